"""A GGUF file in parts, named and marked as llama.cpp's loader expects them: base-00001-of-00003.gguf."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

from lib.errors import InputError
from lib.models.gguf_file import MAGIC, TensorInfo, raw_metadata, read_metadata, read_tensors
from lib.runs.files import CHUNK, atomic_path

_UINT16, _UINT32, _INT32 = 2, 4, 5
_VERSION = 3


def split_gguf(path: Path, folder: Path, limit: int) -> list[Path]:
    """Write the parts of a file; the metadata stand in the first one.

    Args:
        limit: bytes of metadata and tensors in a part, at most; marks and names of tensors come on top.

    Returns:
        The parts, in order.

    Raises:
        InputError: a single tensor is larger than a part.
    """
    count, raw = raw_metadata(path)
    parts = _grouped(path, limit, len(raw))
    total = sum(map(len, parts))
    alignment = int(read_metadata(path).get("general.alignment", 32))
    rest = (0, b"") if alignment == 32 else (1, _pair("general.alignment", _UINT32, "I", alignment))
    made = []
    for number, group in enumerate(parts):
        marks = _pair("split.no", _UINT16, "H", number) + _pair("split.count", _UINT16, "H", len(parts))
        marks += _pair("split.tensors.count", _INT32, "i", total)
        pairs, own = (count, raw) if number == 0 else rest
        made.append(folder / f"{path.stem}-{number + 1:05d}-of-{len(parts):05d}.gguf")
        _write(path, made[-1], group, pairs + 3, own + marks, alignment)
    return made


def tensor_sizes(path: Path) -> list[tuple[TensorInfo, int]]:
    """The tensors as they lie in the file, each with the bytes up to the next one."""
    tensors = sorted(read_tensors(path), key=lambda tensor: tensor.start)
    starts = [*(tensor.start for tensor in tensors), path.stat().st_size]
    return [(tensor, stop - start) for tensor, (start, stop) in zip(tensors, itertools.pairwise(starts), strict=True)]


def _grouped(path: Path, limit: int, metadata: int) -> list[list[tuple[TensorInfo, int]]]:
    """Neighbouring tensors, as many as a part holds (the first one beside the metadata), each with its bytes."""
    parts: list[list[tuple[TensorInfo, int]]] = [[]]
    filled = metadata
    for tensor, size in tensor_sizes(path):
        if size > limit:
            raise InputError(
                f"tensor {tensor.name} of {path.name} has {size / 1e6:.0f} MB.",
                f"at most {limit / 1e6:.0f} MB, which a part for a browser holds.",
                "package a smaller quantization type with --type, or leave out --web.",
            )
        if filled + size > limit and parts[-1]:
            parts.append([])
            filled = 0
        parts[-1].append((tensor, size))
        filled += size
    return parts


def _write(
    source: Path, final: Path, group: list[tuple[TensorInfo, int]], pairs: int, metadata: bytes, alignment: int
) -> None:
    """Write a part: header with so many pairs of metadata, then the tensors from the source."""
    header = MAGIC + struct.pack("<IQQ", _VERSION, len(group), pairs) + metadata
    offset = 0
    for tensor, size in group:
        shape = tuple(reversed(tensor.shape))
        header += _string(tensor.name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        header += struct.pack("<IQ", tensor.type, offset)
        offset += -(-size // alignment) * alignment
    with atomic_path(final) as temporary, temporary.open("wb") as target, source.open("rb") as stream:
        target.write(header + bytes(-len(header) % alignment))
        for tensor, size in group:
            stream.seek(tensor.start)
            left = size
            while left:
                block = stream.read(min(CHUNK, left))
                target.write(block)
                left -= len(block)
            target.write(bytes(-size % alignment))


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _pair(key: str, kind: int, code: str, value: int) -> bytes:
    return _string(key) + struct.pack(f"<I{code}", kind, value)
