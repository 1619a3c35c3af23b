"""What a model is asked: a task turns a row into messages, a prompt and token ids, and says which of them are learned.

There are two tasks. `ConversationTask` takes rows of turns ({"messages"}) whose answers are free text; for
`ClassificationTask` the text of a row ({"text", "label"}) is put into a prompt and the answer is one of a few words. A
stage asks the task and need not know which of the two it is.

A prompt is made here alone, for training, scoring and every backend: rendered by the tokenizer's own chat template with
an explicit system turn, tokenized once, and only token ids are passed on. llama.cpp does not apply NFC as the Hugging
Face tokenizer does, so text must never be tokenized a second time.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import refusal
from lib.prompts.conversations import (
    Encoded,
    ExchangeTooLongError,
    encode_conversation,
    escape,
    render_conversation,
    safe_messages,
)
from lib.prompts.templates import (
    ASSISTANT,
    SYSTEM,
    USER,
    Message,
    always_reasons,
    apply,
    end_of_turn_id,
    in_tags_of,
    split_thinking,
    up_to_last_question,
    with_thinking,
)
from lib.runs.files import read_json, sha256_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lib.settings import Settings

Row = Mapping[str, Any]
"""{"text", "label"} or {"messages"}, with "id" and whatever else belongs to it."""


class Task:
    """What a model is asked; as it stands here, of rows of turns. `ClassificationTask` says what is different there.

    Attributes:
        kind: the value of the setting `task`.
        system_prompt: the system turn (of conversations that bring none of their own).
        user_prompt: wording of a question, with {text} in place of the text.
        label_names: answer words in the labels' order; empty where answers are free text.
        thinking: whether answers may begin with their reasoning (see `reasons`).
        max_seq_length: most tokens of a row.
    """

    def to_json(self) -> dict[str, Any]:
        """The content of task.json."""
        value = asdict(self)
        return {"task": value.pop("kind"), **value}

    def reasons(self, row: Row) -> bool:
        """Whether the last answer of a row is to begin with reasoning.

        With `thinking`, where the known answer does, or none is known: plain rows are asked and learned as the template
        writes an answer without reasoning.
        """
        if not self.thinking:
            return False
        last = row["messages"][-1]
        known = last["role"] == ASSISTANT and last["content"]
        return not known or bool(split_thinking(last["content"])[0])

    def row_of(self, text: str) -> dict[str, Any]:
        """A row that asks `text` and whose answer is not known."""
        turns = ((SYSTEM, self.system_prompt), (USER, text), (ASSISTANT, ""))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    def messages(self, row: Row) -> list[Message]:
        """The turns of a row as they are, system turn first."""
        return list(row["messages"])

    def question(self, tokenizer: PreTrainedTokenizerBase, row: Row) -> list[Message]:
        """The turns up to the last question, with special tokens made harmless."""
        return safe_messages(tokenizer, up_to_last_question(row["messages"]))

    def rendered(self, tokenizer: PreTrainedTokenizerBase, row: Row) -> str:
        """A row as the chat template writes it: a prompt without its label, or a whole conversation."""
        return render_conversation(tokenizer, row["messages"], self.reasons(row))[0]

    def encode(self, tokenizer: PreTrainedTokenizerBase, row: Row) -> Encoded:
        """Token ids of a row, cut to `max_seq_length` (whole turns from the end), and which of them are learned.

        Raises:
            InputError: too few tokens for the shortest possible row, or a chat template that does not fit.
        """
        reasons = self.reasons(row)
        if self.thinking and not reasons and always_reasons(tokenizer):
            found = "an answer without reasoning, and a base model that always reasons."
            raise ExchangeTooLongError(found, "reasoning in every answer.", "add it.")
        return encode_conversation(tokenizer, row["messages"], self.max_seq_length, reasons)

    def probe_ids(self, tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
        """Token ids behind the last of which the model answers: a prompt, or all up to an answer's last token."""
        encoded = self.encode(tokenizer, row)
        return encoded.ids[: encoded.spans[-1][1] - 1]

    def fingerprint(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """SHA-256 of a fixed row, rendered and tokenized: equal hash, equal prompting."""
        last = with_thinking(tokenizer, "想一想" if self.thinking else "", "没有了。")
        texts = ("系统", "测试 test 123 😀", "好的。", "还有？", last)
        roles = (SYSTEM, USER, ASSISTANT, USER, ASSISTANT)
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        encoded = encode_conversation(tokenizer, messages, None, self.thinking)
        return sha256_json({"ids": encoded.ids, "spans": encoded.spans, "system": self.system_prompt})

    def prompt(self, tokenizer: PreTrainedTokenizerBase, row: Row) -> str:
        """The text that asks for the (last) answer of a row, ending where the answer starts."""
        return apply(tokenizer, self.question(tokenizer, row), self.reasons(row), True)

    def answer_words(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Token ids of each answer word as it follows the prompt; none where answers are free text.

        Raises:
            InputError: one answer's ids begin with another's, so their probabilities could not be compared.
        """
        return word_ids(tokenizer, self.label_names)

    def note(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """What must be said of answer words that are not one token each; empty where they are, or there are none."""
        counts = [len(ids) for ids in self.answer_words(tokenizer)]
        if max(counts, default=1) == 1:
            return ""
        words = ", ".join(f"{name} {count}" for name, count in zip(self.label_names, counts, strict=True))
        note = f"tokens of the answer words: {words}; each score is the exact sum of log-probabilities over them"
        return note if len(set(counts)) == 1 else f"{note}, so a longer word has more to lose"


@dataclass(frozen=True)
class ClassificationTask(Task):
    """One of a few words is the answer to a text: two turns, the answer words, and the most tokens of a row."""

    label_names: tuple[str, ...]
    system_prompt: str
    user_prompt: str
    max_seq_length: int

    kind = "classification"
    thinking = False

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "label_names": list(self.label_names)}

    def row_of(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def messages(self, row: Row) -> list[Message]:
        """The label, where the row has one, is the last turn."""
        label = row.get("label")
        answer = [] if label is None else [{"role": ASSISTANT, "content": self.label_names[label]}]
        return [*self._asked(row["text"]), *answer]

    def question(self, tokenizer: PreTrainedTokenizerBase, row: Row) -> list[Message]:
        return self._asked(escape(tokenizer, row["text"]))

    def rendered(self, tokenizer: PreTrainedTokenizerBase, row: Row) -> str:
        return self.prompt(tokenizer, row)

    def encode(self, tokenizer: PreTrainedTokenizerBase, row: Row) -> Encoded:
        """The text is cut from its end where prompt and longest answer exceed the limit."""
        prompt, whole = self._prompt_ids(tokenizer, row["text"])
        if row.get("label") is None:
            return Encoded(prompt, [], whole_length=whole, text_cut=whole > len(prompt))
        answer = [*self.answer_words(tokenizer)[row["label"]], end_of_turn_id(tokenizer)]
        ids = prompt + answer
        spans = [(len(prompt), len(ids))]
        return Encoded(ids, spans, (0,), whole_length=whole + len(answer), text_cut=whole > len(prompt))

    def probe_ids(self, tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
        return self._prompt_ids(tokenizer, row["text"])[0]

    def fingerprint(self, tokenizer: PreTrainedTokenizerBase) -> str:
        rendered = self.prompt(tokenizer, {"text": "测试 test 123 😀"})
        labels = self.answer_words(tokenizer)
        return sha256_json({"text": rendered, "ids": _ids(tokenizer, rendered), "labels": labels})

    def _asked(self, text: str) -> list[Message]:
        return [
            {"role": SYSTEM, "content": self.system_prompt},
            {"role": USER, "content": self.user_prompt.replace("{text}", text)},
        ]

    def _prompt_ids(self, tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], int]:
        """The prompt, cut where it is too long, and how many tokens it would have."""
        room = self.max_seq_length - max(len(ids) for ids in self.answer_words(tokenizer)) - 1
        prompt = _ids(tokenizer, self.prompt(tokenizer, {"text": text}))
        if len(prompt) <= room:
            return prompt, len(prompt)
        frame, whole = len(_ids(tokenizer, self.prompt(tokenizer, {"text": ""}))), len(prompt)
        if frame >= room:
            most, least = self.max_seq_length, frame + self.max_seq_length - room + 16
            raise refusal("prompts/prompt-too-long", most=most, frame=frame, least=least)
        # What is cut is the escaped text: the prompt holds its tokens, and no prefix of it is a special token.
        text = escape(tokenizer, text)
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        keep = room - frame
        while len(prompt) > room:
            keep = max(0, keep)  # nothing of the text fits in any case: frame < room
            cut = text[: offsets[keep][0]] if keep < len(offsets) else text
            prompt = _ids(tokenizer, self.prompt(tokenizer, {"text": cut}))
            keep -= max(1, len(prompt) - room)
        return prompt, whole


@dataclass(frozen=True)
class ConversationTask(Task):
    """To answer in free text, in one turn or in several; `kind` is "instruction" or "dialogue"."""

    kind: str
    system_prompt: str
    max_seq_length: int
    thinking: bool = False

    user_prompt = "{text}"
    label_names = ()


def task_of(settings: Settings) -> Task:
    """The task that the settings describe."""
    system, most = settings.system_prompt, settings.max_seq_length
    if settings.task == "classification":
        return ClassificationTask(tuple(settings.label_names), system, settings.user_prompt, most)
    return ConversationTask(settings.task, system, most, settings.thinking)


def task_from_json(value: Mapping[str, Any]) -> Task:
    """The reverse of `Task.to_json`."""
    if "task" in value:
        return ConversationTask(kind=value["task"], **{key: part for key, part in value.items() if key != "task"})
    return ClassificationTask(**{**value, "label_names": tuple(value["label_names"])})


def read_task(data: Path) -> Task:
    """The task of a data product."""
    return task_from_json(read_json(data / "task.json"))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@functools.lru_cache(maxsize=8)
def word_ids(tokenizer: PreTrainedTokenizerBase, label_names: tuple[str, ...]) -> list[list[int]]:
    """See `Task.answer_words`; do not change the lists."""
    answers = [_ids(tokenizer, name) for name in label_names]
    for (name, first), (other, second) in itertools.permutations(zip(label_names, answers, strict=True), 2):
        if second[: len(first)] == first:
            raise refusal("prompts/labels-begin-alike", name=name, other=other)
    return answers


_CHINESE = re.compile("[\u4e00-\u9fff]")


def texts_of(row: Row) -> list[str]:
    """The texts of a row: the one with a label, or one a turn (the system's, which repeats itself, left out)."""
    if "messages" not in row:
        return [row["text"]]
    return [message["content"] for message in row["messages"] if message["role"] != SYSTEM]


def language_of(rows: Sequence[Row]) -> str | None:
    """ "zh" where at least half of the rows hold a Chinese character; None = not told from the rows."""
    chinese = sum(bool(_CHINESE.search("".join(texts_of(row)))) for row in rows)
    return "zh" if rows and 2 * chinese >= len(rows) else None


def in_model_tags(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row]) -> list[Row]:
    """Rows whose reasoning stands in a model's own tags; texts with labels as they are."""
    return [
        {**row, "messages": in_tags_of(tokenizer, row["messages"], Counter())} if "messages" in row else row
        for row in rows
    ]


def spread(rows: Sequence[Any], count: int) -> list[Any]:
    """About `count` rows, evenly spaced."""
    return list(rows[:: max(1, len(rows) // count)][:count])
