"""One generated answer, measured: the numbers of a row, and what each of them means in words."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lib.textmetrics.overlap import longest_loop, repeated_share, rouge_l
from lib.textmetrics.streams import Stream
from lib.textmetrics.terms import TermList
from lib.textmetrics.thinking import Block, read_block

SHARE, MEAN, RATIO = "share", "mean", "ratio"


@dataclass(frozen=True)
class Metric:
    """A number that every answer has.

    Attributes:
        key: in the measured row.
        name: on the page, with an arrow where one direction is better.
        kind: SHARE (true or false a row), MEAN (a number a row), RATIO (found and wanted a row).
        meaning: the definition in words.
        most: largest possible value; None = no limit. The smallest is 0.
    """

    key: str
    name: str
    kind: str
    meaning: str
    most: float | None = 1.0


METRICS = (
    Metric(
        "chrf", "chrF ↑", MEAN, "overlap of character 1- to 6-grams with the reference, 0 to 100 (sacrebleu)", 100.0
    ),
    Metric("rouge_l", "ROUGE-L ↑", MEAN, "F1 of the longest common subsequence of characters (Latin: words), 0 to 1"),
    Metric(
        "terms",
        "terms of the reference ↑",
        RATIO,
        "share of the reference's listed terms that it holds, also in longer ones",
    ),
    Metric("question_terms", "terms of the question ↑", RATIO, "share of the question's listed terms that it holds"),
    Metric("think", "think block complete ↑", SHARE, "one block: opened, closed, filled, and an answer behind it"),
    Metric("stopped", "stopped by itself ↑", SHARE, "ended its turn within the limit of tokens"),
    Metric("intact", "characters intact ↑", SHARE, "streamed token by token: UTF-8 to the last byte, no U+FFFD"),
    Metric("empty", "empty ↓", SHARE, "no answer, or nothing but reasoning"),
    Metric("repetition", "repeated 4-grams ↓", MEAN, "share of its character 4-grams that stood in it before"),
    Metric(
        "loop",
        "longest loop, characters ↓",
        MEAN,
        "longest stretch of one unit said three times or more in a row",
        None,
    ),
)


@dataclass(frozen=True)
class Answered:
    """A generated answer as any backend gives it.

    Attributes:
        stream: the text as it arrived, without the end-of-turn token.
        ended: whether it closed its turn; False: cut at the limit.
        opening: what the prompt itself ended with of the answer: the tag that opens the reasoning, or "".
    """

    stream: Stream
    ended: bool
    opening: str = ""


@functools.cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def chrf_signature() -> str:
    """sacrebleu's own description of the metric, with its version."""
    _chrf().corpus_score(["a"], [["a"]])  # the number of references is known only then
    return str(_chrf().get_signature())


def measure(answer: Answered, question: str, reference: str, terms: TermList | None, thinking: bool) -> dict[str, Any]:
    """The row of one answer: a value for every metric's key, None where it does not apply.

    Where the task is to think, chrF, ROUGE-L, terms and `empty` look at what stands behind the reasoning, in the answer
    and in the reference. Ratios are [found, wanted]. Further keys: "problem" and "split" (see `Stream`), "think_parts"
    (opened, closed, filled, answered).

    Args:
        terms: list of the domain; None = not measured.
        thinking: whether answers are to begin with reasoning.
    """
    text = answer.opening + answer.stream.text
    block = read_block(text)
    said, wanted = (block.answer, read_block(reference).answer) if thinking else (text.strip(), reference.strip())
    return {
        "chrf": float(_chrf().sentence_score(said, [wanted]).score),
        "rouge_l": rouge_l(said, wanted),
        **_terms(terms, said, {"terms": wanted, "question_terms": question}),
        "think": block.complete if thinking else None,
        "stopped": answer.ended,
        "intact": answer.stream.intact,
        "empty": not said,
        "repetition": repeated_share(text),
        "loop": longest_loop(text),
        "problem": answer.stream.problem,
        "split": answer.stream.split,
        "think_parts": _parts(block) if thinking else None,
    }


def _terms(terms: TermList | None, said: str, wanted: Mapping[str, str]) -> dict[str, list[int] | None]:
    if terms is None:
        return dict.fromkeys(wanted)
    found, kept = {key: terms.found(text) for key, text in wanted.items()}, terms.held(said)
    return {key: [len(asked & kept), len(asked)] for key, asked in found.items()}


def _parts(block: Block) -> list[bool]:
    return [block.opened, block.closed, block.filled, block.answered]
