"""What every backend does: which positions answer the question, and scores that are kept as they come.

An answer of m tokens needs the next-token distribution at m positions: after the prompt, and after each of its tokens
but the last. Answers that share those inputs share the forward pass, so single-token answers cost one pass a prompt.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from lib.errors import InputError, refusal
from lib.progress import Progress, say
from lib.runs.child import peak_memory_mib
from lib.runs.files import data_file, read_jsonl, sha256_file, sha256_json
from lib.runs.locks import writing_alone

# Scores and answers that are kept as they come: one JSON line a batch behind a header, so that killed work continues.
#
# The header says what was asked of which model (hashes) and how; another header means another question, and the file
# begins anew. Batches are always of the same composition, so those of an earlier run are taken in their order, and what
# follows is computed exactly as if there had been no interruption.

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
        kept: batches of an earlier run that were not taken yet: "rows", "values", "seconds", "peak_memory_mib", "place"
            (their first byte in the file).
        file: takes further batches; None where nothing is kept.
        found: what an interrupted run had already done, in words; empty for nothing.
        before: seconds of earlier runs.
        peak: gives the largest resident memory of what computes, MiB.
    """

    progress: Progress
    names: Sequence[str] = ()
    kept: list[dict[str, Any]] = field(default_factory=list)
    file: IO[bytes] | None = None
    found: str = ""
    before: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    peak: Callable[[], float] = peak_memory_mib

    @property
    def seconds(self) -> float:
        """Time of this run and the earlier ones together."""
        return self.before + time.perf_counter() - self.started

    def take(
        self, places: Sequence[int], compute: Callable[[], list[Any]], fits: Callable[[int, Any], bool]
    ) -> list[Any]:
        """JSON values of the next batch, one for each of `places` (numbers of their prompts).

        A batch that is there is not computed again, unless it is of other rows, or `fits` (number and value) says that
        a value is none: with it all behind it are dropped. One that is computed is written at once.
        """
        names = [self.names[place] for place in places] if self.names else []
        if self.kept:
            batch = self.kept.pop(0)
            values = batch["values"]
            alike = batch["rows"] == names and isinstance(values, list) and len(values) == len(names)
            if alike and all(itertools.starmap(fits, enumerate(values))):
                return values
            self.kept.clear()
            self.file.truncate(batch["place"])  # type: ignore[union-attr]
        started = time.perf_counter()
        values = compute()
        if self.file is not None:
            cost = {"seconds": time.perf_counter() - started, "peak_memory_mib": self.peak()}
            _append(self.file, {"rows": names, "values": values, **cost})
        return values


@contextlib.contextmanager
def keeping(
    keep: Keep | None,
    what: str,
    unit: str,
    names: Sequence[str],
    prompts: Sequence[list[int]],
    settings: dict[str, Any],
    peak: Callable[[], float] = peak_memory_mib,
    **asked: Any,
) -> Iterator[Work]:
    """Work on prompts with a progress line that says what was found done.

    Args:
        keep: the file that gets the work as it comes; None = it is not kept.
        what: the work in words.
        unit: what the file holds, in words as in "rows already scored".
        names: the prompts' ids, in their order.
        settings, peak: of the backend: its settings, and what gives the largest resident memory, MiB.
        asked: what is asked of every prompt, JSON values: "labels", "spans" or "writing".

    Raises:
        InputError: another process writes this file.
    """
    if keep is None:
        with Progress(what, len(prompts)) as progress:
            yield Work(progress, peak=peak)
        return
    header = {"model": keep.model, "rows": sha256_json(list(names)), "prompts": sha256_json(list(prompts))}
    keep.path.parent.mkdir(parents=True, exist_ok=True)
    with keep.path.open("a+b", buffering=0) as file, writing_alone(file, keep.path):
        kept, note = _continued(file, {"format": _FORMAT, **header, **asked, "settings": settings})
        done = len({row for batch in kept for row in batch["rows"]})
        found = f"{done} {unit}" if done else note
        if found:
            say(f"{what} ({found})")
        with Progress(what, len(prompts), already=done) as progress:
            before = float(sum(batch["seconds"] for batch in kept))
            yield Work(progress, names, kept, file, found, before, peak=peak)


def _continued(file: IO[bytes], header: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The batches of a file, cut off at the first damaged one, and why what was there cannot be used, in words: under
    another header the file is begun anew."""
    file.seek(0)
    *lines, _ = file.read().split(b"\n")  # what stands behind the last line break was cut off
    found = _parsed(lines[0]) if lines else {}
    if found != header:
        file.truncate(0)
        _append(file, header)
        words = ", ".join(text for key, text in _PARTS.items() if found.get(key) != header.get(key)) or "another file"
        return [], f"begun anew: what was kept is of {words}" if found else ""
    kept = list(itertools.takewhile(lambda batch: batch.keys() == _BATCH, map(_parsed, lines[1:])))
    *places, end = itertools.accumulate(len(line) + 1 for line in lines[: len(kept) + 1])
    file.truncate(end)
    return [batch | {"place": place} for batch, place in zip(kept, places, strict=True)], ""


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


def _append(file: IO[bytes], value: dict[str, Any]) -> None:
    """One line; a disk that is nearly full takes a part of it, and refuses the rest."""
    line = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
    while line:
        line = line[file.write(line) :]


def _parsed(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; empty where it is none."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


_BATCH = {"rows", "values", "seconds", "peak_memory_mib"}

_PARTS: dict[str, str] = data_file("scoring/parts.yaml")
"""Parts of a header, in words where another one stands there."""


@dataclass(frozen=True)
class Job:
    """One sequence to run and what to read from it.

    Attributes:
        prompt: index of the prompt.
        ids: prompt and the shared inputs of the answers.
        start: first position whose distribution is read.
        reads: (answer, position in `ids`, token) of every log-probability wanted.
    """

    prompt: int
    ids: list[int]
    start: int
    reads: tuple[tuple[int, int, int], ...]


Feed = Callable[[Sequence[int]], np.ndarray]
"""Takes further token ids of one text and gives the logits behind the last, (V,)."""

Run = Callable[[Sequence[Job]], list[np.ndarray]]
"""Computes one batch: the read log-probabilities of each job."""


class Backend(ABC):
    """A loaded model that gives log-probabilities. Batches that stand in a journal are taken from it.

    Attributes:
        name: what is being run, in words.
        device: where, in words.
        vocab_size: number of logits a position.
        n_ctx: most tokens of a sequence; None = any.
        most_answer: most tokens of an answer; None = any.
        note: what was done otherwise than usual, in words; empty when nothing was.
        settings: what beside the model changes the rounding of the numbers, JSON values.
        load_seconds: of the model alone, where a process is started besides; None = as long as it took.
    """

    name: str
    device: str
    vocab_size: int
    n_ctx: int | None = None
    most_answer: int | None = None
    note = ""
    settings: dict[str, Any]
    load_seconds: float | None = None

    @abstractmethod
    def window_logits(self, ids: list[int], first: int = 0) -> np.ndarray:
        """Raw logits of the next token after each position of `ids` from `first` on, float32, (T - first, V)."""

    @abstractmethod
    def window_log_probs(self, ids: list[int], first: int = 0) -> np.ndarray:
        """The same as log-softmax."""

    @abstractmethod
    def new_text(self) -> Feed:
        """Takes the token ids of a new text, piece by piece, which is kept in a key-value cache; whatever another one
        held may be forgotten."""

    @abstractmethod
    def close(self) -> None:
        """Free the model's memory; the backend cannot be used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def peak_memory_mib(self) -> float:
        """Largest resident memory of the process that computes, MiB."""
        return peak_memory_mib()

    @abstractmethod
    def _plan(self, jobs: Sequence[Job], alike: bool) -> tuple[Iterable[Sequence[Job]], Run]:
        """Jobs in order (shortest first) cut into batches, and what gives the reads of each job of a batch.

        Args:
            alike: prompts that begin alike, so that their beginning is computed once; else whole conversations.
        """

    def label_log_probs(
        self, prompts: Sequence[list[int]], answers: list[list[int]], work: Work | None = None
    ) -> np.ndarray:
        """log p(answer | prompt), nats, float64, shape (prompts, answers)."""
        jobs = make_jobs(prompts, answers)
        self.check_ids([job.ids for job in jobs])
        check_ids(answers, self.vocab_size, self.most_answer, self.name)
        values = _run_batches(*self._plan(jobs, alike=True), len(prompts) / len(jobs), work)
        total = np.zeros((len(prompts), len(answers)), dtype=np.float64)
        for job, read in zip(jobs, values, strict=True):
            for (answer, _, _), value in zip(job.reads, read, strict=True):
                total[job.prompt, answer] += float(value)
        return total

    def token_log_probs(
        self, rows: Sequence[list[int]], spans: Sequence[Sequence[Sequence[int]]], work: Work | None = None
    ) -> list[np.ndarray]:
        """log p of every token inside the spans, given all tokens before it; one vector a row, nats, float64."""
        check_ids(rows, self.vocab_size, None, self.name)
        jobs = []
        for i, (ids, row_spans) in enumerate(zip(rows, spans, strict=True)):
            places = [place for start, stop in row_spans for place in range(start, stop)]
            reads = tuple((0, place - 1, ids[place]) for place in places)
            jobs.append(Job(i, list(ids[: places[-1]]), places[0] - 1, reads))
        jobs.sort(key=lambda job: len(job.ids))  # each is run whole, so shortest first is cheapest
        self.check_ids([job.ids for job in jobs])
        values = _run_batches(*self._plan(jobs, alike=False), 1.0, work)
        by_row = {job.prompt: value for job, value in zip(jobs, values, strict=True)}
        return [by_row[i] for i in range(len(jobs))]

    def check_ids(self, sequences: Sequence[Sequence[int]]) -> None:
        """Refuse what the model cannot read."""
        check_ids(sequences, self.vocab_size, self.n_ctx, self.name)


def make_jobs(prompts: Sequence[list[int]], answers: list[list[int]]) -> list[Job]:
    """The fewest sequences that give all answers of all prompts, shortest first, then in the prompts' order."""
    inputs = {tuple(answer[:-1]) for answer in answers}
    tails = sorted(t for t in inputs if not any(len(o) > len(t) and o[: len(t)] == t for o in inputs))
    owners = [next(i for i, t in enumerate(tails) if t[: len(a) - 1] == tuple(a[:-1])) for a in answers]
    jobs = []
    for p, prompt in enumerate(prompts):
        start = len(prompt) - 1
        for i, tail in enumerate(tails):
            mine = [a for a, owner in enumerate(owners) if owner == i]
            reads = tuple((a, start + k, token) for a in mine for k, token in enumerate(answers[a]))
            jobs.append(Job(p, [*prompt, *tail], start, reads))
    return sorted(jobs, key=lambda job: len(job.ids))


def common_prefix(jobs: Sequence[Job]) -> list[int]:
    """The ids that all sequences begin with, none of them one whose distribution is read."""
    first, last = min(job.ids for job in jobs), max(job.ids for job in jobs)
    most = min(job.start for job in jobs)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: min(same, most)]


def grouped(jobs: Sequence[Job], full: Callable[[list[Job], Job], bool]) -> Iterator[list[Job]]:
    """Jobs in order, cut into batches.

    Args:
        full: whether a batch has no room for the next job; a batch always takes its first.
    """
    batch: list[Job] = []
    for job in jobs:
        if batch and full(batch, job):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def cut(widths: Sequence[int], most: int, overhead: float) -> list[int]:
    """Sizes of the batches of least cost when sequences, shortest first, are padded to the longest of their batch.

    Args:
        widths: tokens of each sequence, ascending.
        most: largest batch.
        overhead: cost of a batch beside its padded tokens, in tokens.
    """
    cost, start = [0.0], [0]
    for end in range(1, len(widths) + 1):
        choices = range(max(0, end - most), end)
        best = min(choices, key=lambda first: cost[first] + (end - first) * widths[end - 1])
        start.append(best)
        cost.append(cost[best] + overhead + (end - best) * widths[end - 1])
    sizes, end = [], len(widths)
    while end:
        sizes.append(end - start[end])
        end = start[end]
    return sizes[::-1]


def _run_batches(batches: Iterable[Sequence[Job]], run: Run, share: float, work: Work | None) -> list[np.ndarray]:
    """The read log-probabilities of every job, batch by batch; those in the journal are not computed again.

    Args:
        share: prompts a job, for the progress: less than 1 where a prompt takes several sequences.
    """
    values: list[np.ndarray] = []
    for batch in batches:
        if work is None:
            values += run(batch)
            continue
        found = work.take(
            [job.prompt for job in batch],
            lambda batch=batch: [value.tolist() for value in run(batch)],
            lambda number, value, batch=batch: _are_log_probs(value, len(batch[number].reads)),
        )
        values += [np.array(value, dtype=np.float64) for value in found]
        if (more := round(share * len(values)) - work.progress.done) > 0:
            work.progress.advance(more)
    return values


def _are_log_probs(value: Any, count: int) -> bool:
    """Whether a value of a journal is so many log-probabilities; rounding may end a hair above 0."""
    numbers = isinstance(value, list) and len(value) == count and all(type(number) is float for number in value)
    return numbers and all(-math.inf < number < 1e-3 for number in value)


def check_ids(sequences: Sequence[Sequence[int]], vocab_size: int, longest: int | None, name: str) -> None:
    """Refuse what a model cannot read: an empty sequence, an id outside the vocabulary, more tokens than `longest`."""
    for ids in sequences:
        if len(ids) == 0:
            raise InputError("a prompt without tokens.", "at least one token.", "check user_prompt and the text.")
        low, high = min(ids), max(ids)
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise refusal("scoring/unknown-id", bad=bad, name=name, vocab_size=vocab_size)
        if longest is not None and len(ids) > longest:
            raise refusal("scoring/too-long", count=len(ids), name=name, longest=longest)
