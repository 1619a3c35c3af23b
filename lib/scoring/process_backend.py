"""Scoring with a runtime in a process of its own, confined: ONNX Runtime, MNN, and whatever else speaks the protocol of
`lib.scoring.runtimes.protocol`. One sequence at a time; the common beginning of prompts is computed once."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax, logsumexp

from lib.errors import refusal
from lib.models.runtime_folders import Runtime
from lib.runs.child import death, environment
from lib.runs.packages import environment_python
from lib.scoring.backend import Backend, Feed, Job, Run, check_ids, common_prefix

_CHUNK = 256
"""Tokens of a request. Their logits of a vocabulary of 151,936 in float32 are 156 MB."""


class ProcessBackend(Backend):
    """A folder in the runtime that it was made for.

    Args:
        folder, runtime: see `lib.models.runtime_folders`.
        n_threads: of a pass; 0 = as the runtime chooses.
        n_ctx: most tokens of a text that is written (`new_text`); None = what the model was made for.
        command: what is started instead of the runtime; for tests.

    Attributes:
        load_seconds: of the model, once the process runs.

    Raises:
        InputError: as the runtime's `check`; or it does not load.
    """

    def __init__(
        self,
        folder: Path,
        runtime: Runtime,
        n_threads: int = 0,
        n_ctx: int | None = None,
        name: str = "",
        command: Sequence[str] = (),
    ) -> None:
        told = runtime.check(folder)
        self.name, self.device, self.vocab_size = name or folder.name, "cpu", told["vocab_size"]
        self._most = told["context_length"]
        self.n_ctx = min(n_ctx or self._most, self._most)
        self._folder, self._runtime, self._threads = folder, runtime, n_threads
        python = str(environment_python(runtime.environment)) if runtime.environment else sys.executable
        call = ["-P", "-m", "lib.scoring.runtimes.protocol", runtime.module, str(folder.resolve()), str(n_threads)]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            command or [python, *call, json.dumps(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment(os.devnull),
        )
        self._peak = 0.0
        hello = self._heard()
        self.load_seconds, self._versions = float(hello["load_seconds"]), dict(hello["versions"])

    @property
    def settings(self) -> dict[str, Any]:
        """See `lib.scoring.backend.Backend`."""
        return {"n_threads": self._threads, "device": self.device, **self._versions}

    def peak_memory_mib(self) -> float:
        """Largest resident memory of the runtime's process."""
        return self._peak

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """What the folder's own tokenizer makes of texts."""
        return self._ask({"texts": list(texts)})["ids"]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]
        except OSError as error:
            raise self._died() from error
        return self._heard()

    def _heard(self) -> dict[str, Any]:
        """The next line of the child."""
        try:
            answer = json.loads(self._process.stdout.readline())  # type: ignore[union-attr]
        except ValueError as error:
            raise self._died() from error
        if "error" in answer:
            raise refusal(
                "scoring/runtime-refuses", runtime=self._runtime.title, folder=self._folder, said=answer["error"]
            )
        self._peak = max(self._peak, answer["peak_memory_mib"])
        return answer

    def _died(self) -> Exception:
        """The error for a child that ended, or said something else than an answer."""
        self._process.kill()
        code = self._process.wait()
        self._log.seek(0)
        words = self._log.read()[-4000:].decode("utf-8", "replace")
        return death(code, f"running {self._folder} in {self._runtime.title}", words)

    def _pass(self, keep: int, ids: Sequence[int], first: int, most: int) -> np.ndarray:
        """Logits behind the ids from the `first` on, float32, (ids - first, V), after `keep` tokens of the text."""
        answer = self._ask({"keep": keep, "ids": list(map(int, ids)), "first": first, "most": most})
        rows, wanted = answer.get("rows"), len(ids) - first
        if rows != wanted:
            found = (rows, self.vocab_size)
            raise refusal("scoring/other-logits", folder=self._folder, found=found, wanted=(wanted, self.vocab_size))
        values = np.empty((rows, self.vocab_size), dtype=np.float32)
        if rows and self._process.stdout.readinto(values.data.cast("B")) != values.nbytes:  # type: ignore[union-attr]
            raise self._died()
        return values

    def _passes(self, keep: int, ids: Sequence[int], first: int, most: int) -> Iterator[tuple[int, np.ndarray]]:
        """The same in pieces: the number of a piece's first row, and its logits."""
        for start in range(0, len(ids), _CHUNK):
            piece = ids[start : start + _CHUNK]
            begin = min(max(0, first - start), len(piece))
            yield start + begin, self._pass(keep + start, piece, begin, most)

    def _plan(self, jobs: Sequence[Job], alike: bool) -> tuple[Iterable[Sequence[Job]], Run]:
        """See `lib.scoring.backend.Backend`."""
        shared = common_prefix(jobs) if alike and len(jobs) > 1 else []
        most = max((len(job.ids) for job in jobs), default=0)
        for _ in self._passes(0, shared, len(shared), most):
            pass
        return [[job] for job in jobs], functools.partial(self._run, shared=len(shared), most=most)

    def _run(self, batch: Sequence[Job], shared: int, most: int) -> list[np.ndarray]:
        """The read log-probabilities of one sequence behind the `shared` tokens, which the text keeps."""
        (job,) = batch
        values = np.full(len(job.reads), np.nan)
        for begin, logits in self._passes(shared, job.ids[shared:], max(0, job.start - shared), most):
            for i, (_, position, token) in enumerate(job.reads):
                if 0 <= (row := position - shared - begin) < len(logits):
                    values[i] = logits[row, token].astype(np.float64) - logsumexp(logits[row].astype(np.float64))
        return [values]

    def window_logits(self, ids: list[int], first: int = 0) -> np.ndarray:
        """See `lib.scoring.backend.Backend`."""
        self.check_ids([ids])
        return np.concatenate([logits for _, logits in self._passes(0, ids, first, len(ids))])

    def window_log_probs(self, ids: list[int], first: int = 0) -> np.ndarray:
        """See `lib.scoring.backend.Backend`."""
        return log_softmax(self.window_logits(ids, first), axis=-1)

    def new_text(self) -> Feed:
        """See `lib.scoring.backend.Backend`."""
        done = 0

        def feed(ids: Sequence[int]) -> np.ndarray:
            nonlocal done
            check_ids([list(ids)], self.vocab_size, self.n_ctx - done, self.name)
            *_, (_, logits) = self._passes(done, ids, len(ids) - 1, self.n_ctx)
            done += len(ids)
            return logits[-1]

        return feed

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            stream.close()  # type: ignore[union-attr]
