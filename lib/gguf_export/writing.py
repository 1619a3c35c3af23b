"""A GGUF file being written: its header first, then the data of every tensor at its own place, in any order."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.gguf_export.tensors import SLAB, PlannedTensor, encode, slabs
from lib.run.files import write_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    from gguf import GGUFWriter

ALIGNMENT = 32


class GgufFile:
    """An open file of a planned size. Parts may be put from several threads."""

    def __init__(self, path: Path, header: bytes, plan: list[PlannedTensor]) -> None:
        self._offsets: dict[str, int] = {}
        end = _padded(len(header))
        for tensor in plan:
            self._offsets[tensor.name] = end
            end += _padded(tensor.nbytes)
        self._plan = plan
        self._by_source = {tensor.source.name: tensor for tensor in plan if tensor.source is not None}
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.ftruncate(self._file, end)  # the padding between tensors is the zeros of the hole
        write_at(self._file, header, 0)

    def close(self) -> None:
        os.close(self._file)

    def put(self, name: str, first: int, values: np.ndarray, dtype: str) -> None:
        """Write whole rows of the tensor that the model folder calls `name`, from its value number `first` on."""
        if (tensor := self._by_source.get(name)) is None:
            return
        step = len(values) if tensor.heads else max(1, SLAB // tensor.row) * tensor.row
        for start in range(0, len(values), step):
            self._put(tensor, first + start, values[start : start + step], dtype)

    def whole(self, name: str) -> bool:
        """Whether all rows of this tensor must be put at once."""
        tensor = self._by_source.get(name)
        return tensor is not None and bool(tensor.heads)

    def _put(self, tensor: PlannedTensor, first: int, values: np.ndarray, dtype: str) -> None:
        data = encode(tensor, values, dtype)
        offset = self._offsets[tensor.name] + first // tensor.row * (tensor.nbytes // (tensor.size // tensor.row))
        write_at(self._file, data, offset)

    def put_own(self) -> None:
        """Write the tensors that no model folder has."""
        for tensor in self._plan:
            if tensor.values is not None:
                self._put(tensor, 0, tensor.values.reshape(-1), "F32")

    def jobs(self) -> Iterator[Callable[[], int]]:
        """One job a slab: read it from the model folder, convert it, write it; each gives the bytes it read."""
        for tensor in self._plan:
            if tensor.source is not None:
                for first, count in slabs(tensor):
                    yield partial(self._copy, tensor, first, count)

    def _copy(self, tensor: PlannedTensor, first: int, count: int) -> int:
        assert tensor.source is not None
        values = tensor.source.read(first, count)
        self._put(tensor, first, values, tensor.source.dtype)
        return values.nbytes


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def pack_header(writer: GGUFWriter) -> bytes:
    """Header, keys and tensor table of a GGUFWriter as bytes.

    The library packs an array item by item, 300,000 calls for a Qwen vocabulary; arrays are joined here instead.
    """
    import io
    import struct

    import gguf

    stream = io.BytesIO()
    keys = writer.kv_data[0]
    stream.write(struct.pack("<IIQQ", gguf.GGUF_MAGIC, gguf.GGUF_VERSION, len(writer.tensors[0]), len(keys)))
    for key, value in keys.items():
        stream.write(_string(key))
        if value.type == gguf.GGUFValueType.ARRAY and len(value.value) and isinstance(value.value[0], str):
            items = [item.encode("utf-8") for item in value.value]
            stream.write(struct.pack("<IIQ", value.type, gguf.GGUFValueType.STRING, len(items)))
            stream.write(b"".join(part for item in items for part in (len(item).to_bytes(8, "little"), item)))
        else:
            stream.write(_value(writer, value))
    offset = 0
    for name, info in writer.tensors[0].items():
        shape = tuple(reversed(info.shape))
        stream.write(_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, info.dtype, offset))
        offset += _padded(info.nbytes)
    return stream.getvalue()


def _value(writer: GGUFWriter, value: Any) -> bytes:
    return writer._pack_val(value.value, value.type, add_vtype=True, sub_type=value.sub_type)


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return len(data).to_bytes(8, "little") + data
