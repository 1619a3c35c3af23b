"""The stage `quantize`: one file for every type of the ladder, product `quantized`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.models.gguf_file import check_gguf
from lib.quantizing.files import QuantizationReport, quantize_predicted, survey
from lib.run import Product, Run, Work
from lib.run.files import read_json, require_space, sha256_file, write_json
from lib.run.provenance import versions
from lib.settings import Settings

_SUMMARY = "quantized.json"
_SOURCE_SUFFIXES = ("-F16", "-BF16", "-F32")


@dataclass(frozen=True)
class QuantizeResult:
    """The ladder of a run.

    Attributes:
        product: the folder with one `<name>-<TYPE>.gguf` a type.
        source: description of the file that was quantized (see `describe_gguf`).
        files: one report a type, in the order of the ladder.
    """

    product: Product
    source: dict[str, Any]
    files: tuple[QuantizationReport, ...]


def quantize(settings: Settings, run: Run) -> QuantizeResult:
    """Quantize the run's GGUF to every type of `settings.ladder`.

    Files of the former product whose source and quantizer are the same are taken over, so that a longer ladder costs
    only its new types; after an interruption finished files are kept.

    Raises:
        InputError: no product `gguf`, a source that cannot be quantized, a type that needs an importance matrix, too
            little room.
    """

    def build(work: Work) -> None:
        _build(settings, run, work)

    product = run.produce(
        "quantized",
        build,
        parameters=settings.pick("ladder"),
        inputs=("gguf",),
        force=settings.force,
        keep_partial=True,
    )
    summary = read_json(product.path / _SUMMARY)
    files = tuple(
        QuantizationReport(**{key: value for key, value in row.items() if key != "sha256"}) for row in summary["files"]
    )
    return QuantizeResult(product, summary["source"], files)


def _build(settings: Settings, run: Run, work: Work) -> None:
    gguf = run.require("gguf")
    source = _only_gguf(gguf.path)
    name = source.stem
    for suffix in _SOURCE_SUFFIXES:
        name = name.removesuffix(suffix)
    for stray in work.folder.glob(".*.part"):
        stray.unlink()
    predictions, description = survey(source, settings.ladder)
    kept = {} if settings.force else _finished(run, work, gguf.entry.digest)
    missing = [p for p in predictions if p["type"] not in kept]
    require_space(run.folder, sum(p["bytes"] for p in missing), f"{len(missing)} quantized files")
    rows: list[dict[str, Any]] = []
    summary = {"source": description, "quantizer": versions()["llama-cpp-python"], "files": rows}
    for place, prediction in enumerate(predictions, 1):
        kind = prediction["type"]
        output = work.folder / f"{name}-{kind}.gguf"
        if kind in kept:
            folder, row = kept[kind]
            _take_over(folder / row["file"], output)
            rows.append({**row, "file": output.name})
        else:
            what = f"quantizing to {kind} ({place} of {len(predictions)})"
            report = quantize_predicted(source, output, prediction, None, settings.n_threads, what)
            rows.append({**report.to_json(), "sha256": sha256_file(output)})
        write_json(work.folder / _SUMMARY, summary)
    for leftover in {p.name for p in work.folder.glob("*.gguf")} - {row["file"] for row in rows}:
        (work.folder / leftover).unlink()
    work.facts |= {"source": source.name, "reused": [kind for kind in settings.ladder if kind in kept]}
    work.metrics |= {row["type"]: _headline(row) for row in rows}
    work.notes += _fallback_note(rows)


def _only_gguf(folder: Path) -> Path:
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        raise InputError(
            f"{len(found)} GGUF files in {folder}.",
            "exactly one.",
            "run notebooks/05_convert_gguf.ipynb with force: true.",
        )
    check_gguf(found[0])
    return found[0]


def _finished(run: Run, work: Work, source_digest: str) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Files that need not be made again: {type: (folder, row of quantized.json)}; each verifies by SHA-256."""
    folders = [work.folder] if work.resumed else []
    former = run.manifest.entries().get("quantized")
    if former is not None and former.inputs.get("gguf") == source_digest:
        folders.append(run.folder / "quantized")
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for folder in folders:
        for row in _rows(folder):
            path = folder / row["file"]
            if row["type"] not in found and path.is_file() and sha256_file(path) == row["sha256"]:
                found[row["type"]] = (folder, row)
    return found


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of a folder's summary, if this version of llama.cpp made it."""
    path = folder / _SUMMARY
    if path.is_file():
        summary = read_json(path)
        if summary["quantizer"] == versions()["llama-cpp-python"]:
            yield from summary["files"]


def _take_over(old: Path, new: Path) -> None:
    """Hard link, or copy where the disk has no hard links."""
    if old == new:
        return
    new.unlink(missing_ok=True)
    try:
        os.link(old, new)
    except OSError:
        shutil.copyfile(old, new)


def _headline(row: dict[str, Any]) -> dict[str, Any]:
    return {"bytes": row["bytes"], "bits_per_weight": round(row["bits_per_weight"], 3), "seconds": row["seconds"]}


def _fallback_note(rows: list[dict[str, Any]]) -> list[str]:
    """One sentence for every page when type names promise more than the files hold."""
    affected = [row for row in rows if row["fallbacks"]]
    if not affected:
        return []
    columns = sorted({fallback["columns"] for row in affected for fallback in row["fallbacks"]})
    listed = ", ".join(f"{row['type']} ({row['bits_per_weight']:.2f} bits per weight)" for row in affected)
    widths = " and ".join(str(width) for width in columns)
    return [
        f"type names mislead for this model: rows of {widths} weights do not fill blocks of 256, so llama.cpp stored "
        f"some tensors of {listed} in larger types than the names say"
    ]
