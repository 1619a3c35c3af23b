"""What this machine can do: processor, memory, disk, accelerator, number formats, optional libraries.

Libraries are told not to talk here, too: what they print would land in a report page. Errors stay errors.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import logging
import os
import platform
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

# What this machine can do: processor, memory, disk, accelerator, number formats, optional libraries.

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def physical_cores() -> int:
    """Physical cores this process may use (scheduler limits counted); at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    slurm = int(os.environ.get("SLURM_CPUS_PER_TASK") or allowed)
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed, slurm))


def available_memory() -> int:
    """Bytes of memory that can be used now without swapping (the limits of a batch system or container counted)."""
    rooms = [limit - used for limit, used in memory_limits()]
    return max(0, min([psutil.virtual_memory().available, *rooms]))


def total_memory() -> int:
    """Bytes of memory that this process could have if nothing else used any (limits counted)."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in memory_limits())])


def memory_limits(mounted: Path = CGROUPS, own: Path = OWN_CGROUP) -> list[tuple[int, int]]:
    """(limit, use) in bytes of every control group around this process that has a limit, from the innermost out.

    The use is without file contents that the kernel gives up first (`inactive_file`). In a container the names in
    /proc may be those of the machine outside; then only the group at the root of the mount is readable, its own.

    Args:
        mounted: where control groups are mounted; both versions are understood.
        own: the file that names this process's groups, `number:controllers:path` a line.
    """
    found = []
    lines = []
    with contextlib.suppress(OSError):
        lines = [line.split(":", 2) for line in own.read_text().splitlines() if line.count(":") >= 2]
    for _, controllers, name in lines:
        if controllers == "":
            root, files = mounted, ("memory.max", "memory.current", "inactive_file ")
        elif "memory" in controllers.split(","):
            root, files = mounted / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
        else:
            continue
        inside = root / name.lstrip("/")
        for group in (inside, *inside.parents):
            if group.is_relative_to(root) and (pair := _limit(group, *files)):
                found.append(pair)
    return found


def _limit(group: Path, limit: str, use: str, given_up: str) -> tuple[int, int] | None:
    with contextlib.suppress(OSError, ValueError):  # "max" is no number; the outermost group has no such file
        most, used = int((group / limit).read_text()), int((group / use).read_text())
        with contextlib.suppress(OSError, StopIteration, ValueError):
            lines = (group / "memory.stat").read_text().splitlines()
            used -= int(next(line for line in lines if line.startswith(given_up)).split()[1])
        return most, max(0, used)
    return None


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction-set flags of the processor (Linux; empty elsewhere)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def cpu_name() -> str:
    """Model name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def torch_device() -> str:
    """'cuda', 'mps' or 'cpu': where models are loaded."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_name() -> str:
    """The device in words for reports, e.g. 'cpu (AMD EPYC, 2 cores)'."""
    kind = torch_device()
    if kind == "cuda":
        import torch

        return f"cuda ({torch.cuda.get_device_name()})"
    return f"{kind} ({cpu_name()}, {physical_cores()} cores)"


def compute_dtype(wanted: str = "auto") -> tuple[str, str]:
    """The number format for training and evaluation, and the reason for it.

    bfloat16 only where it is computed natively (CPU: AVX512-BF16, AMX or Arm BF16); float16 never (on a CPU it is
    several times slower, and Qwen2 overflows in it).
    """
    if wanted != "auto":
        return wanted, "set by the parameter dtype"
    if torch_device() == "cuda":
        import torch

        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bfloat16", "the GPU computes it natively") if native else ("float32", "the GPU has no native bfloat16")
    if cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"}:
        return "bfloat16", "the CPU computes it natively"
    return "float32", "the CPU has no native bfloat16"


def has_module(name: str) -> bool:
    """Whether a package can be imported (without importing it)."""
    return importlib.util.find_spec(name) is not None


@functools.cache
def bitsandbytes_problem() -> str | None:
    """Why 4-bit layers do not work here; None when a small NF4 product was computed and is right."""
    if not has_module("bitsandbytes"):
        return "bitsandbytes is not installed"
    os.environ.setdefault("HF_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE", "0"))
    try:
        import bitsandbytes as bnb
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16).to(device)
        result = layer(torch.ones(2, 64, dtype=torch.bfloat16, device=device))
        return None if torch.isfinite(result).all() else "a small NF4 product is not finite"
    except Exception as error:  # whatever a native library raises means that it does not work here
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def llama_cpp_problem() -> str | None:
    """Why GGUF files cannot be run here; None when llama-cpp-python imports."""
    if not has_module("llama_cpp"):
        return "llama-cpp-python is not installed (it comes with the extra gguf)"
    try:
        import llama_cpp  # noqa: F401
    except Exception as error:  # a missing shared library surfaces as OSError, RuntimeError or ImportError
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


@dataclass(frozen=True)
class Machine:
    """The machine card of a report."""

    system: str
    processor: str
    cores: int
    memory_gib: float
    available_gib: float
    disk_free_gb: float
    accelerator: str
    dtype: str
    dtype_reason: str
    bitsandbytes: str
    llama_cpp: str


def machine(disk: Path) -> Machine:
    """Describe this machine; `disk` is a folder on the disk that runs are written to."""
    existing = next(p for p in (disk, *disk.absolute().parents) if p.exists())
    dtype, reason = compute_dtype()
    return Machine(
        system=f"{platform.system()} {platform.release()} ({platform.machine()})",
        processor=cpu_name(),
        cores=physical_cores(),
        memory_gib=round(total_memory() / 2**30, 1),
        available_gib=round(available_memory() / 2**30, 1),
        disk_free_gb=round(shutil.disk_usage(existing).free / 1e9, 1),
        accelerator="none" if torch_device() == "cpu" else device_name(),
        dtype=dtype,
        dtype_reason=reason,
        bitsandbytes=bitsandbytes_problem() or "works",
        llama_cpp=llama_cpp_problem() or "works",
    )


def return_freed_memory() -> None:
    """Give the pages that were freed back to the system, where the C library can (glibc); elsewhere nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


# Libraries told not to talk: what they print would land in a report page. Errors stay errors.


@functools.cache
def quiet() -> None:
    """Switch off progress bars and advice of transformers, peft and the hub client, once for this process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import huggingface_hub.utils
    import transformers.utils.logging

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Python warnings of the libraries called inside are dropped; exceptions pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
