"""What the commands do: call the stage's function, print its result."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.cli.output import cell, show, table
from lib.errors import InputError

if TYPE_CHECKING:
    from lib.models.prompting import Task

SEED = 42
"""Seed with which --max-samples draws."""


def _text(report: dict[str, Any], *keys: str) -> str:
    """The named keys of a report, one a line."""
    return "\n".join(f"{key}: {cell(report[key])}" for key in keys if key in report)


def merge(base_model: str, adapter: Path, output_dir: Path, dtype: str | None, revision: str, as_json: bool) -> None:
    """Merge an adapter into a base model and print what was done."""
    from lib.merging.folder import merge_folders
    from lib.models.loading import resolve_base

    base = Path(base_model) if Path(base_model).is_dir() else resolve_base(base_model, revision).path
    report = merge_folders(base, adapter, output_dir, dtype).to_json()
    show(
        report,
        as_json,
        f"{output_dir}\n{_text(report, *(k for k, v in report.items() if not isinstance(v, (dict, list, tuple))))}",
    )


def convert(model_dir: Path, output: Path, outtype: str, as_json: bool) -> None:
    """Convert a model folder and print what was done."""
    from lib.gguf_export.converting import convert as convert_folder

    report = convert_folder(model_dir, output, outtype).to_json()
    show(report, as_json, _text(report, "output", "architecture", "outtype", "tensors", "bytes_after", "loaded"))


def quantize(source: Path, output: Path, type_name: str, imatrix: Path | None, as_json: bool) -> None:
    """Quantize a file and print what was done."""
    from lib.quantizing import quantize_file

    report = quantize_file(source, output, type_name, imatrix).to_json()
    text = _text(report, "file", "type", "bytes", "bits_per_weight", "imatrix", "seconds", "peak_memory_mib")
    if report["fallbacks"]:
        text += f"\nfallbacks: {len(report['fallbacks'])} tensors have another type than the recipe wants (see --json)"
    show(report, as_json, text)


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
        from lib.models.prompting import Task

        values: dict[str, Any] = {}
        if self.run_name is not None:
            from lib.run import open_run
            from lib.run.files import read_json

            values = read_json(open_run(self.run_name).require("data").path / "task.json")
        checked = settings.check({**values, **self.given}, "the options")
        return Task(tuple(checked.label_names), checked.system_prompt, checked.user_prompt, checked.max_seq_length)

    def rows(self, task: Task) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The rows, and what they are in words for the result."""
        if self.data is not None:
            from lib.data import rows_from_file

            rows = rows_from_file(self.data, list(task.label_names), self.text_column, self.label_column)
            if not any(row.get("leaked") for row in rows):  # no leak audit was made for these rows
                rows = [{key: value for key, value in row.items() if key != "leaked"} for row in rows]
            source: dict[str, Any] = {"source": self.data}
        elif self.run_name is not None:
            from lib.run import open_run
            from lib.run.files import read_jsonl

            product = open_run(self.run_name).require("data")
            rows = read_jsonl(product.path / "test.jsonl")
            source = {"source": f"test rows of run {self.run_name}", "facts": product.entry.facts}
        else:
            raise InputError("neither --data nor --run.", "labelled rows.", "give --data FILE, or --run NAME.")
        source["rows_available"] = len(rows)
        if 0 < self.max_samples < len(rows):
            import random

            chosen = sorted(random.Random(SEED).sample(range(len(rows)), self.max_samples))
            rows, source["sample_seed"] = [rows[i] for i in chosen], SEED
        return rows, source


def evaluate(models: list[str], rows: Rows, options: dict[str, Any], output: Path | None, as_json: bool) -> None:
    """Evaluate models on the rows and print the table."""
    from lib.evaluation import evaluate_models
    from lib.run.files import write_json

    if output is not None:
        _writable_file(output)
    task = rows.task()
    found, source = rows.rows(task)
    result = evaluate_models(models, found, task, source, **options)
    if output is not None:
        write_json(output, result)
    columns = ("model", "n", "accuracy", "accuracy_interval", "macro_f1", "seconds_per_sample", "peak_memory_mib")
    show(result, as_json, table(result["models"], columns))


def compare(
    reference: Path, others: list[Path], rows: Rows, output: Path, options: dict[str, Any], as_json: bool
) -> None:
    """Compare quantized files with their reference and print the table."""
    from lib.comparison import compare_files

    task = rows.task()
    found, source = rows.rows(task)
    result = compare_files(reference, others, found, task, output, source, **options)
    columns = ("type", "bytes", "bits_per_weight", "accuracy", "accuracy_interval", "flips", "kld_mean", "verdict")
    show(result, as_json, table(result["files"], columns))


def _writable_file(path: Path) -> None:
    """Refuse an output file that cannot be written before hours of work go into it."""
    from lib.run.folders import writable

    if path.is_dir():
        raise InputError(f"{path} is a folder.", "a file to write.", "add a file name, e.g. result.json.")
    writable(path.parent if str(path.parent) else Path())
