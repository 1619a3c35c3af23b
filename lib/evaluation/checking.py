"""Models looked at before any of them is loaded: whether they can be had, and whether their files are whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.models.gguf_file import check_gguf, read_tensors
from lib.models.resolving import refuse_bad_template
from lib.run.folders import user_path


def is_gguf(model: str) -> bool:
    """Whether a name stands for a .gguf file."""
    return model.lower().endswith(".gguf") or user_path(model).is_file()


def check_models(models: Sequence[str | Path], base_model: str | None, revision: str) -> None:
    """Look at every model as far as that takes no loading; what the hub has is fetched.

    Raises:
        InputError: the first that is missing, damaged or cut off, or is an adapter whose base is.
    """
    for model in map(str, models):
        folder = user_path(model)
        if is_gguf(model):
            _check_whole(check_gguf(folder))
            refuse_bad_template(folder)
        elif (folder / "adapter_config.json").is_file():
            _check_adapter(folder, base_model, revision)
        else:
            _check_full(model, revision)


def _check_whole(path: Path) -> None:
    """Refuse a file that ends before its tensors do."""
    import gguf

    tensors, size = read_tensors(path), path.stat().st_size
    for tensor in tensors:
        try:
            block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.type)]
        except (ValueError, KeyError):
            continue  # a newer type: llama.cpp will say whether it knows it
        need = tensor.start + math.prod(tensor.shape) // block * width
        if need > size:
            raise InputError(
                f"{path} has {size:,} bytes; tensor {tensor.name} ends at byte {need:,}.",
                "a whole GGUF file.",
                "make or download the file again.",
            )


def _check_adapter(folder: Path, base_model: str | None, revision: str) -> None:
    from lib.models.kinds import adapter_config, require_adapter
    from lib.models.trained_on import unpacking_of

    require_adapter(folder)
    base = base_of_adapter(base_model or adapter_config(folder).get("base_model_name_or_path"), folder)
    own = folder if (folder / "tokenizer.json").is_file() else None
    _check_full(base, revision, own, unpacking_of(folder))


def base_of_adapter(name: str | None, folder: Path) -> str:
    """The name of an adapter's base model.

    Raises:
        InputError: neither the option nor adapter_config.json names it.
    """
    if not name:
        raise InputError(f"{folder} does not name its base model.", "an adapter and its base.", "give --base-model.")
    return name


def _check_full(
    model: str, revision: str, tokenizer: Path | None = None, unpacking: Mapping[str, Any] | None = None
) -> None:
    """A model folder, a hub id, or an adapter's GGUF file.

    Args:
        tokenizer: that of an adapter which brings its own; unpacking: how its base was unpacked.
    """
    from lib.models.hub import SourceError
    from lib.models.loading import check_model_folder, load_tokenizer, resolve_base

    folder = user_path(model)
    try:
        if folder.is_dir():
            check_model_folder(folder)
        else:
            folder = resolve_base(model, revision, **(unpacking or {})).path
        load_tokenizer(tokenizer or folder)
    except SourceError as error:
        if "/" in model or "\\" in model:
            raise
        raise InputError(
            f"{model!r}: no file or folder of that name here, and no model in the cache or on the hub ({error.why}).",
            "a .gguf file, a model folder, an adapter folder, or an id such as Qwen/Qwen2.5-0.5B-Instruct.",
            "check the name; a relative path is looked for in the current folder, then in the project.",
        ) from None
