"""The names of llama.cpp's quantization recipes ("Q4_K_M"), and what may be changed about one.

A recipe is a mix: it decides a type for every tensor, so a file's real bits per weight differ from its name. K- and
IQ-types store super-blocks of 256 weights; rows of another length fall back to a type with blocks of 32.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lib.errors import InputError
from lib.settings import TENSOR_TYPES

TABLES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))

FILE_TYPES: dict[str, int] = TABLES["file_types"]
"""Every recipe that llama.cpp (as pinned) can write, with its `general.file_type`."""

SOURCE_TENSOR_TYPES = frozenset({"f32", "f16", "bf16"})
"""Tensor types that may be quantized; anything else would be quantized a second time."""

UNQUANTIZED = frozenset({"F32", "F16", "BF16"})
"""Recipes that only change the number format."""

SUPER_BLOCK = 256
"""Weights in a block of the K-, IQ- (but IQ4_NL) and TQ-types."""

_NANOSECONDS_ANY = 4.0
"""Time to read, widen and write one weight, whatever its type."""


def quantizing_seconds(histogram: Sequence[dict[str, Any]]) -> float:
    """Roughly what one thread needs for a file with that histogram: good enough to begin with the longest."""
    times = TABLES["nanoseconds"]
    return sum(row["weights"] * (times[row["type"]] + _NANOSECONDS_ANY) for row in histogram) * 1e-9


def stem(source: Path) -> str:
    """Name of a source file without the type at its end: what names of quantized files begin with."""
    name = source.stem
    for suffix in ("F16", "BF16", "F32"):
        name = name.removesuffix(f"-{suffix}").removesuffix(f"-{suffix.lower()}")
    return name


def uses_super_blocks(name: str) -> bool:
    """Whether a recipe's main type has blocks of 256 weights."""
    return "_K" in name or (name.startswith(("IQ", "TQ")) and name != "IQ4_NL")


def output_type(name: str) -> str:
    """The tensor type in which a recipe of super-blocks stores the output matrix where its rows fill them."""
    return "q5_K" if name in TABLES["output_as_q5_K"] else "q6_K"


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


def tensor_type(name: str) -> str:
    """The tensor type of that name, whatever its case, as llama.cpp writes it.

    Raises:
        InputError: no such type.
    """
    by_lower_case = {kind.lower(): kind for kind in TENSOR_TYPES}
    if kind := by_lower_case.get(name.lower()):
        return kind
    near = [by_lower_case[found] for found in difflib.get_close_matches(name.lower(), by_lower_case, 2, 0.5)]
    do = f"write {' or '.join(near)}." if near else f"choose one of: {', '.join(TENSOR_TYPES)}."
    raise InputError(f"unknown tensor type {name!r}.", "the type of one tensor, e.g. q6_K (a recipe is a mix).", do)


@dataclass(frozen=True)
class Options:
    """Options of quantizing, checked for their form; what they do to a model is checked by the dry run.

    Attributes:
        imatrix: importance matrix of llama-imatrix (GGUF or .dat; in a child process its path as text); its file name
            goes into the new header.
        tensor_types: "regular expression=type" for tensors whose name it is found in; the first that fits counts.
        output_tensor_type: type of the output matrix (of a tied model: of the token embedding); "" = as the recipe.
        token_embedding_type: type of the token embedding; "" = as the recipe.
        notes: (key, text of at most 127 bytes) that go into the new header.
    """

    imatrix: Path | None = None
    tensor_types: Sequence[str] = ()
    output_tensor_type: str = ""
    token_embedding_type: str = ""
    notes: Sequence[Sequence[str]] = ()

    def __post_init__(self) -> None:
        named = [name for _, name in self.patterns()]
        for name in filter(None, (*named, self.output_tensor_type, self.token_embedding_type)):
            tensor_type(name)

    def patterns(self) -> list[tuple[str, str]]:
        """(regular expression, type) of each entry of `tensor_types`.

        Raises:
            InputError: an entry of another form.
        """
        pairs = []
        for entry in self.tensor_types:
            pattern, _, name = entry.partition("=")
            if not pattern or not name:
                do = "write for example attn_v=Q8_0 or blk\\.0\\.ffn_down=Q6_K."
                raise InputError(f"the tensor type {entry!r}.", "REGEX=TYPE.", do)
            if pattern != pattern.lower():
                do = "write it in lower case: llama-quantize lowers it, and so would change what it means."
                raise InputError(f"capital letters in the expression {pattern!r}.", "names of tensors.", do)
            pairs.append((pattern, name))
        return pairs

    def any_types(self) -> bool:
        """Whether any tensor's type is set by hand."""
        return bool(self.tensor_types or self.output_tensor_type or self.token_embedding_type)
