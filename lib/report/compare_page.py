"""What page 07 shows of a comparison: by labels (`AccuracyPage`) or by the reference answers (`AnswerPage`).

Both have the same parts, so that a cell of the notebook need not know which of the two it shows: `detectable` (what the
rows can show), `sizes` and `quality` (what size buys), `differences` and `tests` (did it get worse), `by_hand` (one
test from the rows' own scores), `beside` (what the endpoint does not see) and `disagreements` (where the files differ).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.report import charts, written_rows
from lib.report.display import Row, Shown, say, table, tell
from lib.report.retention_page import kept_chart, kept_mark, kept_reading
from lib.report.sentences import sentence
from lib.scoring.metric import ACCURACY
from lib.stages.compare.speed import MEMORIES
from lib.statistics.intervals import Interval, limits_text
from lib.statistics.losses import kept_words
from lib.statistics.power import power_mcnemar, rows_needed
from lib.statistics.verdicts import in_words

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown
    from pandas import DataFrame

    from lib.stages.compare.stage import ComparisonResult

Entry = Mapping[str, Any]
"""A file's entry in comparison.json."""


def page_of(result: ComparisonResult) -> AccuracyPage | AnswerPage:
    """The page of a result."""
    return AccuracyPage(result) if result.metric is ACCURACY else AnswerPage(result)


def _interval(entry: Entry, key: str, factor: float = 1.0) -> Interval | float | None:
    """An estimate of an entry with its limits, multiplied by `factor`; None where it has none."""
    if entry[key] is None:
        return None
    found = Interval.from_json(entry[key], entry[f"{key}_interval"])
    return found.scaled(factor) if isinstance(found, Interval) else factor * found


class _Page:
    """What both kinds of comparison show alike."""

    def __init__(self, result: ComparisonResult) -> None:
        self.result, self.reference = result, result.reference
        self.files, self.others = list(result.files), result.others
        self.n = self.files[0]["n"]
        kept_mark(self.files)

    def answer(self) -> Markdown:
        """The recommendation, as a quotation."""
        return say("> " + self.result.recommendation["text"].replace("\n\n", "\n>\n> "))

    def sizes(self) -> HTML:
        """What size buys."""
        return charts.size_quality(self.files, self.result.frontier)

    def by_hand(self, entry: Entry, pairs: DataFrame) -> Shown:
        """One paired test from the rows' own values.

        Args:
            entry: of the file. pairs: a row a test row, columns: the reference's value and the file's.
        """
        before, after = pairs.columns
        differing = pairs[pairs[before] != pairs[after]]
        first = differing.head(5).assign(difference=differing[after] - differing[before])
        rows = [{"row": name, **values} for name, values in first.to_dict("index").items()]
        caption = sentence(
            "compare.rows_by_hand", n=len(pairs), differing=len(differing), metric=self.result.metric.name
        )
        return table(rows, caption), self._test_by_hand(entry, pairs)

    def divergences(self) -> HTML:
        """KL divergence from the reference and perplexity of each file."""
        rows = [
            {
                "type": e["type"],
                "mean": e["kld_mean"],
                "mean_error": 1.96 * e["kld_uncertainty"],
                "document_interval": limits_text(e["kld_mean_interval"], ".2e"),
                "median": e["kld_median"],
                "p99": e["kld_p99"],
                "largest": e["kld_max"],
                "perplexity": e["ppl"],
                "error": e["ppl_uncertainty"],
                "ratio": e["ppl_ratio"],
            }
            for e in self.files
        ]
        window = self.result.conditions["window_tokens"]
        tokens = self.files[0]["n_tokens"]
        return table(rows, sentence("compare.divergences", reference=self.reference, tokens=tokens, window=window))

    def speeds(self) -> HTML:
        """Load time and token rates with their range, time a row, and memory of each file."""
        where = self.result.conditions
        return table(speeds(self.files), speed_caption(self.files, where["processor"], where["n_threads"]))

    def learned(self) -> Markdown:
        """The conclusions."""
        worse = [e["type"] for e in self.others if e["verdict"] == "worse"]
        leaky = [e["type"] for e in self.others if (e["leak_free"] or {}).get("verdict") == "worse"]
        advice, frontier = self.result.recommendation, self.result.frontier
        return tell("compare.learned", advice=advice, worse=worse, leaky=leaky, frontier=frontier, n=self.n)

    def kept(self) -> Shown:
        """How much of what fine-tuning taught is left in each file."""
        return kept_chart(self.files), kept_reading(self.files, self.result.retention_note)


class AccuracyPage(_Page):
    """How many labels the files get right, and how sure they are of them."""

    @property
    def family(self) -> int:
        """Tests that Holm corrects together: every file's accuracy and margins."""
        return self.result.metric.endpoints * len(self.others)

    def detectable(self) -> Shown:
        """What this many rows can show, from the design alone; then what they could show of the changes seen."""
        margin, family = self.result.margin, self.family
        # rows of their own that the test rows are worth if near copies change together: known before any result is
        independent = max(1, round(self.n / self.others[0]["copies_effect"]))
        share, alpha = max(margin / 100, 0.02), 0.05 / family
        changed = sorted((e["mcnemar_b"] + e["mcnemar_c"]) / self.n for e in self.others)
        words = tell(
            "compare.accuracy_power",
            n=self.n,
            independent=independent,
            margin=margin,
            share=share,
            family=family,
            power=power_mcnemar(independent, share, margin / 100, alpha),
            rows_needed=rows_needed(share, margin / 100, alpha=alpha),
            changed=span(changed, ".1%"),
            mde=span([100 * e["mde"] for e in self.others], ".2f"),
        )
        return charts.power(independent, [0.005, 0.02, 0.05], margin, family), words

    def quality(self) -> HTML:
        """Size, quality and verdict of each file."""
        return table(accuracy_rows(self.files), sentence("compare.accuracies", n=self.n, reference=self.reference))

    def differences(self) -> HTML:
        """Paired difference in accuracy from the reference, in points."""
        found = [_interval(e, "accuracy_difference", 100) for e in self.others]
        axis, caption = f"accuracy minus that of {self.reference}, points", sentence("compare.accuracy_differences")
        return charts.estimates(_points(self.others, found), axis, caption, reference=0.0, band=self.result.margin)

    def tests(self) -> Shown:
        """The paired test of each file's accuracy, macro-F1, and what the leak-free rows alone say."""
        tests = [
            {
                "type": e["type"],
                "lost": e["mcnemar_b"],
                "won": e["mcnemar_c"],
                "p": e["mcnemar_p"],
                "p_holm": e["mcnemar_p_holm"],
                "p_tost": e["equivalence_p"],
                "tost_holm": e["equivalence_p_holm"],
                "mde_points": 100 * e["mde"],
                "verdict": in_words(e),
            }
            for e in self.others
        ]
        beside = [
            {
                "type": e["type"],
                "macro_f1_change": _interval(e, "macro_f1_difference"),
                "leak_free_verdict": in_words(e["leak_free"]) if e["leak_free"] else None,
                "leak_free_label_kld": e["leak_free"]["label_kld"] if e["leak_free"] else None,
            }
            for e in self.others
        ]
        caption = sentence("compare.accuracy_tests", family=self.family, files=len(self.others))
        return table(tests, caption), table(beside, sentence("compare.accuracy_beside"))

    def _test_by_hand(self, entry: Entry, pairs: DataFrame) -> Markdown:
        from scipy.stats import binomtest

        before, after = (pairs[name].astype(bool) for name in pairs.columns)
        counts = {"both": before & after, "lost": before & ~after, "won": ~before & after, "none": ~before & ~after}
        counts = {name: int(rows.sum()) for name, rows in counts.items()}
        discordant = counts["lost"] + counts["won"]
        p = float(binomtest(counts["lost"], discordant, 0.5).pvalue) if discordant else 1.0
        return tell("compare.mcnemar_by_hand", names=list(pairs.columns), counts=counts, p=p, page=entry["mcnemar_p"])

    def beside(self) -> Shown:
        """The more powerful endpoint: margins of the right answers, tested and drawn."""
        rows = [
            {
                "type": e["type"],
                "margin_change": Interval.from_json(e["margin_change_mean"], e["margin_change_interval"]),
                "p": e["margin_p"],
                "p_holm": e["margin_p_holm"],
                "mde_nats": e["margin_mde"],
                "verdict_rests_on": e["endpoint"] or "neither",
            }
            for e in self.others
        ]
        smallest = min(self.others, key=lambda e: e["bytes"])["type"]
        names = dict.fromkeys([self.reference, self.others[0]["type"], smallest])
        margins = {name: self.result.scores(name).margins for name in names}
        axis = "margin, nats (log-odds of the second answer word)"
        histogram = charts.overlay_histogram(margins, axis, sentence("compare.margin_histogram", n=self.n))
        return table(rows, sentence("compare.margins")), histogram

    def disagreements(self) -> Shown:
        """Where labels flip: equal labels of each pair of models by the first one's margin."""
        pairs = self.result.agreement
        return table(agreement(pairs, self.files), sentence("compare.agreement")), agreement_reading(pairs)


class AnswerPage(_Page):
    """How likely the files find the reference answers, and what they write."""

    def detectable(self) -> Shown:
        """What the answers can show at all."""
        seen = [e["mde"] for e in self.others if e["mde"] is not None]
        words = tell(
            "compare.answer_power",
            n=self.n,
            tokens=self.others[0]["answer_tokens"],
            mdes=[100 * min(seen), 100 * max(seen)] if seen else None,
            files=len(self.others),
            margin=self.result.margin,
            floor=self.result.conditions["unigram_ppl"],
        )
        return (words,)

    def quality(self) -> HTML:
        """Size, quality and verdict of each file."""
        tokens = self.files[0]["n_tokens"]
        caption = sentence("compare.answers", n=self.n, reference=self.reference, tokens=tokens)
        return table(answer_rows(self.files), caption)

    def differences(self) -> HTML:
        """Change of the answer perplexity, percent."""
        found = [_change(e) for e in self.others]
        axis, caption = f"answer perplexity against {self.reference}, %", sentence("compare.answer_differences")
        return charts.estimates(_points(self.others, found), axis, caption, reference=0.0, band=self.result.margin)

    def tests(self) -> Shown:
        """The paired test of each file's loss, and what the leak-free rows alone say."""
        rows = [
            {
                "type": e["type"],
                "loss_change": _interval(e, "loss_difference"),
                "p": e["p"],
                "p_holm": e["p_holm"],
                "p_tost": e["equivalence_p"],
                "tost_holm": e["equivalence_p_holm"],
                "mde_nats": e["mde"],
                "verdict": e["verdict"],
                "leak_free_verdict": (e["leak_free"] or {}).get("verdict"),
            }
            for e in self.others
        ]
        return (table(rows, sentence("compare.answer_tests", files=len(self.others), groups=self.files[0]["groups"])),)

    def _test_by_hand(self, entry: Entry, pairs: DataFrame) -> Markdown:
        tokens = self.result.metric.row_values(self.result.scores(entry["type"]))[1]
        before, after = pairs.columns
        mean = float(np.average(pairs[after] - pairs[before], weights=tokens))
        page = entry["loss_difference"]
        return tell("compare.losses_by_hand", names=[before, after], tokens=int(tokens.sum()), mean=mean, page=page)

    def beside(self) -> Shown:
        """What the files write: the checks of their answers, and the differences from the reference's."""
        caption = sentence("compare.written_differences", reference=self.reference)
        metrics = table(written_rows.file_metrics(self.result), written_rows.file_conditions(self.result))
        return metrics, table(written_rows.file_differences(self.result), caption)

    def disagreements(self) -> Shown:
        """Which files write differently from the reference."""
        return (say(written_rows.file_reading(self.result)),)


def _change(entry: Entry) -> Interval:
    """Change of the answer perplexity against the reference's, percent."""
    limits = [None if limit is None else 100 * (limit - 1) for limit in entry["answer_ratio_interval"]]
    return Interval.from_json(100 * (entry["answer_ratio"] - 1), limits)


def _points(files: Sequence[Entry], found: Sequence[Any]) -> list[Row]:
    """Intervals for `charts.estimates`; an open limit is None."""
    points = []
    for entry, interval in zip(files, found, strict=True):
        low, high = interval.to_json()
        points.append({"name": entry["type"], "estimate": interval.estimate, "low": low, "high": high, "n": entry["n"]})
    return points


# Rows of tables: one row a file, keys of columns.yaml.


def _size(entry: Entry) -> Row:
    return {"type": entry["type"], "size_mb": entry["bytes"] / 1e6, "bits": entry["bits_per_weight"]}


def accuracy_rows(files: Iterable[Entry]) -> list[Row]:
    """Size, quality and verdict of each file by labels."""
    return [
        {
            **_size(e),
            "accuracy": e["accuracy"],
            "interval": limits_text(e["accuracy_interval"]),
            "verdict": in_words(e),
            "flips": e["flips"],
            "kld": e["kld_mean"],
            "label_kld": e["label_kld"],
            "kept": kept_words(e),
            "same_top": e["same_top"],
            "ppl": e["ppl"],
            "macro_f1": e["macro_f1"],
        }
        for e in files
    ]


def answer_rows(files: Iterable[Entry]) -> list[Row]:
    """The same by the reference answers."""
    return [
        {
            **_size(e),
            "answer_ppl": e["answer_ppl"],
            "interval": limits_text(e["answer_ppl_interval"]),
            "change_percent": None if e["loss_difference"] is None else 100 * (e["answer_ratio"] - 1),
            "verdict": e["verdict"],
            "kld": e["kld_mean"],
            "kept": kept_words(e),
            "same_top": e["same_top"],
        }
        for e in files
    ]


def speeds(files: Iterable[Entry]) -> list[Row]:
    """Load time and token rates with their range, time a row, and memory of each file."""
    return [
        {
            "type": e["type"],
            "load": e["load_seconds"],
            "load_range": "{:.3g} – {:.3g}".format(*e["load_seconds_range"]),
            "prompt_speed": e["prompt_tokens_per_second"],
            "prompt_range": "{:,.0f} – {:,.0f}".format(*e["prompt_tokens_per_second_range"]),
            "generation_speed": e["generation_tokens_per_second"],
            "generation_range": "{:,.0f} – {:,.0f}".format(*e["generation_tokens_per_second_range"]),
            "ms_a_row": 1000 * e["seconds_per_sample"],
            "peak_memory": e["peak_memory_mib"],
        }
        for e in files
    ]


def speed_caption(files: Sequence[Entry], processor: str, threads: int) -> str:
    """Where, and how often each column of `speeds` was measured."""
    runs = {kind: sorted(e[f"{kind}_runs"] for e in files) for kind in ("load", "prompt", "generation")}
    return sentence("compare.speeds", processor=processor, threads=threads, runs=runs)


def ceilings(limits: Iterable[Mapping[str, Any]]) -> HTML:
    """The most tokens a second that a memory can feed (`lib.stages.compare.speed`)."""
    rows = [
        {
            "type": limit["type"],
            "read_mb": limit["megabytes"],
            **{f"≤ tokens/s, {name.split(',')[0]}": f"{r:,.0f}" for name, r in limit["tokens_per_second"].items()},
        }
        for limit in limits
    ]
    return table(rows, sentence("compare.ceilings", memories=MEMORIES))


def agreement(pairs: Iterable[Mapping[str, Any]], files: Iterable[Entry]) -> list[Row]:
    """Equal labels of each pair of models by the first one's margin (`agreement` of comparison.json)."""
    near = {e["type"]: e["near_ties"] for e in files}
    return [
        {
            "model": pair["second"],
            "against": pair["first"],
            "near_ties": near[pair["second"]],
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
    return f"{part['agree']:,}/{part['n']:,} {limits_text(part['interval'], '.0f', 100)}"


def agreement_reading(pairs: Sequence[Mapping[str, Any]]) -> Markdown:
    """What the first pair says: the backends on one model where there is a merged model, else the first file."""
    pair = pairs[0]
    *bins, whole = pair["bins"]
    flipped = [part["n"] - part["agree"] for part in bins]
    sure = sum(count for count, part in zip(flipped, bins, strict=True) if part["low"] >= 1)
    return tell("compare.agreement_reading", pair=pair, whole=whole, tied=flipped[0], sure=sure)


def span(values: Iterable[float], form: str) -> str:
    """The smallest and the largest number, or the one if both read alike."""
    ordered = sorted(values)
    low, high = (f"{limit:{form}}".replace("%", " %") for limit in (ordered[0], ordered[-1]))
    return low if low == high else f"{low} to {high}"
