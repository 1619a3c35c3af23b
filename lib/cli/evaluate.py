"""`workbook evaluate`, `ask`, `compare`, `perplexity`: models and quantized files on the same rows, prompts or text."""

from __future__ import annotations

import random
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lib.cli.console import show, table
from lib.errors import InputError, refusal, refusing
from lib.progress import say
from lib.runs.files import read_json, read_jsonl, user_path, utf8, writable, write_json

if TYPE_CHECKING:
    from lib.prompts.tasks import Task
    from lib.runs.run import Product
    from lib.scoring.measure import Text
    from lib.stages.evaluate.standalone import ModelOptions

SEED = 42
"""Seed with which --max-samples draws."""


@dataclass(frozen=True)
class RowOptions:
    """Options of where the rows and the task come from; None where one was not given."""

    data: str | None = None
    run_name: str | None = None
    max_samples: int = 0
    text_column: str = ""
    label_column: str = ""
    label_names: str | None = None
    system_prompt: str | None = None
    user_prompt: str | None = None
    max_seq_length: int | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The task options that were given, as settings."""
        from lib.settings import parse_override

        keys = ("label_names", "system_prompt", "user_prompt", "max_seq_length")
        return {key: parse_override(key, str(value)) for key in keys if (value := getattr(self, key)) is not None}

    @property
    def _columns(self) -> list[str]:
        """The columns of --data that were chosen."""
        return [name for name in ("text_column", "label_column") if getattr(self, name)]

    def task(self) -> Task:
        """The task of --run, else of the defaults; options that were given replace its parts."""
        from lib import settings
        from lib.prompts.tasks import task_of

        values: dict[str, Any] = {}
        if self.run_name is not None:
            values = read_json(self._product().path / "task.json")
            if "task" in values:
                return self._conversation(values)
            self._check_label_names(values["label_names"])
        return task_of(settings.check({**values, **self.given}, "the options"))

    def part(self, name: str) -> Path | None:
        """A file or folder of --run's rows: "tokenizer", "train.jsonl"."""
        return None if self.run_name is None else self._product().path / name

    def rows(self, task: Task) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The rows, and what they are in words for the result."""
        if self.data is not None:
            rows, source = self._file_rows(self.data, task)
        elif self.run_name is not None:
            if columns := ", ".join(f"--{name.replace('_', '-')}" for name in self._columns):
                raise InputError(f"{columns} without --data.", "a table with columns.", f"leave out {columns}.")

            product = self._product()
            rows = read_jsonl(product.path / "test.jsonl")
            source = {"source": f"test rows of run {self.run_name}", "facts": product.entry.facts}
            source |= {"rows_available": len(rows), "left_out": {}}
        else:
            raise InputError("neither --data nor --run.", "labelled rows.", "give --data FILE, or --run NAME.")
        if 0 < self.max_samples < len(rows):
            chosen = sorted(random.Random(SEED).sample(range(len(rows)), self.max_samples))
            rows, source["sample_seed"] = [rows[i] for i in chosen], SEED
        return rows, source

    def _product(self) -> Product:
        """The rows of --run, with its task and tokenizer."""
        from lib.runs.run import open_run

        return open_run(self.run_name).require("data")

    def _check_label_names(self, own: list[str]) -> None:
        """The rows of --run hold numbers: other words for them are said, the same in another order are refused."""
        given = self.given.get("label_names", own)
        if self.data is not None or given == own:
            return
        if len(given) != len(own) or any(name in own and name != own[i] for i, name in enumerate(given)):
            raise refusal("cli/other-labels", asked=",".join(given), run_name=self.run_name, names=",".join(own))
        say(f"labels {', '.join(own)} of run {self.run_name} are asked for as {', '.join(given)}")

    def _conversation(self, values: dict[str, Any]) -> Task:
        """The task of a run without labels, whose own test rows are the only ones it can be asked for."""
        from lib.prompts.tasks import task_from_json

        wrong = [f"--{name.replace('_', '-')}" for name in (*self.given, *self._columns) if name != "max_seq_length"]
        wrong += ["--data"] if self.data is not None else []
        if wrong:
            raise refusal("cli/not-of-conversations", options=", ".join(wrong), run_name=self.run_name, values=values)
        return task_from_json({**values, **self.given})

    def _file_rows(self, data: str, task: Task) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The rows of --data; what is left out of them is said."""
        from lib.stages.data.stage import rows_from_file

        rows, counts = rows_from_file(data, list(task.label_names), self.text_column, self.label_column)
        if counts.get("split", "test") != "test":
            say(f"{data} has no test split: its rows of {counts['split']} are taken")
        if not self._audited(rows):
            rows = [{key: value for key, value in row.items() if key != "leaked"} for row in rows]
        if left_out := counts["left_out"]:
            reasons = ", ".join(f"{count:,} {why}" for why, count in left_out.items())
            say(f"{data}: {sum(left_out.values()):,} of {counts['rows_available']:,} rows left out ({reasons})")
        return rows, {"source": data, **counts}

    def _audited(self, rows: list[dict[str, Any]]) -> bool:
        """Whether a leak audit was made for these rows, of --run against its own training rows."""
        if self.run_name is not None:
            own = {row["id"]: row["text"] for row in read_jsonl(self._product().path / "test.jsonl")}
            if any(own.get(row["id"]) != row["text"] for row in rows):
                return False
        return any(row.get("leaked") for row in rows)


@dataclass(frozen=True)
class OpeningOptions:
    """Options of how models are opened; see `lib.stages.evaluate.standalone.ModelOptions`."""

    n_gpu_layers: int = 0
    n_threads: int = 0
    base_model: str | None = None
    revision: str = "main"
    dtype: str = "auto"
    load_in_4bit: bool = False

    def models(self, **more: Any) -> ModelOptions:
        """As they are given on, with what else a command says of its models.

        Raises:
            InputError: a number format that nothing is computed with.
        """
        from lib.stages.evaluate.standalone import ModelOptions

        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise InputError(f"--dtype {self.dtype!r}.", "auto, float32 or bfloat16.", "choose one of them.")
        return ModelOptions(**vars(self), **more)


def evaluate(
    models: list[str],
    rows_from: RowOptions = RowOptions(),
    opening: OpeningOptions = OpeningOptions(),
    output: Path | None = None,
    batch_size: int = 32,
    as_json: bool = False,
) -> None:
    """Accuracy (without labels: answer perplexity), interval, speed and memory of models on the same rows."""
    from lib.stages.evaluate.results import result_of
    from lib.stages.evaluate.standalone import evaluate_models

    if output is not None:
        _refuse_unwritable(output, "data")
    options = opening.models(batch_size=batch_size, run_tokenizer=rows_from.part("tokenizer"))
    task = rows_from.task()
    rows, source = rows_from.rows(task)
    result = evaluate_models(
        models,
        rows,
        task,
        source,
        options,
        # The same command finds there what an interrupted one has scored.
        keep=None if output is None else output.with_name(f".{output.name}.scores"),
    )
    if output is not None:
        write_json(output, result)
    shown = ("model", "n", *result_of(task).columns, "seconds_per_sample", "peak_memory_mib")
    show(result, as_json, table(result["models"], shown))


def ask(
    models: list[str],
    prompt: list[str] | None = None,
    prompts: str = "",
    system_prompt: str = "",
    thinking: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = SEED,
    opening: OpeningOptions = OpeningOptions(),
    output: Path | None = None,
    as_json: bool = False,
) -> None:
    """What models answer to the same prompts, side by side, with latency, memory and likeness to the first model."""
    from lib.scoring.generation import Sampling
    from lib.scoring.text_metrics import SHIPPED_PROMPTS, read_prompts
    from lib.stages.evaluate.standalone import ask_models

    if output is not None:
        _refuse_unwritable(output, "decoding")
    options = opening.models()
    asked = [{"prompt": text, "reference": ""} for text in prompt or () if text.strip()]
    asked += read_prompts(prompts, "--prompts") if prompts else []
    if not asked:
        raise refusal("evaluate/no-prompts", sets=", ".join(SHIPPED_PROMPTS))
    drawn = Sampling(temperature, top_p, seed) if temperature else None
    result = ask_models(models, asked, options, system_prompt, thinking, max_new_tokens, drawn)
    if output is not None:
        write_json(output, result)
    show(result, as_json, _side_by_side(result))


def _side_by_side(result: dict[str, Any]) -> str:
    """Every prompt with its answers, then a line a model."""
    names = [Path(told["model"]).name or told["model"] for told in result["models"]]
    parts, likeness = [], [[one["answers"][place] for one in result["prompts"]] for place in range(len(names))]
    for number, one in enumerate(result["prompts"], 1):
        reference = f" (reference: {one['reference']})" if one["reference"] else ""
        parts.append(f"── {number}. {one['prompt']}{reference}")
        for name, answer in zip(names, one["answers"], strict=True):
            text = answer["text"] + ("" if answer["ended"] else " … [cut at the limit]")
            parts.append(f"{name}:\n{textwrap.indent(text, '    ')}")
    rows = [
        {
            "model": name,
            "first token, s": told["first_token_seconds"],
            "tokens/s": told["tokens_per_second"],
            "MiB": told["peak_memory_mib"],
            "same answers": None if place == 0 else f"{sum(a['same_text'] for a in own)} of {len(own)}",
            "same start, %": None if place == 0 else 100 * fmean(a["same_start"] for a in own),
            "chrF": None if place == 0 else fmean(a["chrf"] for a in own),
        }
        for place, (name, told, own) in enumerate(zip(names, result["models"], likeness, strict=True))
    ]
    return "\n".join([*parts, "", table(rows, list(rows[0]))])


def compare(
    reference: Path,
    others: list[Path],
    output: Path,
    rows_from: RowOptions = RowOptions(),
    equivalence_margin: float = 1.0,
    perplexity_margin: float = 1.0,
    n_gpu_layers: int = 0,
    n_threads: int = 0,
    device: list[Path] | None = None,
    as_json: bool = False,
) -> None:
    """Quantized files and folders against their reference: accuracy, flips, divergence, perplexity, speed, verdict."""
    from lib.report import steps_page
    from lib.runs.manifest import Manifest
    from lib.scoring.metric import metric_of
    from lib.stages.compare.files import Comparison, compare_files
    from lib.stages.compare.speed import match_files

    if output.name in Manifest(output.resolve().parent / "manifest.json").entries():
        raise InputError(f"{output} is a product of a run.", "a folder of its own.", "choose another --output.")
    phones = match_files(device or [], [reference, *others])
    task = rows_from.task()
    rows, source = rows_from.rows(task)
    metric = metric_of(task)
    margins = {"equivalence_margin": equivalence_margin, "perplexity_margin": perplexity_margin}
    asked = Comparison(
        reference,
        others,
        rows,
        task,
        output,
        source,
        n_threads=n_threads,
        n_gpu_layers=n_gpu_layers,
        margin=margins[metric.margin_setting],
        train=rows_from.part("train.jsonl"),
    )
    result = compare_files(asked)
    text = table(result["files"], ("type", "bytes", "bits_per_weight", *metric.shown, "kld_mean", "verdict"))
    if phones:
        types = {entry["file"]: entry["type"] for entry in result["files"]}
        phones = [{**phone, "type": types[phone["compared"]]} for phone in phones]
        result = {**result, "devices": phones}
        lines = steps_page.phones(phones, result["files"], result["conditions"]["processor"])
        text += "\n\n" + table(lines, list(lines[0]))
    show(result, as_json, text)


def _refuse_unwritable(path: Path, first: str) -> None:
    """Refuse an output file that cannot be written before hours of work go into it.

    Args:
        first: the first key of a result of this command.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder.", "a file to write.", "add a file name, e.g. result.json.")
    if path.exists() and path.stat().st_size and not _is_result(path, first):
        raise InputError(f"{path} is there and holds no result of this command.", "a new file.", "choose another name.")
    writable(path.parent)


def _is_result(path: Path, first: str) -> bool:
    """Whether a file holds what --output wrote."""
    start = f'{{\n "{first}": {{\n'.encode()
    with path.open("rb") as file:
        begun = file.read(len(start)) == start
    return begun and "models" in read_json(path)


# Perplexity: the numbers of llama-perplexity on a text, with intervals over its documents.

_ROWS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
"""Suffixes of files with one document a row; any other file is plain text."""


def perplexity(
    model: str,
    text: Path,
    reference: str | None = None,
    n_ctx: int = 512,
    chunks: int = 0,
    text_column: str = "",
    n_gpu_layers: int = 0,
    n_threads: int = 0,
    as_json: bool = False,
) -> None:
    """Perplexity on a text; with --reference the table of llama-perplexity --kl-divergence, and intervals."""
    from lib.scoring.measure import measure_text

    content = read_text(text, text_column)
    result = measure_text(
        model, content, reference, n_ctx=n_ctx, chunks=chunks, n_threads=n_threads, n_gpu_layers=n_gpu_layers
    )
    show({"text": str(text), **result}, as_json, numbers(result))


def read_text(path: Path, text_column: str = "", split: str = "") -> Text:
    """The documents of a file; what of a table is left out is said.

    Args:
        split: whose rows are taken of a table that says the splits of its rows; empty = all.

    Raises:
        InputError: no file, not UTF-8, no text in it, no column with a text, or a column of what is no table.
    """
    from lib.scoring.measure import Text

    given, path = path, user_path(str(path))
    if not path.is_file():
        raise refusal("cli/no-text", place=given.expanduser().absolute())
    if path.suffix.lower() in _ROWS:
        text = Text.of_rows(_rows(path, text_column, split))
    elif text_column:
        raise InputError(f"--text-column {text_column}, and {path} is no table.", "a table.", "leave it out.")
    else:
        text = Text.of_file(utf8(path, path.read_bytes()))
    if not text.content.strip():
        raise InputError(f"{path} holds no text.", "a text of at least one window.", "give another file.")
    return text


def _rows(path: Path, text_column: str, split: str) -> list[str]:
    from lib.stages.data.cleaning import DamagedError, find_column, safe_text
    from lib.stages.data.reading import read_table

    splits = read_table(str(path)).splits
    taken = [row for part, rows in splits.items() if part in (split or part, "all") for row in rows]
    left_out = Counter({f"of {part}": len(rows) for part, rows in splits.items() if part not in (split or part, "all")})
    name = find_column(list(taken[0]), text_column, "text")
    with refusing(DamagedError, "cli/no-column-of-text", path=path, name=name):
        texts = [safe_text(row[name], Counter()) for row in taken]
    left_out["without a text"] = sum(not text.strip() for text in texts)
    if reasons := ", ".join(f"{count:,} {why}" for why, count in left_out.items() if count):
        say(f"{path}: {left_out.total():,} of {sum(map(len, splits.values())):,} rows left out ({reasons})")
    return texts


def numbers(result: dict[str, Any]) -> str:
    """The numbers as llama-perplexity prints them (shares in percent), with the intervals over documents."""
    from lib.report.sentences import word_rows

    intervals = any(value is not None for key, value in result.items() if key.endswith("_interval"))
    rows = word_rows("perplexity.numbers", r=result, intervals=intervals)
    return "\n".join(row[0] if len(row) == 1 else f"{row[0]:<22} {row[1]}" for row in rows)
