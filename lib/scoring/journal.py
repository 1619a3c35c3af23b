"""Scores and answers that are kept as they come: one JSON line each behind a header, so that killed work continues.

The header says what was asked of which model (hashes) and how; another header means another question, and the file
begins anew. Batches are always of the same composition, so only whole batches are taken from an earlier run, and what
follows is computed exactly as if there had been no interruption.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.progress import Progress
from lib.runs.child import peak_memory_mib
from lib.runs.files import read_jsonl, sha256_file, sha256_json

_FORMAT = 2

SCORED = "rows already scored"
"""What a journal of scores holds, in words."""


@dataclass(frozen=True)
class Keep:
    """Where work is kept as it comes, and the hash of the model that does it."""

    path: Path
    model: str

    def part(self, name: str) -> Keep:
        """A file beside it, for other work of the same model."""
        return Keep(self.path.with_name(f"{self.path.stem}-{name}{self.path.suffix}"), self.model)


class Journal:
    """An append-only file of what a model made of prompts, one line a sequence; close it.

    Args:
        path: the file; it is continued, or begun.
        header: what is asked, JSON values; the file is begun anew when another one stands there.
        names: the prompts' ids, for readers of the file.
        unit: what it holds, in words as in "rows already scored".

    Attributes:
        note: why what was there could not be used, in words; empty where nothing was.

    Raises:
        InputError: another process writes this file.
    """

    def __init__(self, path: Path, header: dict[str, Any], names: Sequence[str], unit: str = SCORED) -> None:
        self.path, self.names, self.unit = path, names, unit
        self.note = ""
        self._lines: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise InputError(f"another process writes {path}.", "one at a time.", "wait for its end.") from None
        self._continue({"format": _FORMAT, **header})

    def _continue(self, header: dict[str, Any]) -> None:
        """Read what is there and cut it off at the first damaged line; begin anew under another header."""
        *lines, _ = self.path.read_bytes().split(b"\n")  # what stands behind the last line break was cut off
        found = _parsed(lines[0]) if lines else {}
        self._ends = [len(lines[0]) + 1 if lines else 0]  # of the header, then of each line, bytes
        if found != header:
            self.note = "begun anew: what was kept is of " + _difference(found, header) if found else ""
            os.ftruncate(self._file, 0)
            os.write(self._file, _line(header))
            self._ends = [len(_line(header))]
            return
        for line in lines[1:]:
            value = _parsed(line)
            if value.get("sequence") != len(self._lines) or not _complete(value):
                break
            self._lines.append(value)
            self._ends.append(self._ends[-1] + len(line) + 1)
        os.ftruncate(self._file, self._ends[-1])

    def take(self, first: int, places: Sequence[int], compute: Callable[[], list[Any]]) -> list[Any]:
        """JSON values of the sequences from number `first` on, one for each of `places` (numbers of their prompts).

        Where all of them are there they are not computed again; what is computed is written at once.
        """
        if first + len(places) <= len(self._lines):
            return [line["value"] for line in self._lines[first : first + len(places)]]
        started = time.perf_counter()
        values = compute()
        cost = {"seconds": (time.perf_counter() - started) / len(places), "peak_memory_mib": peak_memory_mib()}
        del self._lines[first:], self._ends[first + 1 :]  # a batch that is there in part
        os.ftruncate(self._file, self._ends[-1])
        self._add(
            {"sequence": number, "row": self.names[place], "value": value, **cost}
            for number, (place, value) in enumerate(zip(places, values, strict=True), start=first)
        )
        return values

    def _add(self, lines: Iterable[dict[str, Any]]) -> None:
        text = b""
        for line in lines:
            text += _line(line)
            self._lines.append(line)
            self._ends.append(self._ends[-1] + len(_line(line)))
        os.write(self._file, text)

    @property
    def rows(self) -> int:
        """Number of different prompts that are there."""
        return len({line["row"] for line in self._lines})

    @property
    def seconds(self) -> float:
        """Time of all that is there, that of earlier runs included."""
        return float(sum(line["seconds"] for line in self._lines))

    def describe(self) -> str:
        """What of the work was found done, in words; empty where nothing was there."""
        return f"{self.rows} {self.unit}" if self.rows else self.note

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)


@dataclass(frozen=True)
class Work:
    """Work on prompts in progress.

    Attributes:
        journal: where it is kept; None where it is not.
        found: what an interrupted run had already done of it, in words; empty for nothing.
    """

    progress: Progress
    journal: Journal | None = None
    found: str = ""
    _before: float = 0.0
    _started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Time of this run and the earlier ones together."""
        return self._before + time.perf_counter() - self._started

    def take(self, first: int, places: Sequence[int], compute: Callable[[], list[Any]]) -> list[Any]:
        """As `Journal.take`; always computed where nothing is kept."""
        return compute() if self.journal is None else self.journal.take(first, places, compute)


@contextlib.contextmanager
def keeping(
    keep: Keep | None,
    what: str,
    unit: str,
    names: Sequence[str],
    prompts: Sequence[list[int]],
    settings: dict[str, Any],
    **asked: Any,
) -> Iterator[Work]:
    """Work on prompts with a progress line that says what was found done.

    Args:
        keep: the file that gets the work as it comes; None = it is not kept.
        what: the work in words.
        unit: of the work, as of `Journal`.
        names: the prompts' ids, in their order.
        settings: of the backend.
        asked: what is asked of every prompt, JSON values: "labels", "spans" or "writing".
    """
    with contextlib.ExitStack() as stack:
        if keep is None:
            yield Work(stack.enter_context(Progress(what, len(prompts))))
            return
        header = {"model": keep.model, "rows": sha256_json(list(names)), "prompts": sha256_json(list(prompts))}
        journal = Journal(keep.path, {**header, **asked, "settings": settings}, names, unit)
        stack.callback(journal.close)
        found = journal.describe()
        words = f"{what} ({found})" if found else what
        progress = stack.enter_context(Progress(words, len(prompts), already=journal.rows))
        yield Work(progress, journal, found, journal.seconds)


def found_done(found: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """For the manifest: by model, what of its work was found done; nothing where nothing was."""
    words = {name: ", ".join(filter(None, parts)) for name, parts in found.items()}
    return {name: text for name, text in words.items() if text}


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


def _parsed(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; empty where it is none."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _complete(line: dict[str, Any]) -> bool:
    """Whether a line has all that is read from it."""
    numbers = all(type(line.get(key)) in (int, float) for key in ("seconds", "peak_memory_mib"))
    return numbers and isinstance(line.get("row"), str) and isinstance(line.get("value"), (list, dict))


_PARTS = {
    "model": "another model",
    "rows": "other rows",
    "prompts": "other prompts",
    "labels": "other labels",
    "spans": "other answers",
    "writing": "another way of writing",
    "settings": "other settings",
    "format": "another version",
}
"""Parts of a header, in words where another one stands there."""


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Which parts of two headers differ, in words."""
    return ", ".join(text for key, text in _PARTS.items() if found.get(key) != wanted.get(key)) or "another file"
