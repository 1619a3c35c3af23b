"""The stage `export`: the merged model in every format of `export_formats`, product `exports`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.exporting.card import snippet, write_card
from lib.exporting.formats import FORMATS, Format
from lib.exporting.keeping import SUMMARY, Kept, finished, take_over
from lib.models.tasks import AnyTask, probe_ids, read_task, whole_ids
from lib.run import Product, Run, Work
from lib.run.child import run_child
from lib.run.files import read_json, read_jsonl, require_space, write_json
from lib.run.manifest import hash_folder
from lib.settings import Settings

CALIBRATION_ROWS = 128
"""Training rows that GPTQ is calibrated on, evenly spaced."""

CHECK_PROMPTS = 12
"""Validation rows whose prompts check that a saved folder answers like the merged model."""


@dataclass(frozen=True)
class ExportsResult:
    """The exports of a run.

    Attributes:
        product: the folder with one folder a format.
        made: one record a format that was made: format, title, folder, bytes (weight files), bits_per_weight, weights,
            seconds, peak_memory_mib, check (mean_kld, same_top against the merged model), group_size, …
        skipped: {"format", "reason"} of every other format that was asked for.
    """

    product: Product
    made: tuple[dict[str, Any], ...]
    skipped: tuple[dict[str, str], ...]


def export(settings: Settings, run: Run) -> ExportsResult:
    """Make the product `exports` from `merged`, or skip it when nothing changed.

    Formats of the former product, or of an interrupted try, are taken over if they were made from the same model by
    the same package. A format whose package is absent, or that fails in its process, is skipped with the reason; a
    package that comes or goes makes the stage run again.

    Raises:
        InputError: a missing product, too little room.
        RuntimeError: a format that needs no further package failed.
    """
    formats = [FORMATS[name] for name in settings.export_formats]
    product = run.produce(
        "exports",
        lambda work: _build(settings, run, work, formats),
        parameters={**settings.pick("export_formats"), "export_libraries": {f.name: f.version() for f in formats}},
        inputs=("data", "merged"),
        force=settings.force,
        keep_partial=True,
    )
    content = read_json(product.path / SUMMARY)
    return ExportsResult(product, tuple(content["made"]), tuple(content["skipped"]))


def _build(settings: Settings, run: Run, work: Work, formats: list[Format]) -> None:
    data, merged = run.require("data"), run.require("merged")
    inputs = {"data": data.entry.digest, "merged": merged.entry.digest}
    kept = {} if settings.force else finished(run, work, inputs)
    missing = [wanted for wanted in formats if wanted.name not in kept]
    weights = sum(out["bytes"] for name, out in merged.entry.outputs.items() if name.endswith(".safetensors"))
    require_space(run.folder, weights * len(missing), f"{len(missing)} exported models")
    task = read_task(data.path)
    argument = {"source": str(merged.path.resolve()), **(_token_ids(data.path, task) if missing else {})}
    entries = run.manifest.entries()
    card = {
        "code": snippet(task, read_jsonl(data.path / "validation.jsonl")[0]),
        "lineage": _lineage(merged.entry.facts),
        "notes": [note for name in ("data", "adapter", "merged") if name in entries for note in entries[name].notes],
    }
    content: dict[str, list[dict[str, Any]]] = {"made": [], "skipped": []}
    for place, wanted in enumerate(formats, 1):
        record = _kept_or_made(wanted, work.folder, kept, argument, card, f"({place} of {len(formats)})")
        content["skipped" if "reason" in record else "made"].append(record)
        write_json(work.folder / SUMMARY, content)
    _leave_only(work.folder, content)
    keys = ("bytes", "bits_per_weight", "seconds", "peak_memory_mib")
    work.metrics |= {record["format"]: {key: record[key] for key in keys} for record in content["made"]}
    work.facts |= {"skipped": content["skipped"], "reused": [f.name for f in formats if f.name in kept]}
    work.notes += [f"export format {skip['format']} skipped: {skip['reason']}" for skip in content["skipped"]]


def _lineage(facts: dict[str, Any]) -> str:
    base = f"`{facts['base_model']}` (revision `{facts['base_revision']}`)"
    return f"A LoRA adapter merged into {base}, then exported."


def _kept_or_made(
    wanted: Format, parent: Path, kept: Kept, argument: dict[str, Any], card: dict[str, Any], place: str
) -> dict[str, Any]:
    """The record of a format, with its "files"; {"format", "reason"} where it was skipped and nothing is left of it."""
    folder = parent / wanted.name
    if wanted.name in kept:
        old, record = kept[wanted.name]
        take_over(old, folder)
        return record
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted try
    record, reason = _make(wanted, folder, argument, f"exporting {wanted.name} {place}")
    if reason is not None:
        shutil.rmtree(folder, ignore_errors=True)
        return {"format": wanted.name, "reason": reason}
    write_card(folder, wanted, record, **card)
    return {**record, "files": hash_folder(folder)}


def _leave_only(folder: Path, content: dict[str, list[dict[str, Any]]]) -> None:
    """Remove what an interrupted try with other luck left; write the summary of a run without formats."""
    write_json(folder / SUMMARY, content)
    made = {record["folder"] for record in content["made"]}
    for path in folder.iterdir():
        if path.is_dir() and path.name not in made:
            shutil.rmtree(path)


def _token_ids(data: Path, task: AnyTask) -> dict[str, Any]:
    """Training rows with their answers for calibration, validation prompts for the check."""
    from lib.models.loading import load_tokenizer

    tokenizer = load_tokenizer(data / "tokenizer")

    def chosen(split: str, most: int) -> list[dict[str, Any]]:
        rows = read_jsonl(data / f"{split}.jsonl")
        return rows[:: max(1, len(rows) // most)][:most]

    calibration = [whole_ids(tokenizer, task, row) for row in chosen("train", CALIBRATION_ROWS)]
    prompts = [probe_ids(tokenizer, task, row) for row in chosen("validation", CHECK_PROMPTS)]
    return {"calibration": calibration, "prompts": prompts}


def _make(wanted: Format, folder: Path, argument: dict[str, Any], what: str) -> tuple[dict[str, Any], str | None]:
    """The record of a format, or an empty one and the reason why it was skipped."""
    if problem := wanted.problem():
        return {}, problem
    request = {**argument, "format": wanted.name, "output": str(folder.resolve())}
    try:
        answer = run_child("lib.exporting.worker:make", request, what)
    except InputError as error:
        return {}, error.found
    except RuntimeError as error:
        if wanted.made_by is None:
            raise
        return {}, f"{wanted.made_by} failed: {str(error).strip().splitlines()[-1][:300]}"
    return {
        "format": wanted.name,
        "title": wanted.title,
        "made_by": wanted.maker(),
        "folder": wanted.name,
        "bytes": answer["weight_bytes"],
        "bits_per_weight": 8 * answer["tensor_bytes"] / answer["weights"],
        "peak_memory_mib": answer["memory_mib"],
        **{key: value for key, value in answer.items() if key not in ("weight_bytes", "memory_mib", "peak_memory_mib")},
    }, None
