"""manifest.json of a run: one entry per product, written last, with all that is needed to trust its numbers.

Also here: finished work is found again if its process was killed before the entry was added; and folders that all
runs share are made once.
"""

from __future__ import annotations

import functools
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from lib.errors import InputError, refusal
from lib.runs import files
from lib.runs.files import PROJECT, data_file, object_or_empty, read_json, settle, sha256_file, sha256_json, write_json
from lib.runs.locks import lock_file

# What is needed to trust a number later: versions and commit.


def version_of(package: str) -> str:
    """The installed version of a package; "absent" without one."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions of the packages that decide numbers."""
    packages = data_file("runs/products.yaml")["packages"]
    return {"python": platform.python_version(), **{name: version_of(name) for name in packages}}


@functools.cache
def commit() -> dict[str, Any]:
    """The project's git commit and whether the working tree differs from it."""
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {"commit": "unknown", "dirty": None}
    return {"commit": said.removesuffix("-dirty"), "dirty": said.endswith("-dirty")}


# manifest.json of a run: one entry per product, written last and atomically.

_NOTEBOOKS: dict[str, list[str]] = data_file("runs/products.yaml")["notebooks"]
NOTEBOOK_OF = {product: notebook for notebook, products in _NOTEBOOKS.items() for product in products}
"""Which notebook makes which product."""


@dataclass(frozen=True)
class Entry:
    """What manifest.json knows of one product.

    Attributes:
        parameters: the settings the product depends on.
        inputs: digest of each product that it was made from.
        outputs: {relative file: {"bytes", "sha256"}}.
        facts: lineage of the product: base model id and revision, data source used, prompt hash, stamps.
        metrics: headline numbers.
        notes: fallbacks and warnings that every later page must repeat.
        seconds, peak_memory_mib: cost of making it.
    """

    product: str
    parameters: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    finished: str = ""
    seconds: float = 0.0
    peak_memory_mib: float = 0.0
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    git: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Hash over the product's files: equal files, equal digest."""
        return sha256_json({name: output["sha256"] for name, output in self.outputs.items()})


FORMAT = 1
"""Of manifest.json."""


@functools.cache
def _entries() -> Any:
    """What reads the products of a manifest: every key of an entry with a value of its kind, and no other key."""
    from pydantic import TypeAdapter

    return TypeAdapter(dict[str, Entry])


NOTE = ".request.json"
"""A note beside the work while it is made (see below); no part of the product."""


def files_of(folder: Path) -> dict[str, Path]:
    """Every file under `folder` but the note, by its relative path, sorted.

    Raises:
        InputError: one is a symbolic link.
    """
    found = sorted(path for path in folder.rglob("*") if not path.is_dir())
    if links := [path for path in found if path.is_symlink()]:
        raise InputError(f"{links[0]} is a symbolic link.", "plain files in a product.", "copy the file instead.")
    named = {path.relative_to(folder).as_posix(): path for path in found}
    return {name: path for name, path in named.items() if name != NOTE}


def hash_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of every file of `files_of`."""
    return {
        name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for name, path in files_of(folder).items()
    }


def damage(folder: Path, entry: Entry) -> str | None:
    """The first difference between the files and the entry, in words; None when all files verify."""
    for name, output in entry.outputs.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != output["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {output['bytes']}"
        if sha256_file(path) != output["sha256"]:
            return f"{name} has another SHA-256 than the manifest"
    return None


class Manifest:
    """The entries of a run, kept in `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> dict[str, Entry]:
        """All entries, by product.

        Raises:
            InputError: the file is damaged, or of another version.
        """
        if not self.path.exists():
            return {}
        content = read_json(self.path)
        try:
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise ValueError(f"no manifest of format {FORMAT}")
            found = _entries().validate_python(content.get("products"), extra="forbid")
            for name, entry in found.items():
                sized = all({"bytes", "sha256"} <= output.keys() for output in entry.outputs.values())
                if not sized or entry.product != name or not isinstance(entry.facts.get("rows", {}), dict):
                    raise ValueError(f"the entry {name} is that of another product, or lacks hashes or rows")
            return found
        except ValueError as error:
            first = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": str(error)}
            reason = ": ".join([".".join(map(str, first["loc"])), first["msg"]]).removeprefix(": ")[:200]
            raise refusal("runs/other-manifest", path=self.path, reason=reason) from None

    def add(self, run_name: str, entry: Entry) -> None:
        """Add or replace one entry."""
        self._write(run_name, {**self.entries(), entry.product: entry})

    def remove(self, run_name: str, product: str) -> None:
        """Forget one entry (before its folder is replaced)."""
        self._write(run_name, {name: entry for name, entry in self.entries().items() if name != product})

    def _write(self, run_name: str, entries: dict[str, Entry]) -> None:
        ordered = {name: asdict(entries[name]) for name in NOTEBOOK_OF if name in entries}
        write_json(self.path, {"format": FORMAT, "run": run_name, "products": ordered})


# A kill between the end of a stage and its manifest entry must not cost the work: it is found again.
#
# A note lies beside the work: from the beginning what was asked for, and, once every file has been flushed, also what
# the entry will say. It is removed after the entry has been added.


def finish(folder: Path, wanted: dict[str, Any], facts: dict[str, Any]) -> None:
    """Flush every file, then note that all is done.

    Args:
        facts: what the manifest entry will say beside the hashes of the files.

    Raises:
        InputError: a symbolic link among the files.
        RuntimeError: there are none.
    """
    sizes = _sizes(folder)
    if not sizes:
        raise RuntimeError(f"the stage wrote nothing into {folder}")
    settle(folder)
    write_json(folder / NOTE, {"wanted": wanted, "facts": facts, "sizes": sizes})


def finished(folder: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The facts of work that was finished for exactly that and whose files still have their sizes; else None."""
    found = note(folder)
    same = found.get("wanted") == wanted and "sizes" in found and found["sizes"] == _sizes(folder)
    return found["facts"] if same else None


def _sizes(folder: Path) -> dict[str, int]:
    return {name: path.stat().st_size for name, path in files_of(folder).items()}


def note(folder: Path) -> dict[str, Any]:
    """What was noted beside the work in a folder; empty where nothing was, or a kill has cut it."""
    return object_or_empty(folder / NOTE)


# Folders made once and reused by every run: named by a key of everything that determines them.


def ensure(
    kind: str,
    determined_by: dict[str, Any],
    build: Callable[[Path], dict[str, Any]],
    place: Path | None = None,
) -> Path:
    """The stored folder for this key, made by `build` if it is absent or damaged.

    Args:
        kind: first part of the folder's name, e.g. "tokenizer".
        determined_by: everything the content depends on (JSON values); its hash is the key.
        build: writes files into an empty folder, returns facts for the record.
        place: folder that holds it; None = runs/_offline/.

    Returns:
        The folder; beside it <folder>.json records {"determined_by", "facts", "files" (bytes and SHA-256)}. One process
        builds it, others wait; a kill in between leaves nothing under the final name.
    """
    place = files.writable(place or files.runs_folder() / "_offline")
    final = place / f"{kind}-{sha256_json(determined_by)[:16]}"
    record = place / f"{final.name}.json"
    with lock_file(place / f".{final.name}.lock"):
        if final.is_dir() and record.is_file() and hash_folder(final) == read_json(record)["files"]:
            return final
        shutil.rmtree(final, ignore_errors=True)
        record.unlink(missing_ok=True)
        with files.new_folder(final) as temporary:
            facts = build(temporary)
        write_json(record, {"determined_by": determined_by, "facts": facts, "files": hash_folder(final)})
    return final
