"""One export format in a process of its own: quantize, save, load again, compare with the merged model."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.progress import Progress
from lib.runs.child import peak_memory_mib
from lib.runs.files import readable_by_group
from lib.runs.machine import no_warnings, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CHECKED_POSITIONS = 16
"""Last positions of each prompt whose next-token distributions are compared with the merged model's."""

_OWN = {"config.json", "README.md", "merge.json", "model.safetensors.index.json"}
"""Files of the merged model that are not copied: the export writes its own."""


def make(argument: dict[str, Any]) -> dict[str, Any]:
    """Make one format.

    Args:
        argument: "format", "source" (folder of the merged model), "output" (folder to make), "calibration" (token ids
            of training rows; for GPTQ), "prompts" (token ids of the self-check).

    Returns:
        "seconds" (of quantizing and saving), "peak_memory_mib" (until then), "weights", "bytes", "bits_per_weight",
        "tensor_bytes", "dtypes", "check" and what the format adds, e.g. "group_size".

    Raises:
        InputError: a model or a machine that this format does not fit.
    """
    name, source, output = argument["format"], Path(argument["source"]), Path(argument["output"])
    quiet()
    with Progress("steps", 3) as progress:
        started = time.perf_counter()
        output.mkdir(parents=True)
        with no_warnings():
            more = _quantize(name, source, output, argument["calibration"])
        _copy_companions(source, output)
        seconds, memory = time.perf_counter() - started, peak_memory_mib()
        progress.advance(1, "made")
        check = _check(source, output, argument["prompts"], progress)
    return {"seconds": round(seconds, 2), "peak_memory_mib": memory, **more, **_sizes(source, output), "check": check}


def _quantize(name: str, source: Path, output: Path, calibration: list[list[int]]) -> dict[str, Any]:
    if name == "gptq":
        return quantize_gptq(source, output, calibration)
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.float16 if name == "fp16" else torch.bfloat16
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    if name not in ("fp16", "bf16"):
        options |= {"quantization_config": _quantization(name), "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(str(source), **options)
    if name == "fp16":
        _refuse_overflow(model)
    model.save_pretrained(str(output))
    return {}


def _quantization(name: str) -> Any:
    """The configuration of transformers for one format."""
    import torch
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if name == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(version=2, set_inductor_config=False))
    from lib.runs.machine import bitsandbytes_problem

    if problem := bitsandbytes_problem():
        raise InputError(f"bitsandbytes does not work here ({problem}).", "a working one.", "see `workbook doctor`.")
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _refuse_overflow(model: PreTrainedModel) -> None:
    """Weights above 65,504 became infinite."""
    import torch

    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise InputError(f"{name} exceeds the range of float16.", "weights below 65,504.", "use bf16.")


def _copy_companions(source: Path, output: Path) -> None:
    """Tokenizer, template, generation settings and licences; every file readable by the group."""
    left_out = shutil.ignore_patterns("*.safetensors", *_OWN)
    shutil.copytree(source, output, ignore=left_out, copy_function=shutil.copyfile, dirs_exist_ok=True)
    for path in output.rglob("*"):
        if path.is_file():
            readable_by_group(path)


def _sizes(source: Path, output: Path) -> dict[str, Any]:
    from lib.models.loading import weight_bytes
    from lib.models.weights import open_weights

    saved = open_weights(output)
    plain = {tensor.dtype for tensor in saved.tensors.values() if tensor.dtype in ("F32", "F16", "BF16")}
    weights = open_weights(source).parameters
    return {
        "weights": weights,
        "bytes": weight_bytes(output),
        "bits_per_weight": 8 * saved.nbytes / weights,
        "tensor_bytes": saved.nbytes,
        "dtypes": sorted(plain),
    }


def _check(source: Path, output: Path, prompts: list[list[int]], progress: Progress) -> dict[str, Any]:
    """How far the saved folder's next-token distributions are from the merged model's on the ends of some prompts.

    Raises:
        InputError: the folder does not load, or gives numbers that are not finite.
    """
    import numpy as np

    own = _log_probs(output, prompts)
    progress.advance(1, "loaded again")
    if not np.isfinite(own).all():
        raise InputError(
            f"the {output.name} model gives log-probabilities that are not finite.",
            "numbers.",
            "leave this format out: the model's activations exceed its range.",
        )
    merged = _log_probs(source, prompts)
    progress.advance(1, "compared")
    kld = (np.exp(merged) * (merged - own)).sum(axis=1)
    return {
        "prompts": len(prompts),
        "positions": len(own),
        "mean_kld": float(kld.mean()),
        "same_top": float((own.argmax(axis=1) == merged.argmax(axis=1)).mean()),
    }


def _log_probs(folder: Path, prompts: list[list[int]]) -> Any:
    """Log-probabilities after the last positions of each prompt, (positions, V), loaded and dropped again."""
    import numpy as np

    from lib.models.loading import load_as_saved
    from lib.scoring.torch_backend import TransformersBackend

    backend = TransformersBackend(load_as_saved(folder), name=folder.name)
    found = [backend.window_log_probs(ids, max(0, len(ids) - CHECKED_POSITIONS)) for ids in prompts]
    backend.close()
    return np.concatenate(found)


# GPTQ by llm-compressor: INT4 weights in groups, each column's error pushed into the columns not yet rounded.

BITS = 4
GROUPS = (128, 64, 32, 16)
"""Weights that share a scale, the most that fit: 128 in llm-compressor's scheme W4A16."""

_HEAD = "lm_head"


def group_size(widths: set[int]) -> int:
    """The largest of `GROUPS` that divides the rows of every layer.

    Raises:
        InputError: some row is no multiple of 16: smaller groups would spend more on scales than they save.
    """
    for size in GROUPS:
        if all(width % size == 0 for width in widths):
            return size
    odd = min(width for width in widths if width % GROUPS[-1])
    raise InputError(
        f"linear layers with {odd} inputs.", f"a multiple of {GROUPS[-1]}.", "leave gptq out of export_formats."
    )


def quantize_gptq(source: Path, output: Path, calibration: list[list[int]]) -> dict[str, Any]:
    """Quantize a model folder and save it in the packed format of compressed-tensors.

    Args:
        calibration: token ids of the texts whose activations decide what may be rounded how.

    Returns:
        "group_size" and "calibration_rows", "calibration_tokens".

    Raises:
        InputError: no calibration texts, or layers that no group size fits.
    """
    if not calibration:
        raise InputError("no rows to calibrate GPTQ with.", "training rows.", "check max_train_rows.")
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.bfloat16, local_files_only=True)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != _HEAD}
    size = group_size({layer.in_features for layer in layers.values()})
    weights = QuantizationArgs(num_bits=BITS, type="int", symmetric=True, strategy="group", group_size=size)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=model,
        dataset=Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration]),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=[_HEAD]),
        max_seq_length=max(map(len, calibration)),
        num_calibration_samples=len(calibration),
    )
    model.save_pretrained(str(output), save_compressed=True)
    return {
        "group_size": size,
        "calibration_rows": len(calibration),
        "calibration_tokens": sum(map(len, calibration)),
    }
