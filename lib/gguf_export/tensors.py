"""The tensors of a GGUF: names, types, and their bytes made in slabs, with NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lib.errors import InputError
from lib.gguf_export.architecture import Architecture
from lib.models.floats import largest_magnitude, to_bfloat16, to_float16, widen
from lib.models.gguf_architecture import pair_rows, rope_factors
from lib.models.weights import StoredTensor, Weights

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

SLAB = 4 << 20
"""Weights converted at a time (16 MiB of float32)."""

_F16_MAX = 65504.0
_IGNORED = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the GGUF.

    Attributes:
        name, type: in the GGUF; shape: rows last but one, as in PyTorch; nbytes: without padding.
        source: where its values are stored; None when they are `values`.
        heads: attention heads whose rows are re-paired (Llama's rotary order); 0 = rows stay.
        values: of a tensor that only the GGUF has (float32).
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    nbytes: int
    source: StoredTensor | None
    heads: int = 0
    values: np.ndarray | None = None

    @property
    def row(self) -> int:
        """Values of a row; quantization blocks never cross one."""
        return self.shape[-1] if self.shape else 1

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def plan_tensors(weights: Weights, model: Architecture, outtype: str) -> list[PlannedTensor]:
    """Name and type of every tensor, in the order of the official converter.

    One-dimensional tensors and norms stay float32; a row that Q8_0's blocks of 32 do not divide becomes float16.

    Raises:
        InputError: a tensor that the architecture does not have, or one that is missing.
    """
    import gguf

    names = gguf.get_tensor_name_map(
        {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[model.name], model.blocks
    )
    wanted = gguf.GGMLQuantizationType[outtype.upper()]
    plan = [_rope_tensor(factors)] if (factors := rope_factors(model.config)) is not None else []
    for name, source in weights.tensors.items():
        if name.endswith(_IGNORED):
            continue
        source.require_floats()
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise InputError(
                f"tensor {name} in {weights.folder}, which {model.name} does not have.",
                "the weights of a whole model (adapters merged).",
                "run `workbook merge` first, or check that config.json belongs to these weights.",
            )
        kind = wanted
        if len(source.shape) <= 1 or new.endswith("_norm.weight") or not new.endswith(".weight"):
            kind = gguf.GGMLQuantizationType.F32
        elif kind == gguf.GGMLQuantizationType.Q8_0 and source.shape[-1] % 32:
            kind = gguf.GGMLQuantizationType.F16
        block, size = gguf.GGML_QUANT_SIZES[kind]
        nbytes = source.size // block * size
        plan.append(PlannedTensor(new, kind, source.shape or (1,), nbytes, source, model.heads_of(name)))
    _complete(plan, weights, model)
    return plan


def _rope_tensor(factors: np.ndarray) -> PlannedTensor:
    import gguf

    kind = gguf.GGMLQuantizationType.F32
    return PlannedTensor("rope_freqs.weight", kind, factors.shape, factors.nbytes, None, values=factors)


def _complete(plan: list[PlannedTensor], weights: Weights, model: Architecture) -> None:
    have = {tensor.name for tensor in plan}
    if missing := sorted(model.expected_tensors() - have):
        raise InputError(
            f"{weights.folder} lacks {len(missing)} tensors of a {model.name} model (first {missing[0]}).",
            f"all tensors of {model.blocks} layers.",
            "check that config.json belongs to these weights and that no shard is missing.",
        )
    if len(have) != len(plan):
        raise InputError(f"two tensors of {weights.folder} have one name in GGUF.", "each once.", "check the folder.")
    rows = next(tensor.shape[0] for tensor in plan if tensor.name == "token_embd.weight")
    if rows != model.config["vocab_size"]:
        raise InputError(
            f"{weights.folder}: {rows} rows of embedding, vocab_size {model.config['vocab_size']} in config.json.",
            "equal numbers.",
            "save model and config together after resizing.",
        )


def slabs(tensor: PlannedTensor) -> Iterator[tuple[int, int]]:
    """First value and number of values of each part that is converted alone: whole rows, or all of a re-paired one."""
    step = tensor.size if tensor.heads else max(1, SLAB // max(1, tensor.row)) * tensor.row
    for first in range(0, tensor.size, step):
        yield first, min(step, tensor.size - first)


def encode(tensor: PlannedTensor, values: np.ndarray, dtype: str) -> np.ndarray:
    """Whole rows of a tensor in its GGUF type, as bytes; rounding is to nearest, ties to even, as the official one.

    Args:
        values: one-dimensional, as `lib.models.floats` holds `dtype`.

    Raises:
        InputError: NaN or infinity, or a value that float16 cannot hold.
    """
    import gguf

    _check_values(values, dtype, tensor)
    if tensor.heads:
        values = pair_rows(values.reshape(tensor.shape), tensor.heads).reshape(-1)
    kind = tensor.type.name
    if kind == "Q8_0":
        data = gguf.quants.quantize(widen(values, dtype).reshape(-1, tensor.row), tensor.type)
    else:
        data = {"F32": widen, "F16": to_float16, "BF16": to_bfloat16}[kind](values, dtype)
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


def _check_values(values: np.ndarray, dtype: str, tensor: PlannedTensor) -> None:
    largest = largest_magnitude(values, dtype)
    where = f"{tensor.source.name} of {tensor.source.file}" if tensor.source else tensor.name
    if not math.isfinite(largest):
        raise InputError(
            f"NaN or infinity in {where}.",
            "finite weights.",
            "the training diverged or the file is damaged: merge again from a good checkpoint.",
        )
    limit = {"F16": _F16_MAX, "Q8_0": _F16_MAX * 127}.get(tensor.type.name, math.inf)
    if largest > limit:
        raise InputError(
            f"a weight of size {largest:.6g} in {where}; {tensor.type.name} ends at {limit:.6g}.",
            "values that the type can hold.",
            "use outtype bf16 (or f32).",
        )
