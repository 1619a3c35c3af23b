"""One model in a process of its own: speed, scores of the rows, peak memory, perplexity and KL divergence.

The parent makes all token ids once (`encode_rows`), so that every model reads the same ones, and every process gets the
same argument. A GGUF file runs in llama.cpp, a folder in transformers as it loads by plain `from_pretrained`; what is
measured is the same. For llama.cpp only numpy and llama_cpp are imported: a process starts in a fraction of a second.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError, refusal
from lib.models.runtime_folders import runtime_of
from lib.models.weights import open_weights
from lib.prompts.tasks import Task, texts_of
from lib.runs.machine import no_warnings, quiet
from lib.scoring.backend import Keep, kept_peak_memory_mib, model_hash
from lib.scoring.llama_backend import LlamaCppBackend
from lib.scoring.log_probabilities import RowIds, score_ids
from lib.scoring.measure import FEWEST_DOCUMENTS, SEED
from lib.scoring.perplexity import open_reference, positions, scored_tokens, store_reference, table_of, text_windows
from lib.stages.compare import speed
from lib.statistics.paired import clustered_bootstrap_t

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lib.scoring.backend import Backend

WAIT_POLICY = "passive"
"""How llama.cpp's threads wait for one another (OMP_WAIT_POLICY)."""
BATCH = 32
"""Prompts a forward pass of transformers."""
MERGED, MERGED_FLOAT32, DEQUANTIZED = "merged", "merged_float32", "dequantized"
"""What `score_in_transformers` scores: the model that the files were made from, as saved and with its weights in
float32, and the weights of a GGUF file."""
_SMALLEST_WINDOW = 64

Row = Mapping[str, Any]


# What the parent sends.


@dataclass(frozen=True)
class EncodedRows:
    """Token ids of the rows and of the held-out text, and what to know about them.

    Attributes:
        rows: the rows' own.
        windows: token ids of the held-out text.
        documents: group of near-duplicate rows that each scored token of the windows is from, window after window.
        sample: {"text", "ids"} of a row: another tokenizer shows by it.
        n_ctx: longest sequence.
        notes: sentences about what was changed to make it work.
    """

    rows: RowIds
    windows: list[list[int]]
    documents: list[int]
    sample: dict[str, Any]
    n_ctx: int
    notes: list[str]

    def argument(self, n_threads: int, n_gpu_layers: int) -> dict[str, Any]:
        """What every process gets."""
        own = {key: getattr(self, key) for key in ("windows", "documents", "sample", "n_ctx")}
        return {**own, "rows": vars(self.rows), "n_threads": n_threads, "n_gpu_layers": n_gpu_layers}


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, task: Task, rows: Sequence[Row], n_ctx: int, most: int
) -> EncodedRows:
    """Everything is tokenized here.

    The held-out text is, leak-free rows first, the bare texts of rows that a prompt asks about, or whole conversations.

    Args:
        n_ctx, most: tokens of a window of the held-out text, and of the windows together.
    """
    first = sorted(range(len(rows)), key=lambda i: bool(rows[i].get("leaked")))
    encoded, words = [task.encode(tokenizer, row) for row in rows], task.answer_words(tokenizer)
    if words:
        ids, row_of = _joined_texts(tokenizer, [rows[i]["text"] for i in first])
    else:
        ids = [token for i in first for token in encoded[i].ids]
        row_of = np.repeat(np.arange(len(first)), [len(encoded[i].ids) for i in first])
    windows, notes = _windows(ids, n_ctx, most)
    groups = np.unique(np.array([rows[i].get("group", i) for i in first]), return_inverse=True)[1]
    text, own = texts_of(rows[first[0]])[0], RowIds.of(rows, encoded, words)
    return EncodedRows(
        rows=own,
        windows=windows,
        documents=scored_tokens(groups[row_of], windows).tolist(),
        sample={"text": text, "ids": tokenizer(text, add_special_tokens=False)["input_ids"]},
        n_ctx=max(len(windows[0]), max(map(len, own.prompts)) + max(map(len, words), default=0)),
        notes=notes,
    )


def _joined_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[list[int], np.ndarray]:
    """Token ids of texts on lines of their own, and the text of each token."""
    tokens = tokenizer("\n".join(texts), add_special_tokens=False, return_offsets_mapping=True)
    starts = np.cumsum([0, *(len(text) + 1 for text in texts[:-1])])
    text_of = np.searchsorted(starts, [begin for begin, _ in tokens["offset_mapping"]], side="right") - 1
    return tokens["input_ids"], text_of


def _windows(ids: list[int], n_ctx: int, most: int) -> tuple[list[list[int]], list[str]]:
    """Windows of the held-out text, smaller ones (which is said) where it is short."""
    notes, window = [], min(n_ctx, max(len(ids), _SMALLEST_WINDOW))
    if _SMALLEST_WINDOW <= min(len(ids), most) < n_ctx:
        window = 2 ** (min(len(ids), most).bit_length() - 1)
        notes.append(
            f"the held-out text has only {len(ids)} tokens: perplexity windows are {window} tokens instead of {n_ctx}"
        )
    return text_windows(ids, window, most), notes


# What a process does.


def measure_model(argument: dict[str, Any]) -> dict[str, Any]:
    """Everything measured on one GGUF file or folder.

    Args:
        argument: `EncodedRows.argument`, "path", "keep" (file for the scores as they come), "reference" (file of the
            reference's log-probabilities), "is_reference" (make that file).

    Returns:
        size and speed (as `lib.stages.compare.speed.measure`; "weights" of a folder counts tied weights once,
        "tensor_bytes" and "bytes" are those of its safetensors), "log_probs", "score_seconds", "found" (what was
        already scored, in words), "memory_mib" (peak while loading, timing and scoring; the reference's
        log-probabilities, which only this comparison needs, are not in it), "text" (what `table_of` says of the
        held-out text; of all but the reference also "kld_mean_interval", over documents), "note", "device" and
        "thread_waiting".
    """
    path = Path(argument["path"])
    facts = (_measure_folder if path.is_dir() else _measure_gguf)(path, argument)
    return {**facts, "thread_waiting": os.environ.get("OMP_WAIT_POLICY", "")}


def _measure_gguf(path: Path, argument: dict[str, Any]) -> dict[str, Any]:
    """A file, in llama.cpp."""
    # Threads that wait must sleep: spinning ones slow llama.cpp down a hundredfold when the cores are shared. Read by
    # the OpenMP library when llama.cpp is loaded, so it has to be set before.
    os.environ.setdefault("OMP_WAIT_POLICY", WAIT_POLICY)
    devices, window = (argument["n_threads"], argument["n_gpu_layers"]), argument["windows"][0]
    facts = {**speed.measure(path, window, *devices), "bytes": path.stat().st_size}
    with LlamaCppBackend(path, argument["n_ctx"], *devices) as backend:
        facts |= score(backend, argument, "check the model's weights for NaN or infinity.")
    # Windows in one batch, as llama-perplexity has them; the room for their logits is not the scoring's memory.
    with LlamaCppBackend(path, len(window), *devices, n_outputs=len(window) - len(window) // 2) as backend:
        return facts | _measure_text(backend, argument)


def _measure_folder(path: Path, argument: dict[str, Any]) -> dict[str, Any]:
    """A folder, in the program that it is for: transformers or another runtime."""
    from lib.models.loading import count_weights, weight_bytes, weight_files
    from lib.scoring.folders import open_folder

    use_threads(argument)
    _check_tokenizer(path, argument["sample"])
    weights = count_weights(path)
    for file in weight_files(path):
        speed.read_once(file)
    prompt = argument["windows"][0][: speed.PROMPT_TOKENS]
    place = {"n_threads": argument["n_threads"], "n_ctx": len(prompt) + speed.GENERATED_TOKENS}

    def seconds_of_a_load() -> float:
        started = time.perf_counter()
        with open_folder(path, BATCH, **place) as backend:
            return backend.load_seconds or time.perf_counter() - started

    loads = speed.repeat(seconds_of_a_load, *speed.LOADS)
    with open_folder(path, BATCH, **place) as backend:
        times = speed.times_of(backend.new_text, prompt)
    with open_folder(path, BATCH, path.name, argument["n_threads"]) as backend:
        return {
            "bytes": weight_bytes(path),
            "weights": weights,
            "tensor_bytes": weight_bytes(path) if runtime_of(path) else open_weights(path).nbytes,
            "speed": speed.rates(loads, len(prompt), *times),
            **score(backend, argument, "leave this format out of export_formats."),
            **_measure_text(backend, argument),
        }


def _measure_text(backend: Backend, argument: dict[str, Any]) -> dict[str, Any]:
    text = (store if argument["is_reference"] else diverge)(backend, argument)
    return {"text": text, "note": backend.note, "device": backend.device}


def score_in_transformers(argument: dict[str, Any]) -> dict[str, Any]:
    """The rows alone, by the models of the error ladder that transformers computes, one after another.

    Args:
        argument: as for `measure_model`; "path" is the merged model, "gguf" the file at the end of the ladder, or None;
            "dequantize": whether its weights are computed exactly, too.

    Returns:
        "answers": by way "log_probs", "score_seconds", "found" and "dtype". The ways are `MERGED`; where there is a
        file to dequantize `DEQUANTIZED`; and `MERGED_FLOAT32` (what 16-bit arithmetic alone changed) where that is new
        and fits into the free memory. "found": of all together.
    """
    from lib.models.loading import affordable_dtype

    use_threads(argument)
    answers = {MERGED: score_as(MERGED, argument)}
    if argument["gguf"]:
        if argument["dequantize"]:
            answers[DEQUANTIZED] = score_as(DEQUANTIZED, argument)
        if answers[MERGED]["dtype"] != "float32" and affordable_dtype(Path(argument["path"])) == "float32":
            answers[MERGED_FLOAT32] = score_as(MERGED_FLOAT32, argument)
    return {"answers": answers, "found": ", ".join(filter(None, (answer["found"] for answer in answers.values())))}


def score_as(way: str, argument: dict[str, Any]) -> dict[str, Any]:
    """The rows by one of those models, which is loaded and dropped again."""
    from lib.scoring.torch_backend import TransformersBackend

    path = Path(argument["gguf"] if way == DEQUANTIZED else argument["path"])
    backend = TransformersBackend(_load(path, way, argument), BATCH, path.name)
    dtype = str(backend.model.dtype).removeprefix("torch.")
    asked = {**argument, "path": path, "keep": Path(argument["keep"]).with_name(f"{way}.jsonl")}
    made_by = "quantize again with notebook 06" if way == DEQUANTIZED else "merge again with notebook 04"
    scored = score(backend, asked, f"{made_by} and force: true.")
    backend.close()
    return {**scored, "dtype": dtype}


def _load(path: Path, way: str, argument: Mapping[str, Any]) -> PreTrainedModel:
    from lib.models.loading import load_as_saved, load_model

    if way == MERGED:
        _check_tokenizer(path, argument["sample"])
        return load_as_saved(path)
    if way == MERGED_FLOAT32:
        return load_model(path, dtype="float32", device="cpu")
    quiet()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    options["config"] = AutoConfig.from_pretrained(argument["path"], trust_remote_code=False)
    with no_warnings():
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options).eval()


def use_threads(argument: Mapping[str, Any]) -> None:
    """Torch computes with the threads that llama.cpp has."""
    import torch

    torch.set_num_threads(argument["n_threads"])


def score(backend: Backend, argument: Mapping[str, Any], remedy: str) -> dict[str, Any]:
    """Score the rows.

    Returns:
        "log_probs" (see `lib.scoring.log_probabilities.score_ids`), "score_seconds", "found" and "memory_mib" (see
        `measure_model`).

    Raises:
        InputError: log-probabilities that are not numbers; `remedy` says what to do.
    """
    keep, what = keep_of(argument), f"scoring rows with {backend.name}"
    values, seconds, found = score_ids(backend, RowIds(**argument["rows"]), what, keep)
    if not np.isfinite(values).all():
        name = Path(argument["path"]).name
        raise InputError(f"{name} gives log-probabilities that are not numbers.", "finite log-probabilities.", remedy)
    memory = max(backend.peak_memory_mib(), kept_peak_memory_mib(keep.path))
    return {"log_probs": values.tolist(), "score_seconds": seconds, "found": found, "memory_mib": memory}


def keep_of(argument: Mapping[str, Any]) -> Keep:
    """Where the work on a file or folder is kept as it comes."""
    return Keep(Path(argument["keep"]), model_hash(Path(argument["path"])))


def store(backend: Backend, argument: dict[str, Any]) -> dict[str, Any]:
    """The reference's perplexity; its log-probabilities go into the file."""
    path = Path(argument["reference"])
    return store_reference(backend, argument["windows"], path, f"perplexity of {backend.name}").perplexity


def diverge(backend: Backend, argument: dict[str, Any]) -> dict[str, Any]:
    """KL divergence from the stored reference, and perplexity; an interval over documents where there are enough."""
    windows, documents = argument["windows"], np.array(argument["documents"])
    reference = open_reference(Path(argument["reference"]), windows, backend.vocab_size)
    found = positions(reference, backend, windows, f"KL divergence of {backend.name}")
    interval = None
    if len(np.unique(documents)) >= FEWEST_DOCUMENTS:
        interval = clustered_bootstrap_t(found.kl, documents, SEED).to_json()
    return {**table_of(found), "kld_mean_interval": interval}


def _check_tokenizer(path: Path, sample: Mapping[str, Any]) -> None:
    """The token ids come from the reference's tokenizer; the folder's own must give the same."""
    from lib.models.loading import load_tokenizer

    own = load_tokenizer(path, chat=False)(sample["text"], add_special_tokens=False)["input_ids"]
    if own != sample["ids"]:
        raise refusal("compare/other-tokenizer", path=path)
