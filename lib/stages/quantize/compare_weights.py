"""Weights compared, tensor by tensor: files with their source, with the base; the base with what types give back.

For child processes only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import refusal
from lib.models.configurations import read_configuration
from lib.models.gguf_file import ARCHITECTURES, name_map, row_order
from lib.models.weights import NUMPY, StoredTensor, open_weights, widen
from lib.progress import Progress
from lib.settings import NF4
from lib.stages.quantize import llama_library
from lib.stages.quantize.files import TABLES
from lib.stages.quantize.llama_library import Header, read_header
from lib.stages.quantize.type_costs import PLAIN

_NAME = re.compile(r"^blk\.(\d+)\.(.+)\.weight$")
_AT_ONCE = 1 << 24
"""Weights of a tensor that are turned into float32 together; a quarter where more than two files are held."""


def _stretches(rows: int, columns: int, weights: int) -> Iterator[tuple[int, int]]:
    """Rows of a tensor with at most so many weights, as in a slice."""
    step = max(1, weights // columns)
    for start in range(0, rows, step):
        yield start, start + step


def _place(name: str) -> dict[str, Any]:
    """The "tensor", its "layer" (None outside of the blocks) and "kind"."""
    match = _NAME.match(name)
    layer, kind = (int(match[1]), match[2]) if match else (None, name.removesuffix(".weight"))
    return {"tensor": name, "layer": layer, "kind": kind}


# Every file against its source.


def compare_with_source(argument: dict[str, Any]) -> dict[str, Any]:
    """Rows of `lib.stages.quantize.stage.TensorErrors.files` for "files" ({type: path}) against "source"."""
    source, found = read_header(Path(argument["source"])), {}
    with Progress("comparing files", len(argument["files"])) as progress:
        for name, path in argument["files"].items():
            header = read_header(Path(path))
            changed = [t for t, tensor in header.tensors.items() if tensor.type != source.tensors[t].type]
            found[name] = [_error(source, header, tensor) for tensor in changed]
            progress.advance(note=name)
    return {"files": found}


def _error(source: Header, other: Header, name: str) -> dict[str, Any]:
    tensor, error, size = other.tensors[name], 0.0, 0.0
    for start, stop in _stretches(tensor.rows, tensor.columns, _AT_ONCE):
        wanted, got = (header.rows(name, start, stop) for header in (source, other))
        error += float(np.sum((got - wanted) ** 2, dtype=np.float64))
        size += float(np.sum(wanted**2, dtype=np.float64))
    return {
        **_place(name),
        "type": tensor.type,
        "weights": tensor.weights,
        "bits_per_weight": tensor.bits_per_weight,
        "relative_rmse": (error / size) ** 0.5 if size else 0.0,
    }


# The base's own weights under the names and in the row order of a GGUF.

LEAST_MOVE = 1e-5
"""‖δ‖ / ‖base‖ below which a tensor counts as not moved: 16-bit floats of two kinds differ by less."""
_MANTISSA = {"BF16": 7, "F16": 10}
_LEAST_F16 = 2.0**-24
_SAMPLED = 1 << 14
"""Most weights of a matrix in a sample."""
BLOCK = 32
"""Weights that are asked together whether a rounding gave them back: the block of the smaller types."""
_FINE_BITS = 6.25
"""Bits a weight from which a type's steps are as small as those of 16-bit floats at a block's largest weight."""


@dataclass(frozen=True)
class BaseMatrix:
    """A matrix of the base as a GGUF has it."""

    stored: StoredTensor
    order: np.ndarray

    def rows(self, start: int = 0, stop: int | None = None, step: int = 1) -> np.ndarray:
        """Every `step`-th row, float32, (rows, columns); `start` and `stop` as in a slice."""
        values = self.stored.raw().view(NUMPY[self.stored.dtype]).reshape(self.stored.shape)
        return widen(values[self.order[start:stop:step]], self.stored.dtype)

    @property
    def step(self) -> int:
        """Distance of the rows of a sample."""
        return max(1, -(-self.stored.size // _SAMPLED))


def base_matrices(folder: Path, source: Header) -> tuple[dict[str, BaseMatrix], list[str]]:
    """The base's matrix for every matrix of a GGUF that was made from it, and those of the GGUF that have none.

    Vectors are left out: no type rounds them. An output matrix that the base ties is its embedding.

    Args:
        folder: the base model, safetensors.
        source: header of the GGUF.

    Raises:
        InputError: no 16- or 32-bit weights in the folder, or none that the GGUF has.
    """
    architecture = source.values.get("general.architecture")
    names = name_map(architecture, source.values.get(f"{architecture}.block_count") or 0)
    if names is None:
        raise refusal("quantize/unknown-architecture", source=source, architecture=architecture)
    config = read_configuration(folder)
    config = {"num_key_value_heads": config.get("num_attention_heads"), "model_type": "", **config}
    stored = {}
    for name, tensor in open_weights(folder).tensors.items():
        if len(tensor.shape) == 2 and (new := names.get_name(name, try_suffixes=(".weight",))):
            tensor.require_floats()
            stored[new] = tensor
    if "output.weight" not in stored and "token_embd.weight" in stored:
        stored["output.weight"] = stored["token_embd.weight"]
    matrices = [name for name, tensor in source.tensors.items() if len(tensor.shape) > 1]
    fit = [name for name in matrices if name in stored and stored[name].shape[::-1] == source.tensors[name].shape]
    if not fit:
        raise refusal("quantize/other-base", count=len(matrices), source=source, folder=folder)
    found = {name: BaseMatrix(stored[name], row_order(name, config, stored[name].shape[0])) for name in fit}
    if architecture not in ARCHITECTURES.values():
        found = {name: seen for name, base in found.items() if (seen := _as_in_file(name, base, source, config))}
    return found, [name for name in matrices if name not in found]


_ALIKE = 0.5
"""Least cosine of a matrix before and after fine-tuning; rows in another order have one near 0."""


def _as_in_file(name: str, base: BaseMatrix, source: Header, config: dict[str, Any]) -> BaseMatrix | None:
    """The matrix in the row order of a file of a family whose order is not known here, told by the rows themselves:
    as they are, or with the heads of query or key paired as Llama's; None where neither resembles the file's."""
    orders = [base.order, row_order(name, {**config, "model_type": "llama"}, len(base.order))]
    candidates = [BaseMatrix(base.stored, order) for order in orders]
    wanted = source.rows(name, step=base.step)
    likeness = [_cosine(candidate.rows(step=base.step), wanted) for candidate in candidates]
    best = int(np.argmax(likeness))
    return candidates[best] if likeness[best] > _ALIKE else None


def _cosine(first: np.ndarray, second: np.ndarray) -> float:
    sizes = float(np.linalg.norm(first)) * float(np.linalg.norm(second))
    return float(np.vdot(first, second)) / sizes if sizes else 1.0


def given_back(rounded: np.ndarray, weights: np.ndarray, dtype: str, bits: float) -> np.ndarray:
    """Which blocks of 32 a rounding gives back but for the last places of 16 bits, bool, (rows, columns / 32).

    Weights that were dequantized once and stored in 16 bits lie half a last place off their grid, and the scale that
    a quantizer takes from them as much; so two last places of the block's largest weight are allowed. Steps of types
    with `_FINE_BITS` or more are not larger than that: there each weight may be off by one last place of its own. By
    chance a generic block passes with a probability below 10⁻⁶ (two thirds of the weights or fewer, 32 times).

    Args:
        rounded, weights: float32, (rows, columns); columns fill blocks of 32.
        dtype: of the stored weights as safetensors names it; 32 bits are held against float16.
        bits: a weight of the type.
    """
    off, size = (_blocks(np.abs(values)) for values in (rounded - weights, weights))
    if bits < _FINE_BITS:
        return off.max(axis=-1) <= 2 * last_place(size.max(axis=-1), dtype)
    return (off <= last_place(size, dtype)).all(axis=-1)


def varied(weights: np.ndarray) -> np.ndarray:
    """Blocks of 32 that are neither zero nor nearly constant (range below an eighth of the largest weight)."""
    blocks = _blocks(weights)
    return np.ptp(blocks, axis=-1) > np.abs(blocks).max(axis=-1) / 8


def last_place(sizes: np.ndarray, dtype: str) -> np.ndarray:
    """Distance of neighbouring 16-bit floats at magnitudes `sizes`, float32."""
    exponents = np.frexp(sizes)[1] - 1 - _MANTISSA.get(dtype, _MANTISSA["F16"])
    places = np.ldexp(np.float32(1), exponents)
    return places if dtype == "BF16" else np.maximum(places, np.float32(_LEAST_F16))


def _blocks(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1, BLOCK)


# Whether the base's weights lie on the grid of a quantization type.
#
# Weights that were once dequantized from a type sit on its grid, and rounding them to it again gives them back. So does
# rounding them with a fine-tuning's small change on top: the change is lost. What a model's weights come from is
# written nowhere, so it is measured: the share of blocks of 32 that each type gives back.

_NF4_BLOCK, _NF4_BITS = 64, 4.5
_NF4_CODE = np.array(TABLES["nf4"], dtype=np.float32)
"""Dettmers et al. (2023), arXiv:2305.14314, appendix E."""


def measure_grid(argument: dict[str, Any]) -> dict[str, Any]:
    """Shares of blocks that each type gives back, of the matrices that fine-tuning moved: only there is anything to
    lose. (Of all matrices where it moved none.)

    Args:
        argument: "base" (folder), "source" (the GGUF made from it, for names and row order), "imatrix" (path or None:
            with one llama.cpp searches scales, which finds grids that the plain rounding misses).

    Returns:
        "types" ({type: share of the blocks of 32 of those matrices, weighted by their weights}; tried are NF4 and the
        types that any tensor may have: those of two bits with a codebook take a hundred times as long), "distinct"
        (different values in a block of 32, likewise, see `_distinct`), "blocks" (tried), "matrices" (tried).

    Raises:
        InputError: see `base_matrices`; an importance matrix that cannot be read.
    """
    matrix = llama_library.read_imatrix(argument["imatrix"])
    shares: dict[str, list[tuple[float, int]]] = {}
    distinct, blocks, source = [], 0, read_header(Path(argument["source"]))
    found, _ = base_matrices(Path(argument["base"]), source)
    samples = {name: base.rows(step=base.step) for name, base in found.items()}
    moved = [name for name, base in samples.items() if _moved(source.rows(name, step=found[name].step), base)]
    tried = moved or list(found)
    with Progress("grid of the base's weights, tensors", len(tried)) as progress:
        for name in tried:
            weights, dtype, total = samples[name], found[name].stored.dtype, source.tensors[name].weights
            if weights.shape[1] % BLOCK == 0 and (counted := varied(weights)).any():
                values = None if matrix is None else matrix.values.get(name)
                for kind, share in _shares(weights, dtype, values, counted).items():
                    shares.setdefault(kind, []).append((share, total))
                distinct.append((_distinct(weights)[counted].mean(), total))
                blocks += int(counted.sum())
            progress.advance(note=name)
    return {
        "types": {kind: _mean(pairs) for kind, pairs in shares.items()},
        "distinct": _mean(distinct) if distinct else None,
        "blocks": blocks,
        "matrices": len(tried),
    }


def _moved(tuned: np.ndarray, base: np.ndarray) -> bool:
    """Whether fine-tuning moved a matrix, by the rows that are tried."""
    return float(np.linalg.norm(tuned - base)) > LEAST_MOVE * float(np.linalg.norm(base))


def _shares(weights: np.ndarray, dtype: str, values: np.ndarray | None, counted: np.ndarray) -> dict[str, float]:
    """The share of the counted blocks that each type gives back; types whose blocks the rows do not fill are left
    out."""
    columns, found = weights.shape[1], {}
    for kind in PLAIN:
        if columns % llama_library.block_size(kind) == 0:
            rounded = llama_library.rounded(kind, weights, values)
            bits = 8 * llama_library.row_bytes(kind, columns) / columns
            found[kind] = float(given_back(rounded, weights, dtype, bits)[counted].mean())
    if columns % _NF4_BLOCK == 0:
        found[NF4] = float(given_back(nf4(weights), weights, dtype, _NF4_BITS)[counted].mean())
    return found


def nf4(weights: np.ndarray) -> np.ndarray:
    """Rounded to NF4 with a float scale for every 64 weights, and back; float32, (rows, columns)."""
    blocks = weights.reshape(-1, _NF4_BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    scaled = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0)
    nearest = np.searchsorted((_NF4_CODE[1:] + _NF4_CODE[:-1]) / 2, scaled)
    return (_NF4_CODE[nearest] * scale).reshape(weights.shape)


def _distinct(weights: np.ndarray) -> np.ndarray:
    """Different values in each block of 32, (rows, columns / 32): of those that are not zero, scaled to 32 of them.

    Zeros are no sign of a quantization: pruning sets many of them and leaves the others as they are.
    """
    ordered = np.sort(_blocks(weights), axis=-1)
    zeros = np.count_nonzero(ordered == 0, axis=-1)
    different = 1 + np.count_nonzero(np.diff(ordered, axis=-1), axis=-1) - (zeros > 0)
    return BLOCK * different / np.maximum(1, BLOCK - zeros)


def _mean(pairs: list[tuple[float, int]]) -> float:
    values, weights = zip(*pairs, strict=True)
    return float(np.average(values, weights=weights))


# What is left of a fine-tuning in the weights of every file.
#
# With δ = tuned - base and q = file - base, ⟨q, δ⟩ / ⟨δ, δ⟩ is the share of δ that the file keeps: 1 where it rounds δ
# as noise, 0 where it rounds it away. Rounding errors that have nothing to do with δ cancel in the sum.

_PLACES = "BF16"
"""Floats to whose last places a block counts as the base's: the change that is lost also moves a block's scale by some
thousandths, which float16 would see."""


def compare_with_base(argument: dict[str, Any]) -> dict[str, Any]:
    """Shares for every file.

    Args:
        argument: "base" (folder), "source" (the unquantized GGUF of the tuned model), "files" ({type: path}).

    Returns:
        "files": {type: [{"tensor", "layer", "kind", "type", "weights", "square" (‖δ‖²), "kept" (⟨q, δ⟩ / ‖δ‖²),
        "changed", "returned"}]}, of the matrices that fine-tuning moved and the file quantizes (changed: blocks of 32
        in which the tuned weights are not the base's to bfloat16; returned: those of them in which the file's are the
        base's again); "moved" (‖δ‖ / ‖base‖ over all matrices), "in_blocks" (share of the weights in matrices of the
        layers), "left_out" (matrices that the base does not have).

    Raises:
        InputError: see `base_matrices`; a damaged file.
    """
    source, squares = read_header(Path(argument["source"])), np.zeros(2)
    headers = [read_header(Path(path)) for path in argument["files"].values()]
    files: dict[str, list[dict[str, Any]]] = {name: [] for name in argument["files"]}
    found, left_out = base_matrices(Path(argument["base"]), source)
    with Progress("what is left of the fine-tuning, tensors", len(found)) as progress:
        for name, stored in found.items():
            own, sums = _sums(name, stored, source, headers)
            squares += own
            if own[0] > LEAST_MOVE**2 * own[1]:
                for rows, header, (kept, changed, returned) in zip(files.values(), headers, sums, strict=True):
                    tensor = header.tensors[name]
                    if tensor.type != source.tensors[name].type:
                        row = {**_place(name), "type": tensor.type, "weights": tensor.weights}
                        row |= {"square": float(own[0]), "kept": float(kept) / float(own[0])}
                        rows.append({**row, "changed": int(changed), "returned": int(returned)})
            progress.advance(note=name)
    inside = sum(source.tensors[name].weights for name in found if _NAME.match(name))
    return {
        "files": files,
        "moved": float(np.sqrt(squares[0] / squares[1])),
        "in_blocks": inside / sum(tensor.weights for tensor in source.tensors.values()),
        "left_out": left_out,
    }


def _sums(name: str, stored: BaseMatrix, source: Header, headers: list[Header]) -> tuple[np.ndarray, np.ndarray]:
    """Of one tensor ‖δ‖² and ‖base‖²; and of every file ⟨q, δ⟩, changed and returned blocks, (files, 3)."""
    rows, columns = stored.stored.shape
    squares, sums = np.zeros(2), np.zeros((len(headers), 3))
    for start, stop in _stretches(rows, columns, _AT_ONCE // 4):
        base, tuned = stored.rows(start, stop), source.rows(name, start, stop)
        delta = tuned - base
        squares += _dot(delta, delta), _dot(base, base)
        if not delta.any():
            continue
        for of_file, header in zip(sums, headers, strict=True):
            made, bits = header.rows(name, start, stop), header.tensors[name].bits_per_weight
            of_file[0] += _dot(made - base, delta)
            if columns % BLOCK == 0:
                changed = ~given_back(tuned, base, _PLACES, bits)
                of_file[1] += changed.sum()
                of_file[2] += (changed & given_back(made, base, _PLACES, bits)).sum()
    return squares, sums


def _dot(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.einsum("ij,ij->i", first, second).sum(dtype=np.float64))
