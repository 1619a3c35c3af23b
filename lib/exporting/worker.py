"""One export format in its own process: quantize, save, load again by plain `from_pretrained`, look at its answers."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.models.quiet import no_warnings, quiet
from lib.progress import Progress
from lib.run.child import peak_memory_mib
from lib.run.files import readable_by_group

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
        "seconds" (of quantizing and saving), "memory_mib" (peak until then), "weights", "weight_bytes",
        "tensor_bytes", "dtype", "check" and what the format adds, e.g. "group_size".

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
    return {"seconds": round(seconds, 2), "memory_mib": memory, **more, **_sizes(source, output), "check": check}


def _quantize(name: str, source: Path, output: Path, calibration: list[list[int]]) -> dict[str, Any]:
    if name == "gptq":
        from lib.exporting import gptq

        return gptq.quantize(source, output, calibration)
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
    from lib.device import bitsandbytes_problem

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
    for path in source.iterdir():
        if path.is_dir():
            shutil.copytree(path, output / path.name)
        elif path.suffix != ".safetensors" and path.name not in _OWN:
            shutil.copyfile(path, output / path.name)
    for path in output.rglob("*"):
        if path.is_file():
            readable_by_group(path)


def _sizes(source: Path, output: Path) -> dict[str, Any]:
    from lib.models.saved import weight_bytes
    from lib.models.weights import open_weights

    saved = open_weights(output)
    plain = {tensor.dtype for tensor in saved.tensors.values() if tensor.dtype in ("F32", "F16", "BF16")}
    return {
        "weights": open_weights(source).parameters,
        "weight_bytes": weight_bytes(output),
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

    from lib.models.saved import load_as_saved
    from lib.scoring import TransformersBackend

    backend = TransformersBackend(load_as_saved(folder), name=folder.name)
    found = [backend.window_log_probs(ids, max(0, len(ids) - CHECKED_POSITIONS)) for ids in prompts]
    backend.close()
    return np.concatenate(found)
