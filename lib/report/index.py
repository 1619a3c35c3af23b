"""A run in plain values, and the two index pages: one of a run (`reports/<run>/index.html`), one of all runs."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from lib.errors import InputError, refusing
from lib.report.display import Table, build, rows_of, value_at
from lib.report.sentences import TEMPLATES, environment, sentence, word_rows
from lib.runs import manifest
from lib.runs.files import object_or_empty, write_text
from lib.runs.manifest import NOTEBOOK_OF, Entry
from lib.runs.run import Run, open_run
from lib.select.choice import outdated, read_analysis
from lib.statistics.intervals import Interval

PAGES = len(set(NOTEBOOK_OF.values()))
"""Pages of a complete report."""

# What the manifest and the product folders say about a run.
#
# Later products may be missing and their files may lack keys: what is not there is left out, nothing is guessed.

ALL, LEAK_FREE = "all", "leak_free"
"""Subsets of the test rows."""


Quality = tuple[Interval | float, int | None]
"""An accuracy (without labels: a perplexity of answers), with its interval where there is one, and its n rows."""


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
    comparison = object_or_empty(run.folder / "comparison" / "comparison.json") if "comparison" in entries else {}
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


def _qualities(folder: Path, entries: Mapping[str, Entry]) -> dict[str, dict[str, Quality]]:
    """Qualities by model and subset of the rows: of the evaluation, before it of the linear floor alone."""
    if "evaluation" not in entries:
        floor = value_at(object_or_empty(folder / "data" / "floor.json"), "test.all")
        return {"linear floor": {ALL: (_value(floor, "accuracy"), floor["n"])}} if floor else {}
    evaluation, metrics = object_or_empty(folder / "evaluation" / "evaluation.json"), entries["evaluation"].metrics
    if parts := evaluation.get("parts"):
        return {
            name: {subset: (_value(part[key], "perplexity"), part["n"]) for subset, part in parts.items()}
            for name, key in (("base", "base"), ("fine-tuned", "finetuned"))
        }
    rows = {ALL: metrics.get("n"), LEAK_FREE: value_at(evaluation, "models.base.leak_free.n")}
    found: dict[str, dict[str, Quality]] = {}
    for name, key in (("linear floor", "linear_floor"), ("base", "base"), ("fine-tuned", "finetuned")):
        for subset, ending in ((ALL, ""), (LEAK_FREE, "_leak_free")):
            if f"accuracy_{key}{ending}" in metrics:
                found.setdefault(name, {})[subset] = (_value(metrics, f"accuracy_{key}{ending}"), rows[subset])
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
    exists: bool = False


def read_stage(notebook: Path) -> Stage:
    """Title and question from the notebook's first Markdown cell.

    Raises:
        InputError: the file is no notebook.
    """
    import nbformat

    kinds = (nbformat.reader.NotJSONError, nbformat.ValidationError, AttributeError, KeyError)
    with refusing(kinds, "report/damaged-notebook", notebook=notebook):
        content = nbformat.read(notebook, as_version=4)
    first = next((c.source for c in content.cells if c.cell_type == "markdown"), "")
    title, question = (re.sub(r"[*`]", "", found[1]) if (found := p.search(first)) else "" for p in (_TITLE, _QUESTION))
    return Stage(notebook.stem, title or notebook.stem, question)


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
        sizes = (found[subset][1] for found in summary.qualities.values() if subset in found and found[subset][1])
        headings[subset] = sentence("index.subset", name=subset, n=next(sizes, None))
    rows = [
        {"model": name, **{h: found[s][0] if s in found else None for s, h in headings.items()}}
        for name, found in summary.qualities.items()
    ]
    caption = sentence("index.qualities_caption", labelled=summary.labelled)
    return build(rows, caption, dict.fromkeys(headings.values(), ".3f"))


def write_run_index(folder: Path, summary: Summary, stages: list[Stage], state: str = "") -> Path:
    """Write the overview of a run.

    Args:
        folder: reports/<run>/.
        state: a sentence when the report is not complete ("stopped in 03_evaluate: …"); empty when it is.
    """
    column, key = ("accuracy", "accuracy") if summary.labelled else ("answer_perplexity", "answer_ppl")
    given = summary.parameters(NOTEBOOK_OF["comparison"])
    margin = given.get("equivalence_margin" if summary.labelled else "perplexity_margin")
    verdicts = {"margin": margin, "seed": given.get("seed"), "rule": summary.rule}
    files = rows_of("index.files", summary.files, column=column, key=key)
    n = summary.files[0].get("n") if summary.files else None
    caption = sentence("index.files", n=n, apart=[file for file in summary.files if file.get("n") != n])
    cost = build(rows_of("index.cost", summary.entries.items()), sentence("index.cost"))
    text = fill(
        "run.html.j2",
        run=summary,
        css=stylesheet(),
        stages=stages,
        state=state,
        qualities=_qualities_table(summary) if summary.qualities else None,
        files=build(files, caption) if summary.files else None,
        reading=word_rows("index.reading", labelled=summary.labelled, **verdicts),
        cost=cost if summary.entries else None,
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
    rows = rows_of("index.shared", content["runs"], metric=content["metric"], taken=content["chosen"]["run"])
    return build(rows, sentence("index.shared", made=content["made"][:16].replace("T", " ")))


def recipe_table(content: Mapping[str, Any]) -> Table:
    """Every recipe's mean, the spread of its seeds, its paired difference to the leader."""

    return build(rows_of("index.recipes", content["recipes"]), sentence("index.recipes"))


# The list of all runs.


def _summary(name: str) -> Summary:
    try:
        return summarise(open_run(name))
    except (InputError, KeyError, OSError, TypeError):  # of another version, damaged, or not open to this user
        return Summary(name, {}, [sentence("index.unreadable")])


def write_all_index(reports: Path, total: int = PAGES) -> Path:
    """Write the list of all runs that have a page, and the last choice among runs (`workbook select`).

    Args:
        reports: the folder of all reports.
        total: pages of a complete report.
    """
    reports.mkdir(parents=True, exist_ok=True)
    with FileLock(reports / ".index.lock"):  # a report that ends meanwhile must not be missing from the list
        pages = reports.glob("*/index.html")
        made = {page.parent.name: len(list(page.parent.glob("[0-9][0-9]_*.html"))) for page in pages}
        runs = sorted(map(_summary, sorted(made)), key=lambda run: run.date, reverse=True)
        analysis, choice = read_analysis(reports), {}
        if analysis:
            choice = {
                "stale": outdated(analysis),
                "tables": [run_table(analysis), recipe_table(analysis)],
                "left_out": sentence("index.left_out", rows=analysis["rows"]["left_out"]),
            }
        path = reports / "index.html"
        values = {"css": stylesheet(), "runs": runs, "made": made, "total": total, "analysis": analysis}
        write_text(path, fill("all.html.j2", **values, **choice))
        return path
