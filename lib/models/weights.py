"""Floating-point weights as NumPy arrays, without torch; bfloat16 is held as its bits (uint16).
Weights of a model folder, read without loading them: safetensors headers checked, bytes memory-mapped.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError

if TYPE_CHECKING:
    import torch


# Floating-point weights as NumPy arrays, without torch; bfloat16 is held as its bits (uint16).
#
# Dtypes are named as safetensors names them: F64, F32, F16, BF16.

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


# Weights of a model folder, read without loading them: safetensors headers checked, bytes memory-mapped.
#
# Format (safetensors): 8 bytes of header length, a JSON object {name: {dtype, shape, data_offsets}}, then the data. The
# safetensors library checks the offsets; it accepts a name written twice (the last one wins), so that is refused here.

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER = 100_000_000
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor on the disk: `dtype` as safetensors names it (BF16), bytes `start` to `end` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def raw(self) -> np.ndarray:
        """Its bytes (uint8), memory-mapped; nothing is read until it is looked at."""
        if self.nbytes == 0:
            return np.empty(0, np.uint8)
        # copy-on-write, because torch warns about arrays it may not write to; nothing here writes
        return np.memmap(self.file, np.uint8, "c", self.start, (self.nbytes,))

    def tensor(self) -> torch.Tensor:
        """As a torch tensor over the memory map, in its stored dtype and shape.

        Raises:
            InputError: not a floating-point dtype.
        """
        import torch

        self.require_floats()
        return torch.from_numpy(self.raw()).view(getattr(torch, _FLOATS[self.dtype])).reshape(self.shape)

    @property
    def size(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)

    def read(self, first: int = 0, count: int | None = None) -> np.ndarray:
        """A copy of `count` elements from the `first`, one-dimensional, as `lib.models.weights` holds the dtype.

        Unlike a memory map, it leaves no pages of the file in this process's resident memory.

        Raises:
            InputError: not a floating-point dtype, or the file was cut meanwhile.
        """
        self.require_floats()
        values = np.empty(self.size - first if count is None else count, NUMPY[self.dtype])
        view = memoryview(values).cast("B") if values.size else memoryview(b"")
        position, got = self.start + first * values.itemsize, 0
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(position)
            while got < len(view):
                read = stream.readinto(view[got:])
                if not read:
                    raise InputError(f"{self.file} was cut while it was read.", "a complete file.", "copy it again.")
                got += read
        return values

    def require_floats(self) -> None:
        """Refuse integer and 8-bit tensors, which only quantized models have."""
        if self.dtype not in _FLOATS:
            raise InputError(
                f"tensor {self.name} in {self.file} is {self.dtype}.",
                "float32, float16 or bfloat16 weights.",
                "use the original model, not a quantized one.",
            )


@dataclass(frozen=True)
class Weights:
    """All tensors of a folder by name, in the order of its files and, inside a file, sorted by name."""

    folder: Path
    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(tensor.size for tensor in self.tensors.values())


def _refuse_lookalike(path: Path) -> None:
    with path.open("rb") as stream:
        head = stream.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{path} is a Git LFS pointer, not the weights.", "a safetensors file.", "run `git lfs pull` in its clone."
        )
    if head.lstrip()[:1] == b"<":
        raise InputError(
            f"{path} is a web page, not the weights.", "a safetensors file.", "download the file itself again."
        )
    if head[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):
        raise InputError(f"{path} is a pickle.", "a safetensors file.", "save the weights as safetensors.")


def _no_duplicates(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InputError(f"{path} names a tensor twice in its header.", "each name once.", "download it again.")
    return found


def read_file(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors (sorted by name) and metadata of one safetensors file.

    Raises:
        InputError: missing, a pointer or web page in its place, truncated, or a malformed header.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"no file {path}.", "the weights as safetensors.", "copy or download the folder again.")
    _refuse_lookalike(path)
    try:
        with safe_open(path, framework="np") as checked:
            metadata = dict(checked.metadata() or {})
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            text = stream.read(min(length, _MAX_HEADER)).decode("utf-8")
        header = json.loads(text, object_pairs_hook=functools.partial(_no_duplicates, path=path))
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} is damaged ({error}).", "a complete safetensors file.", "copy or download it again."
        ) from None
    header.pop("__metadata__", None)
    data = 8 + length
    tensors = {
        name: StoredTensor(
            name, value["dtype"], tuple(value["shape"]), path, *(data + offset for offset in value["data_offsets"])
        )
        for name, value in sorted(header.items())
    }
    return tensors, metadata


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return [folder / SINGLE]
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        kind = f"only pickled weights ({', '.join(pickles)})" if pickles else "no weights"
        raise InputError(
            f"{folder} holds {kind}.", f"{SINGLE} or {INDEX}.", "use a model saved as safetensors (pickles are unsafe)."
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        bad = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{index} is damaged ({error}).", "an index of shards.", "download it again.") from None
    if bad or not names:
        raise InputError(
            f"{index} names {bad or 'no files'}.", "files of the same folder.", "download the folder again."
        )
    return [folder / name for name in names]


def open_weights(folder: Path) -> Weights:
    """The weights of a model folder: one model.safetensors, or the shards of its index.

    Raises:
        InputError: no folder, no safetensors weights, a damaged or missing shard, or an index that does not fit.
    """
    if not folder.is_dir():
        raise InputError(f"no folder {folder}.", "a model folder.", "check the path.")
    files = _shards(folder)
    tensors: dict[str, StoredTensor] = {}
    metadata = {}
    for path in files:
        found, metadata[path.name] = read_file(path)
        if twice := sorted(set(found) & set(tensors)):
            raise InputError(f"{twice[0]} is in two shards of {folder}.", "each tensor once.", "download it again.")
        tensors |= found
    if (folder / INDEX).is_file():
        wanted = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        if wrong := sorted(set(wanted) ^ set(tensors)):
            raise InputError(
                f"{folder}: index and shards disagree on {len(wrong)} tensors (first {wrong[0]}).",
                "the tensors that the index names.",
                "download the folder again.",
            )
    if not tensors:
        raise InputError(f"{folder} holds no tensor.", "the weights of a model.", "download the folder again.")
    return Weights(folder, tuple(files), tensors, metadata)
