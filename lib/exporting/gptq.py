"""GPTQ by llm-compressor: INT4 weights in groups, each column's error pushed into the columns not yet rounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.errors import InputError

BITS = 4
GROUP = 128
"""Weights that share a scale, as in llm-compressor's scheme W4A16."""

_SMALLEST_GROUP = 16
_HEAD = "lm_head"


def group_size(widths: set[int]) -> int:
    """Largest group of at most `GROUP` weights (a power of two) that divides the rows of every layer.

    Raises:
        InputError: some row is no multiple of 16: smaller groups would spend more on scales than they save.
    """
    size = GROUP
    while size >= _SMALLEST_GROUP:
        if all(width % size == 0 for width in widths):
            return size
        size //= 2
    odd = sorted(width for width in widths if width % _SMALLEST_GROUP)
    raise InputError(
        f"linear layers with {odd[0]} inputs.", f"a multiple of {_SMALLEST_GROUP}.", "leave gptq out of export_formats."
    )


def quantize(source: Path, output: Path, calibration: list[list[int]]) -> dict[str, Any]:
    """Quantize a model folder and save it in the packed format of compressed-tensors.

    Args:
        calibration: token ids of the texts whose activations decide what may be rounded how.

    Returns:
        "group_size" and "calibration_rows", "calibration_tokens".

    Raises:
        InputError: no calibration texts, or layers that no group size fits.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if not calibration:
        raise InputError("no rows to calibrate GPTQ with.", "training rows.", "check max_train_rows.")
    model = AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.bfloat16, local_files_only=True)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != _HEAD}
    size = group_size({layer.in_features for layer in layers.values()})
    _oneshot(model, calibration, size)
    model.save_pretrained(str(output), save_compressed=True)
    return {
        "group_size": size,
        "calibration_rows": len(calibration),
        "calibration_tokens": sum(map(len, calibration)),
    }


def _oneshot(model: Any, calibration: list[list[int]], size: int) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = QuantizationArgs(num_bits=BITS, type="int", symmetric=True, strategy="group", group_size=size)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    rows = Dataset.from_list([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration])
    oneshot(
        model=model,
        dataset=rows,
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=[_HEAD]),
        max_seq_length=max(map(len, calibration)),
        num_calibration_samples=len(calibration),
    )
