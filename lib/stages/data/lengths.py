"""How long the rows are for the run's tokenizer, and one row as the model sees it."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.progress import Progress
from lib.prompts.conversations import ExchangeTooLongError, encode_conversation
from lib.prompts.tasks import Task
from lib.stages.data.cleaning import Row
from lib.stages.data.dialogues import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


BATCH = 1000


def token_lengths(
    tokenizer: PreTrainedTokenizerBase, task: Task, splits: dict[str, list[Row]]
) -> tuple[dict[str, list[int]], list[dict[str, Any]]]:
    """Tokens of prompt and answer of every row before truncation, and a table with one line a split."""
    answers = [len(ids) for ids in task.answer_words(tokenizer)]
    room = task.max_seq_length - max(answers) - 1
    lengths: dict[str, list[int]] = {}
    table = []
    with Progress("token lengths", sum(map(len, splits.values()))) as progress:
        for name, rows in splits.items():
            prompts: list[int] = []
            for start in range(0, len(rows), BATCH):
                texts = [task.prompt(tokenizer, {"text": row.text}) for row in rows[start : start + BATCH]]
                prompts += map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])
                progress.advance(len(texts))
            lengths[name] = [p + answers[row.label] + 1 for p, row in zip(prompts, rows, strict=True)]
            table.append(_line(name, lengths[name], sum(p > room for p in prompts)))
    return lengths, table


def _line(name: str, lengths: Sequence[int], truncated: int) -> dict[str, Any]:
    values = np.array(lengths)
    percentiles = {f"p{p}": int(np.percentile(values, p, method="nearest")) for p in (50, 90, 95, 99)}
    share = {"truncated rows": truncated, "truncated share": truncated / len(values)}
    return {
        "split": name,
        "rows": len(values),
        "min": int(values.min()),
        **percentiles,
        "max": int(values.max()),
        **share,
    }


def worked_example(
    tokenizer: PreTrainedTokenizerBase, task: Task, rows: Sequence[Row], lengths: Sequence[int]
) -> dict[str, Any]:
    """The row of median length as the model sees it.

    Returns:
        text, label, and `pieces`: {"text", "ids", "loss"} in order; tokens that are only part of a character are
        joined to one piece; `loss` marks the tokens that training counts; `answer_words`: see `label_note`.
    """
    row = rows[int(np.argsort(lengths, kind="stable")[len(lengths) // 2])]
    encoded = task.encode(tokenizer, {"text": row.text, "label": row.label})
    parts = [(encoded.prompt_ids, False), (encoded.loss_ids, True)]
    pieces = [piece for ids, loss in parts for piece in _pieces(tokenizer, ids, loss)]
    return {
        "text": row.text,
        "label": task.label_names[row.label],
        "pieces": pieces,
        "prompt_tokens": len(encoded.prompt_ids),
        "loss_tokens": len(encoded.loss),
        "truncated": encoded.truncated,
        "answer_words": task.note(tokenizer),
    }


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], loss: bool) -> list[dict[str, Any]]:
    pieces: list[dict[str, Any]] = []
    pending: list[int] = []
    for at, token in enumerate(ids):
        pending.append(token)
        text = tokenizer.decode(pending, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if "\ufffd" not in text or len(pending) >= 8 or at == len(ids) - 1:
            pieces.append({"text": text, "ids": pending, "loss": loss})
            pending = []
    return pieces


def conversation_lengths(
    tokenizer: PreTrainedTokenizerBase, task: Task, splits: Mapping[str, list[Conversation]]
) -> tuple[dict[str, list[Conversation]], dict[str, list[int]], list[dict[str, Any]]]:
    """The rows of which at least one exchange fits (with thinking: one with its reasoning); their tokens before the
    cut; a table with one line a split.
    """
    kept: dict[str, list[Conversation]] = {}
    lengths: dict[str, list[int]] = {}
    table = []
    with Progress("token lengths", sum(map(len, splits.values()))) as progress:
        for name, rows in splits.items():
            kept[name], lengths[name], counts = [], [], Counter[str]()
            for row in rows:
                progress.advance()
                used = encode_conversation(tokenizer, row.messages, sys.maxsize, task.thinking)
                whole = len(used.ids)
                if whole > task.max_seq_length:
                    try:
                        used = encode_conversation(tokenizer, row.messages, task.max_seq_length, task.thinking)
                    except ExchangeTooLongError:
                        continue
                    counts["truncated"] += 1
                counts += Counter(cut=used.turns_cut, learned=len(used.answers), read=used.unlearned)
                kept[name].append(row)
                lengths[name].append(whole)
            if kept[name]:
                line = _line(name, lengths[name], counts["truncated"])
                line |= {"turns cut": counts["cut"], "rows too long": len(rows) - len(kept[name])}
                table.append({**line, "answers learned": counts["learned"], "answers only read": counts["read"]})
    return kept, lengths, table


def conversation_example(
    tokenizer: PreTrainedTokenizerBase, task: Task, rows: Sequence[Conversation], lengths: Sequence[int]
) -> dict[str, Any]:
    """The row of median length as the model sees it: as `worked_example`, with "turns" in place of the label."""
    row = rows[int(np.argsort(lengths, kind="stable")[len(lengths) // 2])]
    encoded = encode_conversation(tokenizer, row.messages, task.max_seq_length, task.thinking)
    edges = [0, *(edge for span in encoded.spans for edge in span), len(encoded.ids)]
    pieces = [
        piece
        for i, (start, stop) in enumerate(itertools.pairwise(edges))
        for piece in _pieces(tokenizer, encoded.ids[start:stop], i % 2 == 1)
    ]
    return {
        "text": row.text,
        "turns": 2 * (len(encoded.answers) + encoded.unlearned),
        "pieces": pieces,
        "prompt_tokens": len(encoded.ids) - len(encoded.loss),
        "loss_tokens": len(encoded.loss),
        "truncated": encoded.turns_cut > 0,
    }
