"""A runtime in a process of its own, the child's side: token ids come in, logits go out.

The parent is `lib.scoring.process_backend`. It writes one line of JSON a request; the child answers with one line of
JSON, and where that has "rows", with so many rows of `vocab_size` logits behind it, float32 in the machine's order:

    child, unasked:  {"vocab_size", "context_length", "versions", "load_seconds", "confined"}
    {"keep": n, "ids": […], "first": k, "most": m}
                     the text is cut back to its first n tokens and goes on with the ids (a text of at most m tokens):
                     {"rows": len(ids) - k} and the logits behind each of its further tokens from the k-th on
    {"texts": […]}   {"ids": [[…], …]}: what the folder's own tokenizer makes of them, for runtimes that bring one

{"error": words} stands where a request or loading failed. Every answer has "peak_memory_mib". A runtime is a module of
this folder with `load(folder, n_threads, info)`: it gives a `Runtime`. It is imported by the environment that its
packages are in, which needs NumPy, PyYAML and filelock beside them: nothing else of this project may be imported.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from lib.errors import in_words
from lib.runs.child import die_with_parent, peak_memory_mib
from lib.runs.confinement import confine

_ROOM, _SECONDS = 16 << 30, 7 * 24 * 3600
"""Address space beside four times the folder's size, and seconds of computing that a runtime may take."""


class Runtime(Protocol):
    """A loaded model that keeps one text.

    Attributes:
        versions: of the packages that compute.
    """

    versions: dict[str, str]

    def forward(self, keep: int, ids: Sequence[int], first: int, most: int) -> np.ndarray:
        """See the module: (len(ids) - first, V), any float type."""

    def encode(self, text: str) -> list[int]:
        """Token ids of the folder's own tokenizer; a runtime without one has no such method."""


def serve(runtime: Runtime, vocab_size: int, requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until the parent closes them."""
    for line in requests:
        request, rows = json.loads(line), None
        try:
            if "texts" in request:
                answer: dict[str, Any] = {"ids": [runtime.encode(text) for text in request["texts"]]}
            else:
                asked = (request["keep"], request["ids"], request["first"], request["most"])
                rows = np.ascontiguousarray(runtime.forward(*asked), dtype=np.float32)
                if rows.ndim != 2 or rows.shape != (len(asked[1]) - asked[2], vocab_size):
                    raise ValueError(f"logits of shape {rows.shape} where {len(asked[1]) - asked[2]} rows were asked")
                answer = {"rows": len(rows)}
        except Exception as error:
            answer, rows = {"error": in_words(error)}, None
        _say(answers, answer)
        if rows is not None:
            answers.write(rows.data)
        answers.flush()


def _say(answers: BinaryIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps({**answer, "peak_memory_mib": peak_memory_mib()}).encode() + b"\n")
    answers.flush()


def _main(name: str, folder: Path, n_threads: int, info: dict[str, Any]) -> None:
    die_with_parent(os.getppid())
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not stand between the answers
    try:
        module = importlib.import_module(f"lib.scoring.runtimes.{name}")
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        confined = confine([], 4 * size + _ROOM, _SECONDS)
        started = time.perf_counter()
        runtime = module.load(folder, n_threads, info)
        told = {"versions": runtime.versions, "load_seconds": time.perf_counter() - started, "confined": confined}
    except Exception as error:
        _say(answers, {"error": in_words(error)})
    else:
        _say(answers, {**info, **told})
        serve(runtime, info["vocab_size"], sys.stdin.buffer, answers)
    os._exit(0)  # some runtimes end with a fault where Python takes them down


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
