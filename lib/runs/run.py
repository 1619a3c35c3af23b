"""A run: its folders, its manifest, and the one way in which a stage makes a product.

A stage writes into a temporary sibling, the folder is hashed and renamed, and the manifest entry is added last. A
stage whose entry exists, whose files verify and whose parameters and inputs are unchanged is skipped and says so. One
that was killed between its end and its entry is not made again (`lib.runs.manifest`).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import difflib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lib.errors import InputError
from lib.runs import files
from lib.runs import manifest as runs_manifest
from lib.runs.files import flush_to_disk
from lib.runs.manifest import NOTEBOOK_OF, Entry, Manifest, damage
from lib.runs.resources import PeakMemory


@dataclass(frozen=True)
class Product:
    """A finished product of a run.

    Attributes:
        path: its folder.
        entry: its manifest entry.
        made: False when it was already there and nothing was done.
        message: one sentence for the reader: made in …, or skipped because …
    """

    path: Path
    entry: Entry
    made: bool
    message: str


@dataclass
class ProductDraft:
    """A product while a stage makes it: the builder writes into `folder` and fills in the rest.

    Attributes:
        folder: temporary folder; its content becomes the product.
        resumed: True when the folder holds the remains of an interrupted try with the same parameters and inputs.
        facts, metrics, notes: go to the manifest entry.
        device: where the work ran, e.g. "cpu" or "cuda:0 NVIDIA …".
    """

    folder: Path
    resumed: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    device: str = "cpu"


@dataclass(frozen=True)
class Run:
    """One run: `runs/<name>/` with its products and manifest.json."""

    name: str
    folder: Path

    @property
    def manifest(self) -> Manifest:
        return Manifest(self.folder / "manifest.json")

    def require(self, product: str) -> Product:
        """A finished product that this stage needs.

        Raises:
            InputError: it is absent or damaged; the message names the notebook to run first.
        """
        entry = self.manifest.entries().get(product)
        folder = self.folder / product
        notebook = NOTEBOOK_OF[product]
        if entry is None or not folder.is_dir():
            have = ", ".join(self.manifest.entries()) or "no product"
            raise InputError(
                f"run {self.name!r} holds {have}.",
                f"the product {product!r}.",
                f"run notebooks/{notebook}.ipynb first.",
            )
        if problem := damage(folder, entry):
            raise InputError(
                f"{folder / ''}: {problem}.", "the files of the manifest.", f"run {notebook} again with force: true."
            )
        return Product(folder, entry, False, f"{product}: as made on {entry.finished}.")

    def produce(
        self,
        product: str,
        build: Callable[[ProductDraft], None],
        parameters: Mapping[str, Any],
        inputs: tuple[str, ...] = (),
        force: bool = False,
        keep_partial: bool = False,
    ) -> Product:
        """Make `product` with `build`, or skip it when nothing changed.

        Args:
            build: writes files into `draft.folder` and fills in `draft.facts`, `.metrics`, `.notes`.
            parameters: the settings the product depends on (JSON values); a change redoes the stage.
            inputs: products it is made from; a change of their files redoes the stage.
            force: redo even if nothing changed.
            keep_partial: after an interruption keep the temporary folder, so that the next try with the same
                parameters and inputs finds it (`draft.resumed`). For builders that resume safely.

        Raises:
            InputError: a missing input, an unwritable folder, or a second process working on this run.
        """
        files.writable(self.folder)
        with self._lock():
            digests = {name: self.require(name).entry.digest for name in inputs}
            wanted = {"parameters": dict(parameters), "inputs": digests}
            reason = self._reason(product, wanted, force)
            if reason is None:
                return self._unchanged(product)
            temporary = self._remains(product)
            found = None if force else runs_manifest.finished(temporary, wanted)
            if found is not None:
                reason = "an interrupted try had finished it"
            else:
                found = self._make(temporary, build, wanted, keep_partial)
            entry = Entry(product=product, outputs=runs_manifest.outputs(temporary), **wanted, **found)
            self._publish(temporary, self.folder / product, entry)
            made = f"{product}: made in {entry.seconds:.0f} s, {entry.peak_memory_mib:.0f} MiB at most ({reason})."
            return Product(self.folder / product, entry, True, made)

    def stamps(self) -> list[str]:
        """What every page of this run must say: sample data, offline base, fallbacks; in order, each once."""
        notes = [note for entry in self.manifest.entries().values() for note in entry.notes]
        return list(dict.fromkeys(notes))

    def _reason(self, product: str, wanted: dict[str, Any], force: bool) -> str | None:
        """Why the product has to be made, in words; None when it can be skipped."""
        entry = self.manifest.entries().get(product)
        if entry is None:
            return "first time"
        if force:
            return "force: true"
        keys = sorted(set(entry.parameters) | set(wanted["parameters"]))
        changed = [k for k in keys if entry.parameters.get(k) != wanted["parameters"].get(k)]
        if changed:
            was = ", ".join(f"{k}: {entry.parameters.get(k)!r} → {wanted['parameters'].get(k)!r}" for k in changed)
            return f"parameters changed: {was}"
        stale = [name for name, digest in wanted["inputs"].items() if entry.inputs.get(name) != digest]
        if stale:
            return f"made from another {' and '.join(stale)}"
        problem = damage(self.folder / product, entry)
        return f"damaged: {problem}" if problem else None

    def _unchanged(self, product: str) -> Product:
        _tidy(self.folder / product)
        entry = self.manifest.entries()[product]
        text = f"{product}: already made on {entry.finished} with these parameters; nothing to do."
        return Product(self.folder / product, entry, False, text)

    def _remains(self, product: str) -> Path:
        """The temporary folder of a product, with what an interrupted try left of it (it need not exist)."""
        temporary = self.folder / f".{product}.part"
        if product not in self.manifest.entries():
            runs_manifest.take_back(self.folder / product, temporary)
        return temporary

    def _make(
        self, temporary: Path, build: Callable[[ProductDraft], None], wanted: dict, keep_partial: bool
    ) -> dict[str, Any]:
        """Build into the temporary folder; returns what the manifest entry says beside files, parameters and inputs."""
        resumed = keep_partial and runs_manifest.asked(temporary, wanted)
        if not resumed:
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(exist_ok=True)
        runs_manifest.begin(temporary, wanted)
        draft = ProductDraft(folder=temporary, resumed=resumed)
        started = time.monotonic()
        try:
            with PeakMemory() as memory:
                build(draft)
        except BaseException:
            if not keep_partial:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        facts = {
            "facts": draft.facts,
            "metrics": draft.metrics,
            "notes": draft.notes,
            "finished": dt.datetime.now().astimezone().isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - started, 2),
            "peak_memory_mib": round(memory.bytes / 2**20, 1),
            "device": draft.device,
            "versions": runs_manifest.versions(),
            "git": runs_manifest.commit(),
        }
        runs_manifest.finish(temporary, facts)
        return facts

    def _publish(self, temporary: Path, final: Path, entry: Entry) -> None:
        """Replace the old product: entry out, folder swapped, entry in; a kill in between leaves no half product."""
        self.manifest.remove(self.name, entry.product)
        old = _old(final)
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        flush_to_disk(self.folder)
        self.manifest.add(self.name, entry)
        _tidy(final)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise InputError(
                f"another process works on run {self.name!r}.",
                "one at a time.",
                "wait for it, or use another run_name.",
            ) from None
        try:
            yield
        finally:
            lock.release()


def _tidy(final: Path) -> None:
    """Remove what is of no use once the entry is there."""
    runs_manifest.forget(final)
    shutil.rmtree(_old(final), ignore_errors=True)


def _old(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def open_run(name: str) -> Run:
    """The run of that name under runs/ (created when its first product is made)."""
    return Run(name, files.runs_folder() / name)


def known_run(name: str) -> Run:
    """A run that has a manifest.

    Raises:
        InputError: there is none of that name (those that there are, and the nearest, are named).
    """
    there = sorted(path.parent.name for path in files.runs_folder().glob("*/manifest.json"))
    if name not in there:
        near = difflib.get_close_matches(name, there, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"no run {name!r}.", f"one of: {', '.join(there) or 'none yet'}.", f"{hint}Check the name.")
    return open_run(name)
