"""MNN, the runtime of MNN Chat, with the settings that the folder carries; in the environment .venv-mnn."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import MNN.llm
import numpy as np


class _Mnn:
    def __init__(self, folder: Path, n_threads: int) -> None:
        self.versions = {"mnn": metadata.version("mnn")}
        self._model = MNN.llm.create(str(folder / "config.json"))
        self._model.set_config({"thread_num": n_threads} if n_threads else {})
        self._model.load()
        self._held = 0

    def forward(self, keep: int, ids: Sequence[int], first: int, most: int) -> np.ndarray:
        """See `lib.scoring.runtimes.protocol.Runtime`."""
        if keep == 0:
            self._model.reset()
        elif keep < self._held:
            self._model._c_obj.erase_history(keep, self._held)
        whole = first < len(ids) - 1  # the logits of every token cost a product with the output matrix each
        self._model.set_config({"all_logits": whole})
        self._held = keep + len(ids)
        logits = self._model.forward(list(ids))
        if not logits.shape or logits.shape[1] not in (1, len(ids)):
            raise RuntimeError(f"MNN gives logits of shape {logits.shape}")
        rows = np.array(logits.read(), dtype=np.float32).reshape(logits.shape)[0]  # a copy: MNN frees what it gave
        return rows[first - len(ids) :] if first < len(ids) else rows[:0]

    def encode(self, text: str) -> list[int]:
        """See `lib.scoring.runtimes.protocol.Runtime`."""
        return self._model.tokenizer_encode(text)


def load(folder: Path, n_threads: int, info: dict[str, Any]) -> _Mnn:
    """The folder, loaded."""
    return _Mnn(folder, n_threads)
