"""Scoring with ONNX Runtime GenAI: the runtime of Microsoft's phone and desktop apps, as they run it on a processor."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax, logsumexp

from lib.errors import refusal, refusing
from lib.models.onnx_folder import check_onnx_folder
from lib.scoring.backend import Backend, Feed, Job, Run, check_ids, common_prefix

_CHUNK = 256
"""Tokens of a forward pass. The graph gives the logits of every token: 256 rows of a vocabulary of 151,936 in float32
are 156 MB."""


_FAULTS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, MemoryError)
"""What ONNX Runtime raises of a folder that it cannot run."""


class OnnxBackend(Backend):
    """A folder of ONNX Runtime GenAI; one sequence at a time, the common beginning of prompts computed once.

    Args:
        folder: see `lib.models.onnx_folder`.
        n_threads: of a pass; 0 = as ONNX Runtime chooses.
        n_ctx: most tokens of a text that is written (`new_text`); None = what the model was made for.

    Raises:
        InputError: as `check_onnx_folder`; or ONNX Runtime does not load it.
    """

    def __init__(self, folder: Path, n_threads: int = 0, n_ctx: int | None = None, name: str = "") -> None:
        with refusing(ImportError, "scoring/onnx-does-not-load", folder=folder):
            import onnxruntime_genai as genai

        told = check_onnx_folder(folder)["model"]
        self._genai, self.name, self.device = genai, name or folder.name, "cpu"
        self.vocab_size = told["vocab_size"]
        self._most = int(told["context_length"])
        self.n_ctx = min(n_ctx or self._most, self._most)
        self._folder, self._threads = folder, n_threads
        with refusing(_FAULTS, "scoring/onnx-does-not-load", folder=folder):
            config = genai.Config(str(folder))
            if n_threads:
                options = {"intra_op_num_threads": n_threads}
                config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self._model = genai.Model(config)

    @property
    def settings(self) -> dict[str, Any]:
        """See `lib.scoring.backend.Backend`."""
        versions = {name: metadata.version(name) for name in ("onnxruntime", "onnxruntime-genai")}
        return {"n_threads": self._threads, "device": self.device, **versions}

    def _plan(self, jobs: Sequence[Job], alike: bool) -> tuple[Iterable[Sequence[Job]], Run]:
        """See `lib.scoring.backend.Backend`."""
        shared = common_prefix(jobs) if alike and len(jobs) > 1 else []
        text = self._text(max(len(job.ids) for job in jobs)) if jobs else None
        if shared:
            self._pass(text, shared)
        return [[job] for job in jobs], functools.partial(self._run, text=text, shared=len(shared))

    def _run(self, batch: Sequence[Job], text: Any, shared: int) -> list[np.ndarray]:
        """The read log-probabilities of one sequence behind the `shared` tokens, which the text keeps."""
        (job,) = batch
        text.rewind_to(shared)
        rest, values = job.ids[shared:], np.full(len(job.reads), np.nan)
        for start in range(0, len(rest), _CHUNK):
            logits = self._pass(text, rest[start : start + _CHUNK])
            first = shared + start
            for i, (_, position, token) in enumerate(job.reads):
                if first <= position < first + len(logits):
                    row = logits[position - first].astype(np.float64)
                    values[i] = row[token] - logsumexp(row)
        return [values]

    def _text(self, most: int) -> Any:
        """A new text of at most so many tokens."""
        with refusing(_FAULTS, "scoring/onnx-does-not-load", folder=self._folder):
            parameters = self._genai.GeneratorParams(self._model)
            parameters.set_search_options(max_length=min(most + 1, self._most), do_sample=False)
            return self._genai.Generator(self._model, parameters)

    def _pass(self, text: Any, ids: Sequence[int]) -> np.ndarray:
        """Logits behind each of further tokens of a text, float32, (tokens, V); a view that the next pass replaces."""
        with refusing(_FAULTS, "scoring/onnx-does-not-load", folder=self._folder):
            text.append_tokens(np.array([ids], dtype=np.int32))
            logits = text.get_output("logits")[0]
        if logits.shape != (len(ids), self.vocab_size):
            raise refusal(
                "scoring/other-logits", folder=self._folder, found=logits.shape, wanted=(len(ids), self.vocab_size)
            )
        return logits

    def window_logits(self, ids: list[int], first: int = 0) -> np.ndarray:
        """See `lib.scoring.backend.Backend`."""
        self.check_ids([ids])
        text, parts = self._text(len(ids)), []
        for start in range(0, len(ids), _CHUNK):
            logits = self._pass(text, ids[start : start + _CHUNK])
            parts.append(logits[max(0, first - start) :].astype(np.float32))
        return np.concatenate(parts)

    def window_log_probs(self, ids: list[int], first: int = 0) -> np.ndarray:
        """See `lib.scoring.backend.Backend`."""
        return log_softmax(self.window_logits(ids, first), axis=-1)

    def new_text(self) -> Feed:
        """See `lib.scoring.backend.Backend`."""
        text, done = self._text(self.n_ctx), 0

        def feed(ids: Sequence[int]) -> np.ndarray:
            nonlocal done
            check_ids([list(ids)], self.vocab_size, self.n_ctx - done, self.name)
            done += len(ids)
            for start in range(0, len(ids), _CHUNK):
                logits = self._pass(text, ids[start : start + _CHUNK])
            return logits[-1].copy()

        return feed

    def close(self) -> None:
        """Drop the model."""
        self._model = None
