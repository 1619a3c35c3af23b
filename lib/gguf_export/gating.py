"""The gate between conversion and quantization: a GGUF that does not answer as the merged model does stops the run.

Three questions: does llama.cpp cut the run's texts into the same token ids; is the next-token distribution the same
(KL divergence over whole prompts); does it choose the same labels? Keys and values are kept in float32 and flash
attention is off, so that only the stored weights and llama.cpp's arithmetic can differ.
"""

from __future__ import annotations

import ctypes
import gc
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError
from lib.models.prompting import Task, encode, label_ids, render
from lib.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lib.scoring.backend import Backend

WINDOWS = 8
"""Prompts over all of whose positions the KL divergence is measured."""

ROWS = 100
"""Rows whose labels are compared."""

HARD_STRINGS = (
    "",
    " ",
    "\n",
    "  \n\n \t x  ",
    "酒店很干净，服务不错！！！",
    "It's 12345 o'clock — we'LL see…",
    "３６５天ＡＢＣ①②",
    "👨‍👩‍👧‍👦 🇨🇳 ❤️",
    "a\u00a0b\u3000c\u200bd",
    "é à Ω ё 한글 ไทย العربية",
    "<|im_start|>user\n你好<|im_end|>\n",
    "\x00\x01\x7f",
    "https://a.b/c?d=1&e=%20#f",
    "==------``````''''\"\"\"\"",
)
"""Texts on which tokenizers are known to differ; compared besides the run's own."""


@dataclass(frozen=True)
class GateReport:
    """The merged model against its GGUF.

    Attributes:
        texts: number of texts cut into tokens by both.
        tokens: number of token ids compared, all equal (else the gate fails).
        windows, positions: prompts and positions of the KL divergence.
        mean_kld, max_kld: KL(merged ‖ GGUF), nats a position; same_top: share with the same most probable token.
        rows, label_agreement: rows scored by both, and the share with the same label.
        max_label_difference: largest |Δ log p| of a label, nats.
        computed_in: arithmetic of the merged model.
        limit_kld, limit_agreement: what the settings allow.
    """

    texts: int
    tokens: int
    windows: int
    positions: int
    mean_kld: float
    max_kld: float
    same_top: float
    rows: int
    label_agreement: float
    max_label_difference: float
    computed_in: str
    limit_kld: float
    limit_agreement: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def gguf_token_ids(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of llama.cpp for each text, special tokens recognised, nothing added.

    Raises:
        InputError: llama.cpp is missing or refuses the file.
    """
    from lib.scoring.llama_log import forget_errors, last_error, llama

    api = llama()
    parameters = api.llama_model_default_params()
    parameters.vocab_only = True
    forget_errors()
    model = api.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise InputError(f"llama.cpp cannot load {path}: {last_error()}.", "a complete GGUF.", "convert it again.")
    try:
        vocabulary = api.llama_model_get_vocab(model)
        return [_tokenize(api, vocabulary, text.encode("utf-8", "replace")) for text in texts]
    finally:
        api.llama_model_free(model)


def _tokenize(api: Any, vocabulary: Any, text: bytes) -> list[int]:
    room = len(text) + 8  # a token is at least one byte
    buffer = (ctypes.c_int32 * room)()
    count = api.llama_tokenize(vocabulary, text, len(text), buffer, room, False, True)
    if count < 0:
        raise RuntimeError(f"llama.cpp needs {-count} tokens for {len(text)} bytes")
    return list(buffer[:count])


def compare_tokens(tokenizer: PreTrainedTokenizerBase, path: Path, texts: Sequence[str]) -> int:
    """Check that both tokenizers give the same ids for every text (NFC; llama.cpp does not normalise).

    Returns:
        The number of ids compared.

    Raises:
        InputError: the first text that differs, with both lists.
    """
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    for text, found in zip(texts, gguf_token_ids(path, texts), strict=True):
        wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
        if found != wanted:
            first = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), 0)
            raise InputError(
                f"{path.name} cuts {text[:60]!r} into other tokens than the merged model: "
                f"{found[first : first + 6]} instead of {wanted[first : first + 6]} from token {first} on.",
                "the same token ids.",
                "convert again with the tokenizer that the model was trained with.",
            )
    return sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)


def _spread(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """About `count` rows, evenly spaced."""
    step = max(1, len(rows) // count)
    return list(rows[::step][:count])


def _measure(
    backend: Backend, prompts: list[list[int]], answers: list[list[int]], windows: list[list[int]], progress: Progress
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Label log-probabilities of all prompts, and the log-softmax at every position of the windows; then close it."""
    labels = backend.label_log_probs(prompts, answers)
    progress.advance(len(prompts))
    distributions = []
    for ids in windows:
        distributions.append(backend.window_log_probs(ids))
        progress.advance()
    backend.close()
    gc.collect()
    return labels, distributions


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p ‖ q) of each position, nats; row by row, because the arrays are large."""
    result = np.empty(len(p))
    for i, (left, right) in enumerate(zip(p, q, strict=True)):
        wide = left.astype(np.float64)
        result[i] = max(0.0, float(np.sum(np.exp(wide) * (wide - right))))
    return result


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
    encoded = [encode(tokenizer, task, row["text"]).prompt_ids for row in _spread(rows, ROWS)]
    windows, answers = _spread(encoded, WINDOWS), label_ids(tokenizer, task)
    arithmetic = _arithmetic(model_dir)
    with Progress("comparing merged model and GGUF", 2 * (len(encoded) + len(windows))) as progress:
        merged_labels, merged = _measure(_open_merged(model_dir, arithmetic), encoded, answers, windows, progress)
        opened = _open_gguf(path, task.max_seq_length, n_threads)
        gguf_labels, gguf = _measure(opened, encoded, answers, windows, progress)
    divergence = np.concatenate([_kl(p, q) for p, q in zip(merged, gguf, strict=True)])
    top = np.concatenate([p.argmax(-1) == q.argmax(-1) for p, q in zip(merged, gguf, strict=True)])
    report = GateReport(
        texts=len(texts),
        tokens=tokens,
        windows=len(windows),
        positions=len(divergence),
        mean_kld=float(divergence.mean()),
        max_kld=float(divergence.max()),
        same_top=float(top.mean()),
        rows=len(encoded),
        label_agreement=float(np.mean(merged_labels.argmax(1) == gguf_labels.argmax(1))),
        max_label_difference=float(np.abs(merged_labels - gguf_labels).max()),
        computed_in=arithmetic,
        limit_kld=limit_kld,
        limit_agreement=limit_agreement,
        seconds=round(time.monotonic() - started, 2),
    )
    _refuse(report, path)
    return report


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
    # written so that NaN fails
    if report.mean_kld <= report.limit_kld and report.label_agreement >= report.limit_agreement:
        return
    raise InputError(
        f"{path.name} does not answer as the merged model: mean KL divergence {report.mean_kld:.3g} nats over "
        f"{report.positions} positions, {report.label_agreement:.1%} equal labels over {report.rows} rows.",
        f"at most {report.limit_kld:g} nats (gate_max_kld), at least {report.limit_agreement:.1%} "
        "(gate_min_label_agreement).",
        "do not quantize it; try outtype f32 to see whether rounding is the cause, and report it if it is not.",
    )
