"""The names of llama.cpp's quantization recipes ("Q4_K_M") and the number that each has in a file's header.

A recipe is a mix: it decides a type for every tensor, so a file's real bits per weight differ from its name. K- and
IQ-types store super-blocks of 256 weights; rows of another length fall back to a type with blocks of 32.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from lib.errors import InputError

FILE_TYPES: dict[str, int] = {
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q8_0": 7,
    "Q6_K": 18,
    "Q5_K_M": 17,
    "Q5_K_S": 16,
    "Q5_1": 9,
    "Q5_0": 8,
    "Q4_K_M": 15,
    "Q4_K_S": 14,
    "Q4_1": 3,
    "Q4_0": 2,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "Q3_K_L": 13,
    "Q3_K_M": 12,
    "Q3_K_S": 11,
    "IQ3_M": 27,
    "IQ3_S": 26,
    "IQ3_XS": 22,
    "IQ3_XXS": 23,
    "Q2_K": 10,
    "Q2_K_S": 21,
    "IQ2_M": 29,
    "IQ2_S": 28,
    "IQ2_XS": 20,
    "IQ2_XXS": 19,
    "TQ2_0": 37,
    "TQ1_0": 36,
    "IQ1_M": 31,
    "IQ1_S": 24,
    "MXFP4_MOE": 38,
    "Q2_0": 41,
    "Q1_0": 40,
}
"""Every recipe that llama.cpp (as pinned) can write, with its `general.file_type`."""

SOURCE_TENSOR_TYPES = frozenset({"f32", "f16", "bf16"})
"""Tensor types that may be quantized; anything else would be quantized a second time."""

UNQUANTIZED = frozenset({"F32", "F16", "BF16"})
"""Recipes that only change the number format."""

SUPER_BLOCK = 256
"""Weights in a block of the K-, IQ- (but IQ4_NL) and TQ-types."""

Q5_K_OUTPUT = frozenset({"IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"})
"""Recipes that store the output matrix as Q5_K; every other small one as Q6_K."""


_NANOSECONDS: dict[str, float] = {
    **dict.fromkeys(("f32", "bf16", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"), 2.0),
    **dict.fromkeys(("mxfp4", "tq2_0", "tq1_0", "q2_0", "q1_0"), 4.0),
    **dict(zip(("nvfp4", "q6_K", "q5_K", "q4_K", "q3_K", "q2_K"), (25.0, 28.0, 54.0, 68.0, 15.0, 56.0), strict=True)),
    **dict(zip(("iq4_nl", "iq4_xs", "iq3_s", "iq3_xxs", "iq2_s"), (176.0, 180.0, 333.0, 479.0, 219.0), strict=True)),
    **dict(zip(("iq2_xs", "iq2_xxs", "iq1_m", "iq1_s"), (777.0, 403.0, 134.0, 153.0), strict=True)),
}
"""Time of llama.cpp's quantizer for one weight on one thread of an AMD EPYC, by tensor type."""

_NANOSECONDS_ANY = 4.0
"""Time to read, widen and write one weight, whatever its type."""


def work(histogram: list[dict[str, Any]]) -> float:
    """Seconds, roughly, that one thread needs for a file with that histogram: good enough to begin with the longest."""
    return sum(row["weights"] * (_NANOSECONDS[row["type"]] + _NANOSECONDS_ANY) for row in histogram) * 1e-9


def stem(source: Path) -> str:
    """Name of a source file without the type at its end: what names of quantized files begin with."""
    name = source.stem
    for suffix in ("F16", "BF16", "F32"):
        name = name.removesuffix(f"-{suffix}").removesuffix(f"-{suffix.lower()}")
    return name


def uses_super_blocks(name: str) -> bool:
    """Whether a recipe's main type has blocks of 256 weights."""
    return "_K" in name or (name.startswith(("IQ", "TQ")) and name != "IQ4_NL")


def file_type(name: str) -> int:
    """The header number of a recipe.

    Raises:
        InputError: no such recipe; the message offers the nearest names.
    """
    if name in FILE_TYPES:
        return FILE_TYPES[name]
    near = difflib.get_close_matches(name.upper(), FILE_TYPES, 3, 0.5)
    do = f"write {' or '.join(near)}." if near else f"choose one of: {', '.join(FILE_TYPES)}."
    raise InputError(f"unknown quantization type {name!r}.", "a type that llama.cpp writes, e.g. Q4_K_M.", do)


def name_of(number: int | None) -> str:
    """The recipe with that header number; "unknown" when the header has none or another."""
    return next((name for name, value in FILE_TYPES.items() if value == number), "unknown")
