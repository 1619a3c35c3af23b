"""A full device and a full disk, in whatever words the libraries below say it.
When the device has no room for a micro-batch: halve it, make more of them an update, and go on.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.runs.files import read_json, write_json
from lib.stages.finetune import checkpoints

if TYPE_CHECKING:
    from lib.stages.finetune.session import Job


# A full device and a full disk, in whatever words the libraries below say it.

NO_MEMORY = (
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "MPS backend out of memory"),
    *("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory"),
)
"""In a RuntimeError that is no torch.OutOfMemoryError: cuBLAS, cuDNN, Apple's GPU, the processor's memory."""

NO_SPACE = ("No space left on device", "Disk quota exceeded", "unexpected pos", "PytorchStreamWriter failed")
"""From the system, from safetensors (which wraps it), and from torch's own writer of zip files."""


@contextlib.contextmanager
def memory_in_one_word() -> Iterator[None]:
    """Every way to say that memory is full becomes a torch.OutOfMemoryError."""
    import torch

    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and any(words in str(error) for words in NO_MEMORY):
            raise torch.OutOfMemoryError(str(error)) from None
        raise


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """The base itself does not fit: no smaller micro-batch would help.

    Raises:
        InputError: so it is.
    """
    import torch

    try:
        with memory_in_one_word():
            yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"the device has no room for the base model itself ({str(error).splitlines()[0][:200]}).",
            "a base that fits, with room for its training.",
            "set load_in_4bit: true or a smaller base_model; and see that nothing else uses the device.",
        ) from None


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """The disk of `folder` is full while a checkpoint is written.

    Raises:
        InputError: so it is.
    """
    try:
        yield
    except Exception as error:  # safetensors has an error of its own
        if not any(words in str(error) for words in NO_SPACE):
            raise
        raise InputError(
            f"the disk of {folder} is full: a checkpoint could not be written.",
            "room for it.",
            "free some space and start again: the training goes on from its newest whole checkpoint.",
        ) from None


# When the device has no room for a micro-batch: halve it, make more of them an update, and go on.

RECORD = "out_of_memory.json"
"""Beside the checkpoints: the sizes that did not fit. A continued training begins with those that did."""


def smaller(rows: int, passes: int) -> tuple[int, int] | None:
    """At most half the rows a forward pass, and as many more passes that an update keeps its rows; None for one row."""
    update = rows * passes
    fitting = [size for size in range(1, rows // 2 + 1) if update % size == 0]
    return (fitting[-1], update // fitting[-1]) if fitting else None


def until_it_fits(job: Job, attempt: Callable[[Job], dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Call `attempt` with smaller and smaller micro-batches until the device has room for one.

    The rows of every update, their order and the weight of each loss token stay the same, and a try goes on from the
    newest verified checkpoint, so only rounding differs from a training that began with the smaller size.

    Returns:
        The attempt's facts with "micro_batch" (rows and passes asked for and used, what did not fit), and a note for
        the pages for each size that did not fit.

    Raises:
        InputError: a single row does not fit.
    """
    asked = _sizes(job)
    path = job.folder / RECORD
    failures: list[dict[str, Any]] = read_json(path) if path.is_file() else []
    if failures:
        job = _resized(job, failures[-1]["next"])
    while True:
        try:
            facts = attempt(job)
            break
        except Exception as error:
            if not _out_of_memory(error):
                raise
            message = str(error).splitlines()[0][:200]
        _free_memory()  # here, where no traceback holds the model any more
        failures.append(_failure(job, message))
        write_json(path, failures)
        job = _resized(job, failures[-1]["next"])
    used = {"asked": asked, "used": _sizes(job), "out_of_memory": failures}
    return {**facts, "micro_batch": used}, [_note(failure) for failure in failures]


def _sizes(job: Job) -> dict[str, int]:
    return {
        "rows": job.settings.per_device_train_batch_size,
        "passes": job.settings.gradient_accumulation_steps,
    }


def _resized(job: Job, sizes: dict[str, int]) -> Job:
    changed = {"per_device_train_batch_size": sizes["rows"], "gradient_accumulation_steps": sizes["passes"]}
    return replace(job, settings=job.settings.model_copy(update=changed))


def _out_of_memory(error: Exception) -> bool:
    """Only what torch raises when an accelerator is full; it is loaded by then if it can have raised it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _failure(job: Job, message: str) -> dict[str, Any]:
    """What did not fit, and what is tried next."""
    sizes = _sizes(job)
    following = smaller(sizes["rows"], sizes["passes"])
    if following is None:
        (job.folder / RECORD).unlink(missing_ok=True)  # the next try may find more room
        raise InputError(
            f"the device ran out of memory with one row a forward pass ({message}).",
            "a training that fits.",
            "set gradient_checkpointing: true, load_in_4bit: true, a smaller max_seq_length or a smaller lora_r; "
            "and see that nothing else uses the device.",
        )
    good, _ = checkpoints.find(job.folder / "checkpoints")
    step = good[-1].step if good else 0
    with (job.folder / "training.log").open("a", encoding="utf-8") as stream:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S%z")
        stream.write(f"{stamp} out of memory with {sizes['rows']} rows a forward pass: {following[0]} from now on\n")
    return {**sizes, "from_step": step, "message": message, "next": {"rows": following[0], "passes": following[1]}}


def _note(failure: dict[str, Any]) -> str:
    rows, passes = failure["next"]["rows"], failure["next"]["passes"]
    again = f"went on from update {failure['from_step']}" if failure["from_step"] else "started again"
    return (
        f"the device ran out of memory with {failure['rows']} rows a forward pass: the training {again} with {rows} "
        f"and {passes} passes an update; the updates hold the same rows"
    )


def _free_memory() -> None:
    gc.collect()
    with contextlib.suppress(ImportError):
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
