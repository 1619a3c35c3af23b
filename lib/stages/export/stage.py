"""What can be exported: for each format its words, the package it needs, and why it cannot be made here.
Formats that need not be made again: those of the former product, and those of an interrupted try.
README.md of an export folder: what it is, what it cost, and the lines that load it.
The stage `export`: the merged model in every format of `export_formats`, product `exports`.
Exporting: the merged model in formats that transformers loads, beside the GGUF ladder.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.prompts.tasks import Task, read_task
from lib.runs.child import run_child
from lib.runs.files import read_json, read_jsonl, require_space, write_json, write_text
from lib.runs.machine import has_module
from lib.runs.manifest import hash_folder
from lib.runs.run import Product, Run, Work
from lib.settings import Settings

# What can be exported: for each format its words, the package it needs, and why it cannot be made here.


@dataclass(frozen=True)
class Format:
    """One export format.

    Attributes:
        name: as in the setting `export_formats`; also its folder.
        title: what it is, in words.
        made_by: package that quantizes; None where transformers alone suffices.
        needs: packages that a reader of the folder installs beside torch and transformers.
        note: what a reader must know to use it.
    """

    name: str
    title: str
    made_by: str | None = None
    needs: tuple[str, ...] = ()
    note: str = ""

    def problem(self) -> str | None:
        """The package that is absent, in words; None when all are there (whether they work shows in the child)."""
        wanted = dict.fromkeys((*filter(None, (self.made_by,)), *self.needs))
        missing = [name for name in wanted if not has_module(name.replace("-", "_"))]
        return f"{' and '.join(missing)} not installed" if missing else None

    def version(self) -> str | None:
        """Installed version of `made_by`; None where it is absent or none is needed."""
        if self.made_by is None:
            return None
        try:
            return metadata.version(self.made_by)
        except metadata.PackageNotFoundError:
            return None

    def maker(self) -> str:
        """The package that makes it, with its version."""
        return f"{self.made_by} {self.version()}" if self.made_by else "transformers"


_SKIPPED = "The token embedding and the output layer stay in 16 bits."

FORMATS: dict[str, Format] = {
    found.name: found
    for found in (
        Format("fp16", "16-bit floats, IEEE half", note="Slow on most CPUs, which have no half-precision units."),
        Format("bf16", "16-bit floats, bfloat16", note="The merged model itself where the base is in bfloat16."),
        Format(
            "int8",
            "LLM.int8(): INT8 rows, outlier columns in 16 bits",
            "bitsandbytes",
            ("bitsandbytes", "accelerate"),
            f"{_SKIPPED} The folder carries its quantization: pass no BitsAndBytesConfig. At the first pass "
            "bitsandbytes says that inputs are cast to float16: that is how the format works.",
        ),
        Format(
            "nf4",
            "NormalFloat4 in blocks of 64, block scales quantized again",
            "bitsandbytes",
            ("bitsandbytes", "accelerate"),
            f"{_SKIPPED} The folder carries its quantization: pass no BitsAndBytesConfig.",
        ),
        Format(
            "gptq",
            "GPTQ: INT4 groups, errors corrected on training rows",
            "llmcompressor",
            ("compressed-tensors",),
            f"{_SKIPPED} Small on the disk; transformers unpacks the weights to 16 bits at the first pass, so "
            "memory is saved only by programs that compute on packed weights, such as vLLM.",
        ),
        Format(
            "torchao-int8",
            "torchao: INT8 weights, one scale a row",
            "torchao",
            ("torchao",),
            _SKIPPED,
        ),
    )
}
"""The formats by name, in the order of the pages."""


# Formats that need not be made again: those of the former product, and those of an interrupted try.

SUMMARY = "exports.json"

Kept = dict[str, tuple[Path, dict[str, Any]]]


def finished(run: Run, work: Work, inputs: dict[str, str]) -> Kept:
    """{format: (folder, record)} of what was made from the same products by the same package and still verifies.

    Args:
        inputs: digests of the products that are exported now.
    """
    folders = [work.folder] if work.resumed else []
    former = run.manifest.entries().get("exports")
    if former is not None and former.inputs == inputs:
        folders.append(run.folder / "exports")
    found: Kept = {}
    for folder in folders:
        for record in read_json(folder / SUMMARY)["made"] if (folder / SUMMARY).is_file() else []:
            name, path = record["format"], folder / record["folder"]
            same = name in FORMATS and record["made_by"] == FORMATS[name].maker()
            if same and name not in found and path.is_dir() and hash_folder(path) == record["files"]:
                found[name] = path, record
    return found


def take_over(old: Path, new: Path) -> None:
    """The folder under its new name: hard links, or copies where the disk has no hard links."""
    if old != new:
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(old, new, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


# README.md of an export folder: what it is, what it cost, and the lines that load it.

SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
messages = [
    {{"role": "system", "content": {system!r}}},
    {{"role": "user", "content": {user!r}}},
]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, enable_thinking={thinking}, return_tensors="pt", return_dict=True
)
answer = model.generate(**prompt, max_new_tokens={tokens}, do_sample=False)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def snippet(task: Task, row: dict[str, Any]) -> str:
    """Python that loads the folder it is run in and asks the run's question about one row."""
    system, user = (message["content"] for message in task.messages(row)[:2])
    return SNIPPET.format(system=system, user=user, thinking=task.thinking, tokens=8 if task.label_names else 256)


def write_card(folder: Path, made: Format, record: dict[str, Any], code: str, lineage: str, notes: list[str]) -> None:
    """Write README.md with YAML front matter.

    Args:
        record: the format's entry of exports.json.
        code: the usage, see `snippet`.
        lineage: what was merged, in words.
        notes: sentences that every page of the run must say (sample data, offline base).
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        language="zh", library_name="transformers", pipeline_tag="text-generation", tags=["quantized", made.name]
    )
    packages = ["torch", "transformers", *made.needs]
    versions = " ".join(f"{name}=={metadata.version(name).partition('+')[0]}" for name in packages)
    group = f"| group size | {record['group_size']} weights a scale |\n" if "group_size" in record else ""
    calibrated = (
        f"| calibrated on | {record['calibration_rows']} training rows, {record['calibration_tokens']:,} tokens |\n"
        if "calibration_rows" in record
        else ""
    )
    check = record["check"]
    write_text(
        folder / "README.md",
        f"""---
{data.to_yaml()}
---

# Merged model as {made.name}

{"".join(f"> {note}{chr(10)}>{chr(10)}" for note in notes)}
{lineage} Format: {made.title}. {made.note}

| | |
|---|---|
| weights | {record["weights"]:,}, {record["bytes"] / 1e6:.2f} MB, {record["bits_per_weight"]:.2f} bits each |
{group}{calibrated}| made in | {record["seconds"]:.1f} s, {record["peak_memory_mib"]:.0f} MiB at most |
| against the merged model | mean KL divergence {check["mean_kld"]:.2g} nats, {check["same_top"]:.1%} equal top tokens \
({check["positions"]} positions) |

## Use

Made and tested with `{versions}`.

```python
{code}```
""",
    )


# The stage `export`: the merged model in every format of `export_formats`, product `exports`.

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


def _token_ids(data: Path, task: Task) -> dict[str, Any]:
    """Training rows with their answers for calibration, validation prompts for the check."""
    from lib.models.loading import load_tokenizer

    tokenizer = load_tokenizer(data / "tokenizer")

    def chosen(split: str, most: int) -> list[dict[str, Any]]:
        rows = read_jsonl(data / f"{split}.jsonl")
        return rows[:: max(1, len(rows) // most)][:most]

    calibration = [task.encode(tokenizer, row).ids for row in chosen("train", CALIBRATION_ROWS)]
    prompts = [task.probe_ids(tokenizer, row) for row in chosen("validation", CHECK_PROMPTS)]
    return {"calibration": calibration, "prompts": prompts}


def _make(wanted: Format, folder: Path, argument: dict[str, Any], what: str) -> tuple[dict[str, Any], str | None]:
    """The record of a format, or an empty one and the reason why it was skipped."""
    if problem := wanted.problem():
        return {}, problem
    request = {**argument, "format": wanted.name, "output": str(folder.resolve())}
    try:
        answer = run_child("lib.stages.export.child:make", request, what)
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
