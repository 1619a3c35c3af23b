"""Reading a finished GGUF back: with the gguf library, and with llama.cpp in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def verify(path: Path, types: dict[str, str]) -> None:
    """Check that the file holds exactly the planned tensors with their types and ends where the last one ends.

    Raises:
        RuntimeError: it does not; the writer is wrong or the disk is.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    if found != types:
        wrong = sorted(set(found.items()) ^ set(types.items()))
        raise RuntimeError(f"{path}: {len(wrong)} tensors differ from the plan, first {wrong[0]}")
    end = max(int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors)
    padded = -(-end // 32) * 32
    if path.stat().st_size != padded:
        raise RuntimeError(f"{path}: {path.stat().st_size} bytes, not {padded}")


def metadata_table(path: Path, width: int = 60) -> list[tuple[str, str]]:
    """Key and value of everything a GGUF says about itself, long values shortened, arrays as their length."""
    import gguf

    reader = gguf.GGUFReader(path)
    rows = []
    for key, value in reader.fields.items():
        if key.startswith("GGUF."):
            continue
        if value.types[0] == gguf.GGUFValueType.ARRAY and len(value.data) > 8:
            text = f"{len(value.data)} values"
        else:
            text = " ".join(str(value.contents()).split())
        rows.append((key, text if len(text) <= width else text[: width - 1] + "…"))
    return rows


def open_with_llama_cpp(argument: dict[str, Any]) -> dict[str, Any]:
    """Load {"path"} completely with llama.cpp's own checks of every tensor (runs in a child process).

    Raises:
        InputError: llama.cpp refuses the file; with the last errors it logged.
    """
    import ctypes

    import llama_cpp

    from lib.errors import InputError

    errors: list[str] = []

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        if level >= 4:  # GGML_LOG_LEVEL_ERROR
            errors.append(text.decode("utf-8", "replace").strip())

    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    parameters.check_tensors = True
    model = llama_cpp.llama_model_load_from_file(argument["path"].encode(), parameters)
    if not model:
        raise InputError(
            f"llama.cpp refuses {argument['path']} ({'; '.join(errors[-2:]) or 'no reason given'}).",
            "a GGUF that it can load.",
            "check the model folder's config.json against its weights.",
        )
    tokens = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    llama_cpp.llama_model_free(model)
    return {"tokens": int(tokens)}
