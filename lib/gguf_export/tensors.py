"""The tensors of a GGUF: names, types, and their bytes streamed in slabs from the memory-mapped weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import numpy as np

from lib.errors import InputError
from lib.gguf_export.architecture import Architecture
from lib.models.weights import StoredTensor, Weights

if TYPE_CHECKING:
    import torch
    from gguf import GGMLQuantizationType

    from lib.progress import Progress

SLAB = 16 << 20
"""Weights converted at a time (64 MiB of float32)."""

ALIGNMENT = 32
_F16_MAX = 65504.0
_IGNORED = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the GGUF: its name, type, shape (rows last, as in PyTorch) and bytes without padding."""

    name: str
    source: StoredTensor
    type: GGMLQuantizationType
    nbytes: int


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
    plan = []
    for name, source in weights.tensors.items():
        if name.endswith(_IGNORED):
            continue
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
        plan.append(PlannedTensor(new, source, kind, int(np.prod(source.shape, dtype=np.int64)) // block * size))
    _complete(plan, weights, model)
    return plan


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
    rows = next(tensor.source.shape[0] for tensor in plan if tensor.name == "token_embd.weight")
    if rows != model.config["vocab_size"]:
        raise InputError(
            f"{weights.folder}: {rows} rows of embedding, vocab_size {model.config['vocab_size']} in config.json.",
            "equal numbers.",
            "save model and config together after resizing.",
        )


def write_tensors(stream: IO[bytes], plan: list[PlannedTensor], progress: Progress) -> None:
    """Append the data of all tensors, each padded to 32 bytes; `progress` counts MiB.

    Raises:
        InputError: NaN or infinity in a tensor, or a value that float16 cannot hold.
    """
    stream.write(bytes(-stream.tell() % ALIGNMENT))
    done = 0
    for tensor in plan:
        written = 0
        for slab in _slabs(tensor.source):
            _check_values(slab, tensor)
            data = _convert(slab, tensor.type)
            stream.write(data)
            written += len(data)
        if written != tensor.nbytes:
            raise RuntimeError(f"{tensor.name}: {written} bytes written, {tensor.nbytes} planned")
        stream.write(bytes(-written % ALIGNMENT))
        before, done = done, done + tensor.source.nbytes
        progress.advance((done >> 20) - (before >> 20), tensor.name)


def _slabs(source: StoredTensor) -> Iterator[torch.Tensor]:
    """The tensor in groups of whole rows, so that quantization blocks never cross a slab."""
    tensor = source.tensor()
    if tensor.dim() == 0:
        tensor = tensor.reshape(1)
    rows = tensor.reshape(-1, tensor.shape[-1])
    step = max(1, SLAB // max(1, rows.shape[1]))
    for first in range(0, rows.shape[0], step):
        yield rows[first : first + step]


def _check_values(slab: torch.Tensor, tensor: PlannedTensor) -> None:
    low, high = (float(value) for value in slab.aminmax())
    if not np.isfinite(low) or not np.isfinite(high):
        raise InputError(
            f"NaN or infinity in {tensor.source.name} of {tensor.source.file}.",
            "finite weights.",
            "the training diverged or the file is damaged: merge again from a good checkpoint.",
        )
    limit = {"F16": _F16_MAX, "Q8_0": _F16_MAX * 127}.get(tensor.type.name, np.inf)
    if max(-low, high) > limit:
        raise InputError(
            f"a weight of size {max(-low, high):.6g} in {tensor.source.name}; {tensor.type.name} ends at {limit:.6g}.",
            "values that the type can hold.",
            "use outtype bf16 (or f32).",
        )


def _convert(slab: torch.Tensor, kind: GGMLQuantizationType) -> bytes:
    """The slab in a GGUF type; rounding is to nearest, ties to even, as the official converter does."""
    import gguf
    import torch

    float32 = torch.float32
    if kind.name == "Q8_0":
        return gguf.quants.quantize(slab.to(float32).numpy(), kind).tobytes()
    if kind.name == "F16" and slab.dtype == torch.float64:
        slab = slab.to(float32)  # as the official converter: first to float32, then to float16
    target = {"F32": float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind.name]
    if kind.name == "BF16" and slab.dtype not in (torch.bfloat16, float32):
        slab = slab.to(float32)
    return slab.to(target).contiguous().view(torch.uint8).numpy().tobytes()
