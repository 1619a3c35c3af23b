"""`workbook report`, `params`, `select`, `pick`: the notebooks, the keys that drive them, a choice of what came out."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lib.cli.console import in_brackets, replacing, show, table, tell
from lib.errors import InputError, refusal
from lib.language import HELP, told, translated
from lib.runs.files import read_json, reports_folder, writable

if TYPE_CHECKING:
    from lib.settings import Settings

FAST = {"max_train_rows": 300, "max_eval_rows": 120, "perplexity_tokens": 1024, "imatrix_chunks": 8}
"""Most rows and tokens of a run with `--fast`: enough to see every page, too few for most verdicts."""


def params(complete: Path | None = None, as_json: bool = False) -> None:
    """Every key of a parameter file: type, default, meaning; with --complete every key of one file with its value."""
    from lib import settings

    values = settings.load(complete).model_dump() if complete else {}
    keys = [
        {"key": name, "type": _type_words(field.annotation), "default": field.default, "meaning": field.description}
        | ({"value": values[name]} if complete else {})
        for name, field in settings.Settings.model_fields.items()
    ]
    if complete:
        head = told(f"{complete.name} with every key; `workbook report` takes it as it is.")
        text = f"# {head}\n{settings.as_yaml(values)}"
    else:
        lines = (
            f"{key['key']}: {json.dumps(key['default'], ensure_ascii=False)}\n"
            f"    {translated(key['meaning'], HELP)}{in_brackets(told(key['type']))}"
            for key in keys
        )
        text = "\n".join(lines)
    show({"parameters": keys}, as_json, text)


def _type_words(annotation: Any) -> str:
    """A key's type in words: 'one of …', 'list of text', 'number'."""
    words = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    if typing.get_origin(annotation) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(annotation))).replace("True", "true")
    if typing.get_origin(annotation) is list:
        return f"list of {words.get(typing.get_args(annotation)[0], 'values')}"
    return words.get(annotation, str(annotation))


def report(
    params_file: Path,
    parameters: list[str] | None = None,
    start_from: str | None = None,
    end_at: str | None = None,
    seeds: int = 1,
    fast: bool = False,
    timeout: float = 86400.0,
    rerun: bool = False,
    pdf: bool = False,
    as_json: bool = False,
) -> None:
    """Run the seven notebooks with a parameter file and publish reports/<run>/index.html."""
    from lib import settings

    overrides = parsed(parameters or [])
    options = {"start_from": start_from, "end_at": end_at, "timeout": timeout, "rerun": rerun, "pdf": pdf}
    if fast:
        overrides = fast_overrides(settings.load(params_file, overrides), overrides)
    if seeds == 1:
        made = _run(params_file, overrides, **options)
        show(made, as_json, closing_words(made))
        return
    siblings = seed_overrides(settings.load(params_file, overrides), seeds)
    results = [_run(params_file, overrides | own, **options) for own in siblings]
    choice = analyse([own["run_name"] for own in siblings])
    text = "\n".join([*map(closing_words, results), choice["text"]])
    show({"runs": results, "choice": choice}, as_json, text)


def closing_words(made: Mapping[str, Any]) -> str:
    """What a report ends with: the answer, and where its pages are."""
    lines = [made["answer"], f"{translated('Open in a browser')}{translated(': ')}{made['index']}"]
    lines += [f"{translated('To hand in')}{translated(': ')}{made['pdf']}"] if made["pdf"] else []
    return "\n".join(filter(None, lines))


def parsed(pairs: Sequence[str]) -> dict[str, Any]:
    """The values of `-p KEY=VALUE` options."""
    from lib import settings

    texts = [pair.partition("=")[::2] for pair in pairs]
    keys = [key for key, _ in texts]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise InputError(f"-p {twice} twice.", "every key once: the last would win silently.", "leave one out.")
    return {key: settings.parse_override(key, value) for key, value in texts}


def fast_overrides(settings: Settings, given: dict[str, Any]) -> dict[str, Any]:
    """The overrides of `--fast`: at most the rows and tokens of `FAST`, under a run name of their own.

    Args:
        given: keys that were given; they stay, but the run name is never that of the whole run.
    """
    fewer = {key: most for key, most in FAST.items() if not 0 < getattr(settings, key) <= most}
    fewer["perplexity_tokens"] = max(fewer.get("perplexity_tokens", settings.perplexity_tokens), settings.n_ctx)
    return {**fewer, **given, "run_name": f"{settings.run_name}-fast"}


def seed_overrides(settings: Settings, seeds: int) -> list[dict[str, Any]]:
    """run_name and train_seed of sibling runs: RUN-s42, RUN-s43, … The split's seed stays the same in all.

    Raises:
        InputError: an adapter that is adopted, or no training at all: for neither a seed is used.
    """
    from lib.settings import UNTRAINED

    if settings.adapter or settings.finetuning_type == UNTRAINED:
        key = "adapter" if settings.adapter else "finetuning_type"
        raise refusal("cli/seeds-of-adopted", seeds=seeds, key=key, value=getattr(settings, key))
    first = settings.training_seed
    return [{"run_name": f"{settings.run_name}-s{seed}", "train_seed": seed} for seed in range(first, first + seeds)]


def _run(params_file: Path, overrides: dict[str, Any], pdf: bool = False, **options: Any) -> dict[str, Any]:
    """Run the notebooks once; what failed is told, and becomes the exit code."""
    from lib import settings
    from lib.report.index import summarise
    from lib.report.pdf import browser, write_pdf
    from lib.report.runner import ReportError, run_report
    from lib.runs.run import open_run
    from lib.statistics.losses import advice_words

    if pdf:
        browser()  # refused before the work, not behind it
    try:
        made = run_report(params_file, overrides, **options)
    except ReportError as error:
        evidence = f"The partial notebook is kept: {error.evidence}" if error.evidence else None
        for line in filter(None, (str(error), error.detail, evidence)):
            tell(line)
        raise typer.Exit(error.exit_code) from None
    pages = [str(page) for page in made.pages]
    summary = summarise(open_run(made.run))
    book = write_pdf(made.folder, made.pages, summary, settings.load(params_file, overrides)) if pdf else None
    found = {"run": made.run, "index": str(made.index), "pages": pages, "seconds": round(made.seconds, 1)}
    answer = advice_words(summary.recommendation) if summary.recommendation else ""
    return found | {"answer": answer, "pdf": book and str(book)}


def select(runs: list[str], output: Path | None = None, force: bool = False, as_json: bool = False) -> None:
    """Compare runs on the test rows they share; take the best, and where rows cannot tell, the smaller or faster."""
    from lib.report.index import recipe_table, run_table
    from lib.select.choice import FILE, read_analysis

    if output is not None:
        replacing(output / FILE, force, lambda path: read_analysis(path.parent) is not None)
    found = analyse(runs, output)
    tables = [table(made.records(), made.headings) for made in (run_table(found), recipe_table(found))]
    show(found, as_json, "\n\n".join([*tables, found["text"], found["rule"], found["file"]]))


def analyse(names: list[str], output: Path | None = None) -> dict[str, Any]:
    """Compare runs and write model_analysis.json into a folder (default: reports/, whose index then shows it)."""
    from lib.report.index import write_all_index
    from lib.select.choice import select, write_analysis

    analysis = select(names)
    folder = writable(output or reports_folder())
    path = write_analysis(analysis, folder)
    if output is None:
        write_all_index(folder)
    return {**analysis, "file": str(path)}


def pick(
    run: str, max_mb: float | None = None, max_loss: float = 1.0, runtime: str = "", as_json: bool = False
) -> None:
    """The smallest file shown to lose no more than allowed; or none, and how many rows would tell."""
    from lib.report.display import rows_of
    from lib.runs.run import known_run
    from lib.stages.compare.recommend import pick_file
    from lib.statistics.losses import advice_words

    comparison = known_run(run).require_current("comparison").path / "comparison.json"
    answer = pick_file(read_json(comparison), max_mb, max_loss, runtime.split(","))
    rows = rows_of("select.candidates", answer["candidates"])
    head = f"loss in {answer['limits']['unit']}, at most {max_loss:g}; speed and memory on this machine: "
    head += "{processor}, {n_threads} threads, each file in a process of its own\n".format(**answer["measured_on"])
    show(
        answer,
        as_json,
        f"{head}{table(rows, list(rows[0]))}\n\n{advice_words(answer)}\n{answer['details']}\nRule: {answer['rule']}",
    )
