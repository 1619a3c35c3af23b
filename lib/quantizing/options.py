"""What may be changed about a recipe: an importance matrix, and types of single tensors, as llama-quantize has them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.formats import TENSOR_TYPES


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
