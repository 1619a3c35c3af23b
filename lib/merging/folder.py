"""Merge a LoRA adapter into a model folder, one tensor at a time from the memory-mapped files.

Each changed weight is summed in float32 and rounded once to the dtype of the base, as peft's `merge_and_unload` does
with a float32 adapter; the result is bit-identical to it. Everything else is copied as bytes.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.merging.adapter import Adapter, Update, read_adapter
from lib.merging.planning import plan_updates, unties, with_own_head
from lib.merging.report import AnonymousMemory, MergeReport
from lib.merging.writing import DTYPES, Sink, infinite, planned_weights, write_weights
from lib.models.floats import largest_magnitude
from lib.models.weights import Weights, open_weights
from lib.run.files import new_folder, read_json, require_space, write_json

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "chat_template.jinja", "chat_template.json"),
)


Also = Callable[[Path, Weights], contextlib.AbstractContextManager[Sink | None]]
"""Gets the folder being made (all but its weights are there) and its planned weights; may add small files to it, and
says where else the weights go."""


def merge_folders(
    base: Path,
    adapter: Path,
    output: Path,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    also: Also | None = None,
) -> MergeReport:
    """Write the model `base` with the adapter merged into it as the new folder `output`.

    Args:
        dtype: "float32", "bfloat16" or "float16"; None keeps the dtype of every tensor of the base.
        tokenizer: folder whose tokenizer files are copied; None = those of the base.
        also: further files, or a second product made of the weights in the same pass; when it fails, nothing is
            published.

    Raises:
        InputError: anything of `RULES`, a quantized base, no room, or an output folder that is not new. Nothing is
            left at `output` then.
    """
    started = time.monotonic()
    base, adapter, output = Path(base), Path(adapter), Path(output)
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}.", f"one of {', '.join(DTYPES)}.", "choose one of them.")
    _check_output(base, adapter, output)
    weights, lora = open_weights(base), read_adapter(adapter)
    config = _read_config(base)
    if unties(lora, config):
        weights, config = with_own_head(weights), config | {"tie_word_embeddings": False}
    updates = plan_updates(lora, weights, config)
    for tensor in weights.tensors.values():
        tensor.require_floats()
    memory = AnonymousMemory()
    with new_folder(output) as folder:
        new, headers = planned_weights(weights, folder, DTYPES[dtype] if dtype else None)
        require_space(output.parent, new.nbytes, output.name)
        _check_finite(lora)
        _copy_small_files(base, tokenizer or base, folder, config, dtype)
        with also(folder, new) if also else contextlib.nullcontext() as sink:
            write_weights(weights, new, headers, updates, memory, sink)
    changed = [weights.tensors[name] for name in updates]
    return MergeReport(
        base=str(base),
        adapter=str(adapter),
        output=str(output),
        dtype=dtype or _dtype_of(weights),
        tensors_changed=len(updates),
        tensors_copied=len(weights.tensors) - len(updates),
        parameters=weights.parameters,
        parameters_changed=sum(tensor.size for tensor in changed),
        bytes_base=weights.nbytes,
        bytes_adapter=lora.nbytes,
        bytes_merged=new.nbytes,
        scalings=_scalings(updates),
        peak_anonymous_mib=memory.mib,
        seconds=round(time.monotonic() - started, 2),
    )


def _check_output(base: Path, adapter: Path, output: Path) -> None:
    for name, folder in (("base", base), ("adapter", adapter)):
        if not folder.is_dir():
            raise InputError(f"no folder {folder}.", f"the {name} folder.", "check the path.")
        if output.resolve() == folder.resolve():
            raise InputError(f"{output} is the {name} folder.", "a new folder.", "choose another output folder.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} already exists.", "a new or empty folder.", "remove it or choose another name.")


def _read_config(base: Path) -> dict[str, Any]:
    if not (base / "config.json").is_file():
        raise InputError(f"no config.json in {base}.", "a model folder.", "give the folder of the whole base model.")
    config = read_json(base / "config.json")
    if config.get("quantization_config"):
        raise InputError(
            f"{base} is quantized (quantization_config).",
            "the original 16-bit or 32-bit base.",
            "merge into the model that was quantized; merging into 4 bits would round the adapter away.",
        )
    return config


def _dtype_of(weights: Weights) -> str:
    names = {value: key for key, value in DTYPES.items()}
    kinds = {tensor.dtype for tensor in weights.tensors.values()}
    return names.get(kinds.pop(), "mixed") if len(kinds) == 1 else "mixed"


def _scalings(updates: dict[str, Update]) -> dict[str, int]:
    factors = [f"{update.scaling:.6g}" for update in updates.values() if "A" in update.tensors]
    return {factor: factors.count(factor) for factor in sorted(set(factors))}


def _check_finite(adapter: Adapter) -> None:
    for name, tensor in adapter.tensors.items():
        if not math.isfinite(largest_magnitude(tensor.read(), tensor.dtype)):
            raise infinite(f"{name} of the adapter", adapter.folder)


def _copy_small_files(base: Path, tokenizer: Path, folder: Path, config: dict[str, Any], dtype: str | None) -> None:
    if dtype is not None:
        config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": dtype}
    if config == read_json(base / "config.json"):
        shutil.copyfile(base / "config.json", folder / "config.json")
    else:
        write_json(folder / "config.json", config)
    for source, names in ((base, ("generation_config.json", "LICENSE", "NOTICE")), (tokenizer, TOKENIZER_FILES)):
        for name in names:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    more = tokenizer / "additional_chat_templates"
    if more.is_dir():
        shutil.copytree(more, folder / more.name)
