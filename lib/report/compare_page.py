"""The rows of the tables of notebook 07: one row a file, the columns named with their units.
What page 07 shows of retention: how much of what fine-tuning taught is left in each file's answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from lib.report.charts import estimates
from lib.report.display import Row, mark_names, say
from lib.report.weights_page import MARK
from lib.settings import GRID_SIZABLE
from lib.statistics.losses import KEEPS_LITTLE, keeps_little, kept_words
from lib.statistics.power import power_mcnemar, rows_needed
from lib.statistics.verdicts import in_words

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown


# The rows of the tables of notebook 07: one row a file, the columns named with their units.


def _interval(limits: Sequence[float] | None, form: str = ".3f") -> str | None:
    """Limits as text; None where there is none, or it is not finite."""
    return None if limits is None or None in limits else f"[{limits[0]:{form}},\u00a0{limits[1]:{form}}]"


def quality(files: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Size, quality and verdict of each file (entries of comparison.json)."""
    return [
        {
            "type": e["type"],
            "MB": e["bytes"] / 1e6,
            "bits": e["bits_per_weight"],
            "accuracy ↑": e["accuracy"],
            "95 % interval": _interval(e["accuracy_interval"]),
            "verdict": in_words(e),
            "flips ↓": e["flips"],
            "KL, nats ↓": e["kld_mean"],
            "label KL ↓": e["label_kld"],
            "kept ↑": kept_words(e),
            "same top ↑": e["same_top"],
            "PPL ↓": e["ppl"],
            "macro-F1 ↑": e["macro_f1"],
        }
        for e in files
    ]


def differences(files: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Paired difference in accuracy from the reference, in points, for `charts.estimates`."""
    return [
        {
            "name": e["type"],
            "estimate": 100 * e["accuracy_difference"],
            "low": 100 * e["accuracy_difference_interval"][0],
            "high": 100 * e["accuracy_difference_interval"][1],
            "n": e["n"],
        }
        for e in files
    ]


def tests(files: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The paired test of each file's accuracy against the reference's."""
    return [
        {
            "type": e["type"],
            "lost": e["mcnemar_b"],
            "won": e["mcnemar_c"],
            "p": e["mcnemar_p"],
            "p (Holm)": e["mcnemar_p_holm"],
            "p (TOST)": e["equivalence_p"],
            "TOST (Holm)": e["equivalence_p_holm"],
            "MDE, points": 100 * e["mde"],
            "verdict": in_words(e),
        }
        for e in files
    ]


def tests_beside(files: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Macro-F1 against the reference's, and what the leak-free rows alone say, of each file."""
    return [
        {
            "type": e["type"],
            "Δ macro-F1": e["macro_f1_difference"],
            "95 % interval": _interval(e["macro_f1_difference_interval"], "+.3f"),
            "leak-free verdict": in_words(e["leak_free"]) if e["leak_free"] else None,
            "leak-free label KL": e["leak_free"]["label_kld"] if e["leak_free"] else None,
        }
        for e in files
    ]


def tests_caption(files: Sequence[Mapping[str, Any]]) -> str:
    """Caption of `tests`: which tests, corrected over what."""
    return (
        "Rows lost and won against the reference. p: exact McNemar; Holm corrects the larger of it and, where rows "
        f"have near copies, the sign-flip test of whole groups, over all {_family(files)} tests of this page: "
        f"{len(files)} files and export folders, both endpoints. TOST: two one-sided tests against the "
        "margin; below 0.05 is their 90 % interval, the verdict takes the 95 % one, which is p below 0.025; beside it "
        "Holm over the files alone. MDE: found in 80 % of tests at the first step of the correction for the page. "
        "An equivalent file may differ significantly, which its verdict then says."
    )


def _family(files: Sequence[Mapping[str, Any]]) -> int:
    """Tests that Holm corrects together: every file's accuracy and margins."""
    return 2 * len(files)


def independent_rows(files: Sequence[Mapping[str, Any]]) -> int:
    """Rows of their own that the test rows are worth if near copies change together: known before any result is."""
    return max(1, round(files[0]["n"] / files[0]["copies_effect"]))


def margin_tests(files: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The paired test of each file's margins against the reference's."""
    return [
        {
            "type": e["type"],
            "margin change, nats": e["margin_change_mean"],
            "95 % interval": _interval(e["margin_change_interval"], "+.3f"),
            "p": e["margin_p"],
            "p (Holm)": e["margin_p_holm"],
            "MDE, nats": e["margin_mde"],
            "verdict rests on": e["endpoint"] or "neither",
        }
        for e in files
    ]


def power_reading(files: Sequence[Mapping[str, Any]], margin_points: float) -> str:
    """What this many rows can show, in words, from the design alone: before any result is looked at."""
    n, independent, alpha = files[0]["n"], independent_rows(files), 0.05 / _family(files)
    found = power_mcnemar(independent, max(margin_points / 100, 0.02), margin_points / 100, alpha)
    needed = rows_needed(max(margin_points / 100, 0.02), margin_points / 100, alpha=alpha)
    copies = f" (counted as {independent:,} independent ones, for some are near copies)" if independent < n else ""
    points = f"{margin_points:g} {'point' if margin_points == 1 else 'points'}"
    share = 100 * max(margin_points / 100, 0.02)
    return (
        f"These {n:,} rows{copies} would find a true loss of {points}, with {share:g} % of the rows changed, in "
        f"{100 * found:.0f} of 100 tests after correction for all {_family(files)} tests of this page; 80 of 100 take "
        f"{needed:,} independent rows."
    )


def span(values: Iterable[float], form: str) -> str:
    """The smallest and the largest number, or the one if both read alike."""
    ordered = sorted(values)
    low, high = (f"{limit:{form}}".replace("%", " %") for limit in (ordered[0], ordered[-1]))
    return low if low == high else f"{low} to {high}"


def divergences(files: Iterable[Mapping[str, Any]]) -> list[Row]:
    """KL divergence from the reference and perplexity of each file."""
    return [
        {
            "type": e["type"],
            "mean": e["kld_mean"],
            "± (1.96 SE)": 1.96 * e["kld_uncertainty"],
            "95 % interval (documents)": _interval(e["kld_mean_interval"], ".2e"),
            "median": e["kld_median"],
            "99th percentile": e["kld_p99"],
            "largest": e["kld_max"],
            "perplexity ↓": e["ppl"],
            "±": e["ppl_uncertainty"],
            "ratio to reference": e["ppl_ratio"],
        }
        for e in files
    ]


def speeds(files: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Load time and token rates with their range, time a row, and memory of each file."""
    return [
        {
            "type": e["type"],
            "load, s": e["load_seconds"],
            "load range": "{:.3g} – {:.3g}".format(*e["load_seconds_range"]),
            "prompt, tokens/s": e["prompt_tokens_per_second"],
            "prompt range": "{:,.0f} – {:,.0f}".format(*e["prompt_tokens_per_second_range"]),
            "generation, tokens/s": e["generation_tokens_per_second"],
            "generation range": "{:,.0f} – {:,.0f}".format(*e["generation_tokens_per_second_range"]),
            "ms a row": 1000 * e["seconds_per_sample"],
            "peak memory, MiB": e["peak_memory_mib"],
        }
        for e in files
    ]


def speed_caption(files: Sequence[Mapping[str, Any]], where: str) -> str:
    """How often each column of `speeds` was measured."""
    kinds = {"load": "loads", "prompt": "prompts", "generation": "generations"}
    counts = {words: [e[f"{kind}_runs"] for e in files] for kind, words in kinds.items()}
    runs = ", ".join(
        f"{min(n)} {words}" if min(n) == max(n) else f"{min(n)} to {max(n)} {words}" for words, n in counts.items()
    )
    return (
        f"On {where}. Median and range (slowest and fastest) of {runs} a file, after one of each that is not counted; "
        "the file is in the page cache. Measured once: ms a row (all rows in one pass), peak memory (of the process)."
    )


def ceilings(limits: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The most tokens a second that a memory can feed (`lib.stages.compare.speed`)."""
    return [
        {
            "type": limit["type"],
            "read a token, MB": limit["megabytes"],
            **{f"≤ tokens/s, {name.split(',')[0]}": f"{r:,.0f}" for name, r in limit["tokens_per_second"].items()},
        }
        for limit in limits
    ]


def agreement(pairs: Iterable[Mapping[str, Any]], files: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Equal labels of each pair of models by the first one's margin (`agreement` of comparison.json)."""
    near = {e["type"]: e["near_ties"] for e in files}
    return [
        {
            "model": pair["second"],
            "against": pair["first"],
            "near ties": near[pair["second"]],
            **{_bin_name(part): _share(part) for part in pair["bins"]},
        }
        for pair in pairs
    ]


def _bin_name(part: Mapping[str, Any]) -> str:
    if part["all"]:
        return "all rows"
    if part["high"] is None:
        return f"≥ {part['low']:g}"
    return f"{part['low']:g} – {part['high']:g}" if part["low"] else f"< {part['high']:g}"


def _share(part: Mapping[str, Any]) -> str | None:
    if not part["n"]:
        return None
    low, high = part["interval"]
    return f"{part['agree']:,}/{part['n']:,} [{100 * low:.0f},\u00a0{100 * high:.0f}]"


def agreement_reading(pairs: Sequence[Mapping[str, Any]]) -> str:
    """What the first pair says: the backends on one model where there is a merged model, else the first file."""
    pair = pairs[0]
    *bins, whole = pair["bins"]
    flipped = whole["n"] - whole["agree"]
    tied = bins[0]["n"] - bins[0]["agree"]
    sure = sum(part["n"] - part["agree"] for part in bins if part["low"] >= 1)
    return (
        f"{pair['second']} gives {flipped:,} of {whole['n']:,} rows another label than {pair['first']}: {tied:,} of "
        f"them are near ties of the latter ({pair['near_ties']:,} rows in all), {sure:,} have a margin of 1 nat or "
        "more."
    )


# What page 07 shows of retention: how much of what fine-tuning taught is left in each file's answers.

_PAIRS = 3
"""Pairs of files that are named."""


def kept_mark(files: Sequence[Mapping[str, Any]]) -> None:
    """From now on tables mark the files with a sizable share of weights on the grid of the base's."""
    mark_names([entry["type"] for entry in files if (entry["source_grid"] or 0) >= GRID_SIZABLE], MARK)


def kept_chart(files: Sequence[Mapping[str, Any]]) -> HTML | None:
    """Retention of every file but the reference, the largest first (entries of comparison.json); nothing where it is
    unknown."""
    known = [e for e in files if e["retention"] is not None and e["verdict"] != "reference"]
    if not known:
        return None
    points = []
    for entry in sorted(known, key=lambda e: -e["bytes"]):
        low, high = entry["retention_interval"] or (None, None)
        name = f"{entry['type']}, {entry['bytes'] / 1e6:.1f} MB"
        points.append({"name": name, "estimate": entry["retention"], "low": low, "high": high, "n": entry["n"]})
    caption = (
        "Slope of each file's change from the base on the tuned model's, row by row through the origin, with 95 % "
        f"intervals (near copies together), n = {known[0]['n']:,} test rows; the largest file first. 1 (dashed) is the "
        f"tuned model, 0 the base again; below {KEEPS_LITTLE:g} a file is named in warnings."
    )
    return estimates(points, "kept of what fine-tuning changed in the answers", caption, reference=1.0)


def kept_reading(files: Sequence[Mapping[str, Any]], note: str) -> Markdown:
    """What the rows say, which files keep little, and whether KL divergence on text shows it."""
    known = [e for e in files if e["retention"] is not None and e["verdict"] != "reference"]
    if not known:
        return say(f"What the files keep of the fine-tuning is not known. {note}")
    poor = sorted((e for e in known if keeps_little(e)), key=lambda e: e["retention"])
    if poor:
        listed = "; ".join(f"{e['type']} {kept_words(e)}" for e in poor)
        text = f"**By estimate less than {KEEPS_LITTLE:g} of what fine-tuning changed is left in: {listed}.**"
    else:
        least = min(known, key=lambda e: e["retention"])
        text = (
            f"No file with an interval below 1 is estimated to keep less than {KEEPS_LITTLE:g}; least: {least['type']} "
            f"{kept_words(least)}."
        )
    return say(" ".join(part for part in (text, note, _order(known)) if part))


def _order(known: Sequence[Mapping[str, Any]]) -> str:
    """How KL divergence on text orders the files, beside retention."""
    if len(known) < 3:
        return ""
    from scipy.stats import spearmanr

    values = [[e["kld_mean"] for e in known], [e["retention"] for e in known]]
    if any(len(set(column)) == 1 for column in values):
        return ""
    rank = -float(spearmanr(*values).statistic)
    pairs = [pair for e, other in combinations(known, 2) if (pair := _turned(e, other))]
    pairs.sort(key=lambda pair: pair[0]["retention"] - pair[1]["retention"])
    beside = f"KL divergence on text and retention order the {len(known)} files with a rank correlation of {rank:.2f}"
    if not pairs:
        return f"{beside} (Spearman; 1 = alike); no two files are surely in opposite order."
    named = "; ".join(
        f"{near['type']} is nearer on text ({near['kld_mean']:.2g} against {far['kld_mean']:.2g} nats) but keeps "
        f"{near['retention']:.2f} where {far['type']} keeps {far['retention']:.2f}"
        for near, far in pairs[:_PAIRS]
    )
    count = f"{len(pairs)} {'pair is' if len(pairs) == 1 else 'pairs are'}"
    return f"{beside} (Spearman; 1 = alike); {count} surely in opposite order: {named}. Text does not show this loss."


def _turned(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The file that is surely nearer on text and the other, if it surely keeps less (both pairs of intervals apart)."""
    near, far = sorted((first, second), key=lambda e: e["kld_mean"])
    if near["kld_high"] >= far["kld_low"] or not (near["retention_interval"] and far["retention_interval"]):
        return None
    return (near, far) if near["retention_interval"][1] < far["retention_interval"][0] else None
