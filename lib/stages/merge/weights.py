"""Merge a LoRA adapter into a model folder: tensor by tensor read, changed, checked, rounded once and written.

Each changed weight is summed in float32 and rounded once to the dtype of the base, as peft's `merge_and_unload` does
with a float32 adapter; the result is bit-identical to it. Everything else is copied as bytes. The tensors are
independent, so a few threads work on them at a time, in slabs of rows.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import psutil

from lib.errors import InputError, refusal
from lib.models.merge_plan import EMBEDDING, RULES, Update, plan_merge, remarks
from lib.models.tokenizer_files import TEMPLATES, chat_templates, copy_tokenizer, differences, reader, vocabulary
from lib.models.weights import (
    INDEX,
    NUMPY,
    SAFETENSORS,
    SINGLE,
    TORCH,
    StoredTensor,
    Weights,
    convert,
    infinite,
    largest_magnitude,
    open_weights,
    pack_header,
    read_object,
    slabs,
)
from lib.progress import Progress
from lib.runs.child import run_jobs
from lib.runs.files import new_folder, read_json, require_new, require_space, write_at, write_json

if TYPE_CHECKING:
    import torch


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
        remarks: what is worth knowing of the adapter.
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
    rules: list[str] = field(default_factory=RULES.copy)
    remarks: list[str] = field(default_factory=list)


def _anonymous_memory() -> int:
    """Bytes of this process's own memory, without mapped files; 0 where the system does not tell them apart."""
    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", memory.rss)


DTYPES = ("float32", "bfloat16", "float16")
"""Number formats that the merged model may have."""

_SLAB = 1 << 20  # weights: small enough for a processor's cache
_LEAST_ROWS = 256  # of a slab; a product of few rows may be summed in another order than a product of many


class Sink(Protocol):
    """Another place where the merged weights go in the same pass, e.g. a GGUF file."""

    def put(self, name: str, first: int, values: np.ndarray, dtype: str) -> None:
        """Take whole rows of a tensor, from its value number `first` on; called from several threads."""

    def whole(self, name: str) -> bool:
        """Whether all rows of this tensor are needed at once."""


def prepare_weights(base: Weights, folder: Path, dtype: str | None) -> Weights:
    """Make the files of the merged weights: their headers, the index, and zeros where the weights will be written.

    Args:
        dtype: as safetensors names it; None keeps the dtype of every tensor.
    """
    total = 0
    for file in base.files:
        mine = sorted((t for t in base.tensors.values() if t.file == file), key=lambda tensor: tensor.start)
        kinds = {t.name: dtype or t.dtype for t in mine}
        sizes = {t.name: (kinds[t.name], t.shape, t.size * NUMPY[kinds[t.name]]().itemsize) for t in mine}
        header, nbytes = pack_header(sizes, base.metadata[file.name]), sum(size for _, _, size in sizes.values())
        with (folder / file.name).open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + nbytes)
        total += nbytes
    if [path.name for path in base.files] != [SINGLE]:
        index = read_json(base.folder / INDEX)
        kept = index.get("metadata")
        index["metadata"] = {**(kept if isinstance(kept, dict) else {}), "total_size": total}
        index["weight_map"] = {name: tensor.file.name for name, tensor in sorted(base.tensors.items())}
        write_json(folder / INDEX, index)
    return open_weights(folder)


def write_weights(base: Weights, new: Weights, updates: dict[str, Update], sink: Sink | None = None) -> int:
    """Write the weights of `new`, whose files `prepare_weights` made; `sink` gets every tensor too.

    Returns:
        The most anonymous memory that was seen after a slab of rows, in bytes.

    Raises:
        InputError: NaN or infinity in a weight of the base or of the result.
    """
    import torch

    most = 0
    with contextlib.ExitStack() as stack:
        files = {path: stack.enter_context(path.open("r+b", buffering=0)) for path in new.files}

        def write(target: StoredTensor, rows: slice, first: int, count: int) -> int:
            """Merge some rows, and put them where they belong; returns how many tensors are finished by that."""
            values = _merged(base.tensors[target.name], updates.get(target.name), target.dtype, rows, first, count)
            write_at(files[target.file].fileno(), values.view(np.uint8), target.start + first * values.itemsize)
            if sink is not None:
                sink.put(target.name, first, values, target.dtype)
            return int(first + count == target.size)

        def done(finished: int) -> None:
            nonlocal most
            most = max(most, _anonymous_memory())
            progress.advance(finished)

        jobs = (
            partial(write, target, *slab)
            for name, target in new.tensors.items()
            for slab in slabs(target, target.size if sink is not None and sink.whole(name) else _SLAB, _LEAST_ROWS)
        )
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        progress = stack.enter_context(Progress("merging tensors", len(new.tensors)))
        run_jobs(jobs, done, lambda: torch.set_num_threads(1))
    return most


def _merged(stored: StoredTensor, update: Update | None, dtype: str, rows: slice, first: int, count: int) -> np.ndarray:
    """Some rows of a tensor of the base, changed or copied, and rounded once to `dtype`."""
    if update is None or update.kind == "replace":
        source = update.tensors["value"] if update else stored
        values = convert(source.read(first, count), source.dtype, dtype)
    else:
        import torch

        changed = apply_update(stored.read_tensor(first, count).reshape(-1, *stored.shape[1:]), update, rows)
        changed = changed.to(getattr(torch, TORCH[dtype])).contiguous().reshape(-1)
        values = (changed.view(torch.uint16) if dtype == "BF16" else changed).numpy()
    if math.isfinite(largest_magnitude(values, dtype)):
        return values
    if dtype == "F16":
        raise InputError(  # as `infinite`: threads race for the first one
            f"{stored.name}: a weight that is not finite in float16, which ends at 65,504.",
            "weights within the number format.",
            "merge into bfloat16 or float32 (merge_dtype, --dtype), or look for a diverged training.",
        )
    raise infinite(stored.name, stored.file)


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
        turned = update.kind == "embedding"
        a, b = (update.tensors[role].tensor() for role in "AB")
        a, b = (a[:, rows], b) if turned else (a, b[rows])
        total = (b.to(torch.float32) @ a.to(torch.float32)).mul_(update.scaling).to(wide)
        total = (total.T if turned else total).add_(weight)
        if "magnitude" in update.tensors:
            norm = torch.linalg.norm(total, dim=1)
            total.mul_((update.tensors["magnitude"].tensor()[rows].to(wide) / norm).view(-1, 1))
        return total


Also = Callable[[Path, Weights], contextlib.AbstractContextManager[Sink | None]]
"""Gets the folder being made and its weights, which are still zeros; may add small files to it, and
says where else the weights go."""


def merge_folders(
    base: Path,
    adapter: Path | None,
    output: Path,
    dtype: str | None = None,
    tokenizer: Path | Literal["adapter", "base"] = "adapter",
    also: Also | None = None,
) -> MergeReport:
    """Write the model `base` with the adapter merged into it as the new folder `output`.

    Args:
        adapter: None = the base as it is, or in another number format. A model folder replaces every weight.
        dtype: "float32", "bfloat16" or "float16"; None keeps the dtype of every tensor of the base.
        tokenizer: folder whose tokenizer files are copied; "base" = those of the base; "adapter" = the vocabulary and
            the template of the adapter's folder where it has them, because it was trained with them.
        also: further files, or a second product made of the weights in the same pass; when it fails, nothing is
            published.

    Raises:
        InputError: anything of `RULES`, a quantized base, no room, or an output folder that is not new. Nothing is
            left at `output` then.
    """
    started = time.monotonic()
    base, adapter, output = Path(base), adapter and Path(adapter), Path(output)
    if dtype not in (None, *DTYPES):
        raise refusal("models/unknown-dtype", dtype=dtype, known=", ".join(DTYPES))
    _check_output(base, adapter, output)
    plan = plan_merge(base, adapter)
    weights, memory = plan.base, _anonymous_memory()
    brought = differences(adapter, base) if adapter and tokenizer == "adapter" else {}
    if "vocabulary" in brought:
        check_rows(adapter, weights)
    with new_folder(output) as folder:
        new = prepare_weights(weights, folder, SAFETENSORS[dtype] if dtype else None)
        require_space(output.parent, new.nbytes, output.name)
        if plan.adapter:
            plan.adapter.require_finite()
        words = adapter if brought.keys() - {"template"} else base if isinstance(tokenizer, str) else tokenizer
        _copy_small_files(base, words, folder, plan.config, dtype)
        if brought:
            _keep_template(adapter if "template" in brought else base, folder)
        with also(folder, new) if also else contextlib.nullcontext() as sink:
            most = write_weights(weights, new, plan.updates, sink)
    changed = [weights.tensors[name] for name in plan.updates]
    kinds = {tensor.dtype for tensor in weights.tensors.values()}
    kind = TORCH[kinds.pop()] if len(kinds) == 1 else "mixed"
    scalings = Counter(f"{update.scaling:.6g}" for update in plan.updates.values() if "A" in update.tensors)
    return MergeReport(
        base=str(base),
        adapter=str(adapter),
        output=str(output),
        dtype=dtype or (kind if kind in DTYPES else "mixed"),
        tensors_changed=len(changed),
        tensors_copied=len(weights.tensors) - len(changed),
        parameters=weights.parameters,
        parameters_changed=sum(tensor.size for tensor in changed),
        bytes_base=weights.nbytes,
        bytes_adapter=source.nbytes if (source := plan.adapter or plan.trained) else 0,
        bytes_merged=new.nbytes,
        scalings=dict(sorted(scalings.items())),
        peak_anonymous_mib=round((max(most, memory) - memory) / 2**20, 1) if memory else None,
        seconds=round(time.monotonic() - started, 2),
        rules=RULES.copy() if plan.adapter else [],
        remarks=remarks(plan.adapter) if plan.adapter else [],
    )


def _check_output(base: Path, adapter: Path | None, output: Path) -> None:
    for name, folder in (("base", base), ("adapter", adapter)):
        if folder is None:
            continue
        if not folder.is_dir():
            raise InputError(f"no folder {folder}.", f"the {name} folder.", "check the path.")
        if output.resolve() == folder.resolve():
            raise InputError(f"{output} is the {name} folder.", "a new folder.", "choose another output folder.")
    require_new(output)


def check_rows(tokenizer: Path, weights: Weights) -> None:
    """Refuse an adapter's own vocabulary with a token that has no row of the embedding."""
    largest = max((i for part in vocabulary(reader(tokenizer)) for i in part.values()), default=-1)
    rows = weights.tensors[EMBEDDING].shape[0] if EMBEDDING in weights.tensors else largest + 1
    if largest >= rows:
        raise refusal("merge/too-few-rows", tokenizer=tokenizer, largest=largest, rows=rows)


def _keep_template(source: Path, folder: Path) -> None:
    """The chat template of `source` in place of those that were copied."""
    templates = chat_templates(source, reader(source)("tokenizer_config.json"))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    shutil.rmtree(folder / TEMPLATES, ignore_errors=True)
    for name, text in templates.items():
        path = folder / ("chat_template.jinja" if name == "default" else f"{TEMPLATES}/{Path(name).name}.jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _copy_small_files(base: Path, tokenizer: Path, folder: Path, config: dict[str, Any], dtype: str | None) -> None:
    if dtype is not None:
        config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": dtype}
    config = {key: value for key, value in config.items() if key != "auto_map"}  # code of the folder's own, never run
    if config == read_object(base / "config.json"):
        shutil.copyfile(base / "config.json", folder / "config.json")
    else:
        write_json(folder / "config.json", config)
    for name in ("generation_config.json", "LICENSE", "NOTICE"):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    copy_tokenizer(tokenizer, folder)
