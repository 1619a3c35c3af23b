"""manifest.json of a run: one entry a product, written last and atomically."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.run.files import read_json, sha256_file, sha256_json, write_json

NOTEBOOK_OF = {
    "data": "01_data",
    "adapter": "02_finetune",
    "evaluation": "03_evaluate",
    "merged": "04_merge",
    "gguf": "05_convert_gguf",
    "quantized": "06_quantize",
    "imatrix": "06_quantize",
    "source_grid": "06_quantize",
    "sensitivity": "06_quantize",
    "held_out_kld": "06_quantize",
    "imatrix_effect": "06_quantize",
    "mix_effect": "06_quantize",
    "tensor_errors": "06_quantize",
    "retention": "06_quantize",
    "exports": "06_quantize",
    "comparison": "07_compare_quantized",
    "package": "07_compare_quantized",
}
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


def files_of(folder: Path) -> list[Path]:
    """Every file under `folder`, sorted.

    Raises:
        InputError: one is a symbolic link.
    """
    found = sorted(p for p in folder.rglob("*") if not p.is_dir())
    if links := [path for path in found if path.is_symlink()]:
        raise InputError(f"{links[0]} is a symbolic link.", "plain files in a product.", "copy the file instead.")
    return found


def hash_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of every file under `folder`, by relative path; symbolic links are refused."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in files_of(folder)
    }


def damage(folder: Path, entry: Entry) -> str | None:
    """The first way in which the files differ from the entry, in words; None when all verify."""
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
        """All entries, by product."""
        if not self.path.exists():
            return {}
        content = read_json(self.path)
        return {name: Entry(**entry) for name, entry in content["products"].items()}

    def add(self, run_name: str, entry: Entry) -> None:
        """Add or replace one entry."""
        entries = {**self.entries(), entry.product: entry}
        ordered = {name: asdict(entries[name]) for name in NOTEBOOK_OF if name in entries}
        write_json(self.path, {"format": 1, "run": run_name, "products": ordered})

    def remove(self, run_name: str, product: str) -> None:
        """Forget one entry (before its folder is replaced)."""
        entries = {name: asdict(entry) for name, entry in self.entries().items() if name != product}
        write_json(self.path, {"format": 1, "run": run_name, "products": entries})
