"""A GGUF file looked at before native code opens it: what it is, and its metadata."""

from __future__ import annotations

import contextlib
import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import InputError

MAGIC = b"GGUF"
_SMALLEST = 24  # magic, version, number of tensors, number of metadata entries


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
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}).", "a readable file.", "check its rights."
        ) from None
    if head[:4] == MAGIC and len(head) >= _SMALLEST:
        return path
    raise InputError(f"{path} {_describe(head)}.", "a file that starts with GGUF.", _cure(head))


def _describe(head: bytes) -> str:
    if not head:
        return "is empty"
    if not head.strip(b"\0"):
        return "starts with zeros, as a file does whose writing was interrupted"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself"
    if head.lstrip()[:1] == b"<":
        return "is an HTML or XML page, not a model"
    if head[:2] == b"PK":
        return "is a ZIP archive or a PyTorch pickle"
    if head[8:9] == b"{":
        return "looks like a safetensors file"
    if head[:4] == MAGIC:
        return "is cut off inside its header"
    return f"starts with {head[:8]!r}"


def _cure(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return "run `git lfs pull` in that folder."
    if head.lstrip()[:1] == b"<":
        return "download the file again: the server sent a page."
    if head[8:9] == b"{":
        return "convert the model first: workbook convert MODEL_DIR OUT.gguf."
    return "make or download the file again."


_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class _Reader:
    """Bounds-checked reading: every length is compared with what is left of the file before anything is made of it."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise self.damaged(f"a length of {count} bytes at byte {self.at} of {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"text that is not UTF-8 before byte {self.at}") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in _FORMATS:
                code = _FORMATS[inner]
                return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(code))))
            if inner == _STRING and count <= (len(self.data) - self.at) // 8:
                return [self.string() for _ in range(count)]
            raise self.damaged(f"an array of {count} values of type {inner} at byte {self.at}")
        if kind not in _FORMATS:
            raise self.damaged(f"a value of unknown type {kind} at byte {self.at}")
        return self.number(_FORMATS[kind])

    def metadata(self) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        for _ in range(min(self.number("Q"), len(self.data))):
            key = self.string()
            if key in pairs:
                raise self.damaged(f"key {key[:80]!r} twice")
            pairs[key] = self.value(self.number("I"))
        return pairs

    def tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name, dimensions = self.string(), self.number("I")
        if dimensions > 4:
            raise self.damaged(f"{dimensions} dimensions of tensor {name!r}")
        shape = [self.number("Q") for _ in range(dimensions)]
        return name, self.number("I"), tuple(reversed(shape)), self.number("Q")

    def damaged(self, what: str) -> InputError:
        return InputError(f"{self.path} has {what}.", "a whole GGUF file.", "make or download the file again.")


def read_metadata(path: Path | str) -> dict[str, Any]:
    """All key-value pairs of a GGUF file (versions 2 and 3, little endian); tensors are not read.

    Lengths are checked against the file's size first: a damaged file is refused at once, never waited for.

    Raises:
        InputError: not a GGUF file, or a damaged one.
    """
    with _open(path) as (reader, _):
        return reader.metadata()


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a GGUF file: its type's number, its shape (rows first, as in PyTorch), its first byte."""

    name: str
    type: int
    shape: tuple[int, ...]
    start: int


def read_tensors(path: Path | str) -> list[TensorInfo]:
    """Names, types, shapes and places of a GGUF file's tensors, in the file's order; their data is not read.

    Raises:
        InputError: not a GGUF file, or a damaged header; a tensor that does not begin where the one before it ends.
    """
    with _open(path) as (reader, count):
        alignment = reader.metadata().get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise reader.damaged(f"general.alignment {str(alignment)[:60]!r}, no power of two")
        found = [reader.tensor() for _ in range(min(count, len(reader.data)))]
        _check_places(reader, found, alignment)
        data = -(-reader.at // alignment) * alignment
        return [TensorInfo(name, kind, shape, data + offset) for name, kind, shape, offset in found]


def _check_places(reader: _Reader, found: list[tuple[str, int, tuple[int, ...], int]], alignment: int) -> None:
    """Every tensor begins at the end of the one before it, padded, as ggml demands; a wrong place, type or shape would
    read other weights. Behind a type that the gguf library does not know nothing can be said."""
    import gguf

    place = 0
    for name, kind, shape, offset in found:
        if offset != place:
            raise reader.damaged(f"tensor {name[:80]!r} at byte {offset} of the data, where {place} is next")
        try:
            block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            return
        place += -(-(math.prod(shape) // block * width) // alignment) * alignment


def raw_metadata(path: Path | str) -> tuple[int, bytes]:
    """The number of key-value pairs of a GGUF file, and their bytes as they stand in it.

    Raises:
        InputError: not a GGUF file, or a damaged header.
    """
    with _open(path) as (reader, _):
        start = reader.at + 8
        reader.metadata()
        return int.from_bytes(reader.data[start - 8 : start], "little"), reader.data[start : reader.at]


@contextlib.contextmanager
def _open(path: Path | str) -> Iterator[tuple[_Reader, int]]:
    """A reader behind the magic and the version, and the number of tensors."""
    path = check_gguf(path)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data, path)
        reader.take(4)
        version, tensors = reader.number("I"), reader.number("Q")
        if version not in (2, 3):
            raise reader.damaged(f"GGUF version {version}")
        yield reader, tensors
