"""GGUF headers as llama.cpp quantizes them, importance matrices, rows in its types by its library through ctypes. For
child processes only."""

from __future__ import annotations

import ctypes
import functools
import io
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import _ggml

from lib.errors import InputError, refusal
from lib.models.gguf_file import padded, read_gguf, unusable
from lib.scoring import llama_backend
from lib.settings import TENSOR_TYPES

_LIBRARY = _ggml.libggml


def _function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    function = getattr(_LIBRARY, name)
    function.restype, function.argtypes = result, list(arguments)
    return function


_P, _I64, _TYPE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_type_name = _function("ggml_type_name", ctypes.c_char_p, _TYPE)
_row_size = _function("ggml_row_size", ctypes.c_size_t, _TYPE, _I64)
_block_size = _function("ggml_blck_size", _I64, _TYPE)
_requires_imatrix = _function("ggml_quantize_requires_imatrix", ctypes.c_bool, _TYPE)
_quantize_chunk = _function("ggml_quantize_chunk", ctypes.c_size_t, _TYPE, _P, _P, _I64, _I64, _I64, _P)


_TO_FLOAT = {"f16": "ggml_fp16_to_fp32_row", "bf16": "ggml_bf16_to_fp32_row"}
"""Tensor type → llama.cpp's function that turns it into float32, where it is called otherwise than the others are."""


@functools.cache
def type_number(name: str) -> int:
    """The ggml number of a tensor type ("q4_K")."""
    for number in range(128):
        if (_type_name(number) or b"").decode() == name:
            return number
    raise RuntimeError(f"llama.cpp logged the tensor type {name!r} but does not know it")


def row_bytes(type_name: str, columns: int) -> int:
    """Bytes of one row of `columns` weights."""
    return _row_size(type_number(type_name), columns)


def block_size(type_name: str) -> int:
    """Weights a block of a tensor type."""
    return _block_size(type_number(type_name))


def requires_imatrix(type_name: str) -> bool:
    """Whether llama.cpp aborts when it quantizes to this tensor type without an importance matrix."""
    return _requires_imatrix(type_number(type_name))


def quantize_rows(type_name: str, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """Rows of weights as llama.cpp stores them.

    Args:
        rows: float32, (rows, columns); columns fill whole blocks of the type.
        importance: float32, (columns,), or None.

    Returns:
        bytes, uint8, (rows, bytes of a row).

    Raises:
        ValueError: importance of another width, beyond which llama.cpp would read.
    """
    if importance is not None and importance.shape != (rows.shape[1],):
        raise ValueError(f"importance of shape {importance.shape} for rows of {rows.shape[1]} weights")
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    made = np.zeros((len(rows), row_bytes(type_name, rows.shape[1])), dtype=np.uint8)
    matrix = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    pointer = None if matrix is None else matrix.ctypes.data
    size = _quantize_chunk(type_number(type_name), rows.ctypes.data, made.ctypes.data, 0, *rows.shape, pointer)
    if size != made.nbytes:
        raise RuntimeError(f"llama.cpp wrote {size} bytes of {type_name} instead of {made.nbytes}")
    return made


def dequantize_rows(type_name: str, stored: np.ndarray) -> np.ndarray:
    """Stored rows as float32, (rows, columns), by llama.cpp's own code.

    Args:
        stored: bytes, uint8, (rows, bytes of a row), as `quantize_rows` gives them; any type but f32.
    """
    stored = np.ascontiguousarray(stored)
    rows, size = stored.shape
    columns = size // row_bytes(type_name, block_size(type_name)) * block_size(type_name)
    made = np.empty((rows, columns), dtype=np.float32)
    to_float = _function(_TO_FLOAT.get(type_name, f"dequantize_row_{type_name}"), None, _P, _P, _I64)
    to_float(stored.ctypes.data, made.ctypes.data, made.size)
    return made


def rounded(type_name: str, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """Rows of weights in a type and back; see `quantize_rows`."""
    return dequantize_rows(type_name, quantize_rows(type_name, rows, importance))


class Log:
    """Collects what llama.cpp logs; `errors` are its error lines, `on_line` hears every complete line."""

    def __init__(self, on_line: Callable[[str], None] | None = None) -> None:
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._rest = ""
        self._on_line = on_line
        llama_backend.listen(self._hear)

    def _hear(self, level: int, message: str) -> None:
        if level == llama_backend.ERROR and (stripped := " ".join(message.replace("=", "").split())):
            self.errors.append(stripped)
        *complete, self._rest = (self._rest + message).split("\n")
        for line in complete:
            self.lines.append(line)
            if self._on_line is not None:
                self._on_line(line)

    @property
    def reason(self) -> str:
        """The error lines as one sentence part."""
        return "; ".join(dict.fromkeys(self.errors[-3:])) or "no reason logged"


@dataclass(frozen=True)
class Tensor:
    """A tensor of a GGUF file.

    Attributes:
        shape: columns first; type: as llama.cpp writes it ("q4_K").
        bytes: without padding; offset: from the file's start.
    """

    shape: tuple[int, ...]
    type: str
    bytes: int
    offset: int

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        return self.shape[0]

    @property
    def rows(self) -> int:
        """Those of all experts together."""
        return self.weights // self.columns

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights

    def as_type(self, name: str) -> Tensor:
        """The same tensor in another type; its place in the file is not known then."""
        return replace(self, type=name, bytes=self.rows * row_bytes(name, self.columns))


@dataclass(frozen=True)
class Header:
    """A GGUF header.

    Attributes:
        values: of every key.
        size_when_quantized: its bytes after quantizing, see `read_header`.
    """

    path: Path
    values: dict[str, Any]
    tensors: dict[str, Tensor]
    size_when_quantized: int

    def rows(self, name: str, start: int = 0, stop: int | None = None, step: int = 1) -> np.ndarray:
        """Every `step`-th row of a tensor, float32, (rows, columns); `start` and `stop` as in a slice."""
        tensor = self.tensors[name]
        shape = tensor.rows, tensor.bytes // tensor.rows
        raw = np.ascontiguousarray(np.memmap(self.path, np.uint8, "r", tensor.offset, shape)[start:stop:step])
        return raw.view("<f4") if tensor.type == "f32" else dequantize_rows(tensor.type, raw)


def read_header(path: Path, added: Mapping[str, str | int] | None = None) -> Header:
    """Read a GGUF header.

    Args:
        added: keys that quantizing adds beside its own, for the size of the header afterwards.

    Raises:
        InputError: a damaged header, a type that llama.cpp does not know, or tensors that reach beyond the file's end.
    """
    found, names, tensors = read_gguf(path), {type_number(name): name for name in TENSOR_TYPES}, {}
    for info in found.tensors:
        if (kind := names.get(info.type)) is None:
            what = f"tensor {info.name} of type {info.type}"
            raise unusable(path, what, f"types that llama.cpp quantizes from or to ({', '.join(TENSOR_TYPES)})")
        shape = info.shape[::-1] or (1,)
        tensors[info.name] = Tensor(shape, kind, row_bytes(kind, shape[0]) * math.prod(shape[1:]), info.start)
    left_out = sum(found.pairs.get(f"split.{key}", 0) for key in ("no", "count", "tensors.count"))
    size, changed = found.size - left_out, {"general.quantization_version": 2, "general.file_type": 0}
    for key, value in {**(added or {}), **changed}.items():
        length = 8 + len(value.encode()) if isinstance(value, str) else 4
        size += 8 + len(key.encode()) + 4 + length - found.pairs.get(key, 0)
    end, held = max((t.offset + t.bytes for t in tensors.values()), default=0), path.stat().st_size
    if end > held:
        raise refusal("quantize/cut-file", path=path, held=held, end=end)
    return Header(path, found.metadata, tensors, padded(size, found.alignment))


# Importance matrices: the mean square of every input of every linear layer over a calibration text.
#
# Both formats of llama.cpp are read: GGUF (`general.type` = "imatrix": sums of squares and counts) and the older .dat
# (little-endian: entries of name, calls, values; then chunks and the name of the data set).

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass
class Imatrix:
    """Values by tensor name (float32, one for every input of the layer, experts one after another)."""

    file: str
    values: dict[str, np.ndarray] = field(default_factory=dict)
    dataset: str | None = None
    chunks: int = 0

    def header_keys(self) -> dict[str, str | int]:
        """What llama.cpp adds to the header of a file quantized with it, in its order; texts have 127 bytes at most."""
        keys = {"file": self.file, "dataset": self.dataset}
        keys |= {"entries_count": len(self.values), "chunks_count": self.chunks if self.chunks > 0 else None}
        cut = {k: v.encode()[:127].decode("utf-8", "ignore") if isinstance(v, str) else v for k, v in keys.items()}
        return {f"quantize.imatrix.{key}": value for key, value in cut.items() if value is not None}


def _damaged(path: Path, what: str) -> InputError:
    return refusal("quantize/damaged-matrix", path=path, what=what)


def read_imatrix(path: Path | str | None) -> Imatrix | None:
    """Read an importance matrix; None where there is none.

    Raises:
        InputError: no such file, neither format, or values that no mean square can have: not finite, negative, or 0
            for every input of a layer (llama.cpp would round all its weights to nothing).
    """
    if path is None:
        return None
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no file {path}.", "an importance matrix.", "correct the path.")
    with path.open("rb") as stream:
        is_gguf = stream.read(4) == b"GGUF"
    result = _read_gguf(path) if is_gguf else _read_legacy(path)
    for name, values in result.values.items():
        if not np.isfinite(values).all():
            raise _damaged(path, f"{name} holds values that are not finite")
        if (values < 0).any():
            raise _damaged(path, f"{name} holds negative values, which no mean square is")
        if not values.any():
            raise _damaged(path, f"{name} holds nothing but zeros")
    return result


def _read_gguf(path: Path) -> Imatrix:
    header = read_header(path)
    kind, chunks = header.values.get("general.type"), header.values.get("imatrix.chunk_count")
    if kind != "imatrix":
        raise _damaged(path, f"its general.type is {kind!r}, not 'imatrix'")
    names = sorted(name.removesuffix(_SUMS) for name in header.tensors if name.endswith(_SUMS))
    if not names:
        raise _damaged(path, "it holds no sums")
    datasets = header.values.get("imatrix.datasets")
    dataset = datasets[0] if isinstance(datasets, list) and datasets else None
    result = Imatrix(path.name, {}, dataset, chunks if isinstance(chunks, int) else 0)
    for name in names:
        if name + _COUNTS not in header.tensors:
            raise _damaged(path, f"{name} has sums but no counts")
        sums, counts = _floats(header, name + _SUMS), np.round(_floats(header, name + _COUNTS))
        if not np.isfinite(counts).all() or (counts < 0).any():
            raise _damaged(path, f"{name} has counts that are no numbers of tokens")
        if counts.size == 0 or sums.size % counts.size:
            raise _damaged(path, f"{name} has {sums.size} sums for {counts.size} counts")
        sums, counts = sums.reshape(counts.size, -1), counts[:, None]
        means = np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1))
        result.values[name] = np.ascontiguousarray(means.reshape(-1), dtype=np.float32)
    return result


def _floats(header: Header, name: str) -> np.ndarray:
    tensor = header.tensors[name]
    if tensor.type != "f32":
        raise _damaged(header.path, f"{name} is {tensor.type}, not f32")
    return np.fromfile(header.path, "<f4", tensor.weights, offset=tensor.offset)


def _read_legacy(path: Path) -> Imatrix:
    data = io.BytesIO(path.read_bytes())
    size = len(data.getbuffer())

    def take(count: int) -> bytes:
        if not 0 < count <= size - data.tell():
            raise _damaged(path, "it ends too early or is no importance matrix")
        return data.read(count)

    def integer() -> int:
        return struct.unpack("<i", take(4))[0]

    result = Imatrix(path.name)
    entries = integer()
    if not 0 < entries <= size // 12:
        raise _damaged(path, "neither GGUF nor the older .dat format")
    for _ in range(entries):
        name = take(integer()).decode("utf-8", "replace")
        calls, count = integer(), integer()
        values = np.frombuffer(take(4 * count), "<f4")
        result.values[name] = np.ascontiguousarray(values / np.float32(calls) if calls > 0 else values, np.float32)
    if data.tell() < size:
        result.chunks = integer()
        if data.tell() < size:
            result.dataset = take(integer()).split(b"\0")[0].decode("utf-8", "replace")
    return result
