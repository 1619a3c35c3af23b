"""What llama.cpp itself multiplies: inputs of the matrices, seen through its evaluation callback.

An oracle for importance matrices that shares no code with them. The layout of a tensor is that of ggml.h; the shapes
and names that are read through it are checked, so another layout is an error and not another number.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np

_F32, _FEWEST_ROWS = 0, 16
_P = ctypes.c_void_p


class _Tensor(ctypes.Structure):
    pass


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", _P),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", _P),
    ("view_offs", ctypes.c_size_t),
    ("data", _P),
    ("name", ctypes.c_char * 64),
]


def sums_of_squares(model: Path, windows: Sequence[Sequence[int]]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """GGUF tensor → Σ x² of its inputs over all windows, float64; and → the number of tokens that were summed.

    Nothing but the file is rounded to 16 bits; with weights in F16 llama.cpp would round the inputs too.
    """
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}

    def see(pointer: int, ask: bool, _: int) -> bool:
        tensor = ctypes.cast(pointer, ctypes.POINTER(_Tensor)).contents
        if not tensor.src[0] or not tensor.src[1]:
            return not ask
        weight, inputs = tensor.src[0].contents, tensor.src[1].contents
        name = weight.name.decode("ascii", "replace")
        if not (name.startswith("blk.") and name.endswith(".weight")):
            return not ask
        if inputs.type != _F32 or inputs.ne[1] < _FEWEST_ROWS or inputs.ne[0] != weight.ne[0]:
            return not ask
        if not ask:
            columns, rows = inputs.ne[0], inputs.ne[1]
            assert inputs.nb[0] == 4 and inputs.nb[1] == 4 * columns and inputs.ne[2] == inputs.ne[3] == 1
            values = np.ctypeslib.as_array(ctypes.cast(inputs.data, ctypes.POINTER(ctypes.c_float)), (rows, columns))
            sums[name] = sums.get(name, np.zeros(columns)) + (values.astype(np.float64) ** 2).sum(axis=0)
            counts[name] = counts.get(name, 0) + rows
        return True

    size = len(windows[0])
    hear = llama_cpp.ggml_backend_sched_eval_callback(see)
    llama_cpp.llama_backend_init()
    loaded = llama_cpp.llama_model_load_from_file(str(model).encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = size
    params.n_threads = params.n_threads_batch = 1
    params.cb_eval = hear
    params.type_k = params.type_v = _F32  # a cache of 16 bits alone moves single values by up to 3e-3
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(loaded, params)
    batch = llama_cpp.llama_batch_init(size, 0, 1)
    try:
        for window in windows:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            batch.n_tokens = size
            for place, token in enumerate(window):
                batch.token[place], batch.pos[place], batch.logits[place] = token, place, True
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            assert llama_cpp.llama_decode(context, batch) == 0
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(loaded)
    return sums, counts
