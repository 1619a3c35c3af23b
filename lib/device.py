"""What this machine can do: processor, memory, disk, accelerator, number formats, optional libraries."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil


def physical_cores() -> int:
    """Physical cores this process may use (scheduler limits counted); at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    slurm = int(os.environ.get("SLURM_CPUS_PER_TASK") or allowed)
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed, slurm))


def available_memory() -> int:
    """Bytes of memory that can be used now without swapping (a cgroup limit counted)."""
    free = psutil.virtual_memory().available
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            free = min(free, int(Path(name).read_text()) - psutil.Process().memory_info().rss)
    return max(0, free)


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


def hush_bitsandbytes() -> None:
    """Drop one line that bitsandbytes logs where an optional kernel for single rows is absent; errors still pass."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    if not logger.filters:
        logger.addFilter(lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward"))


@functools.cache
def bitsandbytes_problem() -> str | None:
    """Why 4-bit layers do not work here; None when a small NF4 product was computed and is right."""
    if not has_module("bitsandbytes"):
        return "bitsandbytes is not installed"
    os.environ.setdefault("HF_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE", "0"))
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it advises an optional kernel
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
        return "llama-cpp-python is not installed"
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
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        available_gib=round(available_memory() / 2**30, 1),
        disk_free_gb=round(shutil.disk_usage(existing).free / 1e9, 1),
        accelerator="none" if torch_device() == "cpu" else device_name(),
        dtype=dtype,
        dtype_reason=reason,
        bitsandbytes=bitsandbytes_problem() or "works",
        llama_cpp=llama_cpp_problem() or "works",
    )
