"""From a conversation to token ids, and which of them the loss counts: answers, each with its end of turn.

An answer is learned where the template writes it behind the prompt by which it asks for one, and with thinking only
with its reasoning, so that no prompt is answered both ways. Qwen3 writes earlier answers without their reasoning.

The whole conversation is rendered once by the tokenizer's own chat template and tokenized once. Where the answers stand
is found by rendering it a second time with marks in place of the texts, so that no template has to be known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lib.errors import InputError, refusal
from lib.prompts.templates import (
    ASSISTANT,
    Layout,
    Message,
    apply,
    end_of_turn,
    layout_of,
    split_thinking,
    unfit,
    unlearnable,
    with_thinking,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """Token ids of one row.

    Attributes:
        ids: of the whole row, or of its prompt where it has no answer.
        spans: (first, behind the last) position of every learned answer, its end-of-turn token included.
        answers: which of the row's answers each span is, counted from 0.
        unlearned: answers that are only read: the template writes them otherwise than it asks for them, or the data
            marks them as not to be learned (`learn` of the turn is false).
        turns_cut: turns left out at the end to respect `max_seq_length`.
        text_cut: whether the end of a single text was cut for the same reason.
        whole_length: tokens of the row before anything was cut.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    answers: tuple[int, ...] = ()
    unlearned: int = 0
    turns_cut: int = 0
    text_cut: bool = False
    whole_length: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def loss(self) -> list[int]:
        """Positions that the loss counts: all of the spans."""
        return [position for start, stop in self.spans for position in range(start, stop)]

    @property
    def loss_ids(self) -> list[int]:
        """Token ids at those positions."""
        return [self.ids[position] for position in self.loss]

    @property
    def prompt_ids(self) -> list[int]:
        """Everything up to the point where the last answer starts."""
        return self.ids[: self.spans[-1][0]] if self.spans else self.ids

    @property
    def truncated(self) -> bool:
        """Whether anything was cut to respect `max_seq_length`."""
        return self.text_cut or self.turns_cut > 0


class ExchangeTooLongError(InputError):
    """Not even the first question and answer fit into `max_seq_length`."""


def escape(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text with a space inside every special token: a review must not be able to close its own turn."""
    for token in tokenizer.all_special_tokens:
        if token in text:
            text = text.replace(token, token[:1] + " " + token[1:])
    return text


def safe_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[Message]:
    """The turns with special tokens made harmless: no text can close its turn or pass for the answer of a tool."""
    return [
        {"role": m["role"], "content": escape(tokenizer, m["content"]).replace("<tool_response>", "< tool_response>")}
        for m in messages
    ]


def render_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], thinking: bool
) -> tuple[str, list[tuple[int, int]], list[bool]]:
    """The conversation as the chat template writes it, the characters of every answer with its end of turn, and
    whether each of the answers is learned.

    A template that leaves the last turn open (Qwen1.5) gets its end of turn added. Reasoning belongs to the answer
    where the template shows it (Qwen3 shows that of the last answer only); tags and empty blocks that the template
    itself writes in front of an answer do not.

    Args:
        messages: an optional system turn, then user and assistant in turn, ending on the assistant.

    Raises:
        InputError: a template that changes the turns' texts or does not end an answer by the end-of-turn token.
    """
    messages = safe_messages(tokenizer, messages)
    parts: list[tuple[str, str]] = []
    for message in messages:
        reasoning, answer = "", message["content"]
        if message["role"] == ASSISTANT:
            reasoning, answer = split_thinking(answer)
            message["content"] = with_thinking(tokenizer, reasoning, answer)
        parts.append((reasoning, answer))
    kinds = tuple((message["role"], bool(reasoning)) for message, (reasoning, _) in zip(messages, parts, strict=True))
    layout = layout_of(tokenizer, tokenizer.chat_template, kinds, thinking)
    text, spans = _fill(layout, parts, end_of_turn(tokenizer))
    real = apply(tokenizer, messages, thinking, False)
    if text not in (real, real + end_of_turn(tokenizer)):
        raise unfit("changes the texts of the turns")
    return text, spans, [turn in layout.learned for turn in sorted(layout.starts)]


def _fill(layout: Layout, parts: Sequence[tuple[str, str]], end: str) -> tuple[str, list[tuple[int, int]]]:
    """Put the texts in place of the marks, and note where the answers begin and end."""
    text, spans, done = "", [], 0
    begins: dict[int, int] = {}
    for turn, kind, start, stop in layout.marks:
        text += layout.frame[done:start]
        done = stop
        if turn in layout.starts and turn not in begins:
            begins[turn] = len(text) + layout.starts[turn] - start
        text += parts[turn]["ra".index(kind)]
        if kind == "a" and turn in begins:
            spans.append((begins[turn], len(text) + len(end)))
    return text + layout.frame[done:], spans


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], max_seq_length: int | None, thinking: bool
) -> Encoded:
    """Token ids of a conversation; what exceeds `max_seq_length` is cut at its end, in whole turns.

    With `thinking` the cut is behind an answer that has its reasoning.

    Args:
        messages: as for `render_conversation`; with `thinking` the last answer has its reasoning.
        max_seq_length: None = no limit.

    Raises:
        ExchangeTooLongError: not even the first answer (with `thinking`: the first with its reasoning) fits.
        InputError: an unfit template.
    """
    kept, whole = list(messages), 0
    while True:
        encoded, stops = _encode(tokenizer, kept, thinking)
        whole = whole or len(encoded.ids)
        if max_seq_length is None or len(encoded.ids) <= max_seq_length:
            return replace(encoded, turns_cut=len(messages) - len(kept), whole_length=whole)
        answers = [i for i, message in enumerate(kept) if message["role"] == ASSISTANT]
        fitting = [i for i, stop in zip(answers, stops, strict=True) if stop < max_seq_length and i < answers[-1]]
        shorter = [i for i in fitting if not thinking or split_thinking(kept[i]["content"])[0]]
        if not shorter:
            first = "the first answer with its reasoning" if thinking else "the first question and answer"
            raise refusal("prompts/exchange-too-long", ExchangeTooLongError, max_seq_length=max_seq_length, first=first)
        kept = kept[: shorter[-1] + 1]


def _encode(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], thinking: bool
) -> tuple[Encoded, list[int]]:
    """The whole conversation as token ids, and behind which token each of all its answers ends."""
    text, spans, learned = render_conversation(tokenizer, messages, thinking)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    if not any(learned):
        raise unlearnable(tokenizer, thinking)
    wanted = [message.get("learn", True) for message in messages if message["role"] == ASSISTANT]
    learned = [learns and wants for learns, wants in zip(learned, wanted, strict=True)]
    if not any(learned):
        raise refusal("prompts/nothing-to-learn", ExchangeTooLongError)
    found, at = [], 0
    for start, stop in spans:
        while offsets[at][1] <= start:
            at += 1
        first = at
        while at < len(offsets) and offsets[at][0] < stop:
            at += 1
        found.append((first, at))
    answers = tuple(number for number, learns in enumerate(learned) if learns)
    encoded = Encoded(ids, [found[number] for number in answers], answers, len(spans) - len(answers))
    return encoded, [stop for _, stop in found]
