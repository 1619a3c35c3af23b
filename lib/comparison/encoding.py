"""Token ids for the child processes: made once, by one tokenizer, for every file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.models.conversations import ConversationTask
from lib.models.prompting import Task, encode, label_ids
from lib.models.tasks import AnyTask, encode_row, texts_of
from lib.scoring.perplexity import text_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SMALLEST_WINDOW = 64


@dataclass(frozen=True)
class Work:
    """Token ids for the child processes, and what to know about them.

    Attributes:
        order: the rows' places in the order in which they are scored (by id).
        prompts, answers, windows: token ids; prompts in that order. Without labels the prompts are whole
            conversations, and there are no answers but those in them.
        truncated: whether each row's text was cut, in the rows' own order.
        sample: {"text", "ids"} of a row: another tokenizer shows by it.
        n_ctx: longest sequence.
        notes: sentences about what was changed to make it work.
        spans: without labels (first, behind the last) position of every answer of each prompt.
        documents: group of near-duplicate rows that each scored token of the windows is from, window after window.
    """

    order: list[int]
    prompts: list[list[int]]
    answers: list[list[int]]
    windows: list[list[int]]
    truncated: np.ndarray
    sample: dict[str, Any]
    n_ctx: int
    notes: list[str]
    spans: list[list[tuple[int, int]]] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)


def encode_work(
    tokenizer: PreTrainedTokenizerBase, task: AnyTask, rows: Sequence[Mapping[str, Any]], n_ctx: int, most: int
) -> Work:
    """Everything is tokenized here.

    Args:
        n_ctx, most: tokens of a window of the held-out text, and of the windows together.
    """
    if isinstance(task, ConversationTask):
        return _conversations(tokenizer, task, rows, n_ctx, most)
    return _labelled(tokenizer, task, rows, n_ctx, most)


def _order(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    return sorted(range(len(rows)), key=lambda i: rows[i]["id"])


def _leak_free_first(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    return sorted(range(len(rows)), key=lambda i: bool(rows[i].get("leaked")))


def _windows(ids: list[int], n_ctx: int, most: int) -> tuple[list[list[int]], list[str]]:
    """Windows of the held-out text, smaller ones (which is said) where it is short."""
    notes, window = [], n_ctx
    if _SMALLEST_WINDOW <= min(len(ids), most) < n_ctx:
        window = 2 ** (min(len(ids), most).bit_length() - 1)
        notes.append(
            f"the held-out text has only {len(ids)} tokens: perplexity windows are {window} tokens instead of {n_ctx}"
        )
    return text_windows(ids, window, most), notes


def _scored(rows: Sequence[int], groups: Sequence[Any], windows: list[list[int]]) -> list[int]:
    """Group of the row of every scored token, see `lib.scoring.perplexity.positions`.

    Args:
        rows: row of each token of the text, by its place in `groups`.
        groups: of the rows, in the text's order.
    """
    numbers = np.unique(np.asarray(groups), return_inverse=True)[1]
    size = len(windows[0])
    of_tokens = numbers[np.asarray(rows)[: size * len(windows)]].reshape(len(windows), size)
    return of_tokens[:, size // 2 + 1 :].ravel().tolist()


def _groups(rows: Sequence[Mapping[str, Any]], order: Sequence[int]) -> list[Any]:
    return [rows[i].get("group", i) for i in order]


def _sample(tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, Any]:
    return {"text": text, "ids": tokenizer(text, add_special_tokens=False)["input_ids"]}


def _labelled(
    tokenizer: PreTrainedTokenizerBase, task: Task, rows: Sequence[Mapping[str, Any]], n_ctx: int, most: int
) -> Work:
    order = _order(rows)
    encoded = [encode(tokenizer, task, row["text"]) for row in rows]
    answers = label_ids(tokenizer, task)
    first = _leak_free_first(rows)
    texts = [rows[i]["text"] for i in first]
    tokens = tokenizer("\n".join(texts), add_special_tokens=False, return_offsets_mapping=True)
    windows, notes = _windows(tokens["input_ids"], n_ctx, most)
    starts = np.cumsum([0, *(len(text) + 1 for text in texts[:-1])])
    of_tokens = np.searchsorted(starts, [begin for begin, _ in tokens["offset_mapping"]], side="right") - 1
    longest = max(len(e.prompt_ids) for e in encoded) + max(len(a) for a in answers)
    return Work(
        order=order,
        prompts=[encoded[i].prompt_ids for i in order],
        answers=answers,
        windows=windows,
        truncated=np.array([e.truncated for e in encoded]),
        sample=_sample(tokenizer, texts[0]),
        n_ctx=max(len(windows[0]), longest),
        notes=notes,
        documents=_scored(of_tokens, _groups(rows, first), windows),
    )


def _conversations(
    tokenizer: PreTrainedTokenizerBase,
    task: ConversationTask,
    rows: Sequence[Mapping[str, Any]],
    n_ctx: int,
    most: int,
) -> Work:
    """The held-out text is the rendered conversations, one behind the other."""
    order = _order(rows)
    encoded = [encode_row(tokenizer, task, row) for row in rows]
    first = _leak_free_first(rows)
    windows, notes = _windows([token for i in first for token in encoded[i].ids], n_ctx, most)
    of_tokens = np.repeat(np.arange(len(first)), [len(encoded[i].ids) for i in first])
    return Work(
        order=order,
        prompts=[encoded[i].ids for i in order],
        answers=[],
        windows=windows,
        truncated=np.array([e.turns_cut > 0 for e in encoded]),
        sample=_sample(tokenizer, texts_of(rows[first[0]])[0]),
        n_ctx=max(len(windows[0]), *(len(e.ids) for e in encoded)),
        notes=notes,
        spans=[encoded[i].spans for i in order],
        documents=_scored(of_tokens, _groups(rows, first), windows),
    )


def unigram_perplexity(
    tokenizer: PreTrainedTokenizerBase,
    task: ConversationTask,
    train: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
) -> float:
    """Perplexity of the rows' answers under the token frequencies of the training answers alone (add-one smoothed).

    What naming the commonest label is to classification: a model that is not better has not learned to answer.
    """
    counts = np.ones(len(tokenizer))
    np.add.at(counts, _answer_tokens(tokenizer, task, train), 1)
    log_p = np.log(counts / counts.sum())
    return float(np.exp(-log_p[_answer_tokens(tokenizer, task, rows)].mean()))


def _answer_tokens(
    tokenizer: PreTrainedTokenizerBase, task: ConversationTask, rows: Sequence[Mapping[str, Any]]
) -> np.ndarray:
    encoded = (encode_row(tokenizer, task, row) for row in rows)
    return np.array([conversation.ids[place] for conversation in encoded for place in conversation.loss])
