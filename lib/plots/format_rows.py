"""The rows and sentences about export formats in notebooks 06 and 07."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lib.plots.rows import Row


def exports(made: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Size, cost and self-check of each format (records of exports.json); one row saying so where there is none."""
    rows = [
        {
            "format": record["format"],
            "what": record["title"],
            "MB": record["bytes"] / 1e6,
            "bits per weight": record["bits_per_weight"],
            "weights a scale": record.get("group_size"),
            "KL from merged, nats": record["check"]["mean_kld"],
            "same top": record["check"]["same_top"],
            "seconds": record["seconds"],
            "peak memory, MiB": record["peak_memory_mib"],
        }
        for record in made
    ]
    return rows or [{"format": "none", "what": "no format was made"}]


def skipped(formats: Iterable[Mapping[str, str]]) -> str:
    """Why formats that were asked for are absent, in words."""
    reasons = [f"**{entry['format']}** ({entry['reason'].rstrip('.')})" for entry in formats]
    return f"Skipped: {'; '.join(reasons)}." if reasons else "Every format that was asked for was made."


def compared(files: Iterable[Mapping[str, Any]], formats: Iterable[Mapping[str, str]]) -> str:
    """What stands in the tables of 07 beside GGUF files, and what is not there."""
    entries = [entry for entry in files if entry["kind"] == "folder"]
    folders = [entry["type"] for entry in entries]
    if folders:
        where = ", ".join(dict.fromkeys(entry["device"] for entry in entries))
        text = (
            f"{', '.join(folders)}: folders for transformers, made in 06 from the same merged model and scored by the "
            f"same scorer on the same token ids (on: {where}); MB are those of their weights, without the "
            "tokenizer that a GGUF file contains. llama.cpp does not run them, so the recommendation leaves them out."
        )
    else:
        text = "Only GGUF files were compared."
    return f"{text} {skipped(formats)}" if formats else text
