"""Which file to ship, by a stated rule, in words that the statistics allow.
Files compared on rows without labels: the loss of the reference answers, paired row by row, and what to ship.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lib.scoring.metric import ACCURACY, REFERENCE_VERDICT
from lib.statistics.verdicts import in_words

# Which file to ship, by a stated rule, in words that the statistics allow.

RULE = (
    "Of the GGUF files (which llama.cpp runs on a phone) recommend the smallest whose accuracy on all test rows is "
    "judged equivalent to the reference's: the whole 95 % interval of its own paired difference lies within the "
    "margin, and the text says whether that survives Holm's correction over all files. Or better: exact McNemar and, "
    "where rows have near copies, the sign-flip test of whole groups, the larger p, Holm-corrected over everything "
    "compared and both endpoints, and an interval above zero. A file judged worse on the leak-free rows is not "
    "recommended, and surer margins alone recommend nothing. If there is no such file, say so and how many rows would "
    "decide it. No recommendation is made from a reference that is not clearly better than naming the commonest "
    "label: equal accuracy would say nothing."
)
SURVIVES = 0.025
"""Level of a corrected p of "not equivalent": the verdict's 95 % interval is two one-sided tests at this level."""


def worse_on(entry: Mapping[str, Any]) -> str | None:
    """The rows on which a file is judged worse: "all", "leak-free", or None."""
    if entry["verdict"] == "worse":
        return "all"
    return "leak-free" if (entry.get("leak_free") or {}).get("verdict") == "worse" else None


def recommend(
    entries: Sequence[Mapping[str, Any]], margin_points: float, compared: int | None = None
) -> dict[str, Any]:
    """The recommendation.

    Args:
        entries: one a GGUF file as in comparison.json, the reference (verdict "reference") among them.
        compared: files and folders that were compared with the reference; None = those of `entries`.

    Returns:
        "rule", "type" (None when the evidence does not suffice), "reason" ("equivalent" | "better" | "insufficient" |
        "reference"), "rows_needed" (None where more rows would not help or are not needed), "next_higher" ({type
        judged worse: next larger one that is not, or the reference}), "text" (a paragraph; behind a blank line another
        on the files judged worse, where there are any).
    """
    reference = next(e for e in entries if e["verdict"] == REFERENCE_VERDICT)
    files = sorted((e for e in entries if e is not reference), key=lambda e: e["bytes"])
    if not files:
        alone = f"No recommendation: no GGUF file was compared with {reference['type']}."
        return _answer(None, "insufficient", None, {}, [alone])
    steps = next_higher(files, reference)
    if not ACCURACY.learned(reference, reference["majority_share"]):
        return _answer(None, "reference", None, steps, _unlearned(reference))
    kept = [e for e in files if not worse_on(e)]
    good = [e for e in kept if e["verdict"].startswith(("equivalent", "better")) and e["endpoint"] == "accuracy"]
    if good:
        chosen = good[0]
        sentences = _chosen(chosen, reference)
        sentences += corrected(chosen, compared or len(files)) + _smaller(chosen, files, margin_points)
        return _answer(chosen["type"], chosen["verdict"].split()[0], None, steps, sentences, _advice(steps, files))
    needed = _needed(files, margin_points)
    sentences = _undecided(files, reference, margin_points, needed)
    return _answer(None, "insufficient", needed, steps, sentences, _advice(steps, files))


def corrected(entry: Mapping[str, Any], compared: int) -> list[str]:
    """Whether an equivalence outlasts that several files were tried and the smallest one taken."""
    if not entry["verdict"].startswith("equivalent") or compared < 2:
        return []
    p = f"Holm-adjusted p = {entry['equivalence_p_holm']:.2g}"
    if entry["equivalence_p_holm"] < SURVIVES:
        return [f"That holds after correction for all {compared} files ({p}, below {SURVIVES})."]
    return [
        f"That does not survive a correction for {compared} files ({p}, not below {SURVIVES}), of which the smallest "
        "is taken: confirm it on rows not used here."
    ]


def _answer(
    type_name: str | None,
    reason: str,
    needed: int | None,
    steps: dict[str, str],
    sentences: Sequence[str],
    advice: Sequence[str] = (),
) -> dict[str, Any]:
    return {
        "rule": RULE,
        "type": type_name,
        "reason": reason,
        "rows_needed": needed,
        "next_higher": steps,
        "text": paragraphs(sentences, advice),
    }


def paragraphs(*parts: Sequence[str]) -> str:
    """Sentences as paragraphs with a blank line between them; an empty part is none."""
    return "\n\n".join(" ".join(part) for part in parts if part)


def next_higher(files: Sequence[Mapping[str, Any]], reference: Mapping[str, Any]) -> dict[str, str]:
    """For each type judged worse (on all or on the leak-free rows) the next larger one that is not, or the reference.

    Args:
        files: by size, the smallest first.
    """
    steps = {}
    for i, entry in enumerate(files):
        if worse_on(entry):
            larger = (e for e in files[i + 1 :] if not worse_on(e) and e["bytes"] > entry["bytes"])
            steps[entry["type"]] = next(larger, reference)["type"]
    return steps


def _needed(files: Sequence[Mapping[str, Any]], margin_points: float) -> int | None:
    """Rows that would decide about the file nearest to the reference; None when all are worse."""
    open_files = [e for e in files if not worse_on(e)]
    if not open_files:
        return None
    nearest = min(open_files, key=lambda e: e["mcnemar_b"] + e["mcnemar_c"])
    return ACCURACY.rows_needed(nearest, margin_points)


def _points(entry: Mapping[str, Any]) -> str:
    low, high = (100 * limit for limit in entry["accuracy_difference_interval"])
    return f"{100 * entry['accuracy_difference']:+.2f} points (95 % interval {low:+.2f} to {high:+.2f})"


def _labels(count: int) -> str:
    return "no label" if count == 0 else "1 label" if count == 1 else f"{count} labels"


def _chosen(entry: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    share = entry["bytes"] / reference["bytes"]
    text = [
        f"Recommended: {entry['type']}, {entry['bytes'] / 1e6:.2f} MB, {100 * share:.0f} % of {reference['type']}.",
        f"It is the smallest file judged {in_words(entry)} on {entry['n']:,} rows: accuracy "
        f"{100 * entry['accuracy']:.2f} % against {100 * reference['accuracy']:.2f} %, a difference of "
        f"{_points(entry)}; {_labels(entry['flips'])} changed; mean KL divergence "
        f"{entry['kld_mean']:.2g} nats a token.",
    ]
    free = entry["leak_free"]
    if free and free["n"] < entry["n"]:
        text.append(f"On the {free['n']:,} leak-free rows: {in_words(free)}, a difference of {_points(free)}.")
    return text


def _undecided(
    files: Sequence[Mapping[str, Any]], reference: Mapping[str, Any], margin_points: float, needed: int | None
) -> list[str]:
    margin = f"{margin_points:g} {'point' if margin_points == 1 else 'points'}"
    open_files = [e for e in files if not worse_on(e)]
    text = [
        f"The evidence does not suffice to recommend a file: none of {len(files)} is judged equivalent to "
        f"{reference['type']} within {margin} on {reference['n']:,} rows and not worse on the leak-free ones."
    ]
    if not open_files:
        return [*text, f"All are judged worse: keep {reference['type']}, or try a larger type."]
    nearest = min(open_files, key=lambda e: e["mcnemar_b"] + e["mcnemar_c"])
    return [
        *text,
        f"{nearest['type']} changed fewest answers between right and wrong "
        f"({nearest['mcnemar_b'] + nearest['mcnemar_c']}): a difference of {_points(nearest)}. "
        + (
            f"If that is the true difference, about {needed:,} rows would show it to be within {margin}."
            if needed
            else f"If that is the true difference, it is not within {margin}, however many rows are tested."
        ),
        f"Until then the file closest to {reference['type']} by KL divergence is "
        f"{min(open_files, key=lambda e: e['kld_mean'])['type']}.",
    ]


def _undecided_accuracy(entry: Mapping[str, Any]) -> bool:
    """Whether the rows leave open if its accuracy is as good."""
    return entry["verdict"].startswith("cannot") or (entry["verdict"] == "better" and entry["endpoint"] != "accuracy")


def _smaller(chosen: Mapping[str, Any], files: Sequence[Mapping[str, Any]], margin_points: float) -> list[str]:
    """What is not known of the files below the chosen one."""
    below = [e for e in files if e["bytes"] < chosen["bytes"] and _undecided_accuracy(e)]
    if not below:
        return []
    needs = {e["type"]: ACCURACY.rows_needed(e, margin_points) for e in below}
    listed = ", ".join(
        f"{name} (about {rows:,} rows)" if rows else f"{name} (none: the difference seen is as large as the margin)"
        for name, rows in needs.items()
    )
    return [f"These rows cannot tell whether a smaller one is as good; showing it would take: {listed}."]


def _advice(steps: Mapping[str, str], files: Sequence[Mapping[str, Any]]) -> list[str]:
    worse = {e["type"]: e for e in files if e["type"] in steps}
    lines = []
    for name, up in steps.items():
        entry, where = worse[name], ""
        if worse_on(entry) == "leak-free":
            entry = entry["leak_free"]
            where = f" on the {entry['n']:,} leak-free rows"
        lines.append(f"{name} is worse{where} ({_why(entry)}): take the next higher type, {up}.")
    return lines


def _why(entry: Mapping[str, Any]) -> str:
    """What a verdict "worse" rests on."""
    if entry["endpoint"] == "accuracy":
        return f"{_points(entry)}, Holm-adjusted p = {entry['mcnemar_p_holm']:.2g}"
    low, high = entry["margin_change_interval"]
    return (
        f"its right answers lost log-odds, {entry['margin_change_mean']:+.3f} nats a row (95 % interval {low:+.3f} to "
        f"{high:+.3f}), Holm-adjusted p = {entry['margin_p_holm']:.2g}; accuracy: {_points(entry)}"
    )


def _unlearned(reference: Mapping[str, Any]) -> list[str]:
    """Why a reference that has not learned the task decides nothing."""
    own, majority = 100 * reference["accuracy"], 100 * reference["majority_share"]
    return [
        f"No recommendation: {reference['type']} itself ({own:.1f} % on {reference['n']:,} rows) is not clearly better "
        f"than always naming the commonest label ({majority:.1f} %), so that equal accuracy would say nothing about a "
        "file. Train the model first; until then only KL divergence from the reference tells the files apart."
    ]


# Files compared on rows without labels: the loss of the reference answers, paired row by row, and what to ship.

ANSWERS_RULE = (
    "Of the GGUF files (which llama.cpp runs on a phone) recommend the smallest whose perplexity of the reference "
    "answers is judged equivalent to the reference's: the whole 95 % interval of its own ratio (Student's, over groups "
    "of alike rows, at least 20 of them) lies within the margin, and the text says whether that survives Holm's "
    "correction over all files. Or better: a t-test over groups, Holm-corrected over all files, and an interval below "
    "one. A file judged worse on the leak-free rows is not recommended. If there is none, say so. Likely answers are "
    "not yet good answers: read some before shipping. No recommendation is made from a reference that is not clearly "
    "better than token frequencies alone."
)


def recommend_answers(
    entries: Sequence[Mapping[str, Any]], margin_percent: float, floor: float | None, compared: int | None = None
) -> dict[str, Any]:
    """The recommendation, with the keys of `lib.stages.compare.advice.recommend`.

    Args:
        entries: one a GGUF file as in comparison.json, the reference (verdict "reference") among them.
        floor: answer perplexity of token frequencies alone; None = not known.
        compared: files and folders that were compared with the reference; None = those of `entries`.
    """
    reference = next(e for e in entries if e["verdict"] == REFERENCE_VERDICT)
    files = sorted((e for e in entries if e is not reference), key=lambda e: e["bytes"])
    good = [e for e in files if e["verdict"].startswith(("equivalent", "better")) and not worse_on(e)]
    steps = next_higher(files, reference)
    limits = reference["answer_ppl_interval"]  # None: too few groups to be clear of anything
    unlearned = floor is not None and (limits is None or limits[1] >= floor)
    if unlearned:
        good, text = [], _unlearned_answers(reference, floor)
    elif good:
        text = " ".join([_chosen_answers(good[0], reference), *corrected(good[0], compared or len(files))])
    else:
        text = (
            f"The evidence does not suffice to recommend a file: none of {len(files)} is judged equivalent to "
            f"{reference['type']} within {margin_percent:g} % of answer perplexity on {reference['n']:,} rows."
        )
        if files:
            near = min(files, key=lambda e: e["kld_mean"])
            text += f" Closest by KL divergence is {near['type']}: {_ratio(near)}."
    leaky = {e["type"] for e in files if worse_on(e) == "leak-free"}
    worse = [
        f"{name} is worse{' on the leak-free rows' if name in leaky else ''}: take the next higher type, {better}."
        for name, better in steps.items()
    ]
    return {
        "rule": ANSWERS_RULE,
        "type": good[0]["type"] if good else None,
        "reason": good[0]["verdict"].split()[0] if good else "reference" if unlearned else "insufficient",
        "rows_needed": None,
        "next_higher": steps,
        "text": paragraphs([text], worse),
    }


def _unlearned_answers(reference: Mapping[str, Any], floor: float) -> str:
    return (
        f"No recommendation: {reference['type']} itself (answer perplexity {reference['answer_ppl']:.1f} on "
        f"{reference['n']:,} rows) is not clearly better than the token frequencies of the training answers alone "
        f"({floor:.1f}), so that equal perplexity would say nothing about a file. Train the model first; until then "
        "only KL divergence from the reference tells the files apart."
    )


def _ratio(entry: Mapping[str, Any]) -> str:
    low, high = (100 * (limit - 1) for limit in entry["answer_ratio_interval"])
    return (
        f"answer perplexity {entry['answer_ppl']:.3f}, {100 * (entry['answer_ratio'] - 1):+.2f} % "
        f"(95 % interval {low:+.2f} to {high:+.2f} %)"
    )


def _chosen_answers(entry: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    share = 100 * entry["bytes"] / reference["bytes"]
    text = (
        f"Recommended: {entry['type']}, {entry['bytes'] / 1e6:.2f} MB, {share:.0f} % of {reference['type']}. It is the "
        f"smallest file judged {entry['verdict']} on {entry['n']:,} rows ({entry['answer_tokens']:,} answer tokens): "
        f"{_ratio(entry)} against {reference['answer_ppl']:.3f}; mean KL divergence {entry['kld_mean']:.2g} nats a "
        "token."
    )
    free = entry["leak_free"]
    if free and free["n"] < entry["n"]:
        text += f" On the {free['n']:,} leak-free rows: {free['verdict']}."
    return text
