"""A run in plain values, and the two index pages: one of a run (`reports/<run>/index.html`), one of all runs."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from lib.errors import InputError
from lib.report.display import Table, build, row_of, rows_of, value_at
from lib.report.sentences import TEMPLATES, environment, sentence, word_rows
from lib.runs import manifest
from lib.runs.files import read_json, write_text
from lib.runs.manifest import NOTEBOOK_OF, Entry
from lib.runs.run import Run, open_run
from lib.select.choice import outdated, read_analysis
from lib.statistics.intervals import Interval, limits_text
from lib.statistics.verdicts import in_words

PAGES = len(set(NOTEBOOK_OF.values()))
"""Pages of a complete report."""

# What the manifest and the product folders say about a run.
#
# Later products may be missing and their files may lack keys: what is not there is left out, nothing is guessed.

ALL, LEAK_FREE = "all", "leak_free"
"""Subsets of the test rows."""


@dataclass(frozen=True)
class Quality:
    """An accuracy (without labels: a perplexity of answers), with its interval where there is one, on n rows."""

    value: Interval | float
    n: int | None

    def __str__(self) -> str:
        return format(self.value, ".3f")


@dataclass(frozen=True)
class Summary:
    """A run in plain values.

    Attributes:
        entries: manifest entries by product, in the order of the stages.
        stamps: what every page must say.
        qualities: accuracy (without labels: perplexity of the reference answers) on "all" and on "leak_free" test rows,
            by "linear floor", "base" and "fine-tuned".
        files: one dict a quantized file, with the keys of comparison.json, and "recommended".
        recommendation, rule: the comparison's answer in words, and the rule behind it; empty when there is none.
    """

    name: str
    entries: dict[str, Entry]
    stamps: list[str]
    qualities: dict[str, dict[str, Quality]] = field(default_factory=dict)
    files: list[dict[str, Any]] = field(default_factory=list)
    recommendation: str = ""
    rule: str = ""

    @property
    def labelled(self) -> bool:
        return self.facts.get("task", "classification") == "classification"

    @property
    def facts(self) -> dict[str, Any]:
        """Facts of the data product."""
        entry = self.entries.get("data")
        return entry.facts if entry else {}

    @property
    def model(self) -> str:
        name, revision = self.facts.get("base_model", ""), str(self.facts.get("base_revision", ""))
        return sentence("index.model", name=name, revision=revision, offline=self.facts.get("offline_base"))

    @property
    def data(self) -> str:
        return str(self.facts.get("source") or sentence("index.no_data"))

    @property
    def date(self) -> str:
        finished = [entry.finished for entry in self.entries.values()]
        return max(finished)[:16].replace("T", " ") if finished else ""

    @property
    def commit(self) -> str:
        return commit_words(next((e.git for e in reversed(self.entries.values()) if e.git), {}))

    @property
    def recommended(self) -> dict[str, Any] | None:
        """The recommended file, if the comparison names one."""
        return next((file for file in self.files if file["recommended"]), None)

    def parameters(self, *notebooks: str) -> dict[str, Any]:
        """Parameters of the products of these notebooks (of all without an argument)."""
        merged: dict[str, Any] = {}
        for product, entry in self.entries.items():
            if not notebooks or NOTEBOOK_OF.get(product) in notebooks:
                merged |= entry.parameters
        return merged

    def products(self, notebook: str) -> dict[str, Entry]:
        """The products that a notebook makes."""
        return {p: e for p, e in self.entries.items() if NOTEBOOK_OF.get(p) == notebook}


def commit_words(git: Mapping[str, Any]) -> str:
    """A manifest's git entry in words."""
    return sentence("index.commit", git={"commit": None, "dirty": False, **git})


def summarise(run: Run) -> Summary:
    """Read a run; never fails on a product that is not there yet."""
    entries = {product: e for product, e in run.manifest.entries().items() if (run.folder / product).is_dir()}
    comparison = _json(run.folder / "comparison" / "comparison.json") if "comparison" in entries else {}
    recommendation = comparison.get("recommendation", {})
    return Summary(
        name=run.name,
        entries=entries,
        stamps=run.stamps(),
        qualities=_qualities(run.folder, entries),
        files=[{**f, "recommended": f["type"] == recommendation.get("type")} for f in comparison.get("files", [])],
        recommendation=recommendation.get("text", ""),
        rule=recommendation.get("rule", ""),
    )


def _json(path: Path) -> dict[str, Any]:
    """A product's JSON object; empty when it is absent or damaged (its page says so, not the index)."""
    try:
        value = read_json(path)
    except (OSError, InputError):
        return {}
    return value if isinstance(value, dict) else {}


def _qualities(folder: Path, entries: Mapping[str, Entry]) -> dict[str, dict[str, Quality]]:
    """Qualities by model and subset of the rows: of the evaluation, before it of the linear floor alone."""
    if "evaluation" not in entries:
        floor = value_at(_json(folder / "data" / "floor.json"), "test.all")
        return {"linear floor": {ALL: Quality(_value(floor, "accuracy"), floor["n"])}} if floor else {}
    evaluation, metrics = _json(folder / "evaluation" / "evaluation.json"), entries["evaluation"].metrics
    if parts := evaluation.get("parts"):
        return {
            name: {subset: Quality(_value(part[key], "perplexity"), part["n"]) for subset, part in parts.items()}
            for name, key in (("base", "base"), ("fine-tuned", "finetuned"))
        }
    rows = {ALL: metrics.get("n"), LEAK_FREE: value_at(evaluation, "models.base.leak_free.n")}
    found: dict[str, dict[str, Quality]] = {}
    for name, key in (("linear floor", "linear_floor"), ("base", "base"), ("fine-tuned", "finetuned")):
        for subset, ending in ((ALL, ""), (LEAK_FREE, "_leak_free")):
            if f"accuracy_{key}{ending}" in metrics:
                quality = Quality(_value(metrics, f"accuracy_{key}{ending}"), rows[subset])
                found.setdefault(name, {})[subset] = quality
    return found


def _value(values: Mapping[str, Any], key: str) -> Interval | float:
    return Interval.from_json(values[key], values.get(f"{key}_interval"))


# What page heads and both indexes share.

_TITLE = re.compile(r"^# +(.+)$", re.M)
_QUESTION = re.compile(r"^> *(.+)$", re.M)


@dataclass(frozen=True)
class Stage:
    """A notebook of the report: file stem, heading, its one-sentence question, whether its page exists."""

    name: str
    title: str
    question: str
    exists: bool


def read_stage(notebook: Path, exists: bool = False) -> Stage:
    """Title and question from the notebook's first Markdown cell.

    Raises:
        InputError: the file is no notebook.
    """
    import nbformat

    try:
        content = nbformat.read(notebook, as_version=4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, AttributeError, KeyError):
        raise InputError(f"{notebook} is damaged.", "a Jupyter notebook.", f"git checkout {notebook.name}.") from None
    first = next((c.source for c in content.cells if c.cell_type == "markdown"), "")
    title, question = (re.sub(r"[*`]", "", found[1]) if (found := p.search(first)) else "" for p in (_TITLE, _QUESTION))
    return Stage(notebook.stem, title or notebook.stem, question, exists)


@functools.cache
def stylesheet() -> str:
    """The style of every page, code colours included."""
    from pygments.formatters import HtmlFormatter

    colours = HtmlFormatter(style="default").get_style_defs(".highlight")
    return (TEMPLATES / "workbook.css").read_text(encoding="utf-8") + colours


def parameter_pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Parameters as text; the items of a list are joined by commas."""
    return [(k, ", ".join(map(str, v)) if isinstance(v, (list, tuple)) else str(v)) for k, v in values.items()]


def versions_of(entries: Iterable[Entry]) -> list[tuple[str, str]]:
    """Versions of the libraries that made the last of these products; those of today where there is none."""
    return list(next((entry.versions for entry in reversed(list(entries))), manifest.versions()).items())


# The overview of a run.


def _qualities_table(summary: Summary) -> Table:
    subsets = dict.fromkeys(subset for found in summary.qualities.values() for subset in found)
    headings = {}
    for subset in subsets:
        sizes = (found[subset].n for found in summary.qualities.values() if subset in found and found[subset].n)
        headings[subset] = sentence("index.subset", name=subset, n=next(sizes, None))
    rows = [
        {"model": name, **{h: found[s].value if s in found else None for s, h in headings.items()}}
        for name, found in summary.qualities.items()
    ]
    caption = sentence("index.qualities_caption", labelled=summary.labelled)
    return build(rows, caption, dict.fromkeys(headings.values(), ".3f"))


def _files_table(summary: Summary) -> Table:
    column, key = ("accuracy", "accuracy") if summary.labelled else ("answer_perplexity", "answer_ppl")
    quality = {column: lambda file: _value(file, key) if key in file else None}
    rows = rows_of(
        summary.files,
        f"type overview_mb=bytes bpw=bits_per_weight {column} overview_kld=kld_mean flips perplexity=ppl"
        " tokens_per_second=generation_tokens_per_second verdict",
        type=lambda file: f"{file['type']} ★" if file["recommended"] else file["type"],
        verdict=lambda file: in_words(file) if file.get("verdict") else None,
        **quality,
    )
    return build(rows, sentence("index.files_caption"))


def _cost_table(summary: Summary) -> Table:
    rows = [
        {
            "product": product,
            **row_of(entry, "cost_seconds=seconds peak_memory=peak_memory_mib"),
            "disk_mb": sum(output["bytes"] for output in entry.outputs.values()) / 1e6,
            "device": entry.device,
            "finished": entry.finished[:16].replace("T", " "),
        }
        for product, entry in summary.entries.items()
    ]
    return build(rows, sentence("index.cost_caption"))


def _reading(summary: Summary) -> list[list[str]]:
    """(word, meaning) for a run's verdicts, with its own margin and seed."""
    given = summary.parameters(NOTEBOOK_OF["comparison"])
    margin = given.get("equivalence_margin" if summary.labelled else "perplexity_margin")
    values = {"margin": margin, "seed": given.get("seed"), "rule": summary.rule}
    return word_rows("index.reading", labelled=summary.labelled, **values)


def write_run_index(folder: Path, summary: Summary, stages: list[Stage], state: str = "") -> Path:
    """Write the overview of a run.

    Args:
        folder: reports/<run>/.
        state: a sentence when the report is not complete ("stopped in 03_evaluate: …"); empty when it is.
    """
    text = fill(
        "run.html.j2",
        run=summary,
        css=stylesheet(),
        stages=stages,
        state=state,
        qualities=_qualities_table(summary) if summary.qualities else None,
        files=_files_table(summary) if summary.files else None,
        reading=_reading(summary),
        cost=_cost_table(summary) if summary.entries else None,
        parameters=parameter_pairs(summary.parameters()),
        versions=versions_of(summary.entries.values()),
    )
    path = folder / "index.html"
    write_text(path, text)
    return path


def fill(template: str, **values: Any) -> str:
    """HTML by a template of ``templates/pages``."""
    return environment("pages", True).get_template(template).render(**values)


# The choice among runs, for the index and the command line.


def run_table(content: Mapping[str, Any]) -> Table:
    """Every run's metric on the shared rows, validation loss, speed and sizes (model_analysis.json)."""
    metric = f"shared_{content['metric']}"
    quality = {metric: lambda run: Interval.from_json(run["metric"], run["interval"])}
    rows = rows_of(
        content["runs"],
        f"run {metric} validation_loss train_seed training_speed=samples_per_second adapter_mb=adapter_bytes"
        " recommended_file unlike_first",
        run=lambda run: f"{run['run']} ★" if run["run"] == content["chosen"]["run"] else run["run"],
        recommended_file=lambda run: sentence("index.recommended", file=run["file"]) if run["file"] else None,
        unlike_first=lambda run: "; ".join(run["unlike_first"]) or None,
        **quality,
    )
    return build(rows, sentence("index.shared_caption", made=content["made"][:16].replace("T", " ")))


def recipe_table(content: Mapping[str, Any]) -> Table:
    """Every recipe's mean, the spread of its seeds, its paired difference to the leader."""

    def follows(key: str) -> Callable[[Mapping[str, Any]], Any]:
        """What only a recipe behind the leader has."""
        return lambda recipe: None if recipe["verdict"] == "leader" else _value(recipe, key)

    rows = rows_of(
        content["recipes"],
        "recipe_runs=runs seeds=n_seeds recipe_mean=mean seed_sd seed_range behind_leader p_holm verdict",
        seed_range=lambda recipe: limits_text(recipe["seed_range"], ".4f") if recipe["n_seeds"] > 1 else None,
        behind_leader=follows("difference"),
        p_holm=follows("p_holm"),
    )
    return build(rows, sentence("index.recipes_caption"))


# The list of all runs.


def _summary(name: str) -> Summary:
    try:
        return summarise(open_run(name))
    except (InputError, KeyError, TypeError):  # a manifest that another version wrote, or that is damaged
        return Summary(name, {}, [sentence("index.unreadable")])


def write_all_index(reports: Path, total: int = PAGES) -> Path:
    """Write the list of all runs that have a page, and the last choice among runs (`workbook select`).

    Args:
        reports: the folder of all reports.
        total: pages of a complete report.
    """
    reports.mkdir(parents=True, exist_ok=True)
    with FileLock(reports / ".index.lock"):  # a report that ends meanwhile must not be missing from the list
        return _write_all(reports, total)


def _write_all(reports: Path, total: int) -> Path:
    made = {page.parent.name: len(list(page.parent.glob("[0-9][0-9]_*.html"))) for page in reports.glob("*/index.html")}
    runs = sorted(map(_summary, sorted(made)), key=lambda run: run.date, reverse=True)
    analysis, choice = read_analysis(reports), {}
    if analysis:
        choice = {
            "stale": outdated(analysis),
            "tables": [run_table(analysis), recipe_table(analysis)],
            "left_out": sentence("index.left_out", rows=analysis["rows"]["left_out"]),
        }
    path = reports / "index.html"
    text = fill("all.html.j2", css=stylesheet(), runs=runs, made=made, total=total, analysis=analysis, **choice)
    write_text(path, text)
    return path
