"""The text that an importance matrix is made from: training rows as token windows, held-out rows provably left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import InputError
from lib.prompts.tasks import Task, read_task, texts_of
from lib.runs.files import read_jsonl, sha256_json

HELD_OUT = ("validation", "test")
Row = Mapping[str, Any]


def text_hash(row: Row) -> str:
    """Hash of a row's texts, whatever its label, id and system turn."""
    return sha256_json(texts_of(row))


@dataclass(frozen=True)
class Calibration:
    """Windows of training rows.

    Attributes:
        windows: token ids, each of the same length.
        used: {"id", "sha256"} of every row of which a token is in a window, in the order of the tokens.
        facts: counts for the record: rows, left_out (by reason), held_out_rows, shared_with_held_out (0), tokens,
            window_tokens, rows_sha256.
    """

    windows: list[list[int]]
    used: list[dict[str, str]]
    facts: dict[str, Any]

    @property
    def dataset(self) -> str:
        """Name for the header of quantized files (which keep 127 bytes of it)."""
        return dataset_name("train.jsonl", f"{self.facts['rows']} rows", self.facts["rows_sha256"])


def dataset_name(file: str, part: str, digest: str) -> str:
    """What a header says of a text, in the 127 bytes that llama.cpp keeps: its name (cut where it is long), how much
    of it was used, and its hash."""
    rest = f", {part}, sha256 {digest}"
    return file.encode()[: 127 - len(rest)].decode("utf-8", "ignore") + rest


def choose_windows(data: Path, size: int, most: int, seed: int) -> Calibration:
    """Windows of `size` tokens from the training rows of a data product, in the order that `seed` draws.

    Rows stand one behind the other as training sees them (prompt, answer, end of turn); what does not fill a window is
    dropped, as llama-imatrix does. A training row with the text of a validation or test row, or in the near-duplicate
    group of one, is left out.

    Raises:
        InputError: the rows that are left do not fill one window.
    """
    from lib.models.loading import load_tokenizer

    task, rows = read_task(data), read_jsonl(data / "train.jsonl")
    held_out = [row for split in HELD_OUT for row in read_jsonl(data / f"{split}.jsonl")]
    allowed, left_out = exclude(rows, held_out)
    order = np.random.default_rng(seed).permutation(len(allowed)).tolist()
    tokenizer = load_tokenizer(data / "tokenizer")
    windows, used = _fill((allowed[i] for i in order), task, tokenizer, size, most)
    if not windows:
        raise InputError(
            f"{len(allowed)} training rows (without {sum(left_out.values())} that resemble held-out ones) do not fill "
            f"a window of {size} tokens.",
            "more text for the importance matrix.",
            "lower n_ctx, add training rows, or set imatrix: none.",
        )
    shared = {row["sha256"] for row in used} & {text_hash(row) for row in held_out}
    if shared:
        raise RuntimeError(f"{len(shared)} held-out rows came into the importance matrix")
    facts = {
        "rows": len(used),
        "left_out": left_out,
        "held_out_rows": len(held_out),
        "shared_with_held_out": len(shared),
        "tokens": len(windows) * size,
        "window_tokens": size,
        "rows_sha256": sha256_json([row["sha256"] for row in used]),
    }
    return Calibration(windows, used, facts)


@dataclass(frozen=True)
class AnswerRows:
    """Whole rows with their answers.

    Attributes:
        rows: {"ids": token ids up to the last one that is read from, "positions": where the model predicts a learned
            token (the position before it), "targets": these tokens, "row": number of the row in its split}.
        used: {"id", "sha256"} of every row.
        facts: counts for the record: rows, positions, tokens, rows_sha256.
    """

    rows: list[dict[str, Any]]
    used: list[dict[str, str]]

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "rows": len(self.rows),
            "positions": sum(len(row["positions"]) for row in self.rows),
            "tokens": sum(len(row["ids"]) for row in self.rows),
            "rows_sha256": sha256_json([row["sha256"] for row in self.used]),
        }


def choose_rows(data: Path, most_rows: int, most_tokens: int, seed: int) -> AnswerRows:
    """Whole training rows for what is measured at their answers, in the order and under the rules of `choose_windows`.

    Args:
        most_rows, most_tokens: bounds; one row is taken whatever its length.
    """
    rows = read_jsonl(data / "train.jsonl")
    held_out = [row for split in HELD_OUT for row in read_jsonl(data / f"{split}.jsonl")]
    allowed, _ = exclude(rows, held_out)
    order = np.random.default_rng(seed).permutation(len(allowed)).tolist()
    chosen = _whole_rows(data, [(i, allowed[i]) for i in order], most_rows, most_tokens)
    if shared := {row["sha256"] for row in chosen.used} & {text_hash(row) for row in held_out}:
        raise RuntimeError(f"{len(shared)} held-out rows came among those whose answers are measured")
    return chosen


def held_out_rows(data: Path, most_rows: int, most_tokens: int, seed: int) -> AnswerRows:
    """Whole test rows, in the order of `held_out_windows` (leak-free ones first); bounds as of `choose_rows`."""
    rows = read_jsonl(data / "test.jsonl")
    return _whole_rows(data, [(i, rows[i]) for i in _held_out_order(rows, seed)], most_rows, most_tokens)


def _held_out_order(rows: Sequence[Row], seed: int) -> list[int]:
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    return sorted(order, key=lambda i: bool(rows[i].get("leaked", False)))


def _whole_rows(data: Path, rows: Iterable[tuple[int, Row]], most_rows: int, most_tokens: int) -> AnswerRows:
    from lib.models.loading import load_tokenizer

    task, tokenizer = read_task(data), load_tokenizer(data / "tokenizer")
    chosen: list[dict[str, Any]] = []
    used, tokens = [], 0
    for number, row in rows:
        encoded = task.encode(tokenizer, row)
        ids, read = encoded.ids, [position - 1 for position in encoded.loss if position]
        tokens += read[-1] + 1
        if len(chosen) == most_rows or (chosen and tokens > most_tokens):
            break
        targets = [ids[position + 1] for position in read]
        chosen.append({"ids": ids[: read[-1] + 1], "positions": read, "targets": targets, "row": number})
        used.append({"id": str(row["id"]), "sha256": text_hash(row)})
    return AnswerRows(chosen, used)


def exclude(rows: Sequence[Row], held_out: Sequence[Row]) -> tuple[list[Row], dict[str, int]]:
    """Training rows that neither equal nor nearly equal a held-out row, and how many were left out why."""
    texts = {text_hash(row) for row in held_out}
    groups = {row["group"] for row in held_out if "group" in row}
    same = [text_hash(row) in texts for row in rows]
    near = [row.get("group") in groups and not equal for row, equal in zip(rows, same, strict=True)]
    kept = [row for row, a, b in zip(rows, same, near, strict=True) if not a and not b]
    return kept, {"text of a held-out row": sum(same), "nearly the text of a held-out row": sum(near)}


def _fill(
    rows: Iterable[Row], task: Task, tokenizer: Any, size: int, most: int
) -> tuple[list[list[int]], list[dict[str, str]]]:
    """Windows, and the rows that are in them."""
    ids: list[int] = []
    starts, used = [], []
    for row in rows:
        if len(ids) >= size * most:
            break
        starts.append(len(ids))
        used.append({"id": str(row["id"]), "sha256": text_hash(row)})
        ids += task.encode(tokenizer, row).ids
    count = min(most, len(ids) // size)
    inside = sum(start < count * size for start in starts)
    return [ids[i * size : (i + 1) * size] for i in range(count)], used[:inside]


def held_out_windows(data: Path, size: int, most: int, seed: int) -> tuple[list[list[int]], list[int]]:
    """Windows of test rows (leak-free ones first), and for every token of the windows the number of its row.

    Raises:
        InputError: the test rows do not fill one window.
    """
    from lib.models.loading import load_tokenizer

    task, rows, tokenizer = read_task(data), read_jsonl(data / "test.jsonl"), load_tokenizer(data / "tokenizer")
    ids: list[int] = []
    owners: list[int] = []
    for i in _held_out_order(rows, seed):
        if len(ids) >= size * most:
            break
        ids += (own := task.encode(tokenizer, rows[i]).ids)
        owners += [i] * len(own)
    count = min(most, len(ids) // size)
    if not count:
        raise InputError(
            f"test rows of {len(ids)} tokens.", f"one window of {size} tokens.", "lower n_ctx, or raise max_eval_rows."
        )
    return [ids[i * size : (i + 1) * size] for i in range(count)], owners[: count * size]
