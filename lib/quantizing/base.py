"""The base's own weights under the names and in the row order of a GGUF. For child processes only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from lib.errors import InputError
from lib.models.floats import NUMPY, widen
from lib.models.weights import StoredTensor, open_weights
from lib.quantizing.fisher import row_order
from lib.quantizing.native import Header

LEAST_MOVE = 1e-5
"""‖δ‖ / ‖base‖ below which a tensor counts as not moved: 16-bit floats of two kinds differ by less."""
_MANTISSA = {"BF16": 7, "F16": 10}
_LEAST_F16 = 2.0**-24
BLOCK = 32
"""Weights that are asked together whether a rounding gave them back: the block of the smaller types."""
_FINE_BITS = 6.25
"""Bits a weight from which a type's steps are as small as those of 16-bit floats at a block's largest weight."""


@dataclass(frozen=True)
class BaseMatrix:
    """A matrix of the base as a GGUF has it."""

    stored: StoredTensor
    order: np.ndarray

    @property
    def dtype(self) -> str:
        return self.stored.dtype

    def rows(self, start: int, stop: int, step: int = 1) -> np.ndarray:
        """Every `step`-th row, float32, (rows, columns); `start` and `stop` as in a slice."""
        values = self.stored.raw().view(NUMPY[self.dtype]).reshape(self.stored.shape)
        return widen(values[self.order[start:stop:step]], self.dtype)


def base_matrices(folder: Path, source: Header) -> tuple[dict[str, BaseMatrix], list[str]]:
    """The base's matrix for every matrix of a GGUF that was made from it, and those of the GGUF that have none.

    Vectors are left out: no type rounds them. An output matrix that the base ties is its embedding.

    Args:
        folder: the base model, safetensors.
        source: header of the GGUF.

    Raises:
        InputError: no 16- or 32-bit weights in the folder, or none that the GGUF has.
    """
    import gguf

    kind = source.text("general.architecture")
    blocks = source.number(f"{kind}.block_count") or 0
    number = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind), None)
    if number is None:
        raise InputError(f"{source.path.name} has architecture {kind!r}.", "one that gguf knows.", "convert it again.")
    names = gguf.get_tensor_name_map(number, blocks)
    config = _config(folder)
    stored = {}
    for name, tensor in open_weights(folder).tensors.items():
        if len(tensor.shape) == 2 and (new := names.get_name(name, try_suffixes=(".weight",))):
            tensor.require_floats()
            stored[new] = tensor
    if "output.weight" not in stored and "token_embd.weight" in stored:
        stored["output.weight"] = stored["token_embd.weight"]
    matrices = [name for name, tensor in source.tensors.items() if len(tensor["shape"]) > 1]
    fit = [name for name in matrices if name in stored and list(stored[name].shape[::-1]) == _shape(source, name)]
    if not fit:
        found = f"none of the {len(matrices)} matrices of {source.path.name} is in the base {folder}."
        raise InputError(found, "the base that it was trained from.", "run 01 again with the right base_model.")
    found = {name: BaseMatrix(stored[name], row_order(name, config, stored[name].shape[0])) for name in fit}
    return found, [name for name in matrices if name not in found]


def _shape(source: Header, name: str) -> list[int]:
    return source.tensors[name]["shape"]


def _config(folder: Path) -> Any:
    values: Mapping[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads = values.get("num_attention_heads")
    return SimpleNamespace(**{"num_key_value_heads": heads, "model_type": "", **values})


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
