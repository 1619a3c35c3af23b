"""The file's name by the naming convention of GGUF: Base-Size-FineTune-v1.0-Encoding.gguf.
A GGUF file in parts, named and marked as llama.cpp's loader expects them: base-00001-of-00003.gguf.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import struct
from pathlib import Path

from lib.errors import InputError
from lib.models.gguf_file import MAGIC, TensorInfo, raw_metadata, read_metadata, read_tensors
from lib.models.unpack import plain_name
from lib.runs.files import CHUNK, atomic_path

# The file's name by the naming convention of GGUF: Base-Size-FineTune-v1.0-Encoding.gguf.

VERSION = "v1.0"

_SIZE = re.compile(r"(?:^|[-_ ])(\d+(?:[._]\d+)?[KMBTQ])(?=$|[-_ ])", re.IGNORECASE)
_REVISION = re.compile(r"^((?:\w+:)?[\w.-]+(?:/[\w.-]+)?)@.*$", re.S)
"""A hub id with its revision; a folder's path may hold an @ of its own."""


def gguf_name(base: str, size: str, run_name: str, encoding: str) -> str:
    """The name of a packaged file.

    Args:
        base: hub id, folder or name of the base model, as the run has it; a revision behind @ is left out.
        size: label of the size ("494M"), for a base whose name holds none.
        run_name: the fine-tune; behind what the base's own name says of its tuning (Instruct, Chat).
            Where the convention cannot hold all its characters, a short hash tells it from its like.
        encoding: quantization type.
    """
    name = re.split(r"[/\\:]", _REVISION.sub(r"\1", base).rstrip("/\\"))[-1] or "model"
    name = plain_name(name)
    name = "Offline-base" if name == "offline" else name
    found = _SIZE.search(name)
    size = found[1].replace("_", ".").upper() if found else size
    family, tuning = (name[: found.start()], name[found.end() :]) if found else (name, "")
    parts = [_part(family, "."), _part(size, "."), _part(f"{tuning}-{_tune(run_name)}"), VERSION, encoding]
    return "-".join(part for part in parts if part) + ".gguf"


def _tune(run_name: str) -> str:
    """The run's name as it can stand there: 情感甲 and 情感乙, a.b and a-b stay apart."""
    text = _part(run_name)
    return text if text == run_name else f"{text}-{hashlib.sha256(run_name.encode('utf-8')).hexdigest()[:6]}"


def size_label(weights: int) -> str:
    """The size of a model in its unit: 2.0M, 494M, 7.6B."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if weights >= scale:
            return f"{weights / scale:.{1 if weights < 10 * scale else 0}f}{unit}"
    return f"{max(1, round(weights / 1e3))}K"


def _part(text: str, keep: str = "") -> str:
    """Letters, digits and hyphens, as the convention has them (a base's name and a size keep their dot)."""
    return re.sub(rf"[^A-Za-z0-9{re.escape(keep)}]+", "-", text).strip("-.")


# A GGUF file in parts, named and marked as llama.cpp's loader expects them: base-00001-of-00003.gguf.

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
    tensors = sorted(read_tensors(path), key=lambda tensor: tensor.start)
    starts = [*(tensor.start for tensor in tensors), path.stat().st_size]
    sizes = [end - start for start, end in itertools.pairwise(starts)]
    count, raw = raw_metadata(path)
    parts = _grouped(tensors, sizes, len(raw), limit, path.name)
    alignment = int(read_metadata(path).get("general.alignment", 32))
    rest = (0, b"") if alignment == 32 else (1, _pair("general.alignment", _UINT32, "I", alignment))
    made, first = [], 0
    for number, group in enumerate(parts):
        marks = _pair("split.no", _UINT16, "H", number) + _pair("split.count", _UINT16, "H", len(parts))
        marks += _pair("split.tensors.count", _INT32, "i", len(tensors))
        own, pairs = (count, raw) if number == 0 else rest
        final = folder / f"{path.stem}-{number + 1:05d}-of-{len(parts):05d}.gguf"
        own_sizes = sizes[first : first + len(group)]
        _write(path, final, group, own_sizes, (own + 3, pairs + marks), alignment)
        made.append(final)
        first += len(group)
    return made


def _grouped(
    tensors: list[TensorInfo], sizes: list[int], metadata: int, limit: int, name: str
) -> list[list[TensorInfo]]:
    """Neighbouring tensors, as many as a part holds beside the metadata of the first one."""
    parts: list[list[TensorInfo]] = [[]]
    filled = metadata
    for tensor, size in zip(tensors, sizes, strict=True):
        if size > limit:
            raise InputError(
                f"tensor {tensor.name} of {name} has {size / 1e6:.0f} MB.",
                f"at most {limit / 1e6:.0f} MB, which a part for a browser holds.",
                "package a smaller quantization type with --type, or leave out --web.",
            )
        if filled + size > limit and parts[-1]:
            parts.append([])
            filled = 0
        parts[-1].append(tensor)
        filled += size
    return parts


def _write(
    source: Path, final: Path, group: list[TensorInfo], sizes: list[int], metadata: tuple[int, bytes], alignment: int
) -> None:
    count, pairs = metadata
    header = MAGIC + struct.pack("<IQQ", _VERSION, len(group), count) + pairs
    offset = 0
    for tensor, size in zip(group, sizes, strict=True):
        shape = tuple(reversed(tensor.shape))
        header += _string(tensor.name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        header += struct.pack("<IQ", tensor.type, offset)
        offset += -(-size // alignment) * alignment
    with atomic_path(final) as temporary, temporary.open("wb") as target, source.open("rb") as stream:
        target.write(header + bytes(-len(header) % alignment))
        for tensor, size in zip(group, sizes, strict=True):
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
