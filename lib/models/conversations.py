"""From a conversation to token ids, and which of them the loss counts: every answer with its end of turn.

The whole conversation is rendered once by the tokenizer's own chat template and tokenized once. Where the answers stand
is found by rendering it a second time with marks in place of the texts, so that no template has to be known here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.models.prompting import end_of_turn_id, escape
from lib.run.files import sha256_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"

_TAG = re.compile(r"<(/?)(think|thinking)>")
_MARK = re.compile("\ue000(\\d+)([ra])\ue001")


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
        spans: (first, behind the last) position of every answer, its end-of-turn token included.
        turns_cut: turns left out at the end to respect `max_seq_length`.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    turns_cut: int = 0

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


@functools.lru_cache(maxsize=8)  # asking a tokenizer of 151,936 tokens for its vocabulary takes 0.1 s
def think_tags(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The tags around reasoning: those that the tokenizer has as single tokens, else <think>, </think> as text."""
    vocabulary = tokenizer.get_vocab()
    found = (name for name in ("think", "thinking") if f"<{name}>" in vocabulary and f"</{name}>" in vocabulary)
    name = next(found, "think")
    return f"<{name}>", f"</{name}>"


def split_thinking(content: str) -> tuple[str, str]:
    """Reasoning (empty where there is none) and answer of an assistant turn, both without outer white space.

    Raises:
        ValueError: tags that do not make one closed, filled block in front of an answer; the message says what is
            wrong.
    """
    tags = list(_TAG.finditer(content))
    if not tags:
        return "", content.strip()
    if len(tags) == 1:
        raise ValueError("thinking not opened" if tags[0][1] else "thinking not closed")
    if len(tags) > 2 or tags[0][1] or not tags[1][1] or tags[0][2] != tags[1][2]:
        raise ValueError("thinking nested, repeated or crossed")
    before, reasoning, answer = (
        content[: tags[0].start()].strip(),
        content[tags[0].end() : tags[1].start()].strip(),
        content[tags[1].end() :].strip(),
    )
    if before:
        raise ValueError("text before the thinking")
    if not reasoning:
        raise ValueError("empty thinking")
    if not answer:
        raise ValueError("no answer after the thinking")
    return reasoning, answer


def with_thinking(tokenizer: PreTrainedTokenizerBase, reasoning: str, answer: str) -> str:
    """An assistant turn in the form of the tokenizer's own tags."""
    opening, closing = think_tags(tokenizer)
    return f"{opening}\n{reasoning}\n{closing}\n\n{answer}" if reasoning else answer


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], thinking: bool, prompt: bool) -> str:
    return tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=prompt, enable_thinking=thinking
    )


def safe_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[Message]:
    """The turns with special tokens made harmless: no text can close its turn or pass for the answer of a tool."""
    return [
        {"role": m["role"], "content": escape(tokenizer, m["content"]).replace("<tool_response>", "< tool_response>")}
        for m in messages
    ]


def question(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], thinking: bool) -> str:
    """The rendered conversation up to its last user turn, ending as the template asks for an answer."""
    last = max(i for i, message in enumerate(messages) if message["role"] == USER)
    return _apply(tokenizer, safe_messages(tokenizer, messages[: last + 1]), thinking, True)


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
    messages = safe_messages(tokenizer, messages)
    parts: list[tuple[str, str]] = []
    marked = []
    for i, message in enumerate(messages):
        reasoning, answer = "", message["content"]
        if message["role"] == ASSISTANT:
            reasoning, answer = split_thinking(answer)
            message["content"] = with_thinking(tokenizer, reasoning, answer)
        parts.append((reasoning, answer))
        mark = f"\ue000{i}a\ue001"
        content = with_thinking(tokenizer, f"\ue000{i}r\ue001" if reasoning else "", mark)
        marked.append({"role": message["role"], "content": content})
    frame = _apply(tokenizer, marked, thinking, False)
    text, spans = _fill(tokenizer, frame, messages, parts, thinking)
    real = _apply(tokenizer, messages, thinking, False)
    if text not in (real, real + _end_of_turn(tokenizer)):
        raise _unfit("changes the texts of the turns")
    return text, spans


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer))


def _unfit(what: str) -> InputError:
    return InputError(
        f"the model's chat template {what}.",
        "a template that writes each turn as it is, closed by the end-of-turn token.",
        "choose another base_model (Qwen1.5, Qwen2.5 and Qwen3 fit).",
    )


def _fill(
    tokenizer: PreTrainedTokenizerBase,
    frame: str,
    messages: Sequence[Message],
    parts: Sequence[tuple[str, str]],
    thinking: bool,
) -> tuple[str, list[tuple[int, int]]]:
    """Put the texts in place of the marks, and note where the answers begin and end."""
    opening, end = think_tags(tokenizer)[0], _end_of_turn(tokenizer)
    marks = list(_MARK.finditer(frame))
    if [int(m[1]) for m in marks if m[2] == "a"] != list(range(len(messages))):
        raise _unfit("leaves turns out, repeats them or changes their order")
    asks = _apply(tokenizer, [{"role": USER, "content": "?"}], thinking, True).rstrip()
    text, spans, done = "", [], 0
    start: int | None = None
    for mark in marks:
        i = int(mark[1])
        text += frame[done : mark.start()]
        done = mark.end()
        if mark[2] == "r":  # the opening tag is part of the answer, unless the template's own prompt ends with it
            start = len(text) if asks.endswith(opening) else text.rindex(opening)
            text += parts[i][0]
            continue
        first, start = len(text) if start is None else start, None
        text += parts[i][1]
        if messages[i]["role"] != ASSISTANT:
            continue
        if i == len(messages) - 1 and not frame[done:].startswith(end):
            frame = frame[:done] + end + frame[done:]
        if not frame[done:].startswith(end):
            raise _unfit("does not close an answer")
        spans.append((first, len(text) + len(end)))
    return text + frame[done:], spans


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], max_seq_length: int, thinking: bool
) -> EncodedConversation:
    """Token ids of a conversation; what exceeds `max_seq_length` is cut at its end, in whole turns.

    Args:
        messages: as for `render_conversation`.

    Raises:
        ExchangeTooLongError: not even the first answer fits.
        InputError: an unfit template, or padding by the end-of-turn token.
    """
    kept = list(messages)
    while True:
        encoded = _encode(tokenizer, kept, thinking, len(messages) - len(kept))
        if len(encoded.ids) <= max_seq_length:
            return encoded
        answers = [i for i, message in enumerate(kept) if message["role"] == ASSISTANT]
        fitting = [i for i, (_, stop) in zip(answers, encoded.spans, strict=True) if stop < max_seq_length]
        shorter = [i for i in fitting if i < answers[-1]]
        if not shorter:
            raise ExchangeTooLongError(
                f"max_seq_length {max_seq_length}; the first question and answer take more tokens.",
                "room for one exchange.",
                "raise max_seq_length.",
            )
        kept = kept[: shorter[-1] + 1]


def _encode(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], thinking: bool, cut: int
) -> EncodedConversation:
    text, spans = render_conversation(tokenizer, messages, thinking)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    if tokenizer.pad_token_id == end_of_turn_id(tokenizer):
        raise InputError(
            "a tokenizer that pads with its end-of-turn token.", "two different tokens.", "correct pad_token."
        )
    found, at = [], 0
    for start, stop in spans:
        while offsets[at][1] <= start:
            at += 1
        first = at
        while at < len(offsets) and offsets[at][0] < stop:
            at += 1
        found.append((first, at))
    return EncodedConversation(ids, found, cut)


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
    encoded = _encode(tokenizer, messages, task.thinking, 0)
    return sha256_json({"ids": encoded.ids, "spans": encoded.spans, "system": task.system_prompt})
