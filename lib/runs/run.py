"""A run: its folders, its manifest, and the one way in which a stage makes a product.

A stage writes into a temporary sibling, the folder is hashed and renamed, and the manifest entry is added last. A
stage whose entry exists, whose files verify and whose parameters and inputs are unchanged is skipped and says so. One
that was killed between its end and its entry is not made again (`lib.runs.manifest`).
"""

from __future__ import annotations

import datetime as dt
import difflib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.errors import InputError, refusal
from lib.progress import say
from lib.runs import files
from lib.runs import manifest as runs_manifest
from lib.runs.files import flush_to_disk, read_json, write_json
from lib.runs.locks import locked
from lib.runs.machine import peak_memory
from lib.runs.manifest import NOTE, NOTEBOOK_OF, Entry, Manifest, damage
from lib.settings import FULL, UNTRAINED


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
        resumed: True when the folder holds the remains of an interrupted attempt with the same parameters and inputs.
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
    """One run: `runs/<name>/` with its products and manifest.json.

    With cross-validated data (setting `folds`) it is the first fold; each other one is a run inside its folder, with
    products of its own.
    """

    name: str
    folder: Path
    fold: int = 1

    @property
    def manifest(self) -> Manifest:
        return Manifest(self.folder / "manifest.json")

    def other_folds(self) -> list[Run]:
        """The runs of the other folds of cross-validated data; none where the rows are divided once."""
        data = self.manifest.entries().get("data")
        count = data.facts.get("folds", 1) if data and self.fold == 1 else 1
        return [Run(f"{self.name}, fold {i}", self.folder / f"fold-{i}", i) for i in range(2, count + 1)]

    def on_other_folds(self, stage: Callable[[Any, Run], Any], settings: Any) -> None:
        """Do a stage on every other fold, where there are any."""
        others = self.other_folds()
        for other in others:
            say(f"{stage.__name__}: fold {other.fold} of {len(others) + 1}")
            stage(settings, other)

    @property
    def untrained(self) -> bool:
        """Whether the base model goes through the run as it is: 02 has neither trained nor adopted anything."""
        adapter = self.manifest.entries().get("adapter")
        return adapter is not None and adapter.facts.get("method") == UNTRAINED

    @property
    def whole(self) -> bool:
        """Whether every weight was trained: the product `adapter` is then a model folder."""
        adapter = self.manifest.entries().get("adapter")
        return adapter is not None and adapter.facts.get("method") == FULL

    def adapter(self) -> Product:
        """The adapter of the run, or the model that stands in its place (`whole`).

        Raises:
            InputError: it has none, because nothing was trained; or as `require`.
        """
        if self.untrained:
            raise refusal("runs/untrained", name=self.name)
        return self.require("adapter")

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
            raise refusal("runs/product-absent", name=self.name, have=have, product=product, notebook=notebook)
        if problem := damage(folder, entry):
            raise refusal("runs/product-damaged", folder=folder / "", problem=problem, notebook=notebook)
        return Product(folder, entry, False, f"{product}: as made on {entry.finished}.")

    def outdated(self, product: str) -> tuple[str, str] | None:
        """A product that this one comes from, or it itself, and an input of it that is another now; None: all hold."""
        entries = self.manifest.entries()
        for name in entries[product].inputs.keys() & entries.keys() - {"exports"}:  # no GGUF file rests on them
            if entries[product].inputs[name] != entries[name].digest:
                return product, name
            if older := self.outdated(name):
                return older
        return None

    def require_current(self, product: str) -> Product:
        """A finished product that was made from what the run holds now.

        Raises:
            InputError: as `require`, or it was made from other products.
        """
        found, older = self.require(product), self.outdated(product)
        if older:
            notebook = NOTEBOOK_OF[older[0]]
            raise refusal("runs/product-outdated", older=older, name=self.name, notebook=notebook)
        return found

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
            keep_partial: after an interruption keep the temporary folder, so that the next attempt with the
                same parameters and inputs finds it (`draft.resumed`). For builders that can resume safely.

        Raises:
            InputError: a missing input, an unwritable folder, or a second process working on this run.
        """
        files.writable(self.folder)
        busy = f"another process works on run {self.name!r}."
        alone = locked(self.folder / ".lock", busy, "one at a time.", "wait for it, or use another run_name.")
        with files.writing(self.folder), alone:
            wanted = self._wanted(parameters, inputs)
            final, former = self.folder / product, self.manifest.entries().get(product)
            reason = "first time" if former is None else _reason(final, former, wanted, force)
            if former is not None and reason is None:
                _tidy(final)
                text = f"{product}: already made on {former.finished} with these parameters; nothing to do."
                return Product(final, former, False, text)
            temporary = self.folder / f".{product}.part"  # may hold what an interrupted attempt left
            if former is None and (final / NOTE).is_file():  # renamed, but its entry was never added
                shutil.rmtree(temporary, ignore_errors=True)
                final.rename(temporary)
            found = None if force else runs_manifest.finished(temporary, wanted)
            if found is not None:
                reason = "an interrupted try had finished it"
            else:
                found = _make(temporary, build, wanted, keep_partial)
            entry = Entry(product=product, outputs=runs_manifest.hash_folder(temporary), **wanted, **found)
            self._publish(temporary, final, entry)
            made = f"{product}: made in {entry.seconds:.0f} s, {entry.peak_memory_mib:.0f} MiB at most ({reason})."
            return Product(final, entry, True, made)

    def produce_json(
        self,
        product: str,
        content: Callable[[ProductDraft], dict[str, Any]],
        parameters: Mapping[str, Any],
        inputs: tuple[str, ...] = (),
        force: bool = False,
    ) -> tuple[Product, dict[str, Any]]:
        """A product with the file <product>.json, and what stands in it; arguments as of `produce`."""
        name = f"{product}.json"
        made = self.produce(
            product, lambda draft: write_json(draft.folder / name, content(draft)), parameters, inputs, force
        )
        return made, read_json(made.path / name)

    def is_current(self, product: str, parameters: Mapping[str, Any], inputs: tuple[str, ...]) -> bool:
        """Whether `produce` would find nothing to do.

        Raises:
            InputError: a missing input.
        """
        entry, wanted = self.manifest.entries().get(product), self._wanted(parameters, inputs)
        return entry is not None and _reason(self.folder / product, entry, wanted, force=False) is None

    def _wanted(self, parameters: Mapping[str, Any], inputs: tuple[str, ...]) -> dict[str, Any]:
        """What a product is asked for: its parameters, and the digests of the products that it is made from."""
        return {"parameters": dict(parameters), "inputs": {name: self.require(name).entry.digest for name in inputs}}

    def earlier(self, draft: ProductDraft, product: str, *inputs: str) -> list[Path]:
        """Folders with finished parts that a builder may take over: its own after an interruption, and the former
        product's if it was made from the same `inputs`."""
        former = self.manifest.entries().get(product)
        same = former and all(former.inputs.get(name) == self.require(name).entry.digest for name in inputs)
        return [*([draft.folder] if draft.resumed else []), *([self.folder / product] if same else [])]

    def stamps(self) -> list[str]:
        """What every page of this run must say: sample data, offline base, fallbacks; in order, each once."""
        notes = [note for entry in self.manifest.entries().values() for note in entry.notes]
        return list(dict.fromkeys(notes))

    def _publish(self, temporary: Path, final: Path, entry: Entry) -> None:
        """Remove the old entry, swap the folders, add the new entry: no kill leaves half a product."""
        self.manifest.remove(self.name, entry.product)
        old = _old(final)
        if old.exists():
            shutil.rmtree(old)
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        flush_to_disk(self.folder)
        self.manifest.add(self.name, entry)
        _tidy(final)


def _reason(final: Path, entry: Entry, wanted: dict[str, Any], force: bool) -> str | None:
    """Why a product has to be made again, in words; None when it can be skipped."""
    if force:
        return "force: true"
    before, now = entry.parameters, wanted["parameters"]
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changed:
        return f"parameters changed: {', '.join(f'{k}: {before.get(k)!r} → {now.get(k)!r}' for k in changed)}"
    stale = [name for name, digest in wanted["inputs"].items() if entry.inputs.get(name) != digest]
    if stale:
        return f"made from another {' and '.join(stale)}"
    problem = damage(final, entry)
    return f"damaged: {problem}" if problem else None


def _make(
    temporary: Path, build: Callable[[ProductDraft], None], wanted: dict[str, Any], keep_partial: bool
) -> dict[str, Any]:
    """Build into the temporary folder; returns what the manifest entry says beside files, parameters and inputs."""
    resumed = keep_partial and runs_manifest.note(temporary).get("wanted") == wanted
    if not resumed:
        shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(exist_ok=True)
    write_json(temporary / NOTE, {"wanted": wanted})
    draft = ProductDraft(folder=temporary, resumed=resumed)
    started = time.monotonic()
    try:
        with peak_memory() as memory:
            build(draft)
    except BaseException:
        if not keep_partial:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    facts = {
        **{name: getattr(draft, name) for name in ("facts", "metrics", "notes", "device")},
        "finished": dt.datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 2),
        "peak_memory_mib": round(memory.bytes / 2**20, 1),
        "versions": runs_manifest.versions(),
        "git": runs_manifest.commit(),
    }
    runs_manifest.finish(temporary, wanted, facts)
    return facts


def _tidy(final: Path) -> None:
    """Remove what is no longer needed once the entry is there."""
    (final / NOTE).unlink(missing_ok=True)
    shutil.rmtree(_old(final), ignore_errors=True)


def _old(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def open_run(name: str) -> Run:
    """The run of that name under runs/ (created when its first product is made)."""
    return Run(name, files.runs_folder() / name)


def known_run(name: str) -> Run:
    """A run that has a manifest.

    Raises:
        InputError: there is none of that name; the message lists those there are, and the nearest.
    """
    there = sorted(path.parent.name for path in files.runs_folder().glob("*/manifest.json"))
    if name not in there:
        near = difflib.get_close_matches(name, there, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"no run {name!r}.", f"one of: {', '.join(there) or 'none yet'}.", f"{hint}Check the name.")
    return open_run(name)
