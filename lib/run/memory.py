"""Peak resident memory of this process and its children while a block runs."""

from __future__ import annotations

import contextlib
import threading

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
