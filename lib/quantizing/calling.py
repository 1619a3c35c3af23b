"""The call of llama_model_quantize, for real or as a dry run. For child processes only."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp

from lib.errors import InputError
from lib.quantizing import imatrix as importance
from lib.quantizing import native, recipes
from lib.quantizing.options import Options, tensor_type

_BUFFER = 256 << 20
"""Bytes of rows that llama.cpp holds at once; a row is quantized by itself, so this does not change the result."""


def call(
    source: Path,
    output: Path,
    recipe: str,
    options: Options,
    matrix: importance.Imatrix | None,
    n_threads: int,
    log: native.Log,
) -> None:
    """Quantize `source` to `output`.

    Raises:
        InputError: llama.cpp refused; with the reason that it logged.
    """
    _call(source, output, recipe, options, matrix, log, nthread=n_threads)


def dry_run(source: Path, recipe: str, options: Options, matrix: importance.Imatrix | None = None) -> native.Log:
    """What llama.cpp would do, without reading weights or writing; its log tells.

    Raises:
        InputError: llama.cpp refused; with the reason that it logged.
    """
    log = native.Log()
    _call(source, source.with_suffix(".dry"), recipe, options, matrix, log, nthread=1, dry_run=True)
    return log


def _call(
    source: Path,
    output: Path,
    recipe: str,
    options: Options,
    matrix: importance.Imatrix | None,
    log: native.Log,
    **fields: Any,
) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = recipes.file_type(recipe)
    params.max_buf_size = _BUFFER
    for name, value in fields.items():
        setattr(params, name, value)
    keep_alive = [_attach_matrix(params, matrix) if matrix is not None else None, _attach_types(params, options)]
    keep_alive.append(_attach_keys(params, matrix, options))
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), ctypes.byref(params))
    del keep_alive
    if code != 0:
        do = "check the source file and the disk; for IQ types give an importance matrix."
        raise InputError(f"llama.cpp cannot quantize {source} to {recipe}: {log.reason}.", "a usable source.", do)


def _attach_types(params: Any, options: Options) -> Any:
    """Put types of single tensors into the parameters; returns what must stay alive."""
    if options.output_tensor_type:
        params.output_tensor_type = native.type_number(tensor_type(options.output_tensor_type))
    if options.token_embedding_type:
        params.token_embedding_type = native.type_number(tensor_type(options.token_embedding_type))
    patterns = options.patterns()
    if not patterns:
        return None
    overrides = (llama_cpp.llama_model_tensor_override * (len(patterns) + 1))()
    for slot, (pattern, name) in zip(overrides, patterns, strict=False):
        slot.pattern = pattern.encode()
        slot.type = native.type_number(tensor_type(name))
    params.tt_overrides = overrides
    return overrides


def _attach_matrix(params: Any, matrix: importance.Imatrix) -> list[Any]:
    """Put the importance matrix into the parameters; returns what must stay alive."""
    data = (llama_cpp.llama_model_imatrix_data * (len(matrix.values) + 1))()
    for slot, (name, values) in zip(data, matrix.values.items(), strict=False):
        slot.name = name.encode()
        slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        slot.size = values.size
    params.imatrix = data
    return [data]


def _attach_keys(params: Any, matrix: importance.Imatrix | None, options: Options) -> Any:
    """Put the keys that tell of the importance matrix, and the notes, into the parameters; returns what must stay."""
    texts = {} if matrix is None else matrix.header_texts()
    numbers = {} if matrix is None else matrix.header_numbers()
    order = ("file", "dataset", "entries_count", "chunks_count")
    keys = [key for key in (f"quantize.imatrix.{name}" for name in order) if key in texts or key in numbers]
    texts |= dict(options.notes)
    if not (keys := [*keys, *dict(options.notes)]):
        return None
    overrides = (llama_cpp.llama_model_kv_override * (len(keys) + 1))()
    for slot, key in zip(overrides, keys, strict=False):
        slot.key = key.encode()
        if key in texts:
            slot.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR
            slot.value.val_str = texts[key].encode()
        else:
            slot.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
            slot.value.val_i64 = numbers[key]
    params.kv_overrides = overrides
    return overrides
