"""Files compared on rows without labels: the loss of the reference answers, paired row by row, and what to ship."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lib.comparison.advice import corrected, next_higher, paragraphs, worse_on
from lib.comparison.judging import REFERENCE_VERDICT, Rows
from lib.scoring.answers import AnswerScores
from lib.statistics.losses import LossComparison, compare_losses

RULE = (
    "Of the GGUF files (which llama.cpp runs on a phone) recommend the smallest whose perplexity of the reference "
    "answers is judged equivalent to the reference's: the whole 95 % interval of its own ratio (Student's, over groups "
    "of alike rows, at least 20 of them) lies within the margin, and the text says whether that survives Holm's "
    "correction over all files. Or better: a t-test over groups, Holm-corrected over all files, and an interval below "
    "one. A file judged worse on the leak-free rows is not recommended. If there is none, say so. Likely answers are "
    "not yet good answers: read some before shipping. No recommendation is made from a reference that is not clearly "
    "better than token frequencies alone."
)


def judge_answers(
    reference: AnswerScores, others: Mapping[str, AnswerScores], rows: Rows, margin_percent: float, seed: int
) -> dict[str, dict[str, Any]]:
    """Quality of every file on all rows and on the leak-free rows.

    Returns:
        for every name, and for "" (the reference itself): n, answer_tokens, answer_loss (nats a token),
        answer_ppl, answer_ppl_interval, answer_ratio (of the perplexities, to the reference), answer_ratio_interval,
        loss_difference, loss_difference_interval, p, p_holm, equivalence_p (two one-sided t-tests within the margin),
        equivalence_p_holm, groups, mde (nats a token), verdict; and "leak_free": the same on
        those rows, or None.
    """
    result = _judge(reference, others, rows.groups, margin_percent, seed)
    free: dict[str, dict[str, Any]] = {}
    if rows.leak_free is not None and rows.leak_free.any():
        mask = rows.leak_free
        kept = {name: scores.subset(mask) for name, scores in others.items()}
        free = _judge(reference.subset(mask), kept, rows.groups[mask], margin_percent, seed)
    return {name: {**entry, "leak_free": free.get(name)} for name, entry in result.items()}


def _judge(
    reference: AnswerScores, others: Mapping[str, AnswerScores], groups: np.ndarray, margin: float, seed: int
) -> dict[str, dict[str, Any]]:
    losses = {name: scores.row_losses for name, scores in others.items()}
    tests = compare_losses(reference.row_losses, losses, reference.tokens, groups, margin)
    result = {"": {**_own(reference, groups, seed), **_itself()}}
    for name, scores in others.items():
        result[name] = {**_own(scores, groups, seed), **_tested(tests[name])}
    return result


def _own(scores: AnswerScores, groups: np.ndarray, seed: int) -> dict[str, Any]:
    own = scores.figures(groups)
    return {
        "n": len(scores.ids),
        "groups": len(np.unique(groups)),
        "answer_tokens": int(scores.tokens.sum()),
        "answer_loss": own["loss"],
        "answer_ppl": own["perplexity"],
        "answer_ppl_interval": own["perplexity_interval"],
    }


def _tested(test: LossComparison) -> dict[str, Any]:
    return {
        "answer_ratio": test.ratio.estimate,
        "answer_ratio_interval": test.ratio.to_json(),
        "loss_difference": test.difference.estimate,
        "loss_difference_interval": test.difference.to_json(),
        "p": test.p,
        "p_holm": test.p_adjusted,
        "equivalence_p": test.equivalence_p,
        "equivalence_p_holm": test.equivalence_p_adjusted,
        "mde": test.mde if math.isfinite(test.mde) else None,
        "verdict": test.verdict,
    }


def _itself() -> dict[str, Any]:
    nothing = ("answer_ratio_interval", "loss_difference", "loss_difference_interval", "p", "p_holm", "mde")
    nothing += ("equivalence_p", "equivalence_p_holm")
    return {"answer_ratio": 1.0, **dict.fromkeys(nothing), "verdict": REFERENCE_VERDICT}


def recommend_answers(
    entries: Sequence[Mapping[str, Any]], margin_percent: float, floor: float | None, compared: int | None = None
) -> dict[str, Any]:
    """The recommendation, with the keys of `lib.comparison.advice.recommend`.

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
        good, text = [], _unlearned(reference, floor)
    elif good:
        text = " ".join([_chosen(good[0], reference), *corrected(good[0], compared or len(files))])
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
        "rule": RULE,
        "type": good[0]["type"] if good else None,
        "reason": good[0]["verdict"].split()[0] if good else "reference" if unlearned else "insufficient",
        "rows_needed": None,
        "next_higher": steps,
        "text": paragraphs([text], worse),
    }


def _unlearned(reference: Mapping[str, Any], floor: float) -> str:
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


def _chosen(entry: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
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
