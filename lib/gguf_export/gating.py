"""The gate between conversion and quantization: a GGUF that does not answer as the merged model does stops the run.

Three questions: does llama.cpp cut the run's texts into the same token ids; is the next-token distribution the same
(KL divergence over whole prompts); does it choose the same labels? Keys and values are kept in float32 and flash
attention is off, so that only the stored weights and llama.cpp's arithmetic can differ.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError
from lib.gguf_export.tokens import HARD_STRINGS, compare_prompts, compare_tokens
from lib.models.gguf_file import read_tensors
from lib.models.prompting import Task, encode, label_ids, render
from lib.progress import Progress

if TYPE_CHECKING:
    from lib.scoring.backend import Backend

WINDOWS = 8
"""Prompts over all of whose positions the KL divergence is measured."""

EXACT = 1e-4
"""Largest |Δ log p| of any token when weights, keys, values and arithmetic are float32 on both sides."""

ROWS = 100
"""Rows whose labels are compared."""


@dataclass(frozen=True)
class GateReport:
    """The merged model against its GGUF.

    Attributes:
        texts: number of texts cut into tokens by both.
        tokens: number of token ids compared, all equal (else the gate fails).
        prompts: number of prompts rendered from both chat templates, all equal (else the gate fails).
        windows, positions: prompts and positions of the KL divergence.
        mean_kld, max_kld: KL(merged ‖ GGUF), nats a position; same_top: share with the same most probable token.
        rows, label_agreement: rows scored by both, and the share with the same label.
        max_label_difference: largest |Δ log p| of a label, nats.
        max_log_prob_difference: largest |Δ log p| of any token of the vocabulary at any position, nats.
        exact_limit: what it may be where only the order of sums differs (float32 on both sides); None elsewhere.
        computed_in: arithmetic of the merged model.
        limit_kld, limit_agreement: what the settings allow.
    """

    texts: int
    tokens: int
    prompts: int
    windows: int
    positions: int
    mean_kld: float
    max_kld: float
    same_top: float
    rows: int
    label_agreement: float
    max_label_difference: float
    max_log_prob_difference: float
    exact_limit: float | None
    computed_in: str
    limit_kld: float
    limit_agreement: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def _spread(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """About `count` rows, evenly spaced."""
    step = max(1, len(rows) // count)
    return list(rows[::step][:count])


def _labels(backend: Backend, prompts: list[list[int]], answers: list[list[int]], progress: Progress) -> np.ndarray:
    labels = backend.label_log_probs(prompts, answers)
    progress.advance(len(prompts))
    return labels


def _store(backend: Backend, windows: list[list[int]], folder: Path, progress: Progress) -> None:
    """The log-softmax at every position of the windows, a file each: a large vocabulary makes them large."""
    for i, ids in enumerate(windows):
        np.save(folder / f"{i}.npy", backend.window_log_probs(ids))
        progress.advance()


@dataclass
class _Differences:
    divergence: list[np.ndarray]
    same_top: list[np.ndarray]
    largest: float = 0.0

    def add(self, p: np.ndarray, q: np.ndarray) -> None:
        """Compare (positions, vocabulary) log-probabilities, row by row, because the arrays are large."""
        divergence = np.empty(len(p))
        for i, (left, right) in enumerate(zip(p, q, strict=True)):
            wide = left.astype(np.float64)
            divergence[i] = max(0.0, float(np.sum(np.exp(wide) * (wide - right))))
            self.largest = max(self.largest, float(np.abs(left - right).max()))
        self.divergence.append(divergence)
        self.same_top.append(p.argmax(-1) == q.argmax(-1))


def gate(
    model_dir: Path,
    path: Path,
    task: Task,
    rows: Sequence[dict[str, Any]],
    limit_kld: float,
    limit_agreement: float,
    n_threads: int = 0,
) -> GateReport:
    """Compare the model folder `model_dir` with its GGUF `path` on rows {"text", …} of the run.

    Raises:
        InputError: other token ids, more divergence or fewer equal labels than allowed. Numbers are in the message.
    """
    from lib.models.loading import load_tokenizer

    started = time.monotonic()
    if not rows:
        raise InputError("no rows for the gate.", "at least one row with text.", "give validation rows.")
    tokenizer = load_tokenizer(model_dir)
    texts = [*HARD_STRINGS, *(row["text"] for row in rows), *(render(tokenizer, task, row["text"]) for row in rows)]
    tokens = compare_tokens(tokenizer, path, texts)
    prompts = compare_prompts(tokenizer, path, task, [*HARD_STRINGS, *(row["text"] for row in rows)])
    encoded = [encode(tokenizer, task, row["text"]).prompt_ids for row in _spread(rows, ROWS)]
    windows, answers = _spread(encoded, WINDOWS), label_ids(tokenizer, task)
    arithmetic = _arithmetic(model_dir)
    found = _Differences([], [])
    progress = Progress("comparing merged model and GGUF", 2 * (len(encoded) + len(windows)))
    with progress, tempfile.TemporaryDirectory(prefix="workbook-gate-") as name:
        merged = _open_merged(model_dir, arithmetic)
        merged_labels = _labels(merged, encoded, answers, progress)
        _store(merged, windows, Path(name), progress)
        merged.close()
        del merged
        gc.collect()
        gguf = _open_gguf(path, task.max_seq_length, n_threads)
        gguf_labels = _labels(gguf, encoded, answers, progress)
        for i, ids in enumerate(windows):
            found.add(np.load(Path(name) / f"{i}.npy", mmap_mode="r"), gguf.window_log_probs(ids))
            progress.advance()
        gguf.close()
    divergence = np.concatenate(found.divergence)
    report = GateReport(
        texts=len(texts),
        tokens=tokens,
        prompts=prompts,
        windows=len(windows),
        positions=len(divergence),
        mean_kld=float(divergence.mean()),
        max_kld=float(divergence.max()),
        same_top=float(np.concatenate(found.same_top).mean()),
        rows=len(encoded),
        label_agreement=float(np.mean(merged_labels.argmax(1) == gguf_labels.argmax(1))),
        max_label_difference=float(np.abs(merged_labels - gguf_labels).max()),
        max_log_prob_difference=found.largest,
        exact_limit=EXACT if arithmetic == "float32" and _holds_float32(path) else None,
        computed_in=arithmetic,
        limit_kld=limit_kld,
        limit_agreement=limit_agreement,
        seconds=round(time.monotonic() - started, 2),
    )
    _refuse(report, path)
    return report


def _holds_float32(path: Path) -> bool:
    return all(tensor.type == 0 for tensor in read_tensors(path))


def _open_merged(model_dir: Path, arithmetic: str) -> Backend:
    from lib.models.loading import load_model
    from lib.scoring import TransformersBackend

    return TransformersBackend(load_model(model_dir, dtype=arithmetic), batch_size=16)


def _open_gguf(path: Path, n_ctx: int, n_threads: int) -> Backend:
    from lib.scoring import LlamaCppBackend

    return LlamaCppBackend(path, n_ctx, n_threads=n_threads, cache_type="f32", flash_attention=False)


def _arithmetic(model_dir: Path) -> str:
    """float32 where the merged model fits in memory so; else bfloat16."""
    from lib.device import available_memory
    from lib.models.weights import open_weights

    return "float32" if open_weights(model_dir).parameters * 4 * 1.3 < available_memory() else "bfloat16"


def _refuse(report: GateReport, path: Path) -> None:
    exact = report.exact_limit is None or report.max_log_prob_difference <= report.exact_limit
    # written so that NaN fails
    if exact and report.mean_kld <= report.limit_kld and report.label_agreement >= report.limit_agreement:
        return
    raise InputError(
        f"{path.name} does not answer as the merged model: mean KL divergence {report.mean_kld:.3g} nats over "
        f"{report.positions} positions, {report.label_agreement:.1%} equal labels over {report.rows} rows, "
        f"largest |Δ log p| {report.max_log_prob_difference:.3g}.",
        f"at most {report.limit_kld:g} nats (gate_max_kld), at least {report.limit_agreement:.1%} "
        "(gate_min_label_agreement)"
        + (f", and |Δ log p| of {report.exact_limit:g} for float32." if report.exact_limit else "."),
        "do not quantize it; try outtype f32 to see whether rounding is the cause, and report it if it is not.",
    )
