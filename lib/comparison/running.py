"""The processes of a comparison: one a file, what each of them gets, and where its scores are kept."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.comparison.encoding import Work
from lib.progress import say
from lib.run.child import run_child
from lib.scoring.journal import journal_path

_TEMPORARY = ".reference-"
SCORING = ".scores"
"""Folder of scores and answers that are kept as they come."""


def shared_argument(work: Work, rows: Sequence[Mapping[str, Any]], threads: int, gpu_layers: int) -> dict[str, Any]:
    """What every child process gets."""
    return {
        "names": [str(rows[i]["id"]) for i in work.order],
        "prompts": work.prompts,
        "answers": work.answers,
        "spans": work.spans,
        "windows": work.windows,
        "documents": work.documents,
        "n_ctx": work.n_ctx,
        "n_threads": threads,
        "n_gpu_layers": gpu_layers,
        "sample": work.sample,
    }


def run_all(paths: Sequence[Path], shared: Mapping[str, Any], output: Path) -> list[dict[str, Any]]:
    """Measure every file, one process after another; the reference's log-probabilities live as long as this call."""
    answers = []
    for stray in output.glob(f"{_TEMPORARY}*"):  # of a comparison that was killed
        shutil.rmtree(stray, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=output) as folder:
        stored = str(Path(folder).resolve() / "log-probs")
        for place, path in enumerate(paths):
            function = "torch_worker:score_folder" if path.is_dir() else "worker:score_file"
            what = f"comparing {path.name} ({place + 1} of {len(paths)})"
            more = {"reference": stored, "is_reference": place == 0}
            answers.append(run_one(function, path, {**shared, **more}, output, what))
    return answers


def run_one(function: str, path: Path, argument: Mapping[str, Any], output: Path, what: str) -> dict[str, Any]:
    """One process; what it scores or writes is kept in `output` until the whole comparison is done.

    Args:
        function: "module:name" of this package; it gives "found": what was found done, in words.
    """
    name = function.partition(":")[2]  # one file may be scored in two ways
    keep = journal_path(output / SCORING / name, path.resolve())
    given = {**argument, "path": str(path.resolve()), "keep": str(keep)}
    answer = run_child(f"lib.comparison.{function}", given, what)
    if answer["found"]:
        say(f"{path.name}: {answer['found']}")
    return answer


def forget_scores(output: Path) -> None:
    """Remove what was kept for an interruption."""
    shutil.rmtree(output / SCORING, ignore_errors=True)
