"""One face for both kinds of tasks, so that a stage need not know whether its rows have labels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.prompts.classification import Task, encode
from lib.prompts.conversations import ConversationTask, EncodedConversation, encode_conversation
from lib.prompts.templates import SYSTEM
from lib.runs.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


AnyTask = Task | ConversationTask
Row = Mapping[str, Any]
_CHINESE = re.compile("[\u4e00-\u9fff]")


def read_task(data: Path) -> AnyTask:
    """The task of a data product."""
    value = read_json(data / "task.json")
    return ConversationTask.from_json(value) if "task" in value else Task.from_json(value)


def has_labels(task: AnyTask) -> bool:
    """True for classification."""
    return isinstance(task, Task)


def kind_of(task: AnyTask) -> str:
    """The value of the setting `task`."""
    return task.kind if isinstance(task, ConversationTask) else "classification"


def encode_row(tokenizer: PreTrainedTokenizerBase, task: ConversationTask, row: Row) -> EncodedConversation:
    """A row {"messages"} with everything the task says."""
    return encode_conversation(tokenizer, row["messages"], task.max_seq_length, task.thinking)


def texts_of(row: Row) -> list[str]:
    """The texts of a row: the one with a label, or one a turn (the system's, which repeats itself, left out)."""
    if "messages" not in row:
        return [row["text"]]
    return [message["content"] for message in row["messages"] if message["role"] != SYSTEM]


def language_of(rows: Sequence[Row]) -> str | None:
    """ "zh" where at least half of the rows hold a Chinese character; None = not told from the rows."""
    chinese = sum(bool(_CHINESE.search("".join(texts_of(row)))) for row in rows)
    return "zh" if rows and 2 * chinese >= len(rows) else None


def probe_ids(tokenizer: PreTrainedTokenizerBase, task: AnyTask, row: Row) -> list[int]:
    """Token ids whose last positions are where the model answers: the prompt, or all up to an answer's last token."""
    if isinstance(task, Task):
        return encode(tokenizer, task, row["text"]).prompt_ids
    encoded = encode_row(tokenizer, task, row)
    return encoded.ids[: encoded.spans[-1][1] - 1]


def whole_ids(tokenizer: PreTrainedTokenizerBase, task: AnyTask, row: Row) -> list[int]:
    """Token ids of a row with its answer, as training sees it."""
    if isinstance(task, Task):
        encoded = encode(tokenizer, task, row["text"], row["label"])
        return encoded.prompt_ids + encoded.answer_ids
    return encode_row(tokenizer, task, row).ids


def learned(tokenizer: PreTrainedTokenizerBase, task: AnyTask, row: Row) -> tuple[list[int], list[int]]:
    """Token ids of a row with its answer, and the positions that the loss of training counts: the answers' tokens."""
    if isinstance(task, Task):
        encoded = encode(tokenizer, task, row["text"], row["label"])
        ids = encoded.prompt_ids + encoded.answer_ids
        return ids, list(range(len(encoded.prompt_ids), len(ids)))
    conversation = encode_row(tokenizer, task, row)
    return conversation.ids, conversation.loss


def spread(rows: Sequence[Any], count: int) -> list[Any]:
    """About `count` rows, evenly spaced."""
    return list(rows[:: max(1, len(rows) // count)][:count])
