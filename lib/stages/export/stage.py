"""The stage `export`: the merged model in formats that transformers loads, beside the GGUF ladder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.errors import EXTRAS, InputError
from lib.models.loading import load_tokenizer
from lib.prompts.tasks import Row, Task, read_task, spread, texts_of
from lib.runs import files
from lib.runs.child import run_child
from lib.runs.machine import has_module
from lib.runs.manifest import hash_folder, version_of
from lib.runs.packages import environment_problem, environment_versions, pin
from lib.runs.render import render
from lib.runs.run import Product, ProductDraft, Run
from lib.settings import Settings


@dataclass(frozen=True)
class Format:
    """One export format, as formats.yaml has it.

    Attributes:
        name: as in the setting `export_formats`; also its folder.
        title: what it is, in words.
        note: what a reader must know to use it.
        made_by: package that quantizes; None where transformers alone suffices.
        runs_in: the program that runs it: "transformers" (with torch), "ONNX Runtime" or "MNN".
        environment: name of the environment of its own that makes and runs it (`lib.runs.packages`).
        needs: packages that a reader of the folder installs beside transformers (and torch).
        options: of `BitsAndBytesConfig`.
    """

    name: str
    title: str
    note: str
    made_by: str | None = None
    runs_in: str = "transformers"
    environment: str | None = None
    needs: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def problem(self) -> str | None:
        """The package that is absent, in words; None when all are there (whether they work shows in the child)."""
        if self.environment:
            return environment_problem(self.environment)
        wanted = dict.fromkeys((*filter(None, (self.made_by,)), *self.needs))
        missing = [name for name in wanted if not has_module(name.replace("-", "_"))]
        if not missing:
            return None
        extra = EXTRAS.get(missing[0].replace("-", "_"))
        return f"{' and '.join(missing)} not installed" + (f" (extra {extra})" if extra else "")

    @property
    def in_transformers(self) -> bool:
        """Whether transformers loads it."""
        return self.runs_in == "transformers"

    def pins(self) -> list[str]:
        """What a reader of the folder installs, as lines of a requirements.txt."""
        if self.environment:
            return [f"{self.made_by}=={self.version()}", pin("transformers")]
        return [*map(pin, ([*(["torch"] if self.in_transformers else []), "transformers", *self.needs]))]

    def version(self) -> str | None:
        """Installed version of `made_by`; None where none is needed."""
        if self.environment:
            return environment_versions(self.environment).get(str(self.made_by), "absent")
        return version_of(self.made_by) if self.made_by else None

    def maker(self) -> str:
        """The package that makes it, with its version."""
        return f"{self.made_by} {self.version()}" if self.made_by else "transformers"


FORMATS = {name: Format(name, **values) for name, values in files.data_file("stages/export/formats.yaml").items()}
"""The formats by name, in the order of the pages."""

SUMMARY = "exports.json"

CALIBRATION_ROWS, CALIBRATED = 128, ("gptq", "autoround")
"""Training rows that these formats are calibrated on, evenly spaced."""

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
    content = files.read_json(product.path / SUMMARY)
    return ExportsResult(product, tuple(content["made"]), tuple(content["skipped"]))


def _build(settings: Settings, run: Run, work: ProductDraft, formats: list[Format]) -> None:
    data, merged = run.require("data"), run.require("merged")
    kept = {} if settings.force else _finished(run, work, formats)
    missing = [wanted for wanted in formats if wanted.name not in kept]
    weights = sum(out["bytes"] for name, out in merged.entry.outputs.items() if name.endswith(".safetensors"))
    files.require_space(run.folder, weights * len(missing), f"{len(missing)} exported models")
    task = read_task(data.path)
    argument = {"source": merged.path, **(_token_ids(data.path, task) if missing else {})}
    entries, facts = run.manifest.entries(), merged.entry.facts
    card = {
        "made_of": {
            "kind": "base" if run.untrained else "trained",
            "base": facts["base_model"],
            "revision": facts["base_revision"],
        },
        "notes": [note for name in ("data", "adapter", "merged") if name in entries for note in entries[name].notes],
        "asked": question_of(task, files.read_jsonl(data.path / "validation.jsonl")[0]),
        "calibrated_on": "training rows",
    }
    content: dict[str, list[dict[str, Any]]] = {"made": [], "skipped": []}
    files.write_json(work.folder / SUMMARY, content)
    for place, wanted in enumerate(formats, 1):
        record = kept.get(wanted.name) or make_format(
            wanted, work.folder / wanted.name, argument, card, f"({place} of {len(formats)})"
        )
        content["skipped" if "reason" in record else "made"].append(record)
        files.write_json(work.folder / SUMMARY, content)
    made = {record["folder"] for record in content["made"]}
    for path in work.folder.iterdir():  # what an interrupted try for other formats left
        if path.is_dir() and path.name not in made:
            shutil.rmtree(path)
    keys = ("bytes", "bits_per_weight", "seconds", "peak_memory_mib")
    work.metrics |= {record["format"]: {key: record[key] for key in keys} for record in content["made"]}
    work.facts |= {"skipped": content["skipped"], "reused": [f.name for f in formats if f.name in kept]}
    work.notes += [f"export format {skip['format']} skipped: {skip['reason']}" for skip in content["skipped"]]


def make_format(
    wanted: Format, folder: Path, argument: dict[str, Any], card: dict[str, Any], place: str
) -> dict[str, Any]:
    """Make the folder of a format, in a process of its own.

    Args:
        argument: "source", "calibration" and "prompts" of `make`. card: of `write_card`. place: "(1 of 3)".

    Returns:
        its record, with its "files"; {"format", "reason"} where it was skipped and nothing is left of it.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted try
    request, what = {**argument, "format": wanted.name, "output": folder}, f"exporting {wanted.name} {place}"
    try:
        if (reason := wanted.problem()) is None:
            answer = run_child("lib.stages.export.child:make", request, what)
    except InputError as error:
        reason = error.found
    except RuntimeError as error:
        if wanted.made_by is None:
            raise
        reason = f"{wanted.made_by} failed: {str(error).strip().splitlines()[-1][:300]}"
    if reason is not None:
        shutil.rmtree(folder, ignore_errors=True)
        return {"format": wanted.name, "reason": reason}
    about = {"format": wanted.name, "title": wanted.title, "made_by": wanted.maker(), "folder": wanted.name}
    record = {**about, **answer}
    write_card(folder, wanted, record, **card)
    return {**record, "files": hash_folder(folder)}


def _token_ids(data: Path, task: Task) -> dict[str, Any]:
    """Training rows with their answers for calibration, validation prompts for the check."""
    tokenizer = load_tokenizer(data / "tokenizer")
    rows = spread(files.read_jsonl(data / "train.jsonl"), CALIBRATION_ROWS)
    probes = spread(files.read_jsonl(data / "validation.jsonl"), CHECK_PROMPTS)
    return {
        "calibration": [task.encode(tokenizer, row).ids for row in rows],
        "prompts": [task.probe_ids(tokenizer, row) for row in probes],
        "answers": task.answer_words(tokenizer),
        "texts": [text for row in probes for text in (*texts_of(row), task.rendered(tokenizer, row))],
    }


# Formats that need not be made again: those of the former product, and those of an interrupted try.


def _finished(run: Run, work: ProductDraft, formats: Sequence[Format]) -> dict[str, dict[str, Any]]:
    """{format: record} of what was made from the same products by the same package and still verifies, now in the
    folder of the work."""
    makers, found = {wanted.name: wanted.maker() for wanted in formats}, {}
    for folder in run.earlier(work, "exports", "data", "merged"):
        for record in files.read_json(folder / SUMMARY)["made"] if (folder / SUMMARY).is_file() else []:
            name, path = record["format"], folder / record["folder"]
            same = record["made_by"] == makers.get(name) and name not in found
            if same and path.is_dir() and hash_folder(path) == record["files"]:
                found[name], target = record, work.folder / name
                if path != target:
                    shutil.rmtree(target, ignore_errors=True)
                    shutil.copytree(path, target, copy_function=files.link_or_copy)
    return found


# README.md of an export folder: what it is, what it cost, and the lines that load it.


def write_card(folder: Path, made: Format, record: dict[str, Any], **card: Any) -> None:
    """Write README.md with YAML front matter.

    Args:
        record: the format's entry of exports.json.
        card: "made_of" (what was merged: its "kind" and names), "notes" (sentences that every page of the run must
            say), "asked" (what the code of the card asks the model, see `question_of`), "calibrated_on" (rows or
            windows of GPTQ).
    """
    text = render(
        Path(__file__).with_name("README.md.j2"),
        made=made,
        record=record,
        **card,
        versions=" ".join(made.pins()),
    )
    files.write_text(folder / "README.md", text)


def question_of(task: Task, row: Row) -> dict[str, Any]:
    """The run's question about one row, for the code of a card."""
    system, user = (message["content"] for message in task.messages(row)[:2])
    return {"system": system, "user": user, "thinking": task.thinking, "most_tokens": 8 if task.label_names else 256}
