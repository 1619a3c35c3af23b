"""What this machine can do: processor, memory, accelerator, number formats, optional libraries; and what a stage takes
of it while it works.

Libraries are kept quiet here, too: what they print would land in a report page. Their errors are still raised.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import json
import logging
import os
import platform
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from lib.errors import in_words
from lib.progress import join_log

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def physical_cores() -> int:
    """Physical cores this process may use (limits of the scheduler included); at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    slurm = int(os.environ.get("SLURM_CPUS_PER_TASK") or allowed)
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed, slurm))


def available_memory() -> int:
    """Bytes of memory that can be used now without swapping (limits of a batch system or container included)."""
    rooms = [limit - used for limit, used in memory_limits()]
    return max(0, min([psutil.virtual_memory().available, *rooms]))


def total_memory() -> int:
    """Bytes of memory that this process could have if nothing else used any (limits included)."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in memory_limits())])


def memory_limits(mounted: Path = CGROUPS, own: Path = OWN_CGROUP) -> list[tuple[int, int]]:
    """(limit, use) in bytes of every control group around this process that has a limit, the innermost first.

    The use leaves out cached file contents, which the kernel gives up first (`inactive_file`). In a container the
    names in /proc may be those of the machine outside; then only the container's own group, at the root of the mount,
    can be read.

    Args:
        mounted: where control groups are mounted; both versions are understood.
        own: the file that names this process's groups, `number:controllers:path` a line.
    """
    found, lines = [], []
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
        groups = [group for group in (inside, *inside.parents) if group.is_relative_to(root)]
        found += [pair for group in groups if (pair := _limit(group, *files))]
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
def _cpuinfo() -> dict[str, str]:
    """What Linux says of a processor (all are alike); empty elsewhere."""
    with contextlib.suppress(OSError):
        pairs = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        return {key.strip(): value.strip() for key, _, value in pairs}
    return {}


def cpu_flags() -> set[str]:
    """Instruction-set flags of the processor (Linux; empty elsewhere)."""
    return set(" ".join(_cpuinfo().get(key, "") for key in ("flags", "Features")).split())


def cpu_name() -> str:
    """Model name of the processor."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


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


HALF_PRODUCTS = (7, 0)
"""Compute capability from which a GPU has units for float16 products (V100)."""


def gpus() -> list[str]:
    """Every CUDA device in words: name, memory, compute capability, and the driver where NVIDIA's library tells it."""
    import torch

    driver = ""
    if torch.cuda.is_available():
        with contextlib.suppress(Exception):  # no library, or an error of its own kind
            import pynvml

            pynvml.nvmlInit()
            driver = f", driver {pynvml.nvmlSystemGetDriverVersion()}"
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        f"{p.name}, {p.total_memory / 2**30:.1f} GiB, compute capability {p.major}.{p.minor}{driver}" for p in found
    ]


def compute_dtype(wanted: str = "auto") -> tuple[str, str]:
    """The number format for training and evaluation, and the reason for it.

    bfloat16 only where it is computed natively (CPU: AVX512-BF16, AMX or Arm BF16). float16 only on a GPU without it
    (T4, V100, RTX 20), where it is several times as fast as float32 and takes half the memory; a model that overflows
    in it (some Qwen2 do) is refused. Never on a CPU, where it is several times slower.
    """
    if wanted != "auto":
        return wanted, "set by the parameter dtype"
    if torch_device() == "cuda":
        import torch

        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "the GPU computes it natively"
        if torch.cuda.get_device_capability() >= HALF_PRODUCTS:
            return "float16", "the GPU has no native bfloat16, and fast float16 products"
        return "float32", "the GPU has no native bfloat16 and no fast float16 products"
    if cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"}:
        return "bfloat16", "the CPU computes it natively"
    return "float32", "the CPU has no native bfloat16"


def has_module(name: str) -> bool:
    """Whether a package can be imported (without importing it)."""
    return importlib.util.find_spec(name) is not None


@functools.cache
def bitsandbytes_problem() -> str | None:
    """Why 4-bit layers do not work here; None when a small NF4 product could be computed."""
    if not has_module("bitsandbytes"):
        return "bitsandbytes is not installed"
    try:
        import bitsandbytes as bnb
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16).to(device)
        result = layer(torch.ones(2, 64, dtype=torch.bfloat16, device=device))
        return None if torch.isfinite(result).all() else "a small NF4 product is not finite"
    except Exception as error:  # whatever a native library raises, it does not work here
        return in_words(error)


def llama_cpp_problem() -> str | None:
    """Why GGUF files cannot be run here; None when llama-cpp-python imports."""
    if not has_module("llama_cpp"):
        return "llama-cpp-python is not installed (it comes with the extra gguf)"
    try:
        import llama_cpp  # noqa: F401
    except Exception as error:  # a missing shared library surfaces as OSError, RuntimeError or ImportError
        return in_words(error)
    return None


def return_freed_memory() -> None:
    """Give freed pages back to the system, where the C library can (glibc); elsewhere nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


# Libraries are kept quiet: what they print would land in a report page. Their errors are still raised.


@functools.cache
def quiet() -> None:
    """Switch off progress bars and advice of transformers, peft and the hub client, once for this process. Where a
    command shows what is logged, the advice goes there.

    To be called before a model class is imported.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import huggingface_hub.utils
    import transformers.utils.logging

    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
    if not join_log("transformers", "accelerate", "huggingface_hub"):
        transformers.utils.logging.set_verbosity_error()
        logging.getLogger("accelerate").setLevel(logging.ERROR)
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    _import_models_alone(transformers.utils)


def _import_models_alone(utils: ModuleType) -> None:
    """Load the models of transformers without scikit-learn and scipy: a quarter of the time and memory of a child.

    Two modules that every model imports want them for what this project never does: a candidate generator for
    assisted generation, a loss for object detection. Both go without where a library is absent.
    """
    names = "is_sklearn_available", "is_scipy_available"
    found = {name: getattr(utils, name) for name in names}
    try:
        for name in names:
            setattr(utils, name, lambda: False)
        importlib.import_module("transformers.generation.candidate_generator")
        importlib.import_module("transformers.loss.loss_utils")
    finally:
        for name, available in found.items():
            setattr(utils, name, available)


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Python warnings of the libraries called inside are dropped; exceptions pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# What a stage takes of the machine while it works: peak memory, and processor, memory and GPU over time.


EVERY = 2.0
"""Seconds between samples; a long training comes down to one a minute, so that the file stays small."""

CALM_AFTER, CALM = 900, 60.0
"""Samples after which the pause grows to CALM seconds."""

MIB = 2**20

WHOLE = ("seconds", "cpu_percent", "rss_mib")
"""What every sample has."""


@contextlib.contextmanager
def _sampling(look: Callable[[], float], pause: float) -> Iterator[None]:
    """Call `look` in a thread while the block runs: first after `pause` seconds, then after as many as it returns."""
    stop = threading.Event()

    def watch() -> None:
        seconds = pause
        while not stop.wait(seconds):
            seconds = look()

    thread = threading.Thread(target=watch, name=look.__qualname__, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _tree(own: psutil.Process) -> list[psutil.Process]:
    """A process and all below it; the process alone when some end while they are listed."""
    with contextlib.suppress(psutil.Error):
        return [own, *own.children(recursive=True)]
    return [own]


@dataclass
class Peak:
    """The most that was in use at any moment of a block; known when the block ends."""

    bytes: int = 0


@contextlib.contextmanager
def peak_memory() -> Iterator[Peak]:
    """Resident memory of this process and its children together, sampled every 50 ms."""
    own, peak, pause = psutil.Process(), Peak(), 0.05

    def look() -> float:
        total = 0
        for process in _tree(own):
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        peak.bytes = max(peak.bytes, total)
        return pause

    look()
    try:
        with _sampling(look, pause):
            yield peak
    finally:
        look()


@contextlib.contextmanager
def device_peak() -> Iterator[Peak]:
    """What this process's tensors took on its NVIDIA GPU, those that were there before included.

    0 without one: what does not use torch has no tensors on it.
    """
    torch, peak = sys.modules.get("torch"), Peak()
    if torch is None or not torch.cuda.is_available():
        yield peak
        return
    torch.cuda.reset_peak_memory_stats()
    try:
        yield peak
    finally:
        peak.bytes = torch.cuda.max_memory_allocated()


@contextlib.contextmanager
def resources_recorded(path: Path, every: float = EVERY, gpus: int = 1) -> Iterator[None]:
    """Append a JSON line to `path` every few seconds while the block runs: this process and its children together.

    A line holds: seconds since the first sample (a continued stage goes on counting), cpu_percent (100 = one core
    busy), rss_mib (resident memory), and where there is an NVIDIA GPU gpu_percent (share of the time it was busy) and
    gpu_mib (its memory in use, by any process).

    Args:
        every: seconds between samples.
        gpus: how many of the visible GPUs are in use.
    """
    own, devices, earlier = psutil.Process(), _nvidia(gpus), read_samples(path)
    known: dict[psutil.Process, psutil.Process] = {}
    started, written = time.monotonic(), 0
    last = started - every  # a stage that is over at once gets a sample all the same

    def use() -> tuple[float, int]:
        """Use of the processor since the last call (psutil remembers it in each object), and resident bytes."""
        nonlocal known
        known = {process: known.get(process, process) for process in _tree(own)}
        cpu, rss = 0.0, 0
        for process in known.values():
            with contextlib.suppress(psutil.Error):
                cpu, rss = cpu + process.cpu_percent(None), rss + process.memory_info().rss
        return cpu, rss

    def look() -> float:
        nonlocal last, written
        cpu, rss = use()
        last, written = time.monotonic(), written + 1
        seconds = last - started + (earlier[-1]["seconds"] if earlier else 0.0)
        sample = {"seconds": round(seconds, 1), "cpu_percent": round(cpu, 1), "rss_mib": round(rss / MIB, 1)}
        line = json.dumps({**sample, **_gpu(devices)}) + "\n"
        with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as stream:  # a full disk stops others
            stream.write(line)
        return every if written < CALM_AFTER else max(every, CALM)

    use()
    try:
        with _sampling(look, every):
            yield
    finally:
        if time.monotonic() - last > every / 2:  # the use in a shorter time would say nothing
            look()


def _nvidia(count: int) -> list[Any]:
    """Handles of the first GPUs that torch sees, where NVIDIA's library is installed and a driver answers.

    By their identifiers: NVIDIA's library counts by bus, torch the fastest first and only those that are visible.
    """
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        seen = range(min(count, torch.cuda.device_count()))
        names = [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in seen]
        return [pynvml.nvmlDeviceGetHandleByUUID(name.encode()) for name in names]
    except Exception:  # no library, no driver, or an error of its own kind: then there is nothing to see
        return []


def _gpu(handles: list[Any]) -> dict[str, float]:
    """Mean use and total memory of the GPUs; without NVIDIA's library the memory that torch knows of."""
    if handles:
        import pynvml

        with contextlib.suppress(pynvml.NVMLError):
            busy = [pynvml.nvmlDeviceGetUtilizationRates(handle).gpu for handle in handles]
            used = sum(pynvml.nvmlDeviceGetMemoryInfo(handle).used for handle in handles)
            return {"gpu_percent": round(statistics.mean(busy), 1), "gpu_mib": round(used / MIB, 1)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        return {"gpu_mib": round((total - free) / MIB, 1)}
    return {}


def whole_lines(path: Path) -> list[Any]:
    """The JSON of the lines of a file that is being written, or was cut by a kill: a line that is none is left out."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def read_samples(path: Path) -> list[dict[str, float]]:
    """The samples of a file; lines that are no sample, as a last one that was cut by a kill, are left out."""
    found = [line for line in (whole_lines(path) if path.is_file() else ()) if isinstance(line, dict)]
    return [sample for sample in found if all(isinstance(sample.get(key), int | float) for key in WHOLE)]


def summary(samples: list[dict[str, float]]) -> dict[str, float]:
    """Medians of processor and GPU use, largest memory; empty without samples."""
    found: dict[str, float] = {"samples": len(samples)} if samples else {}
    for key in ("cpu_percent", "rss_mib", "gpu_percent", "gpu_mib"):
        name, choose = ("median", statistics.median) if key.endswith("_percent") else ("max", max)
        if values := [sample[key] for sample in samples if key in sample]:
            found[f"{key}_{name}"] = round(choose(values), 1)
    return found
