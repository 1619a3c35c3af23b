"""Prompts of test rows and of people, answered by a model, and the answers as text and as numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lib.models.conversations import (
    ASSISTANT,
    SYSTEM,
    USER,
    ConversationTask,
    EncodedConversation,
    question,
)
from lib.models.pieces import token_bytes
from lib.models.reasoning import think_tags
from lib.scoring.generation import Feed, Sampling, Written, write
from lib.scoring.journal import Keep, keeping
from lib.textmetrics import Answered, TermList, measure, read_stream


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


def ask_row(tokenizer: Any, row: dict[str, Any], encoded: EncodedConversation) -> Asked:
    """The last answer of a test row that is not cut off, as a task."""
    answers = [place for place, message in enumerate(row["messages"]) if message["role"] == ASSISTANT]
    last = answers[encoded.answers[-1]]
    texts = [message["content"] for message in row["messages"]]
    return Asked(encoded.prompt_ids, texts[last - 1], texts[last], _opening(tokenizer, encoded.prompt_ids))


def ask_prompt(tokenizer: Any, task: ConversationTask, prompt: dict[str, str]) -> Asked:
    """A prompt behind the task's system turn."""
    turns = [{"role": SYSTEM, "content": task.system_prompt}, {"role": USER, "content": prompt["prompt"]}]
    ids = tokenizer(question(tokenizer, turns, task.thinking), add_special_tokens=False)["input_ids"]
    return Asked(ids, prompt["prompt"], prompt["reference"], _opening(tokenizer, ids))


def _opening(tokenizer: Any, ids: Sequence[int]) -> str:
    """The opening tag, where a prompt ends with it."""
    end, tag = tokenizer.decode(list(ids[-12:]), skip_special_tokens=False), think_tags(tokenizer)[0]
    return f"{tag}\n" if end.rstrip().endswith(tag) else ""


def told(tokenizer: Any, asked: Asked, written: Written, terms: TermList | None, thinking: bool) -> dict[str, Any]:
    """An answer as text, and measured.

    Args:
        terms, thinking: see `lib.textmetrics.measure`.

    Returns:
        {"text", "tokens", "ended", "first_token_seconds", "seconds", "tokens_per_second", "measured"}; "measured" is
        the row of `measure`, without what needs a reference where there is none.
    """
    stream = read_stream(token_bytes(tokenizer, written.ids))
    measured = measure(Answered(stream, written.ended, asked.opening), asked.question, asked.reference, terms, thinking)
    if not asked.reference:
        measured |= dict.fromkeys(("chrf", "rouge_l", "terms"))
    return {
        "text": (asked.opening + stream.text).strip(),
        "tokens": written.steps,
        "ended": written.ended,
        "first_token_seconds": written.first_token_seconds,
        "seconds": written.seconds,
        "tokens_per_second": written.tokens_per_second,
        "measured": measured,
    }


@dataclass(frozen=True)
class Writing:
    """How answers are written.

    Attributes:
        most: tokens at which an answer is cut.
        ends: ids that end it.
        sampling: None = greedy.
        keep: a file that gets every answer as it comes; answers that are in it are not written again.
        settings: of the backend, for `keep`.
    """

    most: int
    ends: Collection[int]
    sampling: Sampling | None = None
    keep: Keep | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What decides the answers beside the model."""
        return {"most": self.most, "ends": sorted(self.ends), "sampling": self.sampling and self.sampling.to_json()}


def write_all(
    start: Callable[[], Feed], asked: Sequence[Asked], how: Writing, what: str, name: str
) -> tuple[list[Written], str]:
    """Answers to all prompts, one after another, and what of them an interrupted try had written, in words.

    Args:
        start: gives the feed of a new text (`torch_feed`, `llama_feed`).
        what: "answers" or another word for them.
        name: who writes, in words.
    """
    prompts, answers = [one.ids for one in asked], []
    names = [str(place) for place in range(len(asked))]
    unit, question = f"{what} already written", how.to_json()
    with keeping(how.keep, f"{what} of {name}", unit, names, prompts, how.settings, writing=question) as work:
        for place, ids in enumerate(prompts):
            answer = functools.partial(write, start(), ids, how.most, how.ends, how.sampling)
            (made,) = work.take(place, [place], lambda answer=answer: [asdict(answer())])
            answers.append(Written(**made))
            work.progress.advance()
    return answers, work.found
