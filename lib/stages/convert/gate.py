"""The gate between conversion and quantization: it stops the run if the GGUF does not answer as the merged model does.

Three questions: does llama.cpp cut the run's texts into the same token ids; is the next-token distribution the same
(KL divergence over whole prompts); does it choose the same labels? Keys and values are kept in float32 and flash
attention is off, so that only the stored weights and llama.cpp's arithmetic can differ.
"""

from __future__ import annotations

import gc
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError, refusal
from lib.models.gguf_file import read_metadata, read_tensors
from lib.models.loading import affordable_dtype, load_model, load_tokenizer
from lib.progress import Progress
from lib.prompts.tasks import Task, spread, texts_of
from lib.runs.files import data_file
from lib.scoring.backend import Backend
from lib.scoring.llama_backend import LlamaCppBackend, llama, open_model, token_ids
from lib.scoring.log_probabilities import NEAR_TIE, NEAR_TIE_LOW
from lib.scoring.perplexity import kl_divergence, normalised

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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

_Q8_0 = 8
_ROUNDED = {1, _Q8_0, 30}
"""F16, Q8_0 and BF16 in ggml's enum ggml_type."""

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
        divergences: KL(merged ‖ GGUF) of every position, nats; mean_kld, max_kld: of them.
        same_top: share of the positions with the same most probable token.
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
    divergences: list[float] = field(default_factory=list)


HARD_STRINGS = tuple(data_file("stages/convert/hard_strings.yaml"))
"""Texts on which tokenizers are known to differ; compared besides the run's own."""


def gguf_token_ids(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of llama.cpp for each text, special tokens recognised, nothing added.

    Raises:
        InputError: llama.cpp is missing or refuses the file.
    """
    api, model = llama(), open_model(path, 0, vocab_only=True)
    try:
        vocabulary = api.llama_model_get_vocab(model)
        return [token_ids(vocabulary, text.encode("utf-8", "replace"), False, True) for text in texts]
    finally:
        api.llama_model_free(model)


def _first_difference(found: Any, wanted: Any, shown: int) -> tuple[int, Any, Any]:
    """Where two unequal sequences part (the shorter one's end where it begins the other), and how both go on."""
    pairs = zip(found, wanted, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(wanted)))
    return first, found[first : first + shown], wanted[first : first + shown]


def compare_tokens(tokenizer: PreTrainedTokenizerBase, path: Path, texts: Sequence[str]) -> int:
    """Check that both tokenizers give the same ids for every text (NFC; llama.cpp does not normalise).

    Returns:
        The number of ids compared.

    Raises:
        InputError: the first text that differs, with both lists.
    """
    texts, count = [unicodedata.normalize("NFC", text) for text in texts], 0
    for text, found in zip(texts, gguf_token_ids(path, texts), strict=True):
        wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
        if found != wanted:
            first, found, wanted = _first_difference(found, wanted, 6)
            raise refusal("convert/other-tokens", path=path, text=text[:60], first=first, found=found, wanted=wanted)
        count += len(wanted)
    return count


def compare_prompts(
    tokenizer: PreTrainedTokenizerBase, path: Path, task: Task, rows: Sequence[Mapping[str, Any]]
) -> int:
    """Check that the template inside the GGUF, rendered as llama-cpp-python does, gives the prompts of this run.

    The system turn is always given and thinking switched on or off in words, as the row has it: no default can differ.

    Args:
        rows: {"text"} for a task with labels, else {"messages"} that end on an answer.

    Returns:
        The number of prompts compared.

    Raises:
        InputError: no template in the file, or the first prompt that differs.
    """
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = read_metadata(path).get("tokenizer.chat_template")
    if not isinstance(template, str):
        raise InputError(f"no chat template in {path.name}.", "the template of the model.", "convert the whole folder.")
    formatter = Jinja2ChatFormatter(template, eos_token=tokenizer.eos_token or "", bos_token=tokenizer.bos_token or "")
    for row in rows:
        wanted = task.prompt(tokenizer, row)
        found = formatter(messages=task.question(tokenizer, row), enable_thinking=task.reasons(row)).prompt
        if found != wanted:
            first, found, wanted = _first_difference(found, wanted, 40)
            raise refusal("convert/other-prompt", path=path, first=first, found=found, wanted=wanted)
    return len(rows)


@dataclass(frozen=True)
class _Questions:
    """What both models are asked.

    Attributes:
        prompts, answers: token ids of the prompts whose labels are compared, and of the labels; empty without labels.
        windows: token ids, and the positions after which the next token's distribution is compared.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    windows: list[tuple[list[int], Sequence[int]]]


def _questions(tokenizer: Any, task: Task, rows: Sequence[dict[str, Any]]) -> _Questions:
    if words := task.answer_words(tokenizer):
        prompts = [task.probe_ids(tokenizer, row) for row in spread(rows, ROWS)]
        return _Questions(prompts, words, [(ids, range(len(ids))) for ids in spread(prompts, WINDOWS)])
    windows: list[tuple[list[int], Sequence[int]]] = []
    for row in spread(rows, WINDOWS):
        conversation = task.encode(tokenizer, row)
        places = [place - 1 for place in conversation.loss[:ANSWER_POSITIONS]]
        windows.append((conversation.ids[: places[-1] + 1], places))
    return _Questions([], [], windows)


def _label_facts(merged: np.ndarray | None, gguf: np.ndarray | None, arithmetic: str) -> dict[str, Any]:
    if merged is None or gguf is None:
        return {"label_agreement": None, "clear_rows": 0, "clear_agreement": None, "max_label_difference": None}
    ordered, least = np.sort(merged, axis=1), NEAR_TIE if arithmetic == "float32" else NEAR_TIE_LOW
    same, clear = merged.argmax(1) == gguf.argmax(1), ordered[:, -1] - ordered[:, -2] >= least
    return {
        "label_agreement": float(np.mean(same)),
        "clear_rows": int(clear.sum()),
        "clear_agreement": float(np.mean(same[clear])) if clear.any() else None,
        "max_label_difference": float(np.abs(merged - gguf).max()),
    }


def _differences(p: np.ndarray, q: np.ndarray) -> Iterator[tuple[float, bool, float, float]]:
    """KL divergence, same most probable token, largest |Δ log p| and range of p, position by position.

    Args:
        p, q: log-probabilities (positions, vocabulary), compared row by row, because the arrays are large.
    """
    for left, right in zip(p, q, strict=True):
        left, right = normalised(left), normalised(right)
        same = left.argmax() == right.argmax()
        yield float(kl_divergence(left, right)), same, np.abs(left - right).max(), left.max() - left.min()


def _ask(
    backend: Backend, asked: _Questions, take: Callable[[int, np.ndarray], None], progress: Progress
) -> np.ndarray | None:
    """Log-probabilities of the labels (None without labels); `take` gets the number and the values of each window.

    The values are log-softmax of the next token at the window's positions, float32, (positions, vocabulary).
    """
    labels = backend.label_log_probs(asked.prompts, asked.answers) if asked.answers else None
    progress.advance(len(asked.prompts))
    for i, (ids, places) in enumerate(asked.windows):
        first = places[0]
        take(i, backend.window_log_probs(ids, first)[[place - first for place in places]])
        progress.advance()
    backend.close()
    return labels


def _compare_answers(
    model_dir: Path, path: Path, arithmetic: str, n_threads: int, n_ctx: int, asked: _Questions
) -> tuple[np.ndarray, dict[str, Any]]:
    """Both models on the same questions, one after the other in memory: a large vocabulary makes the values large.

    Returns:
        What `_differences` gives, a column a position; what is said of the labels.
    """
    from lib.scoring.torch_backend import TransformersBackend

    found: list[tuple[float, bool, float, float]] = []
    progress = Progress("comparing merged model and GGUF", 2 * (len(asked.prompts) + len(asked.windows)))
    with progress, tempfile.TemporaryDirectory(prefix="workbook-gate-") as name:
        folder = Path(name)
        merged = TransformersBackend(load_model(model_dir, dtype=arithmetic), batch_size=16)
        merged_labels = _ask(merged, asked, lambda i, values: np.save(folder / f"{i}.npy", values), progress)
        del merged
        gc.collect()
        gguf = LlamaCppBackend(path, n_ctx, n_threads=n_threads, cache_type="f32", flash_attention=False)

        def compare(i: int, values: np.ndarray) -> None:
            found.extend(_differences(np.load(folder / f"{i}.npy", mmap_mode="r"), values))

        gguf_labels = _ask(gguf, asked, compare, progress)
    return np.array(list(zip(*found, strict=True))), _label_facts(merged_labels, gguf_labels, arithmetic)


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
    asked, arithmetic = _questions(tokenizer, task, rows), affordable_dtype(model_dir)
    found, labels = _compare_answers(model_dir, path, arithmetic, n_threads, task.max_seq_length, asked)
    (mean_kld, same_top, *_), (max_kld, _, largest, widest) = found.mean(1).tolist(), found.max(1).tolist()
    types = {tensor.type for tensor in read_tensors(path)}
    exact = arithmetic == "float32" and not types & _ROUNDED
    report = GateReport(
        texts=len(texts),
        tokens=tokens,
        prompts=prompts,
        windows=len(asked.windows),
        positions=found.shape[1],
        divergences=[float(f"{value:.3g}") for value in found[0]],
        mean_kld=mean_kld,
        max_kld=max_kld,
        same_top=same_top,
        rows=len(asked.prompts),
        **labels,
        max_log_prob_difference=largest,
        log_prob_range=widest,
        exact_limit=EXACT * widest if exact else None,
        computed_in=arithmetic,
        limit_kld=limit_kld * (ALLOWANCE if arithmetic != "float32" or _Q8_0 in types else 1.0),
        limit_agreement=limit_agreement,
        seconds=round(time.monotonic() - started, 2),
    )
    _refuse(report, path)
    return report


def _refuse(report: GateReport, path: Path) -> None:
    exact = report.exact_limit is None or report.max_log_prob_difference <= report.exact_limit
    # written so that NaN fails
    agreed = report.clear_agreement is None or report.clear_agreement >= report.limit_agreement
    if exact and report.mean_kld <= report.limit_kld and agreed:
        return
    labels = ""
    if report.clear_agreement is not None:
        labels = f"{report.clear_agreement:.1%} equal labels over {report.clear_rows} rows that are no near ties, "
    exactly = f", and |Δ log p| of {report.exact_limit:.2g} for float32." if report.exact_limit else "."
    raise refusal("convert/other-answers", path=path, report=report, labels=labels, exactly=exactly)
