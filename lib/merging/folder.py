"""Merge a LoRA adapter into a model folder, one tensor at a time from the memory-mapped files.

Each changed weight is summed in float32 and rounded once to the dtype of the base, as peft's `merge_and_unload` does
with a float32 adapter; the result is bit-identical to it. Everything else is copied as bytes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lib.errors import InputError
from lib.merging.adapter import Adapter, Update, plan_updates, read_adapter
from lib.merging.report import AnonymousMemory, MergeReport
from lib.models.weights import INDEX, StoredTensor, Weights, open_weights
from lib.progress import Progress
from lib.run.files import flush_to_disk, read_json, readable_by_group, require_space, write_json

if TYPE_CHECKING:
    import torch

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""dtype of the merged model → its name in safetensors."""

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "chat_template.jinja", "chat_template.json"),
)
_SLAB = 32 << 20


def merge_folders(
    base: Path, adapter: Path, output: Path, dtype: str | None = None, tokenizer: Path | None = None
) -> MergeReport:
    """Write the model `base` with the adapter merged into it as the new folder `output`.

    Args:
        dtype: "float32", "bfloat16" or "float16"; None keeps the dtype of every tensor of the base.
        tokenizer: folder whose tokenizer files are copied; None = those of the base.

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
    updates = plan_updates(lora, weights, config)
    stored = DTYPES[dtype] if dtype else None
    require_space(output.parent, sum(_nbytes(tensor, stored) for tensor in weights.tensors.values()), output.name)
    memory = AnonymousMemory()
    with _new_folder(output) as folder:
        _check_finite(lora)
        _write_weights(folder, weights, updates, stored, memory)
        _copy_small_files(base, tokenizer or base, folder, config, dtype)
    changed = [weights.tensors[name] for name in updates]
    return MergeReport(
        base=str(base),
        adapter=str(adapter),
        output=str(output),
        dtype=dtype or _dtype_of(weights),
        tensors_changed=len(updates),
        tensors_copied=len(weights.tensors) - len(updates),
        parameters=weights.parameters,
        parameters_changed=sum(Weights(base, (), {t.name: t}).parameters for t in changed),
        bytes_base=weights.nbytes,
        bytes_adapter=lora.nbytes,
        bytes_merged=sum(_nbytes(tensor, stored) for tensor in weights.tensors.values()),
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


def _nbytes(tensor: StoredTensor, dtype: str | None) -> int:
    if dtype is None or dtype == tensor.dtype:
        return tensor.nbytes
    sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
    return tensor.nbytes // sizes.get(tensor.dtype, 1) * sizes[dtype]


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `output` when the block succeeds."""
    temporary = output.with_name(f".{output.name}.part")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                readable_by_group(path)
                flush_to_disk(path)
        if output.is_dir():
            output.rmdir()
        temporary.rename(output)
        flush_to_disk(output.parent)
    except OSError as error:
        raise InputError(
            f"{output} cannot be written ({error.strerror}).", "a folder with room that may be written.", "choose one."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_finite(adapter: Adapter) -> None:
    for name, tensor in adapter.tensors.items():
        _refuse_infinite(tensor.tensor(), f"{name} of the adapter", adapter.folder)


def _refuse_infinite(tensor: torch.Tensor, what: str, where: Path) -> None:
    import torch

    if tensor.numel() == 0:
        return
    low, high = tensor.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise InputError(
            f"NaN or infinity in {what} ({where}).",
            "finite weights.",
            "the training diverged or the file is damaged: use an earlier checkpoint or copy it again.",
        )


def _write_weights(
    folder: Path, weights: Weights, updates: dict[str, Update], dtype: str | None, memory: AnonymousMemory
) -> None:
    total = len(weights.tensors)
    with Progress("merging tensors", total) as progress:
        for file in weights.files:
            tensors = [tensor for tensor in weights.tensors.values() if tensor.file == file]
            tensors.sort(key=lambda tensor: tensor.start)
            with (folder / file.name).open("wb") as stream:
                stream.write(_header(tensors, weights.metadata[file.name], dtype))
                for tensor in tensors:
                    _write_tensor(stream, tensor, updates.get(tensor.name), dtype, memory)
                    progress.advance()
    if (weights.folder / INDEX).is_file():
        index = read_json(weights.folder / INDEX)
        index.setdefault("metadata", {})["total_size"] = sum(_nbytes(t, dtype) for t in weights.tensors.values())
        write_json(folder / INDEX, index)


def _header(tensors: list[StoredTensor], metadata: dict[str, str], dtype: str | None) -> bytes:
    """Length and JSON header of a safetensors file, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for tensor in tensors:
        end = offset + _nbytes(tensor, dtype)
        entries[tensor.name] = {
            "dtype": dtype or tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(
    stream: IO[bytes], stored: StoredTensor, update: Update | None, dtype: str | None, memory: AnonymousMemory
) -> None:
    import torch

    names = {value: key for key, value in DTYPES.items()}
    tensor = stored.tensor()
    target = getattr(torch, names[dtype]) if dtype else tensor.dtype
    if update is not None:
        tensor = apply_update(tensor, update)
        memory.look()
    flat = tensor.reshape(-1)
    for first in range(0, flat.numel(), _SLAB):
        slab = flat[first : first + _SLAB].to(target)
        _refuse_infinite(slab, stored.name, stored.file)
        stream.write(memoryview(slab.view(torch.uint8).numpy()))
    memory.look()


def apply_update(weight: torch.Tensor, update: Update) -> torch.Tensor:
    """The merged weight in float32 (float64 for a float64 base), to be rounded once by the caller.

    linear: W + s·B·A; embedding: W + s·(B·A)ᵀ; with a magnitude m (DoRA): m ⊙ rows / ‖rows‖₂ of that sum.
    """
    import torch

    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with torch.inference_mode():
        if update.kind == "replace":
            return update.tensors["value"].tensor()
        if update.kind == "bias":
            value = update.tensors["value"].tensor().to(torch.float32)
            return (value * update.scaling).to(wide).add_(weight)
        first = update.tensors["A"].tensor().to(torch.float32)
        second = update.tensors["B"].tensor().to(torch.float32)
        total = (second @ first).mul_(update.scaling).to(wide)
        if update.kind == "embedding":
            total = total.T
        total.add_(weight)
        if "magnitude" in update.tensors:
            norm = torch.linalg.norm(total, dim=1)
            total.mul_((update.tensors["magnitude"].tensor().to(wide) / norm).view(-1, 1))
        return total


def _copy_small_files(base: Path, tokenizer: Path, folder: Path, config: dict[str, Any], dtype: str | None) -> None:
    if dtype is None:
        shutil.copyfile(base / "config.json", folder / "config.json")
    else:
        config = {key: value for key, value in config.items() if key != "torch_dtype"}
        write_json(folder / "config.json", {**config, "dtype": dtype})
    for source, names in ((base, ("generation_config.json", "LICENSE", "NOTICE")), (tokenizer, TOKENIZER_FILES)):
        for name in names:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    more = tokenizer / "additional_chat_templates"
    if more.is_dir():
        shutil.copytree(more, folder / more.name)
