"""Tiny random GGUF files of the three architectures, quantized by the gguf library, and ways to damage them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from lib.models.gguf_file import _open, _Reader
from lib.stages.convert import convert
from tests.stages.convert.convertible import write_model

Q = gguf.GGMLQuantizationType
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"kind": "qwen2"},
    "qwen3": {"kind": "qwen3", "tied": False},
    "llama": {"kind": "llama", "head_dim": 16, "rope_theta": 10000.0, "rms_norm_eps": 1e-5},
}


def text(value: str) -> bytes:
    """A string as GGUF has it."""
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A value as GGUF has it, behind the number of its type."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<Ii", 5, value) if value < 0 else struct.pack("<II", 4, value)


def _raw_metadata(path: Path) -> tuple[int, bytes]:
    """The number of key-value pairs of a GGUF file, and their bytes as they stand in it."""
    with _open(path) as (reader, _):
        start = reader.at + 8
        reader.metadata()
        return int.from_bytes(reader.data[start - 8 : start], "little"), reader.data[start : reader.at]


def _without(count: int, pairs: bytes, keys: Mapping[str, Any]) -> tuple[int, bytes]:
    """Key-value pairs but for some keys, and their number."""
    reader, kept = _Reader(pairs, Path("pairs")), []
    for _ in range(count):
        start, key = reader.at, reader.string()
        reader.value(reader.number("I"))
        kept += [] if key in keys else [pairs[start : reader.at]]
    return len(kept), b"".join(kept)


def mixed(name: str) -> Any:
    """Q4_1 for matrices, Q8_0 for the embedding, as the SmolLM2 file of the package has them."""
    return Q.Q8_0 if name.startswith(("token_embd", "output.")) else Q.Q4_1


def repack(
    source: Path,
    target: Path,
    kind: Callable[[str], Any] = mixed,
    change: Callable[[bytes], bytes] = lambda pairs: pairs,
    tensors: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
    more: Mapping[str, Any] | None = None,
) -> Path:
    """A copy of a float GGUF file whose matrices are quantized.

    Args:
        change: alters the bytes of the key-value pairs; tensors: alters the float32 tensors by name.
        more: keys put behind the file's own, in place of equal ones.
    """
    arrays = {t.name: np.asarray(t.data).reshape(t.shape[::-1]).copy() for t in gguf.GGUFReader(source).tensors}
    tensors(arrays)
    count, pairs = _raw_metadata(source)
    count, pairs = _without(count, pairs, more or {})
    for key, value in (more or {}).items():
        count, pairs = count + 1, pairs + text(key) + _value(value)
    infos, data, offset = b"", b"", 0
    for name, array in arrays.items():
        matrix = array.ndim > 1 and name.endswith(".weight")
        wanted = kind(name) if matrix else Q.F32
        raw = gguf.quants.quantize(array.astype(np.float32), wanted).tobytes()
        shape = array.shape[::-1]
        infos += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, wanted, offset)
        raw += b"\0" * (-len(raw) % 32)
        data, offset = data + raw, offset + len(raw)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(arrays), count) + change(pairs) + infos
    target.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return target


def make(folder: Path, name: str, options: Mapping[str, Any] | None = None, **changes: Any) -> Path:
    """folder/NAME.Q4_1.gguf of a random model; `options` of `write_model`, `changes` of `repack`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "load_check", lambda *_: "")  # other tests load files in llama.cpp
        whole = write_model(folder / f"{name}-original", **{"dtype": "float32", **(options or MODELS[name])})
        convert.convert(whole, folder / f"{name}-f32.gguf", "f32")
    return repack(folder / f"{name}-f32.gguf", folder / f"{name}.Q4_1.gguf", **changes)
