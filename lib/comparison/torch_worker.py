"""One model folder of transformers in its own process: what `lib.comparison.worker` measures on a GGUF file."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.comparison.speed import GENERATED_TOKENS, PROMPT_TOKENS, load_facts, rate, read_once, repeat, repeat_loads
from lib.comparison.worker import diverge, row_log_probs
from lib.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH = 32
"""Prompts a forward pass."""


def score_folder(argument: dict[str, Any]) -> dict[str, Any]:
    """Everything measured on one folder, loaded by plain `from_pretrained`.

    Args:
        argument: as for `lib.comparison.worker.score_file`, with "sample" ({"text", "ids"}: what the reference's
            tokenizer makes of a text).

    Returns:
        the same keys; "weights" counts tied weights once, "tensor_bytes" and "bytes" are those of the safetensors.
    """
    import torch

    from lib.models.saved import count_weights, load_as_saved, weight_bytes
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
    from lib.models.saved import load_as_saved

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

    from lib.models.quiet import no_warnings, quiet
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
    from lib.models.saved import load_as_saved

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
    """Rates of reading a prompt and of greedy writing with a key-value cache, as `lib.comparison.speed` has them."""
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
