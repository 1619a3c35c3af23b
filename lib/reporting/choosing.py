"""The choice among runs as tables for the index and the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def section(content: dict[str, Any], stale: list[str]) -> dict[str, Any]:
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
