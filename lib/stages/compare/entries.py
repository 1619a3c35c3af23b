"""Token ids for the child processes: made once, by one tokenizer, for every file.
From what the child processes measured to one entry a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.prompts.tasks import Task, texts_of
from lib.runs.machine import cpu_name
from lib.scoring.log_probabilities import AnswerScores, Scores
from lib.scoring.metric import Metric, RowGroups, compare
from lib.scoring.perplexity import text_windows
from lib.stages.compare.retention import FOLDER, GGUF
from lib.stages.compare.speed import read_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Token ids for the child processes: made once, by one tokenizer, for every file.

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
    tokenizer: PreTrainedTokenizerBase, task: Task, rows: Sequence[Mapping[str, Any]], n_ctx: int, most: int
) -> Work:
    """Everything is tokenized here.

    Args:
        n_ctx, most: tokens of a window of the held-out text, and of the windows together.
    """
    if not task.label_names:
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
    encoded = [task.encode(tokenizer, row) for row in rows]
    answers = task.answer_words(tokenizer)
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
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    n_ctx: int,
    most: int,
) -> Work:
    """The held-out text is the rendered conversations, one behind the other."""
    order = _order(rows)
    encoded = [task.encode(tokenizer, row) for row in rows]
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


# From what the child processes measured to one entry a file.

_SPEED_KEYS = (
    *("load_seconds", "load_seconds_range", "load_runs"),
    *("prompt_tokens_per_second", "prompt_tokens_per_second_range", "prompt_runs"),
    *("generation_tokens_per_second", "generation_tokens_per_second_range", "generation_runs"),
)


@dataclass(frozen=True)
class Measured:
    """What the child processes gave, one of each a file, the reference first.

    Attributes:
        names: short and distinct.
        paths: files and folders.
        answers: as `lib.stages.compare.child.score_file` gives them.
        scores: by name.
    """

    names: Sequence[str]
    paths: Sequence[Path]
    answers: Sequence[Mapping[str, Any]]
    scores: Mapping[str, Any]


def row_scores(rows: Sequence[Mapping[str, Any]], work: Work, answer: Mapping[str, Any]) -> Scores | AnswerScores:
    """A child's numbers in the rows' own order."""
    values = np.array(answer["log_probs"], dtype=np.float64)
    log_probs, ids = np.empty_like(values), [row["id"] for row in rows]
    log_probs[work.order] = values
    if work.spans:
        tokens = np.empty(len(rows), dtype=np.int64)
        tokens[work.order] = [sum(stop - start for start, stop in spans) for spans in work.spans]
        return AnswerScores(ids, log_probs[:, 0], tokens, answer["score_seconds"], answer["found"])
    labels = np.array([row["label"] for row in rows], dtype=np.int64)
    return Scores(ids, labels, log_probs, work.truncated, answer["score_seconds"], answer["found"])


def conditions_of(measured: Measured, shared: Mapping[str, Any], work: Work) -> dict[str, Any]:
    """Where and how it was measured."""
    reference = measured.answers[0]
    return {
        "device": reference["device"],
        "processor": cpu_name(),
        "n_threads": shared["n_threads"],
        "thread_waiting": reference["thread_waiting"],
        "n_gpu_layers": shared["n_gpu_layers"],
        "window_tokens": len(work.windows[0]),
        "windows": len(work.windows),
    }


def entries_of(
    metric: Metric, measured: Measured, rows: RowGroups, margin: float, floor: float | None, seed: int
) -> list[dict[str, Any]]:
    """One entry a file, the reference first, but for what `lib.stages.compare.retention.with_retention` adds."""
    scores, (reference, *others) = measured.scores, measured.names
    reference_ppl = measured.answers[0]["perplexity"]["ppl"]
    judged = compare(metric, scores[reference], {name: scores[name] for name in others}, rows, margin, seed)
    entries = []
    for name, path, answer in zip(measured.names, measured.paths, measured.answers, strict=True):
        entries.append(
            {
                "type": name,
                "kind": FOLDER if path.is_dir() else GGUF,
                "file": path.name,
                "bytes": answer["bytes"],
                "read_bytes": None if path.is_dir() else read_bytes(path, answer["tensor_bytes"]),
                "bits_per_weight": 8 * answer["tensor_bytes"] / answer["weights"],
                **judged["" if name == reference else name],
                **metric.entry_floor(floor),
                **_text_quality(answer, reference_ppl),
                **{key: answer[key] for key in _SPEED_KEYS},
                "seconds_per_sample": answer["score_seconds"] / len(rows.groups),
                "peak_memory_mib": answer["memory_mib"],
                "device": answer["device"],
            }
        )
    return entries


def _text_quality(answer: Mapping[str, Any], reference_ppl: float) -> dict[str, Any]:
    """KL divergence and perplexity; the reference's divergence from itself is 0 by definition.

    The ratio is taken to the reference's own perplexity: the one in a KlTable is of its rounded log-probabilities,
    which end 16 nats below the likeliest token.
    """
    table = answer["divergence"]
    if table is None:
        own = answer["perplexity"]
        zero = dict.fromkeys(("kld_mean", "kld_uncertainty", "kld_low", "kld_high", "kld_median"), 0.0)
        text = {"n_tokens": own["n_tokens"], "ppl": own["ppl"], "ppl_uncertainty": own["uncertainty"]}
        return {
            **zero,
            "kld_mean_interval": None,
            "kld_p99": 0.0,
            "kld_max": 0.0,
            "same_top": 1.0,
            **text,
            "ppl_ratio": 1.0,
        }
    half = 1.96 * table["uncertainty"]
    return {
        "kld_mean": table["mean"],
        "kld_uncertainty": table["uncertainty"],
        "kld_low": max(table["mean"] - half, 0.0),
        "kld_high": table["mean"] + half,
        "kld_mean_interval": answer["kld_mean_interval"],
        "kld_median": table["median"],
        "kld_p99": table["p99"],
        "kld_max": table["max"],
        "same_top": table["same_top"],
        "n_tokens": table["n_tokens"],
        "ppl": table["ppl"],
        "ppl_uncertainty": table["ppl_uncertainty"],
        "ppl_ratio": table["ppl"] / reference_ppl,
    }
