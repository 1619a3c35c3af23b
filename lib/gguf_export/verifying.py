"""Reading a finished GGUF back: with a reader that shares no code with the writer, and with llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.models.gguf_file import read_metadata, read_tensors

_LOAD_MODE_NONE = 0  # llama.h, enum llama_load_mode


def verify(path: Path, types: dict[str, str]) -> None:
    """Check that the file holds exactly the planned tensors with their types and ends where the last one ends.

    Raises:
        RuntimeError: it does not; the writer is wrong or the disk is.
    """
    import gguf
    import numpy as np

    tensors = read_tensors(path)
    found = {tensor.name: gguf.GGMLQuantizationType(tensor.type).name for tensor in tensors}
    if found != types or len(found) != len(tensors):
        wrong = sorted(set(found.items()) ^ set(types.items()))
        raise RuntimeError(f"{path}: {len(wrong)} tensors differ from the plan, first {wrong[:1]}")
    end = 0
    for tensor in tensors:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.type)]
        if tensor.start < end:
            raise RuntimeError(f"{path}: {tensor.name} begins inside the tensor before it")
        end = tensor.start + int(np.prod(tensor.shape, dtype=np.int64)) // block * size
    if path.stat().st_size != -(-end // 32) * 32:
        raise RuntimeError(f"{path}: {path.stat().st_size} bytes, its last tensor ends at {end}")


def metadata_table(path: Path, width: int = 60) -> list[tuple[str, str]]:
    """Key and value of everything a GGUF says about itself, long values shortened, arrays as their length."""
    rows = []
    for key, value in read_metadata(path).items():
        if isinstance(value, list):
            text = f"{len(value)} values" if len(value) > 8 else ", ".join(map(str, value))
        else:
            text = f"{value:.7g}" if isinstance(value, float) else " ".join(str(value).split())
        rows.append((key, text if len(text) <= width else text[: width - 1] + "…"))
    return rows


def open_with_llama_cpp(argument: dict[str, Any]) -> dict[str, Any]:
    """Load {"path"} with llama.cpp, without the data of the tensors (runs in a child process).

    It parses all keys, builds the vocabulary and looks up every tensor by name and shape. The values are checked where
    they are written; the gate of stage 05 loads them.

    Raises:
        InputError: llama.cpp refuses the file; with the last errors it logged.
    """
    from lib.errors import InputError
    from lib.scoring.llama_log import forget_errors, last_error, llama

    llama_cpp = llama()
    forget_errors()
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    parameters.no_alloc, parameters.load_mode = True, _LOAD_MODE_NONE  # mapping is not allowed with no_alloc
    model = llama_cpp.llama_model_load_from_file(argument["path"].encode(), parameters)
    if not model:
        raise InputError(
            f"llama.cpp refuses {argument['path']} ({last_error() or 'no reason given'}).",
            "a GGUF that it can load.",
            "check the model folder's config.json against its weights.",
        )
    tokens = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    llama_cpp.llama_model_free(model)
    return {"tokens": int(tokens)}
