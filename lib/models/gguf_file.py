"""GGUF files, read and checked before native code opens them: header, keys, table of tensors; the architectures in
them; and their tensors dequantized."""

from __future__ import annotations

import contextlib
import math
import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError, refusal, refusing
from lib.models.weights import Shaped, impostor
from lib.runs.files import data_file

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

    from lib.runs.run import Run

MAGIC = b"GGUF"
_SMALLEST = 24  # magic, version, number of tensors, number of metadata entries


def unusable(path: Path, found: str, expected: str, do: str = "make or download the file again") -> InputError:
    """The error for a GGUF file that is damaged, or holds something that this workbook cannot read."""
    return InputError(f"{path}: {found}.", f"{expected}.", f"{do}.")


def check_gguf(path: Path | str) -> Path:
    """The path, if the file exists and starts as a GGUF file does.

    Raises:
        InputError: says what the file is instead: missing, a folder, empty, unfinished (zeros), a Git LFS pointer, an
            HTML page, a pickle, a safetensors file.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder.", "a .gguf file.", "name the file inside it.")
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.gguf"))[:3] if path.parent.is_dir() else []
        do = f"use one of those in the folder: {', '.join(near)}." if near else "check the path."
        raise InputError(f"no file {path}.", "a .gguf file.", do)
    with refusing(OSError, "models/unreadable-gguf", path=path), path.open("rb") as stream:
        head = stream.read(512)
    if head[:4] == MAGIC and len(head) >= _SMALLEST:
        return path
    found, do = _instead(head)
    raise InputError(f"{path} {found}.", "a file that starts with GGUF.", f"{do}.")


ADAPTER = b"general.type" + struct.pack("<IQ", 8, 7) + b"adapter"
"""How a LoRA adapter in GGUF begins: the key behind the architecture, a text of seven letters."""


def check_model_gguf(path: Path | str) -> Path:
    """As `check_gguf`, of a file that holds a model: a LoRA adapter is refused, too."""
    path = check_gguf(path)
    with path.open("rb") as stream:
        if ADAPTER in stream.read(512):
            raise refusal("models/gguf-adapter", path=path)
    return path


def run_gguf(run: Run) -> Path:
    """The file of a run's product `gguf`: unquantized, the reference of 07 and the source of 06.

    Raises:
        InputError: no such product, or not one GGUF file in it.
    """
    folder = run.require("gguf").path
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        do = "run notebooks/05_convert_gguf.ipynb with force: true."
        raise InputError(f"{len(found)} GGUF files in {folder}.", "exactly one.", do)
    return check_gguf(found[0])


def _instead(head: bytes) -> tuple[str, str]:
    """What a file without the start of a GGUF file is instead, and what to do about it."""
    again = "make or download the file again"
    if not head:
        return "is empty", again
    if not head.strip(b"\0"):
        return "starts with zeros, as a file does whose writing was interrupted", again
    if head.lstrip()[:1] == b"<":
        return "is an HTML or XML page, not a model", "download the file again: the server sent a page"
    if head[:2] == b"PK":
        return "is a ZIP archive or a PyTorch pickle", "of a model make a folder first: workbook unpickle FOLDER OUT"
    if other := impostor(head):
        return f"is {other[0]}, not the file itself", other[1]
    if head[8:9] == b"{":
        return "looks like a safetensors file", "convert the model first: workbook convert MODEL_DIR OUT.gguf"
    if head[:4] == MAGIC:
        return "is cut off inside its header", again
    return f"starts with {head[:8]!r}", again


_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class _Reader:
    """Bounds-checked reading: every length is compared with what is left of the file before it is used."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0
        self.pairs: dict[str, int] = {}
        """Key → bytes of its pair."""

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise self.damaged(f"a length of {count} bytes at byte {self.at} of {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """One after another, in a loop of its own: a vocabulary and its merges are 300,000 of them."""
        data, at, end, length, found = self.data, self.at, len(self.data), struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            if at + 8 > end or (size := length(data, at)[0]) > end - at - 8:
                self.at = at
                self.take(self.number("Q"))  # refuses the one or the other
            at += 8 + size
            found.append(data[at - size : at])
        self.at = at
        with refusing(UnicodeDecodeError, "models/gguf-not-utf8", path=self.path, at=self.at):
            return [raw.decode("utf-8") for raw in found]

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in _FORMATS:
                code = _FORMATS[inner]
                return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(code))))
            if inner == _STRING and count <= (len(self.data) - self.at) // 8:
                return self.strings(count)
            raise self.damaged(f"an array of {count} values of type {inner} at byte {self.at}")
        if kind not in _FORMATS:
            raise self.damaged(f"a value of unknown type {kind} at byte {self.at}")
        return self.number(_FORMATS[kind])

    def metadata(self) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        for _ in range(min(self.number("Q"), len(self.data))):
            start, key = self.at, self.string()
            if key in pairs:
                raise self.damaged(f"key {key[:80]!r} twice")
            pairs[key] = self.value(self.number("I"))
            self.pairs[key] = self.at - start
        return pairs

    def tensor(self) -> TensorInfo:
        """An entry of the table; its place counts from the first byte of the data."""
        name, dimensions = self.string(), self.number("I")
        if dimensions > 4:
            raise self.damaged(f"{dimensions} dimensions of tensor {name!r}")
        shape = [self.number("Q") for _ in range(dimensions)]
        return TensorInfo(name, self.number("I"), tuple(reversed(shape)), self.number("Q"))

    def damaged(self, what: str) -> InputError:
        return unusable(self.path, what, "a whole GGUF file")


def read_metadata(path: Path | str) -> dict[str, Any]:
    """All key-value pairs of a GGUF file (versions 2 and 3, little endian); tensors are not read.

    Lengths are checked against the file's size first: a damaged file is refused at once, never waited for.

    Raises:
        InputError: not a GGUF file, or a damaged one.
    """
    with _open(path) as (reader, _):
        return reader.metadata()


@dataclass(frozen=True)
class TensorInfo(Shaped):
    """One tensor of a GGUF file: its type's number, its shape (rows first, as in PyTorch), its first byte."""

    name: str
    type: int
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int | None:
        """Bytes of its data, without padding; None for a type that the gguf library does not know."""
        import gguf

        try:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(self.type)]
        except (ValueError, KeyError):
            return None
        return self.size // block * size


def data_end(tensors: Sequence[TensorInfo]) -> int | None:
    """The first byte after the last tensor of a file; None when a type is unknown."""
    sizes = [tensor.nbytes for tensor in tensors]
    return max((t.start + n for t, n in zip(tensors, sizes, strict=True)), default=0) if None not in sizes else None


@dataclass(frozen=True)
class GgufHeader:
    """What stands in a GGUF file before the data: keys, and tensors in the file's order.

    Attributes:
        pairs: bytes that every key takes with its value; size: of the whole header, without padding.
    """

    metadata: dict[str, Any]
    tensors: list[TensorInfo]
    pairs: dict[str, int]
    size: int
    alignment: int


def padded(size: int, alignment: int = 32) -> int:
    """Bytes of a header or a tensor in a file."""
    return -(-size // alignment) * alignment


def read_tensors(path: Path | str) -> list[TensorInfo]:
    """Names, types, shapes and places of a GGUF file's tensors; as `read_gguf`."""
    return read_gguf(path).tensors


def read_gguf(path: Path | str) -> GgufHeader:
    """The header of a GGUF file; the data of the tensors is not read.

    Raises:
        InputError: not a GGUF file, or a damaged header; a tensor that does not begin where the one before it ends.
    """
    with _open(path) as (reader, count):
        metadata = reader.metadata()
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise reader.damaged(f"general.alignment {str(alignment)[:60]!r}, no power of two")
        found = [reader.tensor() for _ in range(min(count, len(reader.data)))]
        data = padded(reader.at, alignment)
        # Every tensor must begin at the end of the one before it, padded, as ggml demands; a wrong place, type or shape
        # would read other weights. Behind a type that the gguf library does not know nothing can be said.
        place: int | None = 0
        for tensor in found:
            if place is not None and tensor.start != place:
                where = f"at byte {tensor.start} of the data, where {place} is next"
                raise reader.damaged(f"tensor {tensor.name[:80]!r} {where}")
            size = tensor.nbytes
            place = None if place is None or size is None else place + padded(size, alignment)
        tensors = [replace(tensor, start=data + tensor.start) for tensor in found]
        return GgufHeader(metadata, tensors, reader.pairs, reader.at, alignment)


def computes_in_float32(name: str, shape: Sequence[int]) -> bool:
    """Whether llama.cpp computes with a tensor in float32 alone, and aborts at another type: vectors, norms, biases."""
    return len(shape) <= 1 or name.endswith(("norm.weight", ".bias"))


@contextlib.contextmanager
def _open(path: Path | str) -> Iterator[tuple[_Reader, int]]:
    """A reader placed behind magic, version and number of tensors, and that number."""
    path = check_gguf(path)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data, path)
        reader.take(4)
        version, tensors = reader.number("I"), reader.number("Q")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            found = f"{swapped}, big-endian" if swapped < version else version
            raise refusal("models/gguf-version", path=path, found=found)
        yield reader, tensors


# The architectures that are turned into GGUF and back: classes, names of tensors, rotary frequencies.

TABLES = data_file("models/architectures.yaml")
_KNOWN: dict[str, dict[str, Any]] = TABLES["architectures"]

ARCHITECTURES = {entry["class"]: name for name, entry in _KNOWN.items()}
"""Class in config.json → architecture in GGUF."""

NUMBERS: dict[str, str] = TABLES["numbers"]
"""Key of config.json → key in GGUF, behind the architecture's name; in the official converter's order."""

ROPE_TYPES = {name: tuple(entry["rope_types"]) for name, entry in _KNOWN.items()}
"""Architecture → kinds of rope scaling that can be said in both formats."""

BIASES = {name: {key: TABLES["biases"][key] for key in entry["biases"]} for name, entry in _KNOWN.items()}
"""Architecture → keys of config.json → biases of every block that each stands for, in GGUF and in transformers."""

OWN_FOLDER = "give the model's own folder as base_model"
"""What to do about a file whose model or tokenizer cannot be rebuilt."""

ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3 = (("factor", 8.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0))


def name_map(architecture: Any, blocks: int) -> Any:
    """The package gguf's map from names of tensors in transformers to those in GGUF; None for an architecture (of GGUF,
    or a model_type of transformers) that it does not know."""
    import gguf

    architecture = TABLES["other_names"].get(architecture, architecture)
    number = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    return None if number is None else gguf.get_tensor_name_map(number, blocks)


def names_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Name in GGUF → name in transformers, of all tensors that a model of this configuration must have."""
    kind, tied = config["model_type"], config.get("tie_word_embeddings")
    names = {ours: theirs for ours, theirs in TABLES["outside"].items() if not (tied and ours == "output.weight")}
    biases = {ours: name for key, of in BIASES[kind].items() if config.get(key) for ours, name in of.items()}
    for block in range(int(config["num_hidden_layers"])):
        for ours, theirs in {**TABLES["block"], **_KNOWN[kind]["block"], **biases}.items():
            names[f"blk.{block}.{ours}"] = f"model.layers.{block}.{theirs}"
    return names


def rotary_heads(name: str, config: dict[str, Any]) -> int:
    """Number of heads whose rows llama.cpp orders differently: query and key of Llama; 0 for all other tensors.

    Args:
        name: of the tensor in transformers or in GGUF.
    """
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    heads |= {"attn_q": heads["q_proj"], "attn_k": heads["k_proj"]}
    module = name.split(".")[-2:][0]
    return int(config[heads[module]]) if config["model_type"] in ("llama", "mistral") and module in heads else 0


def pair_rows(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head reordered from halves (transformers) to neighbours (llama.cpp's rotary order for Llama)."""
    rows = values.shape[0] // heads // 2
    return values.reshape(heads, 2, rows, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def row_order(name: str, config: dict[str, Any], rows: int) -> np.ndarray:
    """The rows of a matrix of a model, by its name in transformers or in GGUF, in the order of GGUF."""
    heads = rotary_heads(name, config)
    return pair_rows(np.arange(rows), heads) if heads else np.arange(rows)


def unpair_rows(values: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `pair_rows`."""
    rows = values.shape[0] // heads // 2
    return values.reshape(heads, rows, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """Rope parameters, in the layout of transformers 5."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})  # transformers' order
    if "rope_theta" not in rope and config.get("rope_theta") is not None:
        rope["rope_theta"] = config["rope_theta"]
    rope.setdefault("rope_type", rope.get("type"))
    return rope


def head_size(config: dict[str, Any]) -> int:
    """Values of one attention head."""
    if config.get("head_dim") is not None:
        return int(config["head_dim"])
    return int(config["hidden_size"]) // int(config["num_attention_heads"])


def rope_factors(config: dict[str, Any]) -> np.ndarray | None:
    """Divisors of the rotary frequencies of Llama 3.1 and later (rope type llama3), float32; None for other models.

    Wavelengths below the high-frequency bound stay, those above the low-frequency bound are stretched by `factor`, and
    those between are blended (llama.cpp, conversion/llama.py, generate_extra_tensors).
    """
    rope = rope_of(config)
    if str(rope.get("rope_type")).lower() != "llama3":
        return None
    size = head_size(config)
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    frequencies = (1.0 / np.power(np.float32(rope.get("rope_theta", 10000.0)), exponents)).astype(np.float32)
    factor, low, high = (rope.get(key, default) for key, default in _LLAMA3)
    trained = rope.get("original_max_position_embeddings", 8192)
    lengths = np.float32(2 * math.pi) / frequencies
    with np.errstate(divide="ignore"):  # outside of its bounds the blend may be infinite; it is not taken there
        smooth = (trained / lengths - low) / (high - low)
        blended = 1 / ((1 - smooth) / factor + smooth)
    stretched = np.where(lengths > trained / low, factor, blended)
    return np.where(lengths < trained / high, 1.0, stretched).astype(np.float32)


# Tensors dequantized.

SLAB = 4 << 20
"""Weights dequantized or converted at a time (16 MiB of float32)."""


@dataclass(frozen=True)
class PackedTensor(TensorInfo):
    """One tensor of a model, as it is stored in a file.

    Attributes:
        name: in transformers.
        heads: attention heads whose rows llama.cpp has in another order; 0 = none.
    """

    type: GGMLQuantizationType
    file: Path
    heads: int

    def slabs(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, float32 rows) of each part, dequantized by the gguf library and put into transformers' order."""
        import gguf

        rows, width = self.shape[0], math.prod(self.shape[1:])
        block, nbytes = gguf.GGML_QUANT_SIZES[self.type]
        row_bytes = width * nbytes // block
        whole = rows // self.heads if self.heads else 1
        step = max(1, SLAB // (width * whole)) * whole
        for first in range(0, rows, step):
            count = min(step, rows - first)
            raw = read_bytes(self.file, self.start + first * row_bytes, count * row_bytes)
            values = gguf.quants.dequantize(raw.reshape(count, row_bytes), self.type)
            values = np.asarray(values, np.float32).reshape(count, *self.shape[1:])
            yield first, unpair_rows(values, count // whole) if self.heads else values


def read_bytes(path: Path, start: int, count: int) -> np.ndarray:
    """A part of a file.

    Raises:
        InputError: the file ends before, or cannot be read.
    """
    with refusing(OSError, "models/gguf-gone", path=path):
        data = np.fromfile(path, np.uint8, count, offset=start)
    if len(data) < count:
        raise unusable(path, "cut while it was read", "a complete file")
    return data
