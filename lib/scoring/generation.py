"""Answers written token by token, greedily or drawn with a fixed seed, by the same code for all backends."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError
from lib.models.gguf_tokenizer import token_bytes
from lib.prompts.conversations import Encoded
from lib.prompts.tasks import Task, spread
from lib.prompts.templates import ASSISTANT, SYSTEM, USER, end_of_turn_id, read_block, think_tags
from lib.scoring import answer_metrics
from lib.scoring.backend import Backend, Feed, Keep, keeping
from lib.scoring.text_metrics import chrf, chrf_signature, measure, read_stream, summarise
from lib.scoring.word_lists import TermList, read_terms

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lib.settings import Settings


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: from the smallest set of tokens whose probabilities reach `top_p`."""

    temperature: float = 0.7
    top_p: float = 0.8
    seed: int = 42


def _is_written(_: int, value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == Written.__dataclass_fields__.keys()


@dataclass(frozen=True)
class Written:
    """One answer.

    Attributes:
        ids: its tokens, without the one that ended it.
        ended: whether it ended by itself; False: cut at the limit.
        steps: tokens written, the ending one included.
        first_token_seconds: from the call to the first token, reading the prompt included.
        seconds: from the call to the last token.
    """

    ids: list[int]
    ended: bool
    steps: int
    first_token_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first, a second; None where there is only one."""
        later = self.seconds - self.first_token_seconds
        return (self.steps - 1) / later if self.steps > 1 and later > 0 else None


def end_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer: end of turn, end of text."""
    vocabulary = tokenizer.get_vocab()
    found = (end_of_turn_id(tokenizer), tokenizer.eos_token_id, vocabulary.get("<|endoftext|>"))
    return {number for number in found if number is not None}


def write(
    feed: Feed, prompt: Sequence[int], most: int, ends: Collection[int], sampling: Sampling | None = None
) -> Written:
    """Write an answer to a prompt.

    Args:
        feed: of a backend, at the beginning of a text.
        most: tokens at which it is cut.
        ends: ids that end it.
        sampling: None = greedy.

    Raises:
        InputError: logits that are not numbers.
    """
    draw = np.random.default_rng(sampling.seed) if sampling else None
    started = time.perf_counter()
    ids, first, token, given = [], 0.0, -1, list(prompt)
    for step in range(1, most + 1):
        logits = feed(given)
        token = pick(logits, sampling, draw)
        first = first or time.perf_counter() - started
        if token in ends:
            return Written(ids, True, step, first, time.perf_counter() - started)
        ids.append(token)
        given = [token]
    return Written(ids, False, most, first, time.perf_counter() - started)


def pick(logits: np.ndarray, sampling: Sampling | None, draw: np.random.Generator | None) -> int:
    """The next token: the likeliest, or one drawn."""
    if not np.isfinite(logits.max()):
        raise InputError("logits that are not numbers.", "finite logits.", "check the model's weights for NaN.")
    if sampling is None or draw is None:
        return int(logits.argmax())
    scaled = (logits.astype(np.float64) - logits.max()) / sampling.temperature
    chances = np.exp(scaled)
    chances /= chances.sum()
    order = np.argsort(-chances, kind="stable")
    sums = np.cumsum(chances[order])
    kept = int(np.searchsorted(sums, sampling.top_p)) + 1  # the one that reaches top_p belongs to them
    place = np.searchsorted(sums[:kept], draw.random() * sums[min(kept, len(sums)) - 1], side="right")
    return int(order[min(int(place), kept - 1)])


# Prompts of test rows and of people, answered by a model, and the answers as text and as numbers.


@dataclass(frozen=True)
class Asked:
    """A prompt as token ids, with what is known of its answer.

    Attributes:
        ids: the rendered conversation up to where the answer starts.
        question: last turn of the user.
        reference: the answer that somebody gave; "" where there is none.
        opening: the tag that the prompt itself ends with, where a template opens the reasoning; else "".
    """

    ids: list[int]
    question: str
    reference: str
    opening: str


def ask_row(tokenizer: Any, row: dict[str, Any], encoded: Encoded) -> Asked:
    """The last answer of a test row that is not cut off, as a task."""
    answers = [place for place, message in enumerate(row["messages"]) if message["role"] == ASSISTANT]
    last = answers[encoded.answers[-1]]
    texts = [message["content"] for message in row["messages"]]
    return Asked(encoded.prompt_ids, texts[last - 1], texts[last], _opening(tokenizer, encoded.prompt_ids))


def ask_prompt(tokenizer: Any, task: Task, prompt: dict[str, str], system_turn: bool = True) -> Asked:
    """A prompt behind the task's system turn, or alone, where the template may add one of its own."""
    turns = [{"role": SYSTEM, "content": task.system_prompt}] if system_turn else []
    turns.append({"role": USER, "content": prompt["prompt"]})
    ids = tokenizer(task.prompt(tokenizer, {"messages": turns}), add_special_tokens=False)["input_ids"]
    return Asked(ids, prompt["prompt"], prompt["reference"], _opening(tokenizer, ids))


def _opening(tokenizer: Any, ids: Sequence[int]) -> str:
    """The opening tag, where a prompt ends with it."""
    end, tag = tokenizer.decode(list(ids[-12:]), skip_special_tokens=False), think_tags(tokenizer)[0]
    return f"{tag}\n" if end.rstrip().endswith(tag) else ""


@dataclass(frozen=True)
class Questions:
    """What every model is asked, and how its answers are measured.

    Attributes:
        tokenizer, terms, thinking, answer_metric: of the run.
        rows: the test rows that are answered; none with `generated_rows: 0`.
        asked: those rows; prompts: further prompts, rendered; sources: these as their file has them.
        most: tokens at which an answer is cut.
        sampling: of the second answer to a prompt.
    """

    tokenizer: Any
    terms: TermList | None
    thinking: bool
    rows: list[dict[str, Any]]
    asked: list[Asked]
    sources: Sequence[dict[str, str]]
    prompts: list[Asked]
    most: int
    sampling: Sampling
    answer_metric: str = answer_metrics.NONE

    @classmethod
    def of(
        cls,
        settings: Settings,
        tokenizer: Any,
        task: Task,
        rows: Sequence[Mapping[str, Any]],
        sources: Sequence[dict[str, str]] = (),
    ) -> Questions:
        """As the settings want it.

        Raises:
            InputError: no such list of terms, or reference answers that `answer_metric` cannot be taken of.
        """
        chosen = [dict(row) for row in spread(rows, settings.generated_rows)] if settings.generated_rows > 0 else []
        asked = [ask_row(tokenizer, row, task.encode(tokenizer, row)) for row in chosen]
        answer_metrics.refuse_other_form(settings.answer_metric, [one.reference for one in asked])
        return cls(
            tokenizer=tokenizer,
            terms=read_terms(settings.terms),
            thinking=task.thinking,
            rows=chosen,
            asked=asked,
            sources=sources,
            prompts=[ask_prompt(tokenizer, task, source) for source in sources],
            most=settings.max_new_tokens,
            sampling=Sampling(seed=settings.seed),
            answer_metric=settings.answer_metric,
        )

    def told(self, asked: Sequence[Asked], written: Sequence[Written]) -> list[dict[str, Any]]:
        """Answers as text, and measured.

        Returns:
            {"text", "tokens", "ended", "first_token_seconds", "seconds", "tokens_per_second", "measured"} of each;
            "measured" is the row of `lib.scoring.text_metrics.measure`, without what needs a reference where there is
            none.
        """
        told = []
        for one, answer in zip(asked, written, strict=True):
            stream = read_stream(token_bytes(self.tokenizer, answer.ids))
            reasons = self.thinking and (not one.reference or read_block(one.reference).complete)
            rest = (one.question, one.reference, self.terms, reasons, one.opening)
            measured = measure(stream, answer.ended, *rest, self.answer_metric)
            if not one.reference:
                measured |= dict.fromkeys(("chrf", "rouge_l", "terms"))
            keys = ("ended", "first_token_seconds", "seconds", "tokens_per_second")
            said = {"text": (one.opening + stream.text).strip(), "tokens": answer.steps}
            told.append({**said, **{key: getattr(answer, key) for key in keys}, "measured": measured})
        return told

    def conditions(self) -> dict[str, Any]:
        """How the rows are answered and measured, for JSON: "decoding", "chrf", "terms"."""
        return {
            "decoding": {"method": "greedy", "max_new_tokens": self.most, "rows": len(self.rows)},
            "chrf": chrf_signature(),
            "terms": self.terms and {"name": self.terms.name, "terms": len(self.terms)},
        }

    def summarise(self, answers: Mapping[str, Sequence[Mapping[str, Any]]], reference: str) -> list[dict[str, Any]]:
        """`lib.scoring.text_metrics.summarise` of every model's answers to the rows."""
        measured = {name: [answer["measured"] for answer in given] for name, given in answers.items()}
        groups = [row.get("group", place) for place, row in enumerate(self.rows)]
        return summarise(measured, groups, reference) if groups else []


def with_likeness(answers: Mapping[Any, Sequence[Mapping[str, Any]]]) -> dict[Any, list[dict[str, Any]]]:
    """Every model's answers to the same prompts, each with how alike it is to the first model's.

    Returns:
        the answers (with "text") and their "same_text", "same_start" (share of the longer text) and "chrf"; these are
        None of the first model.
    """
    reference, first = next(iter(answers.items()), (None, ()))
    return {
        name: [
            {**one, **_likeness(one["text"], None if name == reference else other["text"])}
            for one, other in zip(own, first, strict=True)
        ]
        for name, own in answers.items()
    }


def _likeness(text: str, first: str | None) -> dict[str, Any]:
    if first is None:
        return dict.fromkeys(("same_text", "same_start", "chrf"))
    if text == first:
        return {"same_text": True, "same_start": 1.0, "chrf": 100.0}
    differ = (place for place, (one, other) in enumerate(zip(text, first, strict=False)) if one != other)
    start = next(differ, min(len(text), len(first))) / max(len(text), len(first))
    return {"same_text": False, "same_start": start, "chrf": chrf(text, first)}


def write_all(
    backend: Backend,
    prompts: Sequence[list[int]],
    most: int,
    ends: Collection[int],
    keep: Keep | None,
    what: str = "answers",
    sampling: Sampling | None = None,
) -> tuple[list[Written], str]:
    """Answers to all prompts, one after another, and what of them an interrupted run had written, in words.

    Args:
        most, ends, sampling: as of `write`.
        keep: a file that gets every answer as it comes; answers that are in it are not written again.
        what: another word for the answers.
    """
    names, answers = [str(place) for place in range(len(prompts))], []
    words, unit = f"{what} of {backend.name}", f"{what} already written"
    question = {"most": most, "ends": sorted(ends), "sampling": sampling and asdict(sampling)}
    peak = backend.peak_memory_mib
    with keeping(keep, words, unit, names, prompts, backend.settings, peak, writing=question) as work:
        for place, ids in enumerate(prompts):
            answer = functools.partial(write, backend.new_text(), ids, most, ends, sampling)
            (made,) = work.take([place], lambda answer=answer: [asdict(answer())], _is_written)
            answers.append(Written(**made))
            work.progress.advance()
    return answers, work.found


_ALIKE, _FEWEST = 0.5, 10
"""Share of answers that are one text from which on they are called alike; and of how many answers at least."""


def sameness_notes(model: str, texts: Sequence[str], references: Sequence[str]) -> list[str]:
    """What every page must say of a model that gives one answer to most questions, though their references differ.

    Args:
        model: in words. texts: what it wrote to each question.
    """
    ((answer, count),) = Counter(texts).most_common(1) or [("", 0)]
    if len(texts) < _FEWEST or count < _ALIKE * len(texts) or 2 * references.count(answer) >= count:
        return []
    shown = answer if len(answer) <= 20 else f"{answer[:20]}…"
    said = f"the {model} model answers {count} of {len(texts)} questions with {shown!r}"
    return [f"{said}: that files of it answer alike proves little"]
