"""A run in plain values, and the two index pages: one of a run (`reports/<run>/index.html`), one of all runs."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from lib.errors import InputError, refusing
from lib.language import TAGS, language, retold, translated
from lib.report.display import Table, build, rows_of, value_at
from lib.report.sentences import TEMPLATES, environment, sentence, word_rows
from lib.runs import manifest
from lib.runs.files import data_file, object_or_empty, sha256_json, write_text
from lib.runs.locks import lock_file
from lib.runs.manifest import NOTEBOOK_OF, Entry
from lib.runs.run import Run, open_run
from lib.select.choice import outdated, read_analysis
from lib.settings import FULL, UNTRAINED, Settings
from lib.stages.compare.recommend import reworded
from lib.stages.evaluate.results import ALL, LEAK_FREE, told_apart
from lib.stages.finetune.stage import PRETRAINING, made_with
from lib.statistics.intervals import Interval

if TYPE_CHECKING:
    from nbformat import NotebookNode

PAGES = len(set(NOTEBOOK_OF.values()))
"""Pages of a complete report."""

# What the manifest and the product folders say about a run.
#
# Later products may be missing and their files may lack keys: what is not there is left out, nothing is guessed.

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
        written: what the evaluation measured of written answers, one dict a metric; empty where nothing was written.
        files: one dict a quantized file, with the keys of comparison.json, and "recommended".
        recommendation: what the comparison recommends (`lib.stages.compare.recommend.recommend`); empty when there is
            none.
    """

    name: str
    entries: dict[str, Entry]
    stamps: list[str]
    qualities: dict[str, dict[str, Quality]] = field(default_factory=dict)
    written: list[dict[str, Any]] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)
    recommendation: dict[str, Any] = field(default_factory=dict)

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
        return retold(str(self.facts.get("source") or sentence("index.no_data")))

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
        """Settings that the products of these notebooks depend on (of all without an argument)."""
        merged: dict[str, Any] = {}
        for product, entry in self.entries.items():
            if not notebooks or NOTEBOOK_OF.get(product) in notebooks:
                merged |= {key: value for key, value in entry.parameters.items() if key in Settings.model_fields}
        return merged

    @property
    def recipe(self) -> dict[str, Any]:
        """What rows, base and training were asked for, without the seed of the training.

        An adopted adapter has none, and its run stands alone.
        """
        asked = made_with(self.parameters(NOTEBOOK_OF["adapter"]))
        asked |= {"run_name": self.name} if asked.pop("seed", None) is None else {}
        return self.parameters(NOTEBOOK_OF["data"]) | asked

    def products(self, notebook: str) -> dict[str, Entry]:
        """The products that a notebook makes."""
        return {p: e for p, e in self.entries.items() if NOTEBOOK_OF.get(p) == notebook}


def commit_words(git: Mapping[str, Any]) -> str:
    """A manifest's git entry in words."""
    return sentence("index.commit", git={"commit": None, "dirty": False, **git})


def pretraining(entry: Entry) -> float:
    """Seconds of an adapter's product that pre-trained the offline base; 0 where it was there already."""
    seconds = float(entry.facts.get(PRETRAINING, 0.0))
    return seconds if seconds >= 1 else 0.0


def summarise(run: Run) -> Summary:
    """Read a run; never fails on a product that is not there yet."""
    entries = {product: e for product, e in run.manifest.entries().items() if (run.folder / product).is_dir()}
    comparison = object_or_empty(run.folder / "comparison" / "comparison.json") if "comparison" in entries else {}
    recommendation = comparison.get("recommendation", {})
    if "headline" not in recommendation:  # of an older version, which the next report replaces
        recommendation = {}
    elif "conditions" in comparison:
        recommendation = reworded(comparison)
    return Summary(
        name=run.name,
        entries=entries,
        stamps=[*map(retold, run.stamps())],
        qualities=_qualities(run.folder, entries),
        written=_written(run.folder) if "evaluation" in entries else [],
        files=[{**f, "recommended": f["type"] == recommendation.get("type")} for f in comparison.get("files", [])],
        recommendation=recommendation,
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
            if all(key in part for part in parts.values())
        }
    rows = {ALL: metrics.get("n"), LEAK_FREE: value_at(evaluation, "models.base.leak_free.n")}
    found: dict[str, dict[str, Quality]] = {}
    for name, key in (("linear floor", "linear_floor"), ("base", "base"), ("fine-tuned", "finetuned")):
        for subset, ending in ((ALL, ""), (LEAK_FREE, "_leak_free")):
            if f"accuracy_{key}{ending}" in metrics:
                found.setdefault(name, {})[subset] = (_value(metrics, f"accuracy_{key}{ending}"), rows[subset])
    return found


def _written(folder: Path) -> list[dict[str, Any]]:
    """The metrics that say whether a written answer is the reference."""
    answers = object_or_empty(folder / "evaluation" / "evaluation.json").get("answers", [])
    return [entry for entry in answers if entry["key"] in _ALIKE]


_ALIKE = ("exact_match", "answer_f1", "entity_f1", "chrf")


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


INSTEAD = {UNTRAINED: "untrained", FULL: "full"}
"""Metadata of a cell that speaks of a training, or of an adapter: what stands in its place where nothing is trained, or
every weight is; "" for nothing."""


def read_notebook(notebook: Path, finetuning_type: str = "lora") -> NotebookNode:
    """A notebook as a report executes it: without the cells that speak of what a run of this type has not.

    Raises:
        InputError: the file is no notebook.
    """
    import nbformat

    kinds = (nbformat.reader.NotJSONError, nbformat.ValidationError, AttributeError, KeyError)
    with refusing(kinds, "report/damaged-notebook", notebook=notebook):
        content = nbformat.read(notebook, as_version=4)
        key = INSTEAD.get(finetuning_type)
        for cell in content.cells if key else ():
            cell.source = cell.metadata.get(key, cell.source)
        content.cells = [cell for cell in content.cells if cell.source or not key]
    return content


def write_reduced(notebook: Path, path: Path, finetuning_type: str) -> Path:
    """Write a notebook as `read_notebook` reads it."""
    import nbformat

    write_text(path, nbformat.writes(read_notebook(notebook, finetuning_type)))
    return path


def read_stage(notebook: Path, finetuning_type: str = "lora") -> Stage:
    """Title and question from the notebook's first Markdown cell.

    Raises:
        InputError: the file is no notebook.
    """
    content = read_notebook(notebook, finetuning_type)
    first = next((c.source for c in content.cells if c.cell_type == "markdown"), "")
    first = translated(first.strip(), f"notebooks/{notebook.stem}")
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
    found = next((entry.versions for entry in reversed(list(entries))), manifest.versions())
    return [(name, retold(version)) for name, version in found.items()]


# The overview of a run.


def _qualities_table(summary: Summary) -> Table:
    counts = [{subset: n for subset, (_, n) in found.items()} for found in summary.qualities.values()]
    subsets = dict.fromkeys(subset for rows in counts for subset in told_apart(rows))
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


def _written_table(answers: Iterable[Mapping[str, Any]]) -> Table:
    """How near the written answers are to the references."""
    entries = list(answers)
    models = dict.fromkeys(model for entry in entries for model in entry["models"])
    rows = [
        {
            "metric": entry["name"],
            **{m: Interval.from_json(v["estimate"], v["interval"]) for m, v in entry["models"].items()},
        }
        for entry in entries
    ]
    return build(rows, sentence("index.written", n=entries[0]["n"]), dict.fromkeys(models, ".2f"))


def _picture(summary: Summary) -> str:
    """Loss against size with the verdicts, as page 07 shows it."""
    if not summary.recommendation or len(summary.files) < 2:
        return ""
    from lib.report.charts import size_loss

    advice = summary.recommendation
    return str(size_loss(summary.files, advice["type"], advice["margin"], advice["unit"]).data)


def write_run_index(folder: Path, summary: Summary, stages: list[Stage], state: str = "") -> Path:
    """Write the overview of a run.

    Args:
        folder: reports/<run>/.
        state: a sentence when the report is not complete ("stopped in 03_evaluate: …"); empty when it is.
    """
    column, key = ("accuracy", "accuracy") if summary.labelled else ("answer_perplexity", "answer_ppl")
    given = summary.parameters(NOTEBOOK_OF["comparison"])
    margin = given.get("equivalence_margin" if summary.labelled else "perplexity_margin")
    verdicts = {"margin": margin, "seed": given.get("seed")}
    files = rows_of("index.files", summary.files, column=column, key=key)
    if not summary.labelled:
        files = [{name: cell for name, cell in row.items() if name != "flips"} for row in files]
    n = summary.files[0].get("n") if summary.files else None
    caption = sentence("index.files", n=n, apart=[file for file in summary.files if file.get("n") != n])
    words = data_file("runs/products.yaml")["words"]
    base = next(filter(None, map(pretraining, summary.entries.values())), 0.0)
    cost = build(rows_of("index.cost", summary.entries.items(), words=words), sentence("index.cost", base_seconds=base))
    text = fill(
        "run.html.j2",
        run=summary,
        css=stylesheet(),
        stages=stages,
        state=state,
        more=sentence("compare.more", verdicts=[file.get("verdict") for file in summary.files]),
        picture=_picture(summary),
        qualities=_qualities_table(summary) if summary.qualities else None,
        written=_written_table(summary.written) if summary.written else None,
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
    return environment("pages", True).get_template(template).render(lang=TAGS[language()], **values)


# The choice among runs, for the index and the command line.


def run_table(content: Mapping[str, Any]) -> Table:
    """Every run's metric on the shared rows, validation loss, speed and sizes (model_analysis.json)."""
    rows = rows_of("index.shared", content["runs"], metric=content["metric"], taken=content["chosen"]["run"])
    return build(rows, sentence("index.shared", made=content["made"][:16].replace("T", " ")))


def recipe_table(content: Mapping[str, Any]) -> Table:
    """Every recipe's mean, the spread of its seeds, its paired difference to the leader."""

    return build(rows_of("index.recipes", content["recipes"]), sentence("index.recipes"))


# The list of all runs, and the sweeps among them.


def sweep_tables(runs: Iterable[Summary]) -> list[Table]:
    """A table for every set of test rows that several trainings were evaluated on.

    A row is a recipe (`Summary.recipe`): mean and spread of accuracy or answer perplexity over its seeds, best first.
    """
    found: dict[str, dict[str, list[Summary]]] = {}
    for run in runs:
        rows = run.entries["data"].outputs.get("test.jsonl") if "data" in run.entries else None
        if rows and "adapter" in run.entries and ALL in run.qualities.get("fine-tuned", {}):
            found.setdefault(rows["sha256"], {}).setdefault(sha256_json(run.recipe), []).append(run)
    return [_sweep(list(recipes.values())) for recipes in found.values() if sum(map(len, recipes.values())) > 1]


def _sweep(recipes: list[list[Summary]]) -> Table:
    first, asked = recipes[0][0], [members[0].recipe for members in recipes]
    keys = dict.fromkeys(key for own in asked for key in own)
    differing = [key for key in keys if any(own.get(key) != asked[0].get(key) for own in asked)]
    entries = []
    for members, own in zip(recipes, asked, strict=True):
        # of two runs with one seed, the newer: they are one piece of evidence
        seeds = {
            run.entries["adapter"].parameters.get("seed"): run for run in sorted(members, key=lambda run: run.date)
        }
        values = [float(getattr(value, "estimate", value)) for value in (_finetuned(run) for run in seeds.values())]
        told = {
            "settings": ", ".join(f"{key} {own[key]}" for key in differing if key in own),
            "runs": ", ".join(sorted(run.name for run in seeds.values())),
            "mean": mean(values),
            "seed_sd": stdev(values) if len(values) > 1 else None,
        }
        entries.append({**told, "n_seeds": len(values), "seed_range": [min(values), max(values)]})
    entries.sort(key=lambda entry: entry["mean"], reverse=first.labelled)
    n = first.qualities["fine-tuned"][ALL][1]
    return build(
        rows_of("index.sweep", entries), sentence("index.sweep", labelled=first.labelled, n=n, data=first.data)
    )


def _finetuned(run: Summary) -> Interval | float:
    return run.qualities["fine-tuned"][ALL][0]


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
    with lock_file(reports / ".index.lock"):  # a report that ends meanwhile must not be missing from the list
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
        values["sweeps"] = sweep_tables(runs)
        write_text(path, fill("all.html.j2", **values, **choice))
        return path
