"""Checkpoints that are complete or absent: a record with sizes and hashes is written last, and resuming trusts only it.

Beside them lies a record of the arithmetic that made them (number format, 4 bits or not, kind of device). The product
names one of each, so a training does not go on in another: it begins afresh, and says so.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.runs import machine
from lib.runs.files import flush_to_disk, read_json, settle, sha256_json, write_json
from lib.runs.manifest import hash_folder
from lib.settings import Settings

ARITHMETIC_RECORD = "arithmetic.json"
"""Beside the checkpoints."""

LIVE = "losses.jsonl.live"
"""Beside training.log while a training runs: the rows of the history so far."""

RECORD = "complete.json"

STAGED = ".staged"
"""Folder beside the checkpoints for what is not complete."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint of one training."""

    step: int
    path: Path
    eval_loss: float | None


def publish(staged: Path, final: Path, step: int) -> None:
    """Seal a staged checkpoint with its record and rename it to its place; a kill in between leaves nothing there."""
    files = hash_folder(staged)
    settle(staged)
    write_json(staged / RECORD, _sealed({"step": step, "eval_loss": None, "files": files}))
    shutil.rmtree(final, ignore_errors=True)
    staged.rename(final)
    flush_to_disk(final.parent)


def add_loss(path: Path, eval_loss: float) -> None:
    """Add the validation loss to a checkpoint's record; a kill in between leaves the record without it."""
    staged = path.parent / STAGED / RECORD
    write_json(staged, _sealed({**read_json(path / RECORD), "eval_loss": eval_loss}))
    staged.replace(path / RECORD)
    flush_to_disk(path)


def _sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with a hash over the rest of it: its step and loss are believed, too."""
    content = {key: value for key, value in record.items() if key != "sha256"}
    return {**content, "sha256": sha256_json(content)}


def _verified(path: Path) -> Checkpoint | str:
    """The checkpoint in a folder; or in words why it cannot be trusted: its record, or a file, is not as written."""
    if not (path / RECORD).is_file():
        return f"{path.name} is incomplete (no {RECORD})"
    record = None
    with contextlib.suppress(InputError):
        record = read_json(path / RECORD)
    if not isinstance(record, dict) or _sealed(record) != record or record.get("step") != _step(path):
        return f"{path.name} is damaged ({RECORD})"
    recorded, found = record["files"], hash_folder(path)
    del found[RECORD]
    if damaged := [name for name in sorted({*recorded, *found}) if recorded.get(name) != found.get(name)]:
        return f"{path.name} is damaged ({damaged[0]})"
    return Checkpoint(record["step"], path, record["eval_loss"])


def find(folder: Path) -> tuple[list[Checkpoint], list[str]]:
    """All verified checkpoints of a training, oldest first, and what is wrong with the others."""
    found = [_verified(path) for path in sorted(filter(Path.is_dir, folder.glob("checkpoint-*")), key=_step)]
    return [c for c in found if isinstance(c, Checkpoint)], [problem for problem in found if isinstance(problem, str)]


def _step(path: Path) -> int:
    tail = path.name.rpartition("-")[2]
    return int(tail) if tail.isdigit() else -1


def best(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """The one with the lowest validation loss (the earlier one of equals); None when none was evaluated."""
    judged = [c for c in checkpoints if c.eval_loss is not None]
    return min(judged, key=lambda c: (c.eval_loss, c.step)) if judged else None


def prune(folder: Path) -> None:
    """Keep the two newest verified checkpoints and the best one; remove the others and the damaged."""
    good, _ = find(folder)
    keep = {c.path for c in (*good[-2:], best(good)) if c}
    for path in filter(Path.is_dir, folder.glob("checkpoint-*")):
        if path not in keep:
            shutil.rmtree(path)


def write_log(folder: Path, line: str) -> None:
    """Append a line with a time stamp to training.log."""
    with (folder / "training.log").open("a", encoding="utf-8") as stream:
        stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S%z')} {line}\n")


def same_or_afresh(folder: Path, settings: Settings) -> list[str]:
    """Remove what an interrupted training left if it computed in another way, and record how this one computes.

    Args:
        folder: of the work; hidden files are not the training's.

    Returns:
        For the reader: what was different, in a sentence; nothing where all is as it was.
    """
    dtype, _ = machine.compute_dtype(settings.dtype)
    now = {"dtype": dtype, "in_4bit": settings.load_in_4bit, "device": machine.torch_device()}
    record, checkpoints = folder / "checkpoints" / ARITHMETIC_RECORD, any(folder.glob("checkpoints/checkpoint-*"))
    before = None
    with contextlib.suppress(InputError, OSError):  # nothing was recorded, or nothing that can be read
        found = read_json(record)
        before = found if isinstance(found, dict) and found.keys() == now.keys() else None
    if before == now:
        return []
    messages = []
    if before or checkpoints:
        words = f"the checkpoints were made in {_words(before)}, and now it is {_words(now)}: trained afresh"
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.name.startswith("."):
                path.unlink()
        write_log(folder, words)
        messages = [words] if checkpoints else []
    write_json(record, now)
    return messages


def _words(arithmetic: dict[str, object] | None) -> str:
    if arithmetic is None:
        return "an unknown number format"
    over = " over a base in 4 bits" if arithmetic["in_4bit"] else ""
    return f"{arithmetic['dtype']} on {arithmetic['device']}{over}"
