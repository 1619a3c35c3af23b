"""What a stage takes of the machine while it works: peak memory, and processor, memory and GPU over time."""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

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
    for key in ("cpu_percent", "rss_mib", "gpu_percent", "gpu_mib"):
        name, choose = ("median", statistics.median) if key.endswith("_percent") else ("max", max)
        if values := [sample[key] for sample in samples if key in sample]:
            found[f"{key}_{name}"] = round(choose(values), 1)
    return found
