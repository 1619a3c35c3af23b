"""Model folders loaded as they were saved: quantized checkpoints carry their own configuration, so none is passed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lib.device import available_memory
from lib.errors import InputError
from lib.models.loading import check_model_folder
from lib.models.quiet import no_warnings, quiet
from lib.models.weights import open_weights
from lib.run.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LIBRARIES = {"bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed_tensors", "torchao": "torchao"}
"""quant_method of config.json → the package that transformers needs to read it."""


def quantization_method(folder: Path) -> str | None:
    """`quant_method` of the folder's config.json; None for a folder of plain weights (or no folder at all)."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = read_json(path).get("quantization_config") or {}
    return config.get("quant_method")


def weight_bytes(folder: Path) -> int:
    """Bytes on the disk of the folder's weight files (safetensors)."""
    from lib.models.weights import open_weights

    return sum(path.stat().st_size for path in open_weights(folder).files)


def count_weights(folder: Path) -> int:
    """Number of weights of the unquantized architecture, tied ones once; nothing is allocated."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet()
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def affordable_dtype(folder: Path) -> str:
    """Arithmetic for a check of a model folder: "float32" where its weights fit in memory so, else "bfloat16"."""
    return "float32" if open_weights(folder).parameters * 4 * 1.3 < available_memory() else "bfloat16"


def load_as_saved(folder: Path) -> PreTrainedModel:
    """What `AutoModelForCausalLM.from_pretrained(folder)` gives, in eval mode.

    That is: its own dtype, on the CPU (bitsandbytes puts itself on a GPU where there is one).

    Raises:
        InputError: an unusable folder, a quantization whose package is absent, missing or superfluous tensors.
    """
    from lib.device import has_module

    quiet()
    check_model_folder(folder)
    method = quantization_method(folder)
    needed = LIBRARIES.get(method, method) if method else None
    if needed and not has_module(needed):
        raise InputError(
            f"{folder} is quantized by {method}, and {needed} is not installed.",
            f"the package {needed}.",
            f"pip install {needed.replace('_', '-')}, or leave this folder out.",
        )
    _hush_casts()
    from transformers import AutoModelForCausalLM

    with no_warnings():
        model, report = AutoModelForCausalLM.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True, output_loading_info=True
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if wrong := sorted(map(str, report[kind])):
            raise InputError(
                f"{folder} has {len(wrong)} {kind.replace('_', ' ')} (first {wrong[0]}).",
                "a tensor for each place of the model.",
                "make the folder again.",
            )
    return model.requires_grad_(False).eval()


def _hush_casts() -> None:
    """Drop the line that bitsandbytes logs at every 8-bit product: it computes the activations' INT8 from float16."""
    import logging

    logger = logging.getLogger("bitsandbytes.autograd._functions")
    if not logger.filters:
        logger.addFilter(lambda record: not str(record.msg).startswith("MatMul8bitLt: inputs will be cast"))
