"""A full device and a full disk, in whatever words the libraries below say it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lib.errors import InputError

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
