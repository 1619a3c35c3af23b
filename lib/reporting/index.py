"""The two index pages: one of a run (`reports/<run>/index.html`), one of all runs (`reports/index.html`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.reporting.choosing import section
from lib.reporting.pages import Stage, card, pages, shown, stylesheet
from lib.reporting.reading import reading
from lib.reporting.summary import Quality, Summary, summarise
from lib.run import open_run, provenance
from lib.run.files import write_text
from lib.run.manifest import NOTEBOOK_OF
from lib.selecting import outdated, read_analysis
from lib.statistics import in_words

PAGES = len(set(NOTEBOOK_OF.values()))
"""Pages of a complete report."""

_FILE_COLUMNS = {
    "type": "type",
    "size": "size, MB",
    "bits_per_weight": "bpw",
    "accuracy": "accuracy ↑",
    "kld_mean": "KLD ↓",
    "flips": "flips",
    "ppl": "perplexity ↓",
    "generation_tokens_per_second": "tokens/s ↑",
    "verdict": "verdict",
}


_MEASURE = {True: "Accuracy", False: "Perplexity of the reference answers"}
"""What the qualities of a run are, by whether its rows have labels."""


def _columns(labelled: bool) -> list[str]:
    """Headings of the table of files; the column of the accuracies holds what stands in their place."""
    shown = _FILE_COLUMNS if labelled else {**_FILE_COLUMNS, "accuracy": "answer perplexity ↓"}
    return list(shown.values())


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, (int, float)) and not isinstance(value, bool) else "–"


def _file_row(file: dict[str, Any]) -> list[str]:
    interval = file.get("accuracy_interval", file.get("answer_ppl_interval"))
    bounds = tuple(float(v) for v in interval) if isinstance(interval, (list, tuple)) and len(interval) == 2 else None
    accuracy = file.get("accuracy", file.get("answer_ppl"))
    quality = str(Quality(float(accuracy), bounds, None)) if isinstance(accuracy, (int, float)) else "–"
    size = file.get("bytes")
    return [
        f"{file.get('type', '–')}{' ★' if file.get('recommended') else ''}",
        _number(size / 1e6 if isinstance(size, (int, float)) else None, ".2f"),
        _number(file.get("bits_per_weight"), ".2f"),
        quality,
        _number(file.get("kld_mean"), ".4f"),
        _number(file.get("flips"), "d" if isinstance(file.get("flips"), int) else ".0f"),
        _number(file.get("ppl"), ".3f"),
        _number(file.get("generation_tokens_per_second"), ".0f"),
        in_words(file) if file.get("verdict") else "–",
    ]


def _accuracy_rows(summary: Summary) -> tuple[list[str], list[list[str]]]:
    kinds = list(dict.fromkeys(kind for quality in summary.qualities.values() for kind in quality))
    words = {"all": "all test rows", "leak_free": "leak-free rows"}
    sizes = {k: next((q[k].n for q in summary.qualities.values() if k in q and q[k].n), None) for k in kinds}
    columns = ["model", *(f"{words[k]} (n = {sizes[k]})" if sizes[k] else words[k] for k in kinds)]
    rows = [[name, *(str(q.get(kind, "–")) for kind in kinds)] for name, q in summary.qualities.items()]
    return columns, rows


def _cost_rows(summary: Summary) -> list[list[str]]:
    return [
        [
            product,
            f"{entry.seconds:.1f}",
            f"{entry.peak_memory_mib:.0f}",
            f"{sum(o['bytes'] for o in entry.outputs.values()) / 1e6:.1f}",
            entry.device,
            entry.finished[:16].replace("T", " "),
        ]
        for product, entry in summary.entries.items()
    ]


def write_run_index(folder: Path, summary: Summary, stages: list[Stage], state: str = "") -> Path:
    """Write the overview of a run.

    Args:
        folder: reports/<run>/.
        state: a sentence when the report is not complete ("stopped in 03_evaluate: …"); empty when it is.
    """
    columns, accuracy = _accuracy_rows(summary)
    versions = next((e.versions for e in reversed(list(summary.entries.values()))), provenance.versions())
    text = (
        pages()
        .get_template("run.html.j2")
        .render(
            name=summary.name,
            css=stylesheet(),
            stages=stages,
            card=card(summary),
            stamps=summary.stamps,
            state=state,
            answer=summary.recommendation,
            accuracy_columns=columns,
            accuracy=accuracy,
            measure=_MEASURE[summary.labelled],
            file_columns=_columns(summary.labelled),
            files=[_file_row(file) for file in summary.files],
            reading=reading(summary),
            cost=_cost_rows(summary),
            parameters=[(key, shown(value)) for key, value in summary.parameters().items()],
            versions=list(versions.items()),
        )
    )
    path = folder / "index.html"
    write_text(path, text)
    return path


def _remarks(summary: Summary, folder: Path, total: int) -> str:
    made = len(list(folder.glob("[0-9][0-9]_*.html")))
    incomplete = [f"incomplete: {made} of {total} pages"] if made < total else []
    return "; ".join(incomplete + summary.stamps)


def write_all_index(reports: Path, total: int = PAGES) -> Path:
    """Write the list of all runs that have a page, and the last choice among runs (`workbook select`).

    Args:
        reports: the folder of all reports.
        total: pages of a complete report.
    """
    runs = []
    for folder in sorted(p.parent for p in reports.glob("*/index.html")):
        try:
            summary = summarise(open_run(folder.name))
        except (InputError, KeyError, TypeError):  # a manifest that another version wrote, or that is damaged
            summary = Summary(folder.name, {}, ["its manifest cannot be read"])
        unit = "" if summary.labelled else "PPL "
        quality = {name: f"{unit}{found.get('all', '–')}" for name, found in summary.qualities.items()}
        best = next((f for f in summary.files if f.get("recommended")), None)
        runs.append(
            {
                "name": folder.name,
                "date": summary.date,
                "model": summary.model,
                "data": summary.data,
                "floor": quality.get("linear floor", "–"),
                "base": quality.get("base", "–"),
                "finetuned": quality.get("fine-tuned", "–"),
                "file": f"{best.get('type')}, {_file_row(best)[1]} MB" if best else "–",
                "remarks": _remarks(summary, folder, total),
            }
        )
    runs.sort(key=lambda run: run["date"], reverse=True)
    path = reports / "index.html"
    analysis = read_analysis(reports)
    choice = section(analysis, outdated(analysis)) if analysis else None
    write_text(path, pages().get_template("all.html.j2").render(css=stylesheet(), runs=runs, choice=choice))
    return path
