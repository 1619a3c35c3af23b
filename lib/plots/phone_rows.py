"""The rows and sentences about real phones in notebook 07."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lib.plots.rows import Row


def phones(results: Iterable[Mapping[str, Any]], files: Iterable[Mapping[str, Any]], processor: str) -> list[Row]:
    """Speed and agreement of each phone, and below them this machine with the same files.

    Args:
        results: of `lib.comparison.phones.measured`.
        files: entries of the comparison.
        processor: of this machine, in words.
    """
    results = list(results)
    rows = [_phone(result) for result in results]
    types = {result["type"] for result in results}
    return rows + [_machine(entry, processor) for entry in files if entry["type"] in types]


def _phone(result: Mapping[str, Any]) -> Row:
    checks, rows, runtime = result["checks"], result["rows"], result["runtime"]
    gap = rows["largest_gap_nats"]
    return {
        "type": result["type"],
        "device": result["device"]["name"],
        "runtime": f"{result['device']['browser']}, wllama {runtime['wllama']}{', slower build' * runtime['compat']}",
        "threads": runtime["threads"],
        "load, s": statistics.median(result["load"]["seconds"]),
        "prompt, tokens/s": _spread(result["prompt"]["tokens_per_second"]),
        "generation, tokens/s": _spread(result["generation"]["tokens_per_second"]),
        "stored tokens": f"{checks['same_tokens']} of {checks['tokens']}",
        "stored labels": f"{rows['agree']} of {rows['n']}" if rows["n"] else None,
        "margins differ by ≤, nats": gap,
    }


def _machine(entry: Mapping[str, Any], processor: str) -> Row:
    return {
        "type": entry["type"],
        "device": f"this machine ({processor})",
        "runtime": "llama-cpp-python",
        "threads": None,
        "load, s": entry["load_seconds"],
        "prompt, tokens/s": _range(entry["prompt_tokens_per_second"], entry["prompt_tokens_per_second_range"]),
        "generation, tokens/s": _range(
            entry["generation_tokens_per_second"], entry["generation_tokens_per_second_range"]
        ),
        "stored tokens": None,
        "stored labels": None,
        "margins differ by ≤, nats": None,
    }


def _spread(values: Sequence[float]) -> str:
    return _range(statistics.median(values), (min(values), max(values)))


def _range(median: float, ends: Sequence[float]) -> str:
    low, high = ends
    return f"{median:,.1f} ({low:,.1f} – {high:,.1f})"


def reading(results: Sequence[Mapping[str, Any]], left_out: Sequence[str], run_name: str) -> str:
    """What the table shows, or how to get one."""
    if not results:
        text = (
            "No phone has measured a file of this run. To do so: "
            f"`workbook package {run_name} --web`, then `workbook serve {run_name} --phone --host 0.0.0.0`."
        )
        return " ".join([text, *left_out])
    agree, rows = (sum(result["rows"][key] for result in results) for key in ("agree", "n"))
    same, tokens = (sum(result["checks"][key] for result in results) for key in ("same_tokens", "tokens"))
    what = "1 result of the phone page" if len(results) == 1 else f"{len(results)} results of the phone page"
    text = f"{what}, each for a file with the SHA-256 of a compared one: "
    text += f"{same:,} of {tokens:,} stored tokens came back the same"
    text += f", and {agree:,} of {rows:,} stored labels." if rows else "."
    return " ".join([text, *left_out])
