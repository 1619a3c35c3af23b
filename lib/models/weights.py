"""Files of a model folder, read without loading the model: JSON, safetensors headers, weights as NumPy arrays.

Dtypes are named as safetensors names them: F64, F32, F16, BF16. bfloat16 is held as its bits (uint16).
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError, refusal, refusing
from lib.runs.files import data_file, once, refuse_device

if TYPE_CHECKING:
    import torch


NUMPY: dict[str, type[np.generic]] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
"""dtype → type of the array's elements."""

_INFINITY = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}
"""dtype → bits of infinity; magnitudes are ordered as their bits are."""

FLOAT16_MAX = 65504.0


def largest_magnitude(values: np.ndarray, dtype: str) -> float:
    """Largest |value| of an array; infinity when any value is infinite or NaN, 0 for an empty array."""
    if values.size == 0:
        return 0.0
    bits = values.reshape(-1).view(f"u{values.itemsize}")
    largest = int((bits & bits.dtype.type(np.iinfo(bits.dtype).max >> 1)).max())  # all but the sign
    if largest >= _INFINITY[dtype]:
        return float("inf")
    return float(widen(np.array([largest], bits.dtype).view(NUMPY[dtype]), dtype)[0])


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


def convert(values: np.ndarray, dtype: str, target: str) -> np.ndarray:
    """Values of one dtype in another (F32, F16 or BF16), each rounded once; equal dtypes give the array itself."""
    if dtype == target:
        return values
    return {"F32": widen, "F16": to_float16, "BF16": to_bfloat16}[target](values, dtype)


def infinite(what: str, where: Path) -> InputError:
    """The error for NaN or infinity; no sentence to be read from a file, for threads race for the first one."""
    return InputError(
        f"NaN or infinity in {what} ({where}).",
        "finite weights.",
        "the training diverged or the file is damaged: use an earlier checkpoint or copy it again.",
    )


# Files that are not what their names promise.


def impostor(head: bytes) -> tuple[str, str] | None:
    """What a file is instead of itself, by its first 64 bytes, and what to do; None for one that is none of these."""
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer", "run `git lfs pull` in its clone"
    if head.lstrip()[:1] == b"<":
        return "a web page", "download the file itself again"
    if head[:2] in (b"PK", b"\x80\x02", b"\x80\x04") and head[8:9] != b"{":  # a header of 640 bytes begins so, too
        return "a pickle", "name it pytorch_model.bin and run workbook unpickle FOLDER OUT"
    return None


def refuse_impostor(path: Path, expected: str) -> None:
    """Refuse a pointer, a web page or a pickle in place of a file.

    Raises:
        InputError: says which of them it is.
    """
    with path.open("rb") as stream:
        found = impostor(stream.read(64))
    if found:
        raise InputError(f"{path} is {found[0]}, not the file itself.", f"{expected}.", f"{found[1]}.")


def read_object(path: Path, what: str = "a model folder") -> dict[str, Any]:
    """A JSON object of a model, adapter or tokenizer folder.

    Args:
        what: the folder ought to be, for the message about a missing file.

    Raises:
        InputError: no such file, something else in its place, damaged, or no object.
    """
    refuse_device(path)
    if not path.is_file():
        raise InputError(f"no {path.name} in {path.parent}.", f"{what}.", "give the folder that has it.")
    refuse_impostor(path, "JSON")
    with refusing((OSError, ValueError, RecursionError), "models/damaged-json", path=path):
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no object.", f"{what}.", "download or copy it again.")
    return content


# Safetensors: 8 bytes of header length, a JSON object {name: {dtype, shape, data_offsets}}, then the data. The library
# checks the offsets; it accepts a name written twice (the last one wins), so that is refused here.

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER = 100_000_000
TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""dtype in safetensors → in torch, and in settings."""
SAFETENSORS = {name: kind for kind, name in TORCH.items()}


class Shaped:
    """Something with a shape, and hence a number of elements."""

    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)


def slabs(tensor: Shaped, most: int, fewest: int = 1) -> Iterator[tuple[slice, int, int]]:
    """A tensor in slabs of whole rows: the rows, the number of their first weight, and how many weights they have.

    Args:
        most: about as many weights; but at least `fewest` rows.
    """
    rows, width = (tensor.shape[0], math.prod(tensor.shape[1:])) if tensor.shape else (1, 1)
    step = max(fewest, most // max(1, width))
    for first in range(0, max(1, rows), step):
        part = slice(first, min(first + step, rows))
        yield part, first * width, (part.stop - first) * width


@dataclass(frozen=True)
class StoredTensor(Shaped):
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
        return torch.from_numpy(self.raw()).view(getattr(torch, TORCH[self.dtype])).reshape(self.shape)

    def read(self, first: int = 0, count: int | None = None) -> np.ndarray:
        """A copy of `count` elements from the `first`, one-dimensional, as `lib.models.weights` holds the dtype.

        Raises:
            InputError: not a floating-point dtype, or the file was cut meanwhile.
        """
        self.require_floats()
        kind, wanted = np.dtype(NUMPY[self.dtype]), self.size - first if count is None else count
        # unlike a memory map, this leaves no pages of the file in this process's resident memory
        values = np.fromfile(self.file, kind, wanted, offset=self.start + first * kind.itemsize)
        if len(values) < wanted:
            raise InputError(f"{self.file} was cut while it was read.", "a complete file.", "copy it again.")
        return values

    def read_tensor(self, first: int, count: int) -> torch.Tensor:
        """As `read`, as a torch tensor."""
        import torch

        return torch.from_numpy(self.read(first, count)).view(getattr(torch, TORCH[self.dtype]))

    def require_floats(self) -> None:
        """Refuse integer and 8-bit tensors, which only quantized models have."""
        if self.dtype not in TORCH:
            raise refusal("models/quantized-tensor", name=self.name, file=self.file, dtype=self.dtype)


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


def read_file(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors (sorted by name) and metadata of one safetensors file.

    Raises:
        InputError: missing, a pointer or web page in its place, truncated, or a malformed header.
    """
    from safetensors import SafetensorError, safe_open

    def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise InputError(f"{path} names a tensor twice in its header.", "each name once.", "download it again.")
        return dict(pairs)

    refuse_device(path)
    if not path.is_file():
        raise InputError(f"no file {path}.", "the weights as safetensors.", "copy or download the folder again.")
    refuse_impostor(path, "a safetensors file")
    with refusing((SafetensorError, OSError, ValueError, RecursionError), "models/damaged-safetensors", path=path):
        with safe_open(path, framework="np") as checked:
            metadata = dict(checked.metadata() or {})
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            text = stream.read(min(length, _MAX_HEADER)).decode("utf-8")
        header = json.loads(text, object_pairs_hook=each_once)
    header.pop("__metadata__", None)
    tensors = {}
    for name, value in sorted(header.items()):
        start, end = (8 + length + offset for offset in value["data_offsets"])
        tensors[name] = StoredTensor(name, value["dtype"], tuple(value["shape"]), path, start, end)
    return tensors, metadata


def pack_header(tensors: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON of a safetensors header, padded so that the data begins at a multiple of 8 bytes.

    Args:
        tensors: name → (dtype, shape, bytes), in the order of their data.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        start, end = end, end + nbytes
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def weight_map(folder: Path) -> dict[str, str] | None:
    """Name of every tensor → shard that holds it, by the index of a folder; None where one file holds all of them.

    The order of transformers: beside a whole `SINGLE` an index counts for nothing, whether its shards are there or not.

    Raises:
        InputError: damaged, empty, names of other folders, missing shards, or shards without their index.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return None
    if not index.is_file():
        if shards := sorted(path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name)):
            shown, total = ", ".join(shards[:4]) + (", …" if len(shards) > 4 else ""), int(shards[0][-17:-12])
            raise refusal("models/shards-without-index", folder=folder, count=len(shards), total=total, shown=shown)
        return None
    with refusing((KeyError, AttributeError), "models/damaged-index", index=index):
        content = read_object(index)
        found = {str(name): str(file) for name, file in content["weight_map"].items()}
    if not isinstance(content.get("metadata"), dict):
        raise refusal("models/index-without-metadata", index=index)
    bad = sorted(name for name in found.values() if Path(name).name != name)
    if bad or not found:
        raise refusal("models/odd-index", index=index, names=bad or "no files")
    if missing := sorted({name for name in found.values() if not (folder / name).is_file()}):
        shown = ", ".join(missing[:4])
        raise refusal("models/missing-shards", count=len(missing), shown=shown, folder=folder)
    return found


_ELSEWHERE: dict[str, str] = data_file("models/architectures.yaml")["elsewhere"]
"""Beginning of the name of a safetensors file that transformers does not look for → what to do."""


def _no_weights(folder: Path) -> InputError:
    """The error for a folder without weights under the names that transformers looks for."""
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    kind = f"only pickled weights ({', '.join(pickles)})" if pickles else "no weights"
    do = f"run workbook unpickle {folder} OUT, and give OUT." if pickles else "use a model saved as safetensors."
    if others:
        kind = f"no weights that transformers looks for, but {', '.join(others[:4])}" + (", …" if others[4:] else "")
        do = next(words for start, words in _ELSEWHERE.items() if others[0].startswith(start))
    elif any(folder.glob("*.onnx")):
        kind = "a model for ONNX Runtime, and no weights for transformers"
        do = "give the folder that it was made of; workbook evaluate, ask and perplexity run this one, too."
    return InputError(f"{folder} holds {kind}.", f"{SINGLE} or {INDEX}.", do)


def open_weights(folder: Path) -> Weights:
    """The weights of a model folder: one model.safetensors, else the shards of its index (`weight_map`).

    Raises:
        InputError: no folder, no safetensors weights, a damaged or missing shard, an index that does not fit, or an
            adapter beside the weights.
    """
    if not folder.is_dir():
        raise refusal("models/no-folder", what="no folder", folder=folder)
    refuse_device(folder / SINGLE)
    listed = weight_map(folder)
    if listed is None and not (folder / SINGLE).is_file():
        raise _no_weights(folder)
    if (folder / "adapter_config.json").is_file():
        raise refusal("models/adapter-beside-model", folder=folder)
    files = tuple(folder / name for name in (sorted(set(listed.values())) if listed else [SINGLE]))
    tensors: dict[str, StoredTensor] = {}
    metadata = {}
    for path in files:
        found, metadata[path.name] = read_file(path)
        if twice := sorted(set(found) & set(tensors)):
            raise InputError(f"{twice[0]} is in two shards of {folder}.", "each tensor once.", "download it again.")
        tensors |= found
    if listed and (wrong := sorted(set(listed) ^ set(tensors))):
        raise refusal("models/index-and-shards", folder=folder, count=len(wrong), wrong=wrong)
    if not tensors:
        raise InputError(f"{folder} holds no tensor.", "the weights of a model.", "download the folder again.")
    return Weights(folder, files, tensors, metadata)
