"""The choice among runs as tables for the index and the command line.
The two index pages: one of a run (`reports/<run>/index.html`), one of all runs (`reports/index.html`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.report.html import Stage, card, pages, shown, stylesheet
from lib.report.summary import Quality, Summary, reading, summarise
from lib.runs import manifest
from lib.runs.files import write_text
from lib.runs.manifest import NOTEBOOK_OF
from lib.runs.run import open_run
from lib.select.choice import outdated, read_analysis
from lib.statistics.verdicts import in_words

# The choice among runs as tables for the index and the command line.

_WORDS = {"accuracy": "accuracy ↑", "answer_loss": "loss of the answers, nats a token ↓"}


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _limits(interval: Sequence[float | None] | None, form: str = ".4f") -> str:
    if interval is None or None in interval:
        return "–"
    return f"[{interval[0]:{form}}, {interval[1]:{form}}]"


def run_rows(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: every run's metric on the shared rows, validation loss, speed and sizes."""
    columns = [
        *("run", _WORDS[content["metric"]], "validation loss ↓", "train seed", "rows/s of training ↑"),
        *("adapter, MB", "recommended file", "unlike the first run"),
    ]
    rows = []
    for run in content["runs"]:
        file = run["file"]
        rows.append(
            [
                f"{run['run']}{' ★' if run['run'] == content['chosen']['run'] else ''}",
                f"{run['metric']:.4f} {_limits(run['interval'])}",
                _number(run["validation_loss"], ".4f"),
                _number(run["train_seed"], "d"),
                _number(run["samples_per_second"], ".2f"),
                f"{run['adapter_bytes'] / 1e6:.2f}",
                f"{file['type']}, {file['bytes'] / 1e6:.2f} MB" if file else "–",
                "; ".join(run["unlike_first"]) or "–",
            ]
        )
    return columns, rows


def recipe_rows(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: every recipe's mean, the spread of its seeds, its paired difference to the leader."""
    columns = [
        *("runs of the recipe", "seeds", "mean", "standard deviation", "range"),
        *("difference to the leader, simultaneous interval", "p (Holm)", "verdict"),
    ]
    rows = []
    for recipe in content["recipes"]:
        seeds = recipe["n_seeds"] > 1
        leads = recipe["verdict"] == "leader"
        rows.append(
            [
                ", ".join(recipe["runs"]),
                str(recipe["n_seeds"]),
                f"{recipe['mean']:.4f}",
                _number(recipe["seed_sd"], ".4f"),
                _limits(recipe["seed_range"]) if seeds else "–",
                "–" if leads else f"{recipe['difference']:+.4f} {_limits(recipe['difference_interval'], '+.4f')}",
                "–" if leads else f"{recipe['p_holm']:.2g}",
                recipe["verdict"],
            ]
        )
    return columns, rows


def choice_section(content: dict[str, Any], stale: list[str]) -> dict[str, Any]:
    """What the index shows of an analysis.

    Args:
        stale: runs that have changed since.
    """
    return {
        "text": content["text"],
        "rule": content["rule"],
        "made": content["made"][:16].replace("T", " "),
        "stale": stale,
        "runs": run_rows(content),
        "recipes": recipe_rows(content),
        "left_out": ", ".join(f"{count} {why}" for why, count in content["rows"]["left_out"].items() if count),
    }


# The two index pages: one of a run (`reports/<run>/index.html`), one of all runs (`reports/index.html`).

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


def _shown_number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, (int, float)) and not isinstance(value, bool) else "–"


def _file_row(file: dict[str, Any]) -> list[str]:
    interval = file.get("accuracy_interval", file.get("answer_ppl_interval"))
    bounds = tuple(float(v) for v in interval) if isinstance(interval, (list, tuple)) and len(interval) == 2 else None
    accuracy = file.get("accuracy", file.get("answer_ppl"))
    quality = str(Quality(float(accuracy), bounds, None)) if isinstance(accuracy, (int, float)) else "–"
    size = file.get("bytes")
    return [
        f"{file.get('type', '–')}{' ★' if file.get('recommended') else ''}",
        _shown_number(size / 1e6 if isinstance(size, (int, float)) else None, ".2f"),
        _shown_number(file.get("bits_per_weight"), ".2f"),
        quality,
        _shown_number(file.get("kld_mean"), ".4f"),
        _shown_number(file.get("flips"), "d" if isinstance(file.get("flips"), int) else ".0f"),
        _shown_number(file.get("ppl"), ".3f"),
        _shown_number(file.get("generation_tokens_per_second"), ".0f"),
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
    versions = next((e.versions for e in reversed(list(summary.entries.values()))), manifest.versions())
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
    choice = choice_section(analysis, outdated(analysis)) if analysis else None
    write_text(path, pages().get_template("all.html.j2").render(css=stylesheet(), runs=runs, choice=choice))
    return path
