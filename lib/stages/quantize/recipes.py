"""The names of llama.cpp's quantization recipes ("Q4_K_M") and the number that each has in a file's header.
What may be changed about a recipe: an importance matrix, and types of single tensors, as llama-quantize has them.
What is refused before any work: an output path that would destroy the source or cannot be written.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.runs.files import writable
from lib.settings import TENSOR_TYPES

# The names of llama.cpp's quantization recipes ("Q4_K_M") and the number that each has in a file's header.
#
# A recipe is a mix: it decides a type for every tensor, so a file's real bits per weight differ from its name. K- and
# IQ-types store super-blocks of 256 weights; rows of another length fall back to a type with blocks of 32.

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


# What may be changed about a recipe: an importance matrix, and types of single tensors, as llama-quantize has them.


@dataclass(frozen=True)
class Options:
    """Options of quantizing, checked for their form; what they do to a model is checked by the dry run.

    Attributes:
        imatrix: importance matrix of llama-imatrix (GGUF or .dat); its file name goes into the new header.
        tensor_types: "regular expression=type" for tensors whose name it is found in; the first that fits counts.
        output_tensor_type: type of the output matrix (of a tied model: of the token embedding); "" = as the recipe.
        token_embedding_type: type of the token embedding; "" = as the recipe.
        notes: (key, text of at most 127 bytes) that go into the new header.
    """

    imatrix: Path | None = None
    tensor_types: tuple[str, ...] = ()
    output_tensor_type: str = ""
    token_embedding_type: str = ""
    notes: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for _, name in self.patterns():
            tensor_type(name)
        for name in filter(None, (self.output_tensor_type, self.token_embedding_type)):
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

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, with an absolute path, for a child process."""
        return {
            "imatrix": None if self.imatrix is None else str(self.imatrix.resolve()),
            "tensor_types": list(self.tensor_types),
            "output_tensor_type": self.output_tensor_type,
            "token_embedding_type": self.token_embedding_type,
            "notes": [list(note) for note in self.notes],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Options:
        """The reverse of `to_json`."""
        matrix = values["imatrix"]
        return cls(
            None if matrix is None else Path(matrix),
            tuple(values["tensor_types"]),
            values["output_tensor_type"],
            values["token_embedding_type"],
            tuple((key, text) for key, text in values.get("notes", [])),
        )


def tensor_type(name: str) -> str:
    """The tensor type of that name, whatever its case, as llama.cpp writes it.

    Raises:
        InputError: no such type.
    """
    known = {kind.lower(): kind for kind in TENSOR_TYPES}
    if name.lower() in known:
        return known[name.lower()]
    near = difflib.get_close_matches(name.lower(), known, 2, 0.5)
    do = f"write {' or '.join(known[n] for n in near)}." if near else f"choose one of: {', '.join(TENSOR_TYPES)}."
    raise InputError(f"unknown tensor type {name!r}.", "the type of one tensor, e.g. q6_K (a recipe is a mix).", do)


# What is refused before any work: an output path that would destroy the source or cannot be written.


def check_output(source: Path, output: Path) -> None:
    """Refuse an output that is the source itself (llama.cpp would destroy it) or cannot be written.

    Raises:
        InputError: same file by path, symbolic or hard link; a folder; an unwritable place.
    """
    if output.is_dir():
        raise InputError(f"{output} is a folder.", "the path of the new file.", f"write {output}/NAME-TYPE.gguf.")
    if output.is_symlink():
        raise InputError(f"{output} is a symbolic link.", "a plain path.", "remove the link, or choose another name.")
    if output.resolve() == source.resolve() or (output.exists() and output.samefile(source)):
        raise InputError(
            f"{output} is the source file itself.",
            "another file: quantizing reads while it writes.",
            "change OUT.gguf.",
        )
    if not output.name.endswith(".gguf"):
        raise InputError(f"the output name {output.name!r}.", "a name that ends with .gguf.", "add .gguf to it.")
    writable(output.parent)
