"""What the commands do: call the stage's function, print its result."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.cli.console import cell, show, table
from lib.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lib.models.weights import Weights
    from lib.prompts.tasks import Task
    from lib.stages.convert.convert import Conversion
    from lib.stages.convert.tensors import GgufFile


SEED = 42
"""Seed with which --max-samples draws."""


def _text(report: dict[str, Any], *keys: str) -> str:
    """The named keys of a report, one a line."""
    return "\n".join(f"{key}: {cell(report[key])}" for key in keys if key in report)


def merge(
    base_model: str,
    adapter: str,
    output_dir: Path,
    dtype: str | None,
    revision: str,
    gguf: Path | None,
    outtype: str,
    as_json: bool,
) -> None:
    """Merge an adapter into a base model, write a GGUF of it in the same pass if asked, and print what was done."""
    from lib.models.adapters import refuse_adapter, require_adapter
    from lib.models.base_model import refuse_other_folder, resolve_adapter, resolve_base, unpacking_of
    from lib.stages.merge.stage import write_lineage
    from lib.stages.merge.weights import merge_folders

    local = Path(base_model).is_dir()
    given = Path(adapter) if Path(adapter).is_dir() else resolve_adapter(adapter).path
    found = None if local else resolve_base(base_model, revision, **unpacking_of(given))
    base = found.path if found else Path(base_model)
    name, commit = (base.name, None) if local else (base_model, base.name)
    if found and found.unpacked:
        name, commit = found.unpacked["source"], None
    refuse_adapter(base)
    require_adapter(given)
    if gguf is not None and gguf.exists() and Path(base_model).is_file() and gguf.samefile(base_model):
        raise InputError(f"{gguf} is the base model.", "another file.", "choose another name for the output.")
    refuse_other_folder(given, base)
    conversions: list[Conversion] = []

    @contextlib.contextmanager
    def also(folder: Path, weights: Weights) -> Iterator[GgufFile | None]:
        write_lineage(folder, name, commit, Path(adapter).name)
        if gguf is None:
            yield None
            return
        from lib.stages.convert.convert import Conversion

        conversions.append(Conversion(folder, weights, gguf, outtype))
        with conversions[0].open() as file:
            yield file

    report = merge_folders(base, given, output_dir, dtype, also=also).to_json()
    plain = [key for key, value in report.items() if not isinstance(value, (dict, list, tuple))]
    text = f"{output_dir}\n{_text(report, *plain)}"
    for conversion in conversions:
        report["gguf"] = {**conversion.report().to_json(), "model": str(output_dir)}
        text += f"\n{gguf}\n{_text(report['gguf'], 'architecture', 'outtype', 'tensors', 'bytes_after', 'loaded')}"
    show(report, as_json, text)


def convert(model_dir: Path, output: Path, outtype: str, llama_cpp: Path | None, as_json: bool) -> None:
    """Convert a model folder, here or with the official script of a checkout, and print what was done."""
    if llama_cpp is not None:
        from lib.stages.convert.stage import convert_officially

        report = convert_officially(model_dir, output, outtype, llama_cpp)
    else:
        from lib.stages.convert.convert import convert as convert_folder

        report = convert_folder(model_dir, output, outtype).to_json()
    keys = ("output", "converter", "architecture", "outtype", "tensors", "bytes_after", "loaded")
    show(report, as_json, _text(report, *keys))


@dataclass(frozen=True)
class Rows:
    """Where the rows and the task come from, as the options say.

    Attributes:
        given: task settings that were given on the command line.
    """

    data: str | None
    run_name: str | None
    max_samples: int
    text_column: str = ""
    label_column: str = ""
    given: dict[str, Any] = field(default_factory=dict)

    def task(self) -> Task:
        """The task of --run, else of the defaults; options that were given replace its parts."""
        from lib import settings
        from lib.prompts.tasks import task_of

        values: dict[str, Any] = {}
        if self.run_name is not None:
            from lib.runs.files import read_json
            from lib.runs.run import open_run

            values = read_json(open_run(self.run_name).require("data").path / "task.json")
            if "task" in values:
                return self._conversation(values)
        return task_of(settings.check({**values, **self.given}, "the options"))

    def tokenizer(self) -> Path | None:
        """Folder of the tokenizer of --run."""
        if self.run_name is None:
            return None
        from lib.runs.run import open_run

        return open_run(self.run_name).require("data").path / "tokenizer"

    def _conversation(self, values: dict[str, Any]) -> Task:
        """The task of a run without labels, whose own test rows are the only ones it can be asked for."""
        from lib.prompts.tasks import task_from_json

        wrong = [f"--{name.replace('_', '-')}" for name in self.given if name != "max_seq_length"]
        wrong += ["--data"] if self.data is not None else []
        if wrong:
            raise InputError(
                f"{', '.join(wrong)} for run {self.run_name!r}, whose task is {values['task']}: rows without labels.",
                "the run's own test rows, or a run with labels.",
                f"leave out {', '.join(wrong)}.",
            )
        return task_from_json({**values, **self.given})

    def _file_rows(self, data: str, task: Task) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The rows of --data; what is left out of them is said."""
        from lib.progress import say
        from lib.stages.data.stage import rows_from_file

        rows, counts = rows_from_file(data, list(task.label_names), self.text_column, self.label_column)
        if not any(row.get("leaked") for row in rows):  # no leak audit was made for these rows
            rows = [{key: value for key, value in row.items() if key != "leaked"} for row in rows]
        if left_out := counts["left_out"]:
            reasons = ", ".join(f"{count:,} {why}" for why, count in left_out.items())
            lost, read = sum(left_out.values()), counts["rows_available"]
            say(f"{data}: {lost:,} of {read:,} rows left out ({reasons})")
        return rows, {"source": data, **counts}

    def rows(self, task: Task) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The rows, and what they are in words for the result."""
        if self.data is not None:
            rows, source = self._file_rows(self.data, task)
        elif self.run_name is not None:
            from lib.runs.files import read_jsonl
            from lib.runs.run import open_run

            product = open_run(self.run_name).require("data")
            rows = read_jsonl(product.path / "test.jsonl")
            source = {"source": f"test rows of run {self.run_name}", "facts": product.entry.facts}
            source |= {"rows_available": len(rows), "left_out": {}}
        else:
            raise InputError("neither --data nor --run.", "labelled rows.", "give --data FILE, or --run NAME.")
        if 0 < self.max_samples < len(rows):
            import random

            chosen = sorted(random.Random(SEED).sample(range(len(rows)), self.max_samples))
            rows, source["sample_seed"] = [rows[i] for i in chosen], SEED
        return rows, source


def evaluate(models: list[str], rows: Rows, options: dict[str, Any], output: Path | None, as_json: bool) -> None:
    """Evaluate models on the rows and print the table."""
    from lib.runs.files import write_json
    from lib.stages.evaluate.standalone import evaluate_models, evaluate_models_by_answers

    if output is not None:
        _writable_file(output)
    task = rows.task()
    found, source = rows.rows(task)
    # The same command finds there what an interrupted one has scored.
    keep = None if output is None else output.with_name(f".{output.name}.scores")
    options = options | {"tokenizer": rows.tokenizer()}
    if task.label_names:
        result = evaluate_models(models, found, task, source, keep=keep, **options)
        quality = ("accuracy", "accuracy_interval", "macro_f1")
    else:
        result = evaluate_models_by_answers(models, found, task, source, keep=keep, **options)
        quality = ("answer_tokens", "perplexity", "perplexity_interval", "bits_per_character")
    if output is not None:
        write_json(output, result)
    show(result, as_json, table(result["models"], ("model", "n", *quality, "seconds_per_sample", "peak_memory_mib")))


def compare(
    reference: Path,
    others: list[Path],
    rows: Rows,
    output: Path,
    options: dict[str, Any],
    devices: list[Path],
    as_json: bool,
) -> None:
    """Compare quantized files with their reference and print the table, and what phones measured of them."""
    from lib.report import steps_page
    from lib.runs.run import open_run
    from lib.scoring.metric import metric_of
    from lib.stages.compare.files import Comparison, compare_files
    from lib.stages.compare.speed import match_files

    phones = match_files(devices, [reference, *others])
    task = rows.task()
    found, source = rows.rows(task)
    metric = metric_of(task)
    margins = {name: options.pop(name) for name in ("equivalence_margin", "perplexity_margin")}
    if rows.run_name:
        options["train"] = open_run(rows.run_name).require("data").path / "train.jsonl"
    margin = margins[metric.margin_setting]
    result = compare_files(Comparison(reference, others, found, task, output, source, margin=margin, **options))
    text = table(result["files"], ("type", "bytes", "bits_per_weight", *metric.shown, "kld_mean", "verdict"))
    if phones:
        types = {entry["file"]: entry["type"] for entry in result["files"]}
        phones = [{**phone, "type": types[phone["compared"]]} for phone in phones]
        result = {**result, "devices": phones}
        lines = steps_page.phones(phones, result["files"], result["conditions"]["processor"])
        text += "\n\n" + table(lines, list(lines[0]))
    show(result, as_json, text)


def _writable_file(path: Path) -> None:
    """Refuse an output file that cannot be written before hours of work go into it."""
    from lib.runs.files import writable

    if path.is_dir():
        raise InputError(f"{path} is a folder.", "a file to write.", "add a file name, e.g. result.json.")
    writable(path.parent if str(path.parent) else Path())
