"""Scores that are kept as they come: one JSON line a sequence behind a header, so that a killed evaluation continues.

The header says what was asked of which model (hashes) and how; another header means another question, and the file
begins anew. Batches are always of the same composition, so only whole batches are taken from an earlier try, and what
follows is computed exactly as if there had been no interruption.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError
from lib.run.child import peak_memory_mib
from lib.run.files import read_jsonl, sha256_file, sha256_json

if TYPE_CHECKING:
    from lib.scoring.backend import Backend, Job

_FORMAT = 1


class Journal:
    """An append-only file of scores; use as a context manager.

    Args:
        path: the file; it is continued, or begun.
        header: what is scored, JSON values; the file is begun anew when another one stands there.
        names: the prompts' ids, for readers of the file.

    Attributes:
        note: how the file was found, in words; empty for a new one.
        restarted: whether scores were there that belong to another question.

    Raises:
        InputError: another process writes this file.
    """

    def __init__(self, path: Path, header: dict[str, Any], names: Sequence[str]) -> None:
        self.path, self.names = path, names
        self.note, self.restarted = "", False
        self._lines: list[dict[str, Any]] = []
        self._ends: list[int] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise InputError(f"another process writes {path}.", "one at a time.", "wait for its end.") from None
        self._continue({"format": _FORMAT, **header})

    def _continue(self, header: dict[str, Any]) -> None:
        """Read what is there up to the first line that is damaged; begin anew under another header."""
        *lines, _ = self.path.read_bytes().split(b"\n")  # what stands behind the last line break was cut off
        end = len(lines[0]) + 1 if lines else 0
        found = _parsed(lines[0]) if lines else None
        if found != header:
            self.restarted = found is not None
            self.note = "scored anew: the kept scores are of " + _difference(found, header) if found else ""
            os.ftruncate(self._file, 0)
            os.write(self._file, _line(header))
            self._start = len(_line(header))
            return
        self._start = end
        for line in lines[1:]:
            value = _parsed(line)
            if value is None or value.get("sequence") != len(self._lines):
                break
            end += len(line) + 1
            self._lines.append(value)
            self._ends.append(end)

    def known(self, first: int, count: int) -> list[np.ndarray] | None:
        """The values of `count` sequences from number `first` on, if all of them are there."""
        if first + count > len(self._lines):
            return None
        return [np.array(line["log_probs"], dtype=np.float64) for line in self._lines[first : first + count]]

    def add(self, first: int, batch: Sequence[Job], values: Sequence[np.ndarray], seconds: float) -> None:
        """Write the values of one batch, whose first sequence has the number `first`."""
        del self._lines[first:], self._ends[first:]
        os.ftruncate(self._file, self._ends[-1] if self._ends else self._start)
        peak, text = peak_memory_mib(), b""
        end = os.fstat(self._file).st_size
        for number, (job, value) in enumerate(zip(batch, values, strict=True), start=first):
            line = {"sequence": number, "row": self.names[job.prompt], "log_probs": value.tolist()}
            line |= {"seconds": seconds / len(batch), "peak_memory_mib": peak}
            text += _line(line)
            self._lines.append(line)
            self._ends.append(end + len(text))
        os.write(self._file, text)

    @property
    def rows(self) -> int:
        """Number of different prompts that have scores."""
        return len({line["row"] for line in self._lines})

    @property
    def seconds(self) -> float:
        """Time of all forward passes, also of earlier tries."""
        return float(sum(line["seconds"] for line in self._lines))

    def describe(self) -> str:
        """What of the work was found done, in words; empty where nothing was there."""
        return f"{self.rows} rows already scored" if self.rows else self.note

    def close(self) -> None:
        """Give the file free."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def open_journal(
    path: Path,
    model: str,
    backend: Backend,
    names: Sequence[str],
    prompts: Sequence[list[int]],
    answers: list[list[int]],
) -> Journal:
    """The journal of one model on some prompts.

    Args:
        model: hash of everything that the model is made of.
        names: the rows' ids, in the prompts' order.
    """
    header = {
        "model": model,
        "rows": sha256_json(list(names)),
        "prompts": sha256_json(list(prompts)),
        "labels": answers,
        "settings": backend.settings,
    }
    return Journal(path, header, names)


def journal_path(folder: Path, model: str | Path) -> Path:
    """The journal of a model in a folder of journals: one for each path or id, whatever else is scored beside it."""
    return folder / f"{sha256_json(str(model))[:16]}.jsonl"


def kept_peak_memory_mib(path: Path) -> float:
    """Largest resident memory of the processes that computed the scores of a journal, MiB."""
    return max((float(line.get("peak_memory_mib", 0)) for line in read_jsonl(path)), default=0.0)


def model_hash(*paths: Path) -> str:
    """SHA-256 over the contents and names of files, and of all files in folders (links followed)."""
    found = {}
    for number, path in enumerate(paths):
        inside = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        found |= {f"{number}/{p.relative_to(path).as_posix()}": sha256_file(p) for p in inside}
    return sha256_json(found)


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, UnicodeDecodeError):
        return None
    return value if isinstance(value, dict) else None


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Which parts of two headers differ, in words."""
    names = {"model": "another model", "rows": "other rows", "prompts": "other prompts", "labels": "other labels"}
    names |= {"settings": "other settings", "format": "another version"}
    return ", ".join(text for key, text in names.items() if found.get(key) != wanted.get(key)) or "another file"
