"""The papers of an export tree: README.md, deployment_guide.md, usage_examples.py, test_model.py, requirements.txt."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib import CHATTER
from lib.language import translated
from lib.runs.files import write_text
from lib.runs.packages import closure, pin
from lib.runs.render import megabytes, render
from lib.stages.export.stage import FORMATS

_TEMPLATES = Path(__file__).with_name("templates")
PAPERS = ("README.md", "deployment_guide.md", "usage_examples.py", "test_model.py", "requirements.txt")


def write_papers(folder: Path, report: Mapping[str, Any], prompts: Sequence[Mapping[str, str]]) -> None:
    """Write them into the tree.

    Args:
        report: the content of export_report.json. prompts: those that the formats were asked; the first is the example.
    """
    folders = [
        {**r, "note": FORMATS[r["format"]].note, "runs_in": FORMATS[r["format"]].runs_in}
        for r in report["formats"]
        if r["format"] in FORMATS
    ]
    gguf = [record for record in report["formats"] if record["format"] not in FORMATS]
    values = {
        "report": report,
        "folders": folders,
        "gguf": gguf,
        "onnx": any(record["runs_in"] == "ONNX Runtime" for record in folders),
        "mnn": any(record["runs_in"] == "MNN" for record in folders),
        "question": prompts[0]["prompt"],
        "thinks": report["merged_model"]["checks"]["thinking"] is not None,
        "chatter": CHATTER,
        "requirements": _requirements(folders, gguf),
        "rows": table_rows(report),
        "quoted": shlex.quote,
    }
    for name in PAPERS:
        write_text(folder / name, render(_TEMPLATES / f"{name}.j2", **values))


def _requirements(folders: Sequence[Mapping[str, Any]], gguf: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of requirements.txt: the versions with which the tree was made and tested."""
    needs = dict.fromkeys(name for record in folders for name in FORMATS[record["format"]].needs)
    lines = [f"# {translated('The folders for transformers (torch in the build that suits the device)')}"]
    lines += [pin(name) for name in ("torch", "transformers", "accelerate", *(n for n in needs if n != "accelerate"))]
    lines += [line for record in folders if (made := FORMATS[record["format"]]).environment for line in made.pins()[:1]]
    return lines + ([f"# {translated('The files in gguf/')}", *closure("llama_cpp_python")] if gguf else [])


def table_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for the merged model and for every format, for terminals and pages: sizes, the four checks, accuracy."""
    merged, rows = report["merged_model"], []
    quality = (report["evaluation"] or {"models": []})["models"]
    for place, record in enumerate((merged, *report["formats"])):
        checks, own = record["checks"], quality[place] if quality else {}
        terms, thinking = checks["terms"], checks["thinking"]
        row = {
            "format": record.get("path", "merged_model"),
            "MB": megabytes(record["bytes"]),
            "of merged, %": 100 * record["bytes"] / merged["bytes"],
            "mean KLD": record["check"]["mean_kld"] if "check" in record else None,
            "same answers": f"{checks['same_text']} of {checks['prompts']}" if place else None,
            "chrF": checks["chrf"],
            "whole characters": f"{checks['whole']} of {checks['prompts']}",
            "terms kept": f"{terms[0]} of {terms[1]}" if terms[1] else None,
            "thinking complete": f"{thinking[0]} of {thinking[1]}" if thinking else None,
            "looping": f"{checks['looping']} of {checks['prompts']}",
        }
        for key in ("accuracy", "perplexity"):
            if own.get(key) is not None:
                row[key] = own[key]
        rows.append(row)
    return [{key: row.get(key) for key in _columns(rows)} for row in rows]


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns in which some row says something."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if any(row.get(name) is not None for row in rows)]
