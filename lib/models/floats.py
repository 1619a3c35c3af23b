"""Floating-point weights as NumPy arrays, without torch; bfloat16 is held as its bits (uint16).

Dtypes are named as safetensors names them: F64, F32, F16, BF16.
"""

from __future__ import annotations

import functools

import numpy as np

NUMPY: dict[str, type[np.generic]] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
"""dtype → type of the array's elements."""

_BITS: dict[str, tuple[type[np.unsignedinteger], int, int]] = {
    "F64": (np.uint64, 2**63 - 1, 0x7FF << 52),
    "F32": (np.uint32, 2**31 - 1, 0xFF << 23),
    "F16": (np.uint16, 2**15 - 1, 0x1F << 10),
    "BF16": (np.uint16, 2**15 - 1, 0xFF << 7),
}
"""dtype → unsigned type, all bits but the sign, bits of infinity; magnitudes are ordered as their bits are."""


def largest_magnitude(values: np.ndarray, dtype: str) -> float:
    """Largest |value| of an array; infinity when any value is infinite or NaN, 0 for an empty array."""
    if values.size == 0:
        return 0.0
    kind, magnitude, infinity = _BITS[dtype]
    largest = int((values.reshape(-1).view(kind) & kind(magnitude)).max())
    if largest >= infinity:
        return float("inf")
    return float(widen(np.array([largest], kind).view(NUMPY[dtype]), dtype)[0])


def widen(values: np.ndarray, dtype: str) -> np.ndarray:
    """As float32: exact, except that float64 is rounded to nearest, ties to even."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32, copy=False)


@functools.cache
def _bfloat16_as_float16() -> np.ndarray:
    """float16 of every bfloat16, by its bits. A look-up is twice as fast as widening and rounding."""
    with np.errstate(over="ignore"):
        return widen(np.arange(2**16, dtype=np.uint16), "BF16").astype(np.float16)


def to_float16(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rounded to nearest, ties to even; float64 by way of float32, as llama.cpp's converter does."""
    if dtype == "BF16":
        return _bfloat16_as_float16()[values]
    return widen(values, dtype).astype(np.float16) if dtype == "F64" else values.astype(np.float16, copy=False)


def to_bfloat16(values: np.ndarray, dtype: str) -> np.ndarray:
    """The bits, rounded to nearest, ties to even; for finite values only."""
    if dtype == "BF16":
        return values
    bits = widen(values, dtype).view(np.uint32)
    return ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(np.uint16)
