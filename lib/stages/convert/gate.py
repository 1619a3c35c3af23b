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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError
from lib.models.gguf_file import read_tensors
from lib.models.loading import affordable_dtype
from lib.progress import Progress
from lib.prompts.tasks import Task, spread, texts_of
from lib.scoring.perplexity import kl_divergence, normalised
from lib.stages.convert.token_parity import HARD_STRINGS, compare_prompts, compare_tokens

if TYPE_CHECKING:
    from lib.scoring.backend import Backend


WINDOWS = 8
"""Prompts over all of whose positions the KL divergence is measured."""

EXACT = 2e-5
"""Largest |Δ log p| of any token when weights, keys, values and arithmetic are float32 on both sides, as a share of the
range of the log-probabilities (largest minus smallest at a position, the widest of them).

Only the order of the sums differs then, and its error grows with the numbers: a trained model's logits reach further
than those of random weights."""

ALLOWANCE = 10.0
"""Factor on the allowed KL divergence where the file holds Q8_0, or where memory allows the merged model bfloat16
arithmetic only: on SmolLM2-135M these cost 0.0030 and 0.0031 nats by themselves (on random weights less than 0.001). A
wrong tensor or a wrong rope costs a nat and more."""

ROWS = 100
"""Rows whose labels are compared."""

_F16, _Q8_0, _BF16 = 1, 8, 30  # enum ggml_type
_ROUNDED = (_F16, _Q8_0, _BF16)

ANSWER_POSITIONS = 128
"""Most positions of a conversation that are compared: its first answer tokens."""


@dataclass(frozen=True)
class GateReport:
    """The merged model against its GGUF.

    Attributes:
        texts: number of texts cut into tokens by both.
        tokens: number of token ids compared, all equal (else the gate fails).
        prompts: number of prompts rendered from both chat templates, all equal (else the gate fails).
        windows, positions: prompts and positions of the KL divergence.
        mean_kld, max_kld: KL(merged ‖ GGUF), nats a position; same_top: share with the same most probable token.
        rows, label_agreement: rows scored by both, and the share with the same label; 0 and None without labels.
        clear_rows, clear_agreement: the same for the rows that the merged model decides by more than rounding can turn:
            by `NEAR_TIE`, in bfloat16 by `NEAR_TIE_LOW`. It is what is limited; None where there is no such row.
        max_label_difference: largest |Δ log p| of a label, nats; None without labels.
        max_log_prob_difference: largest |Δ log p| of any token of the vocabulary at any position, nats.
        log_prob_range: widest range of log-probabilities at a position, nats.
        exact_limit: what the largest difference may be where only the order of sums differs (float32 on both sides):
            `EXACT` times the range; None elsewhere.
        computed_in: arithmetic of the merged model.
        limit_kld, limit_agreement: what the settings allow (times `ALLOWANCE` where that says so; for clear rows).
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
    label_agreement: float | None
    clear_rows: int
    clear_agreement: float | None
    max_label_difference: float | None
    max_log_prob_difference: float
    log_prob_range: float
    exact_limit: float | None
    computed_in: str
    limit_kld: float
    limit_agreement: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Window:
    """Token ids, and the positions after which the next token's distribution is compared (None: after every one)."""

    ids: list[int]
    places: list[int] | None = None


def window_values(backend: Backend, window: Window) -> np.ndarray:
    """Log-softmax of the next token at the window's positions, float32, (positions, V)."""
    if window.places is None:
        return backend.window_log_probs(window.ids)
    first = window.places[0]
    return backend.window_log_probs(window.ids, first)[[place - first for place in window.places]]


def _token_ids(
    tokenizer: Any, task: Task, rows: Sequence[dict[str, Any]]
) -> tuple[list[list[int]], list[Window], list[list[int]]]:
    """Prompts whose labels are compared (none without labels), windows, and the labels' ids."""
    if words := task.answer_words(tokenizer):
        encoded = [task.probe_ids(tokenizer, row) for row in spread(rows, ROWS)]
        return encoded, [Window(ids) for ids in spread(encoded, WINDOWS)], words
    windows = []
    for row in spread(rows, WINDOWS):
        conversation = task.encode(tokenizer, row)
        places = [place - 1 for place in conversation.loss[:ANSWER_POSITIONS]]
        windows.append(Window(conversation.ids[: places[-1] + 1], places))
    return [], windows, []


def _label_facts(merged: np.ndarray | None, gguf: np.ndarray | None, arithmetic: str) -> dict[str, Any]:
    if merged is None or gguf is None:
        return {"label_agreement": None, "clear_rows": 0, "clear_agreement": None, "max_label_difference": None}
    from lib.scoring.log_probabilities import NEAR_TIE, NEAR_TIE_LOW

    ordered, least = np.sort(merged, axis=1), NEAR_TIE if arithmetic == "float32" else NEAR_TIE_LOW
    same, clear = merged.argmax(1) == gguf.argmax(1), ordered[:, -1] - ordered[:, -2] >= least
    return {
        "label_agreement": float(np.mean(same)),
        "clear_rows": int(clear.sum()),
        "clear_agreement": float(np.mean(same[clear])) if clear.any() else None,
        "max_label_difference": float(np.abs(merged - gguf).max()),
    }


def _labels(
    backend: Backend, prompts: list[list[int]], answers: list[list[int]], progress: Progress
) -> np.ndarray | None:
    if not answers:
        return None
    labels = backend.label_log_probs(prompts, answers)
    progress.advance(len(prompts))
    return labels


def _store(backend: Backend, windows: list[Window], folder: Path, progress: Progress) -> None:
    """The log-softmax at the compared positions of the windows, a file each: a large vocabulary makes them large."""
    for i, ids in enumerate(windows):
        np.save(folder / f"{i}.npy", window_values(backend, ids))
        progress.advance()


@dataclass
class _Differences:
    """What was found so far, position by position."""

    divergence: list[float] = field(default_factory=list)
    same_top: list[bool] = field(default_factory=list)
    largest: float = 0.0
    range: float = 0.0

    def add(self, p: np.ndarray, q: np.ndarray) -> None:
        """Compare (positions, vocabulary) log-probabilities, row by row, because the arrays are large."""
        for left, right in zip(p, q, strict=True):
            left, right = normalised(left), normalised(right)
            self.divergence.append(float(kl_divergence(left, right)))
            self.largest = max(self.largest, float(np.abs(left - right).max()))
            self.range = max(self.range, float(left.max() - left.min()))
            self.same_top.append(bool(left.argmax() == right.argmax()))


def _answers(
    model_dir: Path, path: Path, arithmetic: str, n_threads: int, task: Task, asked: tuple[Any, Any, Any]
) -> tuple[_Differences, dict[str, Any]]:
    """Both models on the same prompts, windows and labels, one after the other in memory."""
    encoded, windows, answers = asked
    found = _Differences()
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
            found.add(np.load(Path(name) / f"{i}.npy", mmap_mode="r"), window_values(gguf, ids))
            progress.advance()
        gguf.close()
    return found, _label_facts(merged_labels, gguf_labels, arithmetic)


def gate(
    model_dir: Path,
    path: Path,
    task: Task,
    rows: Sequence[dict[str, Any]],
    limit_kld: float,
    limit_agreement: float,
    n_threads: int = 0,
) -> GateReport:
    """Compare the model folder `model_dir` with its GGUF `path` on rows of the run ({"text", …} or {"messages", …}).

    Raises:
        InputError: other token ids, more divergence or fewer equal labels than allowed. Numbers are in the message.
    """
    from lib.models.loading import load_tokenizer

    started = time.monotonic()
    if not rows:
        raise InputError("no rows for the gate.", "at least one row with text.", "give validation rows.")
    tokenizer = load_tokenizer(model_dir)
    texts = [
        *HARD_STRINGS,
        *(text for row in rows for text in texts_of(row)),
        *(task.rendered(tokenizer, row) for row in rows),
    ]
    tokens = compare_tokens(tokenizer, path, texts)
    prompts = compare_prompts(tokenizer, path, task, [*map(task.row_of, HARD_STRINGS), *rows])
    asked = encoded, windows, _ = _token_ids(tokenizer, task, rows)
    arithmetic = affordable_dtype(model_dir)
    found, labels = _answers(model_dir, path, arithmetic, n_threads, task, asked)
    report = GateReport(
        texts=len(texts),
        tokens=tokens,
        prompts=prompts,
        windows=len(windows),
        positions=len(found.divergence),
        mean_kld=float(np.mean(found.divergence)),
        max_kld=max(found.divergence),
        same_top=float(np.mean(found.same_top)),
        rows=len(encoded),
        **labels,
        max_log_prob_difference=found.largest,
        log_prob_range=found.range,
        exact_limit=EXACT * found.range if arithmetic == "float32" and not _holds(path, *_ROUNDED) else None,
        computed_in=arithmetic,
        limit_kld=limit_kld * (ALLOWANCE if arithmetic != "float32" or _holds(path, _Q8_0) else 1.0),
        limit_agreement=limit_agreement,
        seconds=round(time.monotonic() - started, 2),
    )
    _refuse(report, path)
    return report


def _holds(path: Path, *types: int) -> bool:
    """Whether a tensor of the file has one of the types."""
    return any(tensor.type in types for tensor in read_tensors(path))


def _open_merged(model_dir: Path, arithmetic: str) -> Backend:
    from lib.models.loading import load_model
    from lib.scoring.torch_backend import TransformersBackend

    return TransformersBackend(load_model(model_dir, dtype=arithmetic), batch_size=16)


def _open_gguf(path: Path, n_ctx: int, n_threads: int) -> Backend:
    from lib.scoring.llama_backend import LlamaCppBackend

    return LlamaCppBackend(path, n_ctx, n_threads=n_threads, cache_type="f32", flash_attention=False)


def _refuse(report: GateReport, path: Path) -> None:
    exact = report.exact_limit is None or report.max_log_prob_difference <= report.exact_limit
    # written so that NaN fails
    agreed = report.clear_agreement is None or report.clear_agreement >= report.limit_agreement
    if exact and report.mean_kld <= report.limit_kld and agreed:
        return
    labels = (
        ""
        if report.clear_agreement is None
        else f"{report.clear_agreement:.1%} equal labels over {report.clear_rows} rows that are no near ties, "
    )
    raise InputError(
        f"{path.name} does not answer as the merged model: mean KL divergence {report.mean_kld:.3g} nats over "
        f"{report.positions} positions, {labels}"
        f"largest |Δ log p| {report.max_log_prob_difference:.3g}.",
        f"at most {report.limit_kld:g} nats (gate_max_kld), at least {report.limit_agreement:.1%} "
        "(gate_min_label_agreement)"
        + (f", and |Δ log p| of {report.exact_limit:.2g} for float32." if report.exact_limit else "."),
        "do not quantize it; try outtype f32 to see whether rounding is the cause, and report it if it is not.",
    )
