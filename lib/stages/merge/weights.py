"""What a merge did, and how much memory of its own it took.
The merged weights, tensor by tensor: read, changed, checked, rounded once, written at their place in the new files.
Merge a LoRA adapter into a model folder, one tensor at a time from the memory-mapped files.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lib.errors import InputError
from lib.models.weights import (
    INDEX,
    NUMPY,
    StoredTensor,
    Weights,
    largest_magnitude,
    open_weights,
    to_bfloat16,
    to_float16,
    widen,
)
from lib.progress import Progress
from lib.runs.child import run_jobs
from lib.runs.files import new_folder, read_json, require_space, write_at, write_json
from lib.stages.merge.adapter import RULES, Adapter, Update, plan_updates, read_adapter, unties, with_own_head

if TYPE_CHECKING:
    import torch


# What a merge did, and how much memory of its own it took.


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        dtype: of the weights written ("bfloat16"; "mixed" when the base has several).
        tensors_changed, tensors_copied: numbers of weights of the base.
        parameters, parameters_changed: numbers of weights in them.
        bytes_base, bytes_adapter, bytes_merged: of the tensors.
        scalings: distinct factors of B·A, with the number of modules that have them.
        peak_anonymous_mib: growth of this process's own memory (without mapped files); None where it is unknown.
        rules: what was checked; a violation would have refused the merge.
    """

    base: str
    adapter: str
    output: str
    dtype: str
    tensors_changed: int
    tensors_copied: int
    parameters: int
    parameters_changed: int
    bytes_base: int
    bytes_adapter: int
    bytes_merged: int
    scalings: dict[str, int]
    peak_anonymous_mib: float | None
    seconds: float
    rules: tuple[str, ...] = field(default=RULES)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "rules": list(self.rules)}


class AnonymousMemory:
    """Largest growth of this process's anonymous memory, looked at after every tensor (Linux)."""

    def __init__(self) -> None:
        self.start = self._now()
        self.peak = self.start

    @staticmethod
    def _now() -> int | None:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:")), None)

    def look(self) -> None:
        if self.peak is not None:
            self.peak = max(self.peak, self._now() or 0)

    @property
    def mib(self) -> float | None:
        return None if self.peak is None or self.start is None else round((self.peak - self.start) / 2**20, 1)


# The merged weights, tensor by tensor: read, changed, checked, rounded once, written at their place in the new files.
#
# The tensors are independent, so a few threads work on them at a time; what is not changed is copied in slabs of rows.

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""dtype of the merged model → its name in safetensors."""

_SLAB = 1 << 20  # weights: small enough for a processor's cache
_LEAST_ROWS = 256  # of a slab; a product of few rows may be summed in another order than a product of many
_CONVERT: dict[str, Callable[[np.ndarray, str], np.ndarray]] = {"F32": widen, "BF16": to_bfloat16, "F16": to_float16}


class Sink(Protocol):
    """Somewhere else that the merged weights go in the same pass, e.g. a GGUF file."""

    def put(self, name: str, first: int, values: np.ndarray, dtype: str) -> None:
        """Take whole rows of a tensor, from its value number `first` on; called from several threads."""

    def whole(self, name: str) -> bool:
        """Whether all rows of this tensor are needed at once."""


def planned_weights(base: Weights, folder: Path, dtype: str | None) -> tuple[Weights, dict[str, bytes]]:
    """The weights that `folder` will hold, and the header of each of its files.

    Args:
        dtype: as safetensors names it; None keeps the dtype of every tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    headers, metadata = {}, {}
    for file in base.files:
        mine = sorted((t for t in base.tensors.values() if t.file == file), key=lambda tensor: tensor.start)
        entries: dict[str, Any] = {"__metadata__": {"format": "pt", **base.metadata[file.name]}}
        offset = 0
        for tensor in mine:
            kind = dtype or tensor.dtype
            end = offset + (tensor.size * NUMPY[kind]().itemsize if dtype else tensor.nbytes)
            entries[tensor.name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        headers[file.name] = len(text).to_bytes(8, "little") + text
        start = len(headers[file.name])
        for tensor in mine:
            first, end = entries[tensor.name]["data_offsets"]
            tensors[tensor.name] = replace(
                tensor, dtype=dtype or tensor.dtype, file=folder / file.name, start=start + first, end=start + end
            )
        metadata[file.name] = dict(base.metadata[file.name])
    ordered = {name: tensors[name] for name in base.tensors}
    return Weights(folder, tuple(folder / file.name for file in base.files), ordered, metadata), headers


def write_weights(
    base: Weights,
    new: Weights,
    headers: dict[str, bytes],
    updates: dict[str, Update],
    memory: AnonymousMemory,
    sink: Sink | None = None,
) -> None:
    """Write all files of `new`, as `planned_weights` planned them; `sink` gets every tensor too.

    Raises:
        InputError: NaN or infinity in a weight of the base or of the result.
    """
    import torch

    descriptors = {}
    threads = torch.get_num_threads()
    try:
        for path in new.files:
            descriptors[path] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            write_at(descriptors[path], headers[path.name], 0)
        parts = _Parts(base, new, updates, descriptors, sink)
        with Progress("merging tensors", len(new.tensors)) as progress:

            def done(tensors: int) -> None:
                memory.look()
                progress.advance(tensors)

            run_jobs(parts.jobs(), done, lambda: torch.set_num_threads(1))
    finally:
        torch.set_num_threads(threads)
        for descriptor in descriptors.values():
            os.close(descriptor)
    if (base.folder / INDEX).is_file():
        index = read_json(base.folder / INDEX)
        index.setdefault("metadata", {})["total_size"] = new.nbytes
        index["weight_map"] = {name: tensor.file.name for name, tensor in sorted(new.tensors.items())}
        write_json(new.folder / INDEX, index)


class _Parts:
    """The pieces of work of one merge; each job gives the number of tensors that it finished."""

    def __init__(
        self,
        base: Weights,
        new: Weights,
        updates: dict[str, Update],
        descriptors: dict[Path, int],
        sink: Sink | None,
    ) -> None:
        self.base, self.new, self.updates, self.descriptors, self.sink = base, new, updates, descriptors, sink

    def jobs(self) -> Iterator[Callable[[], int]]:
        for name, target in self.new.tensors.items():
            update = self.updates.get(name)
            rows, width = (target.shape[0], math.prod(target.shape[1:])) if target.shape else (1, 1)
            step = max(_LEAST_ROWS, _SLAB // max(1, width))
            if self.sink is not None and self.sink.whole(name):
                step = rows
            for first in range(0, max(1, rows), max(1, step)):
                part = slice(first, min(first + step, rows))
                if update is None or update.kind == "replace":
                    source = self.base.tensors[name] if update is None else update.tensors["value"]
                    yield partial(self._copy, target, source, part, width, part.stop >= rows)
                else:
                    yield partial(self._change, target, update, part, width, part.stop >= rows)

    def _change(self, target: StoredTensor, update: Update, rows: slice, width: int, last: bool) -> int:
        import torch

        names = {value: key for key, value in DTYPES.items()} | {"F64": "float64"}
        stored = self.base.tensors[target.name]
        values = torch.from_numpy(stored.read(rows.start * width, (rows.stop - rows.start) * width))
        if stored.dtype == "BF16":
            values = values.view(torch.bfloat16)
        result = apply_update(values.reshape(-1, *stored.shape[1:]), update, rows)
        result = result.to(getattr(torch, names[target.dtype])).contiguous().reshape(-1)
        bits = result.view(torch.uint16) if target.dtype == "BF16" else result
        self._put(target, rows.start * width, bits.numpy())
        return int(last)

    def _copy(self, target: StoredTensor, source: StoredTensor, rows: slice, width: int, last: bool) -> int:
        values = source.read(rows.start * width, (rows.stop - rows.start) * width)
        if source.dtype != target.dtype:
            values = _CONVERT[target.dtype](values, source.dtype)
        self._put(target, rows.start * width, values)
        return int(last)

    def _put(self, target: StoredTensor, first: int, values: np.ndarray) -> None:
        if not math.isfinite(largest_magnitude(values, target.dtype)):
            if target.dtype == "F16":
                raise InputError(
                    f"{target.name}: a weight that is not finite in float16, which ends at 65,504.",
                    "weights within the number format.",
                    "merge into bfloat16 or float32 (merge_dtype, --dtype), or look for a diverged training.",
                )
            raise infinite(target.name, self.base.tensors[target.name].file)
        write_at(self.descriptors[target.file], values.view(np.uint8), target.start + first * values.itemsize)
        if self.sink is not None:
            self.sink.put(target.name, first, values, target.dtype)


def infinite(what: str, where: Path) -> InputError:
    """The error for NaN or infinity."""
    return InputError(
        f"NaN or infinity in {what} ({where}).",
        "finite weights.",
        "the training diverged or the file is damaged: use an earlier checkpoint or copy it again.",
    )


def apply_update(weight: torch.Tensor, update: Update, rows: slice) -> torch.Tensor:
    """The merged weight in float32 (float64 for a float64 base), to be rounded once by the caller.

    linear: W + s·B·A; embedding: W + s·(B·A)ᵀ; with a magnitude m (DoRA): m ⊙ rows / ‖rows‖₂ of that sum.

    Args:
        weight: the `rows` of the base's tensor.
    """
    import torch

    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with torch.inference_mode():
        if update.kind == "rows":
            result, trained = weight.to(wide, copy=True), update.tensors["value"].tensor()
            for i, row in enumerate(update.rows):
                if rows.start <= row < rows.stop:
                    result[row - rows.start] = trained[i]
            return result
        if update.kind == "bias":
            value = update.tensors["value"].tensor()[rows].to(torch.float32)
            return (value * update.scaling).to(wide).add_(weight)
        first, second = update.tensors["A"].tensor(), update.tensors["B"].tensor()
        if update.kind == "embedding":
            total = (second.to(torch.float32) @ first[:, rows].to(torch.float32)).mul_(update.scaling).to(wide).T
        else:
            total = (second[rows].to(torch.float32) @ first.to(torch.float32)).mul_(update.scaling).to(wide)
        total.add_(weight)
        if "magnitude" in update.tensors:
            norm = torch.linalg.norm(total, dim=1)
            total.mul_((update.tensors["magnitude"].tensor()[rows].to(wide) / norm).view(-1, 1))
        return total


# Merge a LoRA adapter into a model folder, one tensor at a time from the memory-mapped files.
#
# Each changed weight is summed in float32 and rounded once to the dtype of the base, as peft's `merge_and_unload` does
# with a float32 adapter; the result is bit-identical to it. Everything else is copied as bytes.

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
