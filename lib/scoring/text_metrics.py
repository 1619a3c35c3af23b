"""What a generated text is worth, from the text alone: no model, no tokenizer; the same for every backend."""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lib.prompts.templates import read_block
from lib.runs.files import data_file
from lib.scoring import answer_metrics
from lib.scoring.word_lists import TermList, fold
from lib.statistics.paired import clustered_mean, clustered_score_interval, clustered_share

# How much of a reference text a text shares: ROUGE-L over characters, and what it repeats of itself.

LONGEST_UNIT = 64
"""Longest unit, in characters, whose immediate repetition is looked for."""

_WORD = re.compile(r"[a-z0-9]+|[^\W_]")
_SPACE = re.compile(r"\s+")


def units(text: str) -> list[str]:
    """What ROUGE-L counts: runs of Latin letters and digits as words, every other letter or digit alone.

    After NFKC and without case; white space, punctuation and symbols are left out.
    """
    return _WORD.findall(fold(text))


def common_length(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence, by bits (Hyyrö 2004): one big number a row of the usual table."""
    where: dict[str, int] = {}
    for i, unit in enumerate(one):
        where[unit] = where.get(unit, 0) | 1 << i
    full = (1 << len(one)) - 1
    row = full
    for unit in other:
        match = row & where.get(unit, 0)
        row = (row + match | row - match) & full
    return len(one) - row.bit_count()


def rouge_l(text: str, reference: str) -> float:
    """F1 of ROUGE-L (Lin 2004, β = 1) over `units`; 0 where nothing is shared."""
    made, wanted = units(text), units(reference)
    common = common_length(made, wanted)
    return 2 * common / (len(made) + len(wanted)) if common else 0.0


def repeated_share(text: str) -> float:
    """Share of a text's character 4-grams that occurred before in it, white space left out; 0 for shorter texts."""
    characters = _SPACE.sub("", text)
    grams = [characters[i : i + 4] for i in range(len(characters) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def longest_loop(text: str) -> int:
    """Characters of the longest stretch in which a unit of 1 to 64 characters follows itself at least twice (xyxyxy).

    White space is left out; 0 where there is none.
    """
    codes = np.frombuffer(_SPACE.sub("", text).encode("utf-32-le", "surrogatepass"), np.uint32)
    longest = 0
    for period in range(1, min(LONGEST_UNIT, len(codes) // 3) + 1):
        same = np.concatenate([[False], codes[period:] == codes[:-period], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1])
        runs = edges[1::2] - edges[::2]
        if runs.size and runs.max() >= 2 * period:
            longest = max(longest, int(runs.max()) + period)
    return longest


# Character integrity: what a display gets that shows an answer while it is written, token by token.

REPLACEMENT = "\ufffd"
BROKEN, UNFINISHED, WRITTEN = "bytes that are not UTF-8", "ends inside a character", "U+FFFD written"


@dataclass(frozen=True)
class Stream:
    """An answer as it arrived.

    Attributes:
        text: all of it; broken bytes as U+FFFD.
        problem: "" when every byte became a character and none is U+FFFD; else the first of BROKEN, UNFINISHED and
            WRITTEN that holds.
        split: pieces that end inside a character. They harm nobody who decodes incrementally; a display that decodes
            each piece alone shows U+FFFD for them.
    """

    text: str
    problem: str
    split: int


def read_stream(pieces: Iterable[bytes]) -> Stream:
    """Read an answer as a display does: an incremental UTF-8 decoder, piece by piece, flushed at the end.

    Args:
        pieces: the bytes of each token, in order, the end-of-turn token left out.
    """
    decoder, given, text, split = codecs.getincrementaldecoder("utf-8")("replace"), list(pieces), "", 0
    for piece in given:
        text += decoder.decode(piece)
        split += bool(decoder.getstate()[0])
    begun = decoder.getstate()[0]
    problem = UNFINISHED if begun else WRITTEN if REPLACEMENT in text else ""
    if text.encode("utf-8") + begun != b"".join(given):  # what was replaced does not come back
        problem = BROKEN
    return Stream(text + decoder.decode(b"", final=True), problem, split)


# One generated answer, measured: the numbers of a row, and what each of them means in words.

SHARE, MEAN, RATIO, F1 = "share", "mean", "ratio", "f1"


@dataclass(frozen=True)
class Metric:
    """A number that every answer has.

    Attributes:
        key: in the measured row.
        name: on the page, with an arrow where one direction is better.
        kind: SHARE (true or false a row), MEAN (a number a row), RATIO (found and wanted a row), F1
            (twice the right ones, and all that are written or wanted, a row).
        meaning: the definition in words.
        most: largest possible value; None = no limit. The smallest is 0.
    """

    key: str
    name: str
    kind: str
    meaning: str
    most: float | None = 1.0


METRICS = tuple(Metric(**row) for row in data_file("scoring/text_metrics.yaml"))


@functools.cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def chrf(text: str, reference: str) -> float:
    """chrF of a text, 0 to 100 (Popović 2015, by sacrebleu)."""
    return float(_chrf().sentence_score(text, [reference]).score)


def chrf_signature() -> str:
    """sacrebleu's own description of the metric, with its version."""
    _chrf().corpus_score(["a"], [["a"]])  # the number of references is known only then
    return str(_chrf().get_signature())


def measure(
    stream: Stream,
    ended: bool,
    question: str,
    reference: str,
    terms: TermList | None,
    thinking: bool,
    opening: str = "",
    answer_metric: str = answer_metrics.NONE,
) -> dict[str, Any]:
    """The row of one answer: a value for every metric's key, None where it does not apply.

    Where the task is to think, chrF, ROUGE-L, terms and `empty` look at what stands behind the reasoning, in the answer
    and in the reference. Ratios are [found, wanted]. Further keys: "problem" and "split" (see `Stream`), "think_parts"
    (opened, closed, filled, answered).

    Args:
        stream: the text as it arrived, without the end-of-turn token.
        ended: whether the answer closed its turn; False: cut at the limit.
        terms: list of the domain; None = not measured.
        thinking: whether answers are to begin with reasoning.
        opening: what the prompt itself ended with of the answer: the tag that opens the reasoning, or "".
        answer_metric: the setting (`lib.scoring.answer_metrics`).
    """
    text = opening + stream.text
    block = read_block(text)
    said, wanted = (block.answer, read_block(reference).answer) if thinking else (text.strip(), reference.strip())
    return {
        **answer_metrics.measured(answer_metric, said, wanted),
        "chrf": chrf(said, wanted),
        "rouge_l": rouge_l(said, wanted),
        **_terms(terms, said, {"terms": wanted, "question_terms": question}),
        "think": block.complete if thinking else None,
        "stopped": ended,
        "intact": not stream.problem,
        "empty": not said,
        "repetition": repeated_share(text),
        "loop": longest_loop(text),
        "problem": stream.problem,
        "split": stream.split,
        "think_parts": block.parts if thinking else None,
    }


def _terms(terms: TermList | None, said: str, wanted: Mapping[str, str]) -> dict[str, list[int] | None]:
    if terms is None:
        return dict.fromkeys(wanted)
    found, kept = {key: terms.found(text) for key, text in wanted.items()}, terms.held(said)
    return {key: [len(asked & kept), len(asked)] for key, asked in found.items()}


# Measured answers of several models to the same questions: estimates with intervals, and paired differences.

FEWEST = 3
"""Groups of rows below which an interval would be a pretence."""

Measured = Sequence[Mapping[str, Any]]


def summarise(models: Mapping[str, Measured], groups: Sequence[int], reference: str) -> list[dict[str, Any]]:
    """One entry a metric that applies to these rows.

    Few rows, skewed values and many zeros are the rule here, so no percentile bootstrap, which covers far too rarely
    then (docs/LOG.md). Shares, and ratios as shares of all terms, have Wilson's interval with n divided by the design
    effect of the groups; differences of shares have Tango's, likewise. Means, and differences of means and ratios,
    have Student's with whole groups as units (ratios linearized). With fewer than three groups, or where all rows agree
    in a mean, there is nothing to tell an interval from.

    Args:
        models: name -> measured rows (`measure`), the same questions in the same order.
        groups: group of each row.
        reference: name of the model that differences are taken from.

    Returns:
        {"key", "name", "meaning", "n" (rows), "groups", "wanted" (terms, of ratios; else None), "models": {name:
        {"estimate", "interval"}}, "differences": {name: {"estimate", "interval"}}}; an interval may be None. Of F1 also
        "types": {name: lines of `answer_metrics.by_type`}.
    """
    numbers = np.asarray(groups)
    entries = []
    for metric in METRICS:
        found = {name: _values(metric, rows) for name, rows in models.items()}
        kept = np.isfinite(found[reference][0]) & (sum(weights for _, weights in found.values()) > 0)
        mine = {name: (values[kept], weights[kept]) for name, (values, weights) in found.items()}
        if not all(weights.sum() for _, weights in mine.values()):
            continue
        base, own = mine[reference], numbers[kept]
        entry = {
            "key": metric.key,
            "name": metric.name,
            "meaning": metric.meaning,
            "n": int(kept.sum()),
            "groups": len(np.unique(own)),
            "wanted": int(base[1].sum()) if metric.kind == RATIO else None,
            "models": {name: _own(metric, *value, own) for name, value in mine.items()},
            "differences": {
                name: _difference(metric, value, base, own) for name, value in mine.items() if name != reference
            },
        }
        if metric.kind == F1:
            entry["types"] = {name: answer_metrics.by_type(rows) for name, rows in models.items()}
        entries.append(entry)
    return entries


def _values(metric: Metric, rows: Measured) -> tuple[np.ndarray, np.ndarray]:
    """Value and weight of each row; not a number where the metric does not apply."""
    found = [row.get(metric.key) for row in rows]
    if metric.kind in (RATIO, F1):
        pairs = [value or [0, 0] for value in found]
        weights = np.array([wanted for _, wanted in pairs], dtype=np.float64)
        return np.array([kept / max(1, wanted) for kept, wanted in pairs]), weights
    values = np.array([np.nan if value is None else float(value) for value in found])
    return values, np.ones(len(values))


def _own(metric: Metric, values: np.ndarray, weights: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    if len(np.unique(groups)) < FEWEST or (metric.kind == MEAN and not np.ptp(values)):
        return _shown(float(np.average(values, weights=weights)))
    if metric.kind == MEAN:
        found = clustered_mean(values, groups)
        high = found.high if metric.most is None else min(metric.most, found.high)
        return _shown(found.estimate, [max(0.0, found.low), high])  # within the values that the metric can have
    if metric.kind != SHARE:
        values, groups = _terms_alone(values * weights, groups, weights)
    found = clustered_share(values, groups)
    return _shown(found.estimate, found.to_json())


def _difference(
    metric: Metric, values: tuple[np.ndarray, np.ndarray], base: tuple[np.ndarray, np.ndarray], groups: np.ndarray
) -> dict[str, Any]:
    """Of values and weights; those of a ratio by row are what each row moves it, about the ratio of all rows."""
    estimate = float(np.average(values[0], weights=values[1]) - np.average(base[0], weights=base[1]))
    if len(np.unique(groups)) < FEWEST:
        return _shown(estimate)
    change = values[0] - base[0]
    if metric.kind == MEAN and not np.ptp(change):
        return _shown(float(change[0]))
    if metric.kind in (RATIO, F1):
        moved = [(own - np.average(own, weights=w)) * w / w.mean() for own, w in (values, base)]
        change = moved[0] - moved[1] + estimate
    if metric.kind == SHARE:
        found = clustered_score_interval(change, groups)
    elif metric.kind != MEAN and not np.any((values[0] != base[0]) | (values[1] != base[1])):
        found = clustered_score_interval(np.zeros(len(np.unique(groups))))
    else:
        found = clustered_mean(change, groups)
    return _shown(found.estimate, found.to_json())


def _terms_alone(sums: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One value a term (as many ones as the row's sum says, then zeros), and the group that it belongs to."""
    single = [np.arange(round(total)) < round(kept) for kept, total in zip(sums, weights, strict=True)]
    return np.concatenate(single), np.repeat(groups, np.round(weights).astype(int))


def _shown(estimate: float, interval: Sequence[float | None] | None = None) -> dict[str, Any]:
    return {"estimate": estimate, "interval": interval}
