"""The merged weights, tensor by tensor: read, changed, checked, rounded once, written at their place in the new files.

The tensors are independent, so a few threads work on them at a time; what is not changed is copied in slabs of rows.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lib.errors import InputError
from lib.merging.adapter import Update
from lib.models.floats import NUMPY, largest_magnitude, to_bfloat16, to_float16, widen
from lib.models.weights import INDEX, StoredTensor, Weights
from lib.progress import Progress
from lib.run.files import read_json, write_at, write_json
from lib.run.workers import run_jobs

if TYPE_CHECKING:
    import torch

    from lib.merging.report import AnonymousMemory

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
