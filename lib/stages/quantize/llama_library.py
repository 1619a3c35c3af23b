"""GGUF headers read by llama.cpp's own, bounds-checked parser (through ctypes). For child processes only.
Weights of a GGUF tensor as float32. For child processes only.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import _ggml

from lib.errors import InputError
from lib.scoring import llama_backend

# GGUF headers read by llama.cpp's own, bounds-checked parser (through ctypes). For child processes only.
#
# The parser of the PyPI package `gguf` follows a damaged length without end; this one refuses the file.

_LIBRARY = _ggml.libggml
_U32, _STRING, _ARRAY = 4, 8, 9  # enum gguf_type of gguf.h
_QUANTIZATION_VERSION = 2


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def _function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    function = getattr(_LIBRARY, name)
    function.restype, function.argtypes = result, list(arguments)
    return function


_P, _I64, _CHARS, _TYPE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p, ctypes.c_int
_init = _function("gguf_init_from_file", _P, _CHARS, _InitParams)
_free = _function("gguf_free", None, _P)
_find_key = _function("gguf_find_key", _I64, _P, _CHARS)
_kv_type = _function("gguf_get_kv_type", _TYPE, _P, _I64)
_val_u32 = _function("gguf_get_val_u32", ctypes.c_uint32, _P, _I64)
_val_str = _function("gguf_get_val_str", _CHARS, _P, _I64)
_arr_type = _function("gguf_get_arr_type", _TYPE, _P, _I64)
_arr_n = _function("gguf_get_arr_n", ctypes.c_size_t, _P, _I64)
_arr_str = _function("gguf_get_arr_str", _CHARS, _P, _I64, ctypes.c_size_t)
_set_u32 = _function("gguf_set_val_u32", None, _P, _CHARS, ctypes.c_uint32)
_set_str = _function("gguf_set_val_str", None, _P, _CHARS, _CHARS)
_meta_size = _function("gguf_get_meta_size", ctypes.c_size_t, _P)
_data_offset = _function("gguf_get_data_offset", ctypes.c_size_t, _P)
_n_tensors = _function("gguf_get_n_tensors", _I64, _P)
_tensor_name = _function("gguf_get_tensor_name", _CHARS, _P, _I64)
_tensor_ne = _function("gguf_get_tensor_ne", ctypes.POINTER(ctypes.c_int64), _P, _I64)
_tensor_type = _function("gguf_get_tensor_type", _TYPE, _P, _I64)
_tensor_size = _function("gguf_get_tensor_size", ctypes.c_size_t, _P, _I64)
_tensor_offset = _function("gguf_get_tensor_offset", ctypes.c_size_t, _P, _I64)
_type_name = _function("ggml_type_name", _CHARS, _TYPE)
_row_size = _function("ggml_row_size", ctypes.c_size_t, _TYPE, _I64)
_block_size = _function("ggml_blck_size", _I64, _TYPE)
_requires_imatrix = _function("ggml_quantize_requires_imatrix", ctypes.c_bool, _TYPE)
_quantize_chunk = _function("ggml_quantize_chunk", ctypes.c_size_t, _TYPE, _P, _P, _I64, _I64, _I64, _P)


class _TypeTraits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("block_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float", ctypes.c_void_p),
    )


_type_traits = _function("ggml_get_type_traits", ctypes.POINTER(_TypeTraits), _TYPE)


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


@functools.cache
def _to_float(type_name: str) -> Callable[[int, int, int], None]:
    """llama.cpp's function that turns blocks of a type into float32.

    Raises:
        RuntimeError: another llama.cpp, whose struct has other fields.
    """
    traits = _type_traits(type_number(type_name)).contents
    same = traits.type_name == type_name.encode() and traits.block_size == block_size(type_name)
    if not same or traits.type_size != row_bytes(type_name, traits.block_size) or not traits.to_float:
        raise RuntimeError(f"the traits of {type_name} in this llama.cpp are laid out otherwise than in 0.3.36")
    return traits.to_float


def dequantize_rows(type_name: str, stored: np.ndarray) -> np.ndarray:
    """Stored rows as float32, (rows, columns), by llama.cpp's own code.

    Args:
        stored: bytes, uint8, (rows, bytes of a row), as `quantize_rows` gives them; any type but f32.
    """
    stored = np.ascontiguousarray(stored)
    rows, size = stored.shape
    columns = size // row_bytes(type_name, block_size(type_name)) * block_size(type_name)
    made = np.empty((rows, columns), dtype=np.float32)
    _to_float(type_name)(stored.ctypes.data, made.ctypes.data, made.size)
    return made


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


class Header:
    """An open GGUF header.

    Attributes:
        path: the file.
        tensors: {name: {"shape": columns first, "type", "bytes", "weights", "offset": from the file's start}}.
    """

    def __init__(self, path: Path, pointer: int) -> None:
        self.path, self._pointer = path, pointer
        start = _data_offset(pointer)
        self.tensors: dict[str, dict[str, Any]] = {}
        for i in range(_n_tensors(pointer)):
            shape = [_tensor_ne(pointer, i)[k] for k in range(4)]
            while len(shape) > 1 and shape[-1] == 1:
                shape.pop()
            weights = 1
            for length in shape:
                weights *= length
            self.tensors[_tensor_name(pointer, i).decode()] = {
                "shape": shape,
                "type": _type_name(_tensor_type(pointer, i)).decode(),
                "bytes": _tensor_size(pointer, i),
                "weights": weights,
                "offset": start + _tensor_offset(pointer, i),
            }

    def text(self, key: str) -> str | None:
        """A string value; None when absent or of another type."""
        i = _find_key(self._pointer, key.encode())
        if i < 0 or _kv_type(self._pointer, i) != _STRING:
            return None
        return _val_str(self._pointer, i).decode("utf-8", "replace")

    def number(self, key: str) -> int | None:
        """An unsigned 32-bit value; None when absent or of another type."""
        i = _find_key(self._pointer, key.encode())
        return _val_u32(self._pointer, i) if i >= 0 and _kv_type(self._pointer, i) == _U32 else None

    def has(self, key: str) -> bool:
        """Whether the header has that key."""
        return _find_key(self._pointer, key.encode()) >= 0

    def first_text(self, key: str) -> str | None:
        """The first entry of an array of strings."""
        i = _find_key(self._pointer, key.encode())
        if i < 0 or _kv_type(self._pointer, i) != _ARRAY or _arr_type(self._pointer, i) != _STRING:
            return None
        return _arr_str(self._pointer, i, 0).decode("utf-8", "replace") if _arr_n(self._pointer, i) else None

    def size_when_quantized(self, file_type: int, numbers: dict[str, int], texts: dict[str, str]) -> int:
        """Header bytes of this file after quantizing, with further keys added; changes only the copy in memory."""
        _set_u32(self._pointer, b"general.quantization_version", _QUANTIZATION_VERSION)
        _set_u32(self._pointer, b"general.file_type", file_type)
        for key, number in numbers.items():
            _set_u32(self._pointer, key.encode(), number)
        for key, text in texts.items():
            _set_str(self._pointer, key.encode(), text.encode())
        return _meta_size(self._pointer)


@contextlib.contextmanager
def open_header(path: Path) -> Iterator[Header]:
    """Open a GGUF header with llama.cpp's parser.

    Raises:
        InputError: the parser refuses the file, or tensors reach beyond its end.
    """
    log = Log()
    pointer = _init(str(path).encode(), _InitParams(True, None))
    if not pointer:
        raise InputError(f"{path} is a damaged GGUF file ({log.reason}).", "a complete GGUF file.", "make it again.")
    try:
        header = Header(path, pointer)
        end = max((t["offset"] + t["bytes"] for t in header.tensors.values()), default=0)
        size = path.stat().st_size
        if end > size:
            found = f"{path} has {size} bytes; its header describes {end}."
            raise InputError(found, "a complete file.", "copy, download or make it again.")
        yield header
    finally:
        _free(pointer)


# Weights of a GGUF tensor as float32. For child processes only.


def rows_of(path: Path, tensor: dict[str, Any], start: int, stop: int, step: int = 1) -> np.ndarray:
    """Every `step`-th row of a tensor, float32, (rows, columns).

    Args:
        path: the GGUF file.
        tensor: an entry of `lib.stages.quantize.llama_library.Header.tensors`.
        start, stop: as in a slice.
    """
    rows = tensor["weights"] // tensor["shape"][0]
    row = tensor["bytes"] // rows
    raw = np.ascontiguousarray(np.memmap(path, np.uint8, "r", tensor["offset"], (rows, row))[start:stop:step])
    return raw.view("<f4") if tensor["type"] == "f32" else dequantize_rows(tensor["type"], raw)
