"""Scores and answers that are kept as they come: one JSON line a batch behind a header, so that killed work continues.

The header says what was asked of which model (hashes) and how; another header means another question, and the file
begins anew. Batches are always of the same composition, so those of an earlier run are taken in their order, and what
follows is computed exactly as if there had been no interruption.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lib.errors import InputError
from lib.progress import Progress
from lib.runs.child import peak_memory_mib
from lib.runs.files import read_jsonl, sha256_file, sha256_json

_FORMAT = 3

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


@dataclass
class Work:
    """Work on prompts in progress, kept batch by batch where there is a file.

    Attributes:
        names: the prompts' ids, for readers of the file.
        kept: batches of an earlier run that were not taken yet: "rows", "values", "seconds", "peak_memory_mib".
        file: takes further batches; None where nothing is kept.
        found: what an interrupted run had already done, in words; empty for nothing.
        before: seconds of earlier runs.
    """

    progress: Progress
    names: Sequence[str] = ()
    kept: list[dict[str, Any]] = field(default_factory=list)
    file: IO[bytes] | None = None
    found: str = ""
    before: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Time of this run and the earlier ones together."""
        return self.before + time.perf_counter() - self.started

    def take(self, places: Sequence[int], compute: Callable[[], list[Any]]) -> list[Any]:
        """JSON values of the next batch, one for each of `places` (numbers of their prompts).

        A batch that is there is not computed again; one that is computed is written at once.
        """
        if self.kept:
            return self.kept.pop(0)["values"]
        started = time.perf_counter()
        values = compute()
        if self.file is not None:
            cost = {"seconds": time.perf_counter() - started, "peak_memory_mib": peak_memory_mib()}
            self.file.write(_line({"rows": [self.names[place] for place in places], "values": values, **cost}))
        return values


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
        unit: what the file holds, in words as in "rows already scored".
        names: the prompts' ids, in their order.
        settings: of the backend.
        asked: what is asked of every prompt, JSON values: "labels", "spans" or "writing".

    Raises:
        InputError: another process writes this file.
    """
    if keep is None:
        with Progress(what, len(prompts)) as progress:
            yield Work(progress)
        return
    header = {"model": keep.model, "rows": sha256_json(list(names)), "prompts": sha256_json(list(prompts))}
    keep.path.parent.mkdir(parents=True, exist_ok=True)
    with keep.path.open("a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another process writes {keep.path}.", "one at a time.", "wait for its end.") from None
        kept, note = _continued(file, {"format": _FORMAT, **header, **asked, "settings": settings})
        done = len({row for batch in kept for row in batch["rows"]})
        found = f"{done} {unit}" if done else note
        with Progress(f"{what} ({found})" if found else what, len(prompts), already=done) as progress:
            yield Work(progress, names, kept, file, found, float(sum(batch["seconds"] for batch in kept)))


def _continued(file: IO[bytes], header: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The batches of a file, cut off at the first damaged one, and why what was there cannot be used, in words: under
    another header the file is begun anew."""
    file.seek(0)
    *lines, _ = file.read().split(b"\n")  # what stands behind the last line break was cut off
    found = _parsed(lines[0]) if lines else {}
    if found != header:
        file.truncate(0)
        file.write(_line(header))
        words = ", ".join(text for key, text in _PARTS.items() if found.get(key) != header.get(key)) or "another file"
        return [], f"begun anew: what was kept is of {words}" if found else ""
    kept = list(itertools.takewhile(lambda batch: batch.keys() == _BATCH, map(_parsed, lines[1:])))
    file.truncate(sum(len(line) + 1 for line in lines[: len(kept) + 1]))
    return kept, ""


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


_BATCH = {"rows", "values", "seconds", "peak_memory_mib"}

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
