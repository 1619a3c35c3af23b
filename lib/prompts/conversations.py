"""From a conversation to token ids, and which of them the loss counts: answers, each with its end of turn.

An answer is learned where the template writes it behind the prompt by which it asks for one, and with thinking only
with its reasoning, so that no prompt is answered both ways. Qwen3 writes earlier answers without their reasoning.

The whole conversation is rendered once by the tokenizer's own chat template and tokenized once. Where the answers stand
is found by rendering it a second time with marks in place of the texts, so that no template has to be known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.prompts.classification import escape
from lib.prompts.templates import (
    ASSISTANT,
    SYSTEM,
    USER,
    Layout,
    Message,
    apply,
    end_of_turn,
    layout_of,
    refusal,
    split_thinking,
    unfit,
    with_thinking,
)
from lib.runs.files import sha256_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ConversationTask:
    """What the model is taught where there are no labels: to answer, in one turn or in several.

    Attributes:
        kind: "instruction" or "dialogue".
        system_prompt: system turn of rows that bring none.
        max_seq_length: most tokens of a row.
        thinking: whether answers begin with their reasoning.
    """

    kind: str
    system_prompt: str
    max_seq_length: int
    thinking: bool = False

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        value = asdict(self)
        return {"task": value.pop("kind"), **value}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ConversationTask:
        """The reverse of `to_json`."""
        return cls(kind=value["task"], **{key: part for key, part in value.items() if key != "task"})


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids of one conversation.

    Attributes:
        ids: of the whole rendered text.
        spans: (first, behind the last) position of every learned answer, its end-of-turn token included.
        turns_cut: turns left out at the end to respect `max_seq_length`.
        answers: which of the row's answers each span is, counted from 0.
        unlearned: answers that are only read, because the template writes them otherwise than it asks for them.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    turns_cut: int
    answers: tuple[int, ...]
    unlearned: int

    @property
    def loss(self) -> list[int]:
        """Positions that the loss counts: all of the spans."""
        return [position for start, stop in self.spans for position in range(start, stop)]

    @property
    def prompt_ids(self) -> list[int]:
        """Everything up to the point where the last answer starts."""
        return self.ids[: self.spans[-1][0]]


class ExchangeTooLongError(InputError):
    """Not even the first question and answer fit into `max_seq_length`."""


def safe_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[Message]:
    """The turns with special tokens made harmless: no text can close its turn or pass for the answer of a tool."""
    return [
        {"role": m["role"], "content": escape(tokenizer, m["content"]).replace("<tool_response>", "< tool_response>")}
        for m in messages
    ]


def question(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], thinking: bool) -> str:
    """The rendered conversation up to its last user turn, ending as the template asks for an answer."""
    last = max(i for i, message in enumerate(messages) if message["role"] == USER)
    return apply(tokenizer, safe_messages(tokenizer, messages[: last + 1]), thinking, True)


def render_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], thinking: bool
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as the chat template writes it, and the characters of every answer with its end of turn.

    A template that leaves the last turn open (Qwen1.5) gets its end of turn added. Reasoning belongs to the answer
    where the template shows it (Qwen3 shows that of the last answer only); tags and empty blocks that the template
    itself writes in front of an answer do not.

    Args:
        messages: an optional system turn, then user and assistant in turn, ending on the assistant.

    Raises:
        InputError: a template that changes the turns' texts or does not end an answer by the end-of-turn token.
    """
    return _render(tokenizer, messages, thinking)[:2]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], thinking: bool
) -> tuple[str, list[tuple[int, int]], list[bool]]:
    """As `render_conversation`, and which of the answers are learned."""
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
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], max_seq_length: int, thinking: bool
) -> EncodedConversation:
    """Token ids of a conversation; what exceeds `max_seq_length` is cut at its end, in whole turns.

    With `thinking` the cut is behind an answer that has its reasoning.

    Args:
        messages: as for `render_conversation`; with `thinking` the last answer has its reasoning.

    Raises:
        ExchangeTooLongError: not even the first answer (with `thinking`: the first with its reasoning) fits.
        InputError: an unfit template.
    """
    kept = list(messages)
    while True:
        encoded, stops = _encode(tokenizer, kept, thinking, len(messages) - len(kept))
        if len(encoded.ids) <= max_seq_length:
            return encoded
        answers = [i for i, message in enumerate(kept) if message["role"] == ASSISTANT]
        fitting = [i for i, stop in zip(answers, stops, strict=True) if stop < max_seq_length and i < answers[-1]]
        shorter = [i for i in fitting if not thinking or split_thinking(kept[i]["content"])[0]]
        if not shorter:
            raise ExchangeTooLongError(
                f"max_seq_length {max_seq_length}; "
                + ("the first answer with its reasoning" if thinking else "the first question and answer")
                + " takes more tokens.",
                "room for one exchange.",
                "raise max_seq_length.",
            )
        kept = kept[: shorter[-1] + 1]


def _encode(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], thinking: bool, cut: int
) -> tuple[EncodedConversation, list[int]]:
    """The conversation as token ids, and behind which token each of all its answers ends."""
    text, spans, learned = _render(tokenizer, messages, thinking)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    if not any(learned):
        raise refusal(tokenizer, thinking)
    found, at = [], 0
    for start, stop in spans:
        while offsets[at][1] <= start:
            at += 1
        first = at
        while at < len(offsets) and offsets[at][0] < stop:
            at += 1
        found.append((first, at))
    answers = tuple(number for number, learns in enumerate(learned) if learns)
    encoded = EncodedConversation(ids, [found[number] for number in answers], cut, answers, len(spans) - len(answers))
    return encoded, [stop for _, stop in found]


def conversation_hash(tokenizer: PreTrainedTokenizerBase, task: ConversationTask) -> str:
    """SHA-256 of a rendered and tokenized fixed conversation: equal hash, equal rendering."""
    turns = [
        ("系统", SYSTEM),
        ("测试 test 123 😀", USER),
        ("好的。", ASSISTANT),
        ("还有？", USER),
        ("没有了。", ASSISTANT),
    ]
    messages = [{"role": role, "content": text} for text, role in turns]
    if task.thinking:
        messages[-1]["content"] = with_thinking(tokenizer, "想一想", "没有了。")
    encoded, _ = _encode(tokenizer, messages, task.thinking, 0)
    return sha256_json({"ids": encoded.ids, "spans": encoded.spans, "system": task.system_prompt})
