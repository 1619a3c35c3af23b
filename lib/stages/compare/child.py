"""One file in its own process: speed, label scores, peak memory, perplexity and KL divergence.
One model folder of transformers in its own process: what `lib.stages.compare.child` measures on a GGUF file.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError
from lib.runs.child import peak_memory_mib
from lib.scoring.backend import Backend
from lib.scoring.journal import Keep, kept_peak_memory_mib, model_hash
from lib.scoring.llama_backend import LlamaCppBackend
from lib.scoring.log_probabilities import kept_log_probs, score_answers
from lib.scoring.measure import FEWEST_DOCUMENTS, SEED
from lib.scoring.perplexity import open_reference, positions, store_reference, table_of
from lib.stages.compare.speed import (
    GENERATED_TOKENS,
    PROMPT_TOKENS,
    load_facts,
    measure,
    rate,
    read_once,
    repeat,
    repeat_loads,
)
from lib.statistics.paired import clustered_bootstrap_t

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# One file in its own process: speed, label scores, peak memory, perplexity and KL divergence.
#
# Imports only numpy and llama_cpp, so that a process starts in a fraction of a second; token ids come from the parent.

WAIT_POLICY = "passive"
"""How llama.cpp's threads wait for one another (OMP_WAIT_POLICY)."""


def score_file(argument: dict[str, Any]) -> dict[str, Any]:
    """Everything measured on one file.

    Args:
        argument: "path", "names" (of the rows), "prompts", "answers" and "windows" (token ids), "keep" (file for the
            scores as they come), "spans" (of the answers; empty with labels), "documents" (of each scored token of the
            windows), "n_ctx" (longest sequence), "n_threads", "n_gpu_layers", "reference" (file of the reference's
            log-probabilities), "is_reference" (make that file).

    Returns:
        what `measure` gives, "log_probs", "score_seconds", "found" (what of it was done already, in words),
        "memory_mib" (peak while loading, timing and scoring; the reference's log-probabilities, which only this
        comparison needs, are not in it), "divergence" (a KlTable as a dict; null for the reference),
        "kld_mean_interval" (over documents) and "perplexity" (a Perplexity as a dict; null for the others).
    """
    # Threads that wait must sleep: spinning ones slow llama.cpp down a hundredfold when the cores are shared. Read by
    # the OpenMP library when llama.cpp is loaded, so it has to be set before.
    os.environ.setdefault("OMP_WAIT_POLICY", WAIT_POLICY)
    path, windows = Path(argument["path"]), argument["windows"]
    speed = measure(path, windows[0], argument["n_threads"], argument["n_gpu_layers"])
    backend = LlamaCppBackend(path, argument["n_ctx"], argument["n_threads"], argument["n_gpu_layers"])
    with backend:
        scored = row_log_probs(backend, argument)
        log_probs = scored.pop("values")
        if not np.isfinite(log_probs).all():
            raise InputError(
                f"{path.name} gives log-probabilities that are not numbers.",
                "finite log-probabilities.",
                "check the model's weights for NaN or infinity.",
            )
    # windows in one batch, as llama-perplexity has them; the room for their logits is not the scoring's memory
    n_ctx, devices = len(windows[0]), (argument["n_threads"], argument["n_gpu_layers"])
    backend = LlamaCppBackend(path, n_ctx, *devices, n_outputs=n_ctx - n_ctx // 2)
    with backend:
        text = (store if argument["is_reference"] else diverge)(backend, argument)
    return {
        **speed,
        "bytes": path.stat().st_size,
        "log_probs": log_probs.tolist(),
        **scored,
        "device": backend.device,
        "thread_waiting": os.environ["OMP_WAIT_POLICY"],
        **text,
    }


def row_log_probs(backend: Backend, argument: dict[str, Any]) -> dict[str, Any]:
    """log p of each answer word, (rows, words); without labels of all answers of a row together, (rows, 1).

    Returns:
        "values" (the array), "score_seconds", "found" and "memory_mib" (see `score_file`).
    """
    keep, what = keep_of(argument), f"scoring rows with {backend.name}"
    names, prompts = argument["names"], argument["prompts"]
    if argument["spans"]:
        scores = score_answers(backend, names, prompts, argument["spans"], what, keep)
        values, seconds, words = scores.log_probs[:, None], scores.seconds, scores.found
    else:
        values, seconds, words = kept_log_probs(backend, names, prompts, argument["answers"], what, keep)
    memory = max(peak_memory_mib(), kept_peak_memory_mib(keep.path))
    return {"values": values, "score_seconds": seconds, "found": words, "memory_mib": memory}


def keep_of(argument: dict[str, Any]) -> Keep:
    """Where the work on a file or folder is kept as it comes."""
    return Keep(Path(argument["keep"]), model_hash(Path(argument["path"])))


def store(backend: Backend, argument: dict[str, Any]) -> dict[str, Any]:
    """The reference's perplexity; its log-probabilities go into the file."""
    path = Path(argument["reference"])
    reference = store_reference(backend, argument["windows"], path, f"perplexity of {backend.name}")
    return {"perplexity": asdict(reference.perplexity), "divergence": None, "kld_mean_interval": None}


def diverge(backend: Backend, argument: dict[str, Any]) -> dict[str, Any]:
    """KL divergence from the stored reference, and perplexity; an interval over documents where there are enough."""
    windows, documents = argument["windows"], np.array(argument["documents"])
    reference = open_reference(Path(argument["reference"]), windows, backend.vocab_size)
    found = positions(reference, backend, windows, f"KL divergence of {backend.name}")
    interval = None
    if found.kl is not None and len(np.unique(documents)) >= FEWEST_DOCUMENTS:
        interval = clustered_bootstrap_t(found.kl, documents, SEED).to_json()
    return {"perplexity": None, "divergence": asdict(table_of(found)), "kld_mean_interval": interval}


# One model folder of transformers in its own process: what `lib.stages.compare.child` measures on a GGUF file.

BATCH = 32
"""Prompts a forward pass."""


def score_folder(argument: dict[str, Any]) -> dict[str, Any]:
    """Everything measured on one folder, loaded by plain `from_pretrained`.

    Args:
        argument: as for `lib.stages.compare.child.score_file`, with "sample" ({"text", "ids"}: what the reference's
            tokenizer makes of a text).

    Returns:
        the same keys; "weights" counts tied weights once, "tensor_bytes" and "bytes" are those of the safetensors.
    """
    import torch

    from lib.models.loading import count_weights, load_as_saved, weight_bytes
    from lib.models.weights import open_weights
    from lib.scoring.torch_backend import TransformersBackend

    path, windows = Path(argument["path"]), argument["windows"]
    torch.set_num_threads(argument["n_threads"])
    _check_tokenizer(path, argument["sample"])
    stored, weights = open_weights(path), count_weights(path)
    for file in stored.files:
        read_once(file)
    loads = repeat_loads(lambda: _load_once(path))
    model = load_as_saved(path)
    speed = _speed(model, windows[0][:PROMPT_TOKENS])
    backend = TransformersBackend(model, BATCH, path.name)
    scored = row_log_probs(backend, argument)
    log_probs = _finite(scored.pop("values"), path, "leave this format out of export_formats.")
    text = diverge(backend, argument)
    return {
        "file_type": None,
        "bytes": weight_bytes(path),
        "weights": weights,
        "tensor_bytes": stored.nbytes,
        "vocab_size": backend.vocab_size,
        **load_facts(loads),
        **speed,
        "log_probs": log_probs.tolist(),
        **scored,
        "note": backend.note,
        "device": backend.device,
        "thread_waiting": os.environ.get("OMP_WAIT_POLICY", ""),
        **text,
    }


def score_merged(argument: dict[str, Any]) -> dict[str, Any]:
    """The rows alone, by the model that the files were made from: "log_probs", "score_seconds", "found", "dtype"."""
    from lib.models.loading import load_as_saved

    path = Path(argument["path"])
    _check_tokenizer(path, argument["sample"])
    return _score_rows(load_as_saved(path), path, argument)


def _score_rows(model: PreTrainedModel, path: Path, argument: dict[str, Any]) -> dict[str, Any]:
    import torch

    from lib.scoring.torch_backend import TransformersBackend

    torch.set_num_threads(argument["n_threads"])
    backend = TransformersBackend(model, BATCH, path.name)
    scored = row_log_probs(backend, argument)
    log_probs = _finite(scored.pop("values"), path, "merge again with notebook 04 and force: true.")
    dtype = str(backend.model.dtype).removeprefix("torch.")
    return {"log_probs": log_probs.tolist(), **scored, "dtype": dtype, "note": backend.note}


def score_merged_float32(argument: dict[str, Any]) -> dict[str, Any]:
    """The same as `score_merged`, the weights loaded in float32: what 16-bit arithmetic alone changed."""
    from lib.models.loading import load_model

    path = Path(argument["path"])
    return _score_rows(load_model(path, dtype="float32", device="cpu"), path, argument)


def score_dequantized(argument: dict[str, Any]) -> dict[str, Any]:
    """The rows alone, by a GGUF file's weights turned back to float32 and computed by transformers.

    Args:
        argument: as for `score_merged`; "path" is the GGUF file, "config" the folder of the model it was made from.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lib.runs.machine import no_warnings, quiet
    from lib.scoring.torch_backend import TransformersBackend

    quiet()
    path = Path(argument["path"])
    torch.set_num_threads(argument["n_threads"])
    config = AutoConfig.from_pretrained(argument["config"], trust_remote_code=False)
    with no_warnings():
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
    scored = row_log_probs(TransformersBackend(model, BATCH, path.name), argument)
    log_probs = _finite(scored.pop("values"), path, "quantize again with notebook 06 and force: true.")
    return {"log_probs": log_probs.tolist(), **scored, "dtype": "float32"}


def _load_once(path: Path) -> float:
    """Seconds of a load; the model is gone before the next one."""
    from lib.models.loading import load_as_saved

    started = time.perf_counter()
    model = load_as_saved(path)
    seconds = time.perf_counter() - started
    del model
    gc.collect()
    return seconds


def _finite(log_probs: np.ndarray, path: Path, do: str) -> np.ndarray:
    if not np.isfinite(log_probs).all():
        found = f"{path.name} gives log-probabilities that are not numbers."
        raise InputError(found, "finite log-probabilities.", do)
    return log_probs


def _check_tokenizer(path: Path, sample: dict[str, Any]) -> None:
    """The token ids come from the reference's tokenizer; the folder's own must give the same."""
    from lib.models.loading import load_tokenizer

    own = load_tokenizer(path)(sample["text"], add_special_tokens=False)["input_ids"]
    if own != sample["ids"]:
        raise InputError(
            f"the tokenizer in {path} gives other token ids than the reference's.",
            "one tokenizer.",
            "compare models that were made from one model.",
        )


def _speed(model: PreTrainedModel, prompt: Sequence[int]) -> dict[str, Any]:
    """Rates of reading a prompt and of greedy writing with a key-value cache, as `lib.stages.compare.speed` has
    them."""
    import torch

    ids = torch.tensor([list(prompt)], device=model.device)

    def seconds_since(started: float) -> float:
        if ids.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def read() -> tuple[float, Any]:
        started = time.perf_counter()
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return seconds_since(started), output

    def write() -> float:
        _, output = read()
        started = time.perf_counter()
        for _ in range(GENERATED_TOKENS):
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        return seconds_since(started)

    with torch.inference_mode():
        prompts, written = repeat(lambda: read()[0]), repeat(write)
    return {**rate("prompt", ids.shape[1], prompts), **rate("generation", GENERATED_TOKENS, written)}
