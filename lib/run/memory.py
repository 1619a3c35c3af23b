"""Peak memory while a block runs: resident, of this process and its children; and of its tensors on a GPU."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import Any

import psutil


class PeakMemory(contextlib.AbstractContextManager):
    """Samples resident memory every 50 ms; `bytes` is the largest sum over this process and its children."""

    def __init__(self, interval: float = 0.05) -> None:
        self.bytes = 0
        self._interval = interval
        self._stop = threading.Event()
        self._process = psutil.Process()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _sample(self) -> None:
        total = self._process.memory_info().rss
        with contextlib.suppress(psutil.Error):
            for child in self._process.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    total += child.memory_info().rss
        self.bytes = max(self.bytes, total)

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._sample()


class DevicePeak(contextlib.AbstractContextManager):
    """`bytes`: the most that this process's tensors took on its NVIDIA GPU in the block, those there before included.

    0 without one: what does not use torch has no tensors on it.
    """

    def __init__(self) -> None:
        self.bytes = 0
        torch = sys.modules.get("torch")
        self._cuda: Any = torch.cuda if torch is not None and torch.cuda.is_available() else None

    def __enter__(self) -> DevicePeak:
        if self._cuda:
            self._cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self.bytes = self._cuda.max_memory_allocated()
