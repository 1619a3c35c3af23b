"""What a stage takes of the machine while it works: peak memory, and processor, memory and GPU over time."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import threading
import time
from abc import abstractmethod
from pathlib import Path
from typing import Any, Self

import psutil

EVERY = 2.0
"""Seconds between samples; a long training gets one a minute at last, so that the file stays small."""

CALM_AFTER, CALM = 900, 60.0
"""Samples after which the pause grows to CALM seconds."""

MIB = 2**20

WHOLE = ("seconds", "cpu_percent", "rss_mib")
"""What every sample has."""


class _Sampling(contextlib.AbstractContextManager):
    """A thread that calls `sample` every few seconds while the block runs."""

    def __init__(self, every: float) -> None:
        self.every = every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=type(self).__name__, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self.every):
            self.sample()

    @abstractmethod
    def sample(self) -> None:
        """Look once."""


class PeakMemory(_Sampling):
    """Samples resident memory every 50 ms; `bytes` is the largest sum over this process and its children."""

    def __init__(self, every: float = 0.05) -> None:
        super().__init__(every)
        self._own, self.bytes = psutil.Process(), 0

    def __enter__(self) -> Self:
        self.sample()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.sample()

    def sample(self) -> None:
        total = self._own.memory_info().rss
        for child in _children(self._own):
            with contextlib.suppress(psutil.Error):
                total += child.memory_info().rss
        self.bytes = max(self.bytes, total)


def _children(process: psutil.Process) -> list[psutil.Process]:
    """All processes below one; none when they end while they are listed."""
    with contextlib.suppress(psutil.Error):
        return process.children(recursive=True)
    return []


class DevicePeak(contextlib.AbstractContextManager):
    """`bytes`: the most that this process's tensors took on its NVIDIA GPU in the block, those there before included.

    0 without one: what does not use torch has no tensors on it.
    """

    def __init__(self) -> None:
        self.bytes = 0
        torch = sys.modules.get("torch")
        self._cuda: Any = torch.cuda if torch is not None and torch.cuda.is_available() else None

    def __enter__(self) -> Self:
        if self._cuda:
            self._cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self.bytes = self._cuda.max_memory_allocated()


class ResourceSampler(_Sampling):
    """Appends a JSON line every few seconds while the block runs, of this process and its children together.

    A line holds: seconds since the first sample (a continued stage goes on counting), cpu_percent (100 = one core
    busy), rss_mib (resident memory), and where there is an NVIDIA GPU gpu_percent (time in which it was busy) and
    gpu_mib (its memory in use, by whomever).

    Args:
        path: the file.
        every: seconds between samples.
        gpus: how many of the visible GPUs are in use.
    """

    def __init__(self, path: Path, every: float = EVERY, gpus: int = 1) -> None:
        super().__init__(every)
        self.path, self._gpus, self._written = path, _nvidia(gpus), 0
        self._processes: dict[int, psutil.Process] = {}
        before = read_samples(path)
        self._before = before[-1]["seconds"] if before else 0.0

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._last = self._started - self.every  # a stage that is over at once gets a sample all the same
        self._tree()  # psutil measures the processor between two calls
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if time.monotonic() - self._last > self.every / 2:  # the use in a shorter time would say nothing
            self.sample()

    def sample(self) -> None:
        cpu, rss = self._tree()
        self._last, self._written = time.monotonic(), self._written + 1
        if self._written == CALM_AFTER:
            self.every = max(self.every, CALM)
        seconds = self._before + self._last - self._started
        sample = {"seconds": round(seconds, 1), "cpu_percent": round(cpu, 1), "rss_mib": round(rss / MIB, 1)}
        line = json.dumps({**sample, **_gpu(self._gpus)}) + "\n"
        with contextlib.suppress(OSError), self.path.open("a", encoding="utf-8") as stream:  # a full disk stops others
            stream.write(line)

    def _tree(self) -> tuple[float, int]:
        """Processor use in percent of a core and resident bytes, of this process and all below it."""
        own = self._processes.setdefault(0, psutil.Process())
        self._processes = {0: own, **{child.pid: self._processes.get(child.pid, child) for child in _children(own)}}
        cpu, rss = 0.0, 0
        for process in self._processes.values():
            with contextlib.suppress(psutil.Error):
                cpu, rss = cpu + process.cpu_percent(None), rss + process.memory_info().rss
        return cpu, rss


def _nvidia(count: int) -> list[Any]:
    """Handles of the first GPUs that are visible, where NVIDIA's library is installed and a driver answers.

    Numbers in CUDA_VISIBLE_DEVICES count in CUDA's order, the fastest first, and those of NVIDIA's library by bus: they
    are one order only under CUDA_DEVICE_ORDER=PCI_BUS_ID or with a single GPU. Otherwise torch, which has chosen by
    then where it trains, is asked which one is meant.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if given is None else [name.strip() for name in given.split(",") if name.strip()]
    if names == [] or (names and names[0] == "-1"):
        return []
    try:
        import pynvml

        pynvml.nvmlInit()
        there = pynvml.nvmlDeviceGetCount()
        if there > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID" and not _all_unique(names):
            names = _unique_names(count)
        names = [str(index) for index in range(there)] if names is None else names
        return [
            pynvml.nvmlDeviceGetHandleByIndex(int(name))
            if name.isdigit()
            else pynvml.nvmlDeviceGetHandleByUUID(name.encode())
            for name in names[:count]
        ]
    except Exception:  # no library, no driver, or an error of its own kind: then there is nothing to see
        return []


def _all_unique(names: list[str] | None) -> bool:
    """Whether all are identifiers, which mean the same to everybody."""
    return names is not None and not any(name.isdigit() for name in names)


def _unique_names(count: int) -> list[str]:
    """Identifiers of torch's first GPUs."""
    import torch

    found = range(min(count, torch.cuda.device_count()))
    return [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in found]


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


def read_samples(path: Path) -> list[dict[str, float]]:
    """The samples of a file; lines that are no sample, as a last one that was cut by a kill, are left out."""
    samples = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            sample = json.loads(line)
            if isinstance(sample, dict) and all(isinstance(sample.get(key), int | float) for key in WHOLE):
                samples.append(sample)
    return samples


def summary(samples: list[dict[str, float]]) -> dict[str, float]:
    """Medians of processor and GPU use, largest memory; empty without samples."""
    found: dict[str, float] = {"samples": len(samples)} if samples else {}
    for key, name, choose in (
        ("cpu_percent", "cpu_percent_median", statistics.median),
        ("rss_mib", "rss_mib_max", max),
        ("gpu_percent", "gpu_percent_median", statistics.median),
        ("gpu_mib", "gpu_mib_max", max),
    ):
        if values := [sample[key] for sample in samples if key in sample]:
            found[name] = round(choose(values), 1)
    return found
