"""`workbook evaluate`, `ask`, `compare`: models and quantized files on the same rows or prompts."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lib.cli.console import replacing, show, table
from lib.errors import InputError, refusal
from lib.parameter_file import refuse_escape
from lib.progress import say
from lib.runs.files import object_or_empty, read_json, read_jsonl, writable, write_json

if TYPE_CHECKING:
    from lib.prompts.tasks import Task
    from lib.runs.run import Product
    from lib.stages.evaluate.standalone import ModelOptions

SEED = 42
"""Seed with which --max-samples draws."""
LONGEST = 1024
"""Most tokens of a conversation of --data, as in the profiles."""


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
        """The task of --run, else as the rows of --data tell; options that were given replace its parts."""
        from lib import settings
        from lib.prompts.tasks import task_of

        given, values = self.given, {}  # options are refused before a file is read
        if self.run_name is not None:
            values = read_json(self._product().path / "task.json")
            if "task" in values:
                return self._conversation(values)
            self._check_label_names(values["label_names"])
        elif self.data is not None:
            values = self._told(self.data)
        return task_of(settings.check({**values, **given}, "the options"))

    def _told(self, data: str) -> dict[str, Any]:
        """What the rows of --data say of their task."""
        from lib.settings import Settings
        from lib.stages.data.dialogues import told_by_rows
        from lib.stages.data.reading import read_table

        table = [row for rows in read_table(data).splits.values() for row in rows]
        names = self.given.get("label_names")
        told = told_by_rows(table, names, self.text_column, self.label_column)
        if told is None:
            say(f"{data}: texts with labels, asked for as {', '.join(names or Settings().label_names)}")
            return {}
        self._refuse_options(data, told[0], but=("system_prompt", "max_seq_length"))
        values = {"task": told[0], "thinking": told[1], "system_prompt": "", "max_seq_length": LONGEST, **self.given}
        reasoning, most = "some" if told[1] else "none", values["max_seq_length"]
        say(f"{data}: conversations (task {told[0]}), {reasoning} with reasoning, at most {most:,} tokens a row")
        say(f"{data}: system turn of rows that bring none: {values['system_prompt'] or 'empty'}")
        return {**values, "dataset": data}

    def _refuse_options(self, what: str, task: str, but: Sequence[str]) -> None:
        """Refuse what was given of a task with labels, for rows of another."""
        if wrong := [f"--{name.replace('_', '-')}" for name in (*self.given, *self._columns) if name not in but]:
            raise refusal("cli/not-of-conversations", options=", ".join(wrong), what=what, task=task)

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
        from lib.runs.run import known_run

        return known_run(str(self.run_name)).require("data")

    def _check_label_names(self, own: list[str]) -> None:
        """The rows of --run hold numbers: other words for them are said, the same in another order are refused."""
        given = self.given.get("label_names", own)
        if self.data is not None or given == own:
            return
        if len(given) != len(own) or any(name in own and name != own[i] for i, name in enumerate(given)):
            raise refusal("cli/other-labels", asked=",".join(given), run_name=self.run_name, names=",".join(own))
        say(f"labels {', '.join(own)} of run {self.run_name} are asked for as {', '.join(given)}")

    def _conversation(self, values: dict[str, Any]) -> Task:
        """The task of a run without labels, whose rows bring their prompts."""
        from lib.prompts.tasks import task_from_json

        self._refuse_options(f"run {self.run_name!r}", values["task"], but=("max_seq_length",))
        return task_from_json({**values, **self.given})

    def _file_rows(self, data: str, task: Task) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The rows of --data; what is left out of them is said."""
        from lib.stages.data.stage import rows_from_file

        names = list(task.label_names)
        rows, counts = rows_from_file(data, names, self.text_column, self.label_column, None if names else task)
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
        from lib.prompts.tasks import texts_of

        if self.run_name is not None:
            own = {row["id"]: texts_of(row) for row in read_jsonl(self._product().path / "test.jsonl")}
            if any(own.get(row["id"]) != texts_of(row) for row in rows):
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
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Accuracy (without labels: answer perplexity), interval, speed and memory of models on the same rows."""
    from lib.stages.evaluate.results import result_of
    from lib.stages.evaluate.standalone import evaluate_models

    if output is not None:
        _refuse_unwritable(output, "data", force)
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
    shown = ("model", "n", *result_of(task).columns, "seconds_per_sample", "seconds", "peak_memory_mib")
    text = table(result["models"], shown)
    if task.label_names:
        text += f"\n\n{_classes(result['models'], task.label_names)}"
    show(result, as_json, text)


def _classes(models: Sequence[dict[str, Any]], labels: Sequence[str]) -> str:
    """What each model answered to the rows of every label, and how well."""
    rows = [
        {"model": told["model"], "label": label, **told["per_class"][label]}
        | {f"answered {other}": count for other, count in zip(labels, counts, strict=True)}
        for told in models
        for label, counts in zip(labels, told["confusion"], strict=True)
    ]
    return table(rows, list(rows[0]))


def ask(
    models: list[str],
    prompt: list[str] | None = None,
    prompts: str = "",
    run_name: str | None = None,
    system_prompt: str = "",
    thinking: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float | None = None,
    seed: int | None = None,
    opening: OpeningOptions = OpeningOptions(),
    output: Path | None = None,
    force: bool = False,
    as_json: bool = False,
) -> None:
    """What models answer to the same prompts, side by side, with latency, memory and likeness to the first model."""
    from lib.scoring.generation import Sampling
    from lib.scoring.word_lists import SHIPPED_PROMPTS, read_prompts
    from lib.stages.evaluate.standalone import ask_models

    if output is not None:
        _refuse_unwritable(output, "decoding", force)
    if not temperature and (idle := [f"--{n}" for n, v in (("top-p", top_p), ("seed", seed)) if v is not None]):
        raise refusal("cli/without-temperature", options=" and ".join(idle))
    for key, texts in (("--prompt", prompt or ()), ("--system-prompt", [system_prompt])):
        for text in texts:
            refuse_escape(key, text, "workbook ask")
    options = opening.models()
    asked = [{"prompt": text, "reference": ""} for text in prompt or () if text.strip()]
    asked += read_prompts(prompts, "--prompts") if prompts else []
    if not asked:
        raise refusal("evaluate/no-prompts", sets=", ".join(SHIPPED_PROMPTS))
    if run_name is not None:  # as the run's model was trained: its system turn, its words around a text, its thinking
        task = RowOptions(run_name=run_name).task()
        asked = [{**one, "prompt": task.user_prompt.replace("{text}", one["prompt"])} for one in asked]
        system_prompt, thinking = system_prompt or task.system_prompt, thinking or task.thinking
    drawn = Sampling(temperature, top_p or 1.0, SEED if seed is None else seed) if temperature else None
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
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Quantized files and folders against their reference: accuracy, flips, divergence, perplexity, speed, verdict."""
    from lib.models.gguf_tokenizer import tokenizer_from_gguf
    from lib.report import steps_page
    from lib.runs.manifest import Manifest
    from lib.scoring.metric import metric_of
    from lib.stages.compare.answers import is_answers, judge_answers, read_answers
    from lib.stages.compare.files import SUMMARY, Comparison, compare_files
    from lib.stages.compare.speed import match_files

    if output.name in Manifest(output.resolve().parent / "manifest.json").entries():
        raise InputError(f"{output} is a product of a run.", "a folder of its own.", "choose another --output.")
    replacing(output / SUMMARY, force, lambda path: "recommendation" in object_or_empty(path))
    answered = [path for path in device or [] if is_answers(path)]
    phones = match_files([path for path in device or [] if path not in answered], [reference, *others])
    task = rows_from.task()
    rows, source = rows_from.rows(task)
    given = [read_answers(path, [one.name for one in (reference, *others)], rows) for path in answered]
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
    if given:
        types = {entry["file"]: entry["type"] for entry in result["files"]}
        words = task.answer_words(tokenizer_from_gguf(reference))
        judged = [
            {"type": (name := types[one["file"]]), **judge_answers(one, output / f"scores-{name}.jsonl", task, words)}
            for one in given
        ]
        result = {**result, "answers": judged}
        text += "\n\n" + table(
            judged, ("device", "runtime", "type", "n", "agree", "right", "right_here", "unread", "p")
        )
    show(result, as_json, text)


def _refuse_unwritable(path: Path, first: str, force: bool) -> None:
    """Refuse an output file that cannot be written before hours of work go into it.

    Args:
        first: the first key of a result of this command.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder.", "a file to write.", "add a file name, e.g. result.json.")
    writable(path.parent)
    replacing(path, force, lambda path: _is_result(path, first))


def _is_result(path: Path, first: str) -> bool:
    """Whether a file holds what --output wrote."""
    start = f'{{\n "{first}": {{\n'.encode()
    with path.open("rb") as file:
        begun = file.read(len(start)) == start
    return begun and "models" in read_json(path)
