"""ONNX Runtime GenAI: the runtime of Microsoft's phone and desktop apps, as they run it on a processor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai


class _Onnx:
    def __init__(self, folder: Path, n_threads: int, context_length: int) -> None:
        self.versions = {name: metadata.version(name) for name in ("onnxruntime", "onnxruntime-genai")}
        config = genai.Config(str(folder))
        if n_threads:
            options = {"intra_op_num_threads": n_threads}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model, self._most, self._room = genai.Model(config), context_length, 0
        self._text = self._tokenizer = None

    def forward(self, keep: int, ids: Sequence[int], first: int, most: int) -> np.ndarray:
        """See `lib.scoring.runtimes.protocol.Runtime`."""
        if keep == 0 and self._room != (room := min(most + 1, self._most)):
            parameters = genai.GeneratorParams(self._model)
            parameters.set_search_options(max_length=room, do_sample=False)
            self._text, self._room = genai.Generator(self._model, parameters), room
        self._text.rewind_to(keep)
        self._text.append_tokens(np.array([ids], dtype=np.int32))
        logits = self._text.get_output("logits")[0]
        if len(logits) != len(ids):
            raise RuntimeError(f"logits of {len(logits)} tokens where {len(ids)} were read")
        return logits[first:]

    def encode(self, text: str) -> list[int]:
        """See `lib.scoring.runtimes.protocol.Runtime`."""
        self._tokenizer = self._tokenizer or genai.Tokenizer(self._model)  # the model's vocabulary, read in 0.3 s
        return [int(number) for number in self._tokenizer.encode(text)]


def load(folder: Path, n_threads: int, info: dict[str, Any]) -> _Onnx:
    """The folder, loaded."""
    return _Onnx(folder, n_threads, info["context_length"])
