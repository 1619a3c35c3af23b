"""`workbook new`: look at a user's data as stage 01 does, and write the parameter file that fits it.

Nothing is asked. Every key that differs from params/quick.yaml is written with the reason, and the rows are then
cleaned and divided with these very settings, so that what is told is what 01 will find.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import language
from lib.cli.console import show
from lib.cli.labels import Keys, is_chinese, label_keys, label_values
from lib.errors import InputError, refusal
from lib.runs import machine
from lib.runs.files import PROJECT, user_path, write_text
from lib.runs.render import render

if TYPE_CHECKING:
    from lib.settings import Settings
    from lib.stages.data.data_files import Rows
    from lib.stages.data.stage import DividedRows

FOLDED_ROWS = 3000
"""Rows up to which five trainings instead of one are proposed, where one test split shows too little."""
FIRST_LOOK = 20_000
"""Training rows of a first run; of more so many are drawn."""
MEASURED_ROWS = 2000
"""Rows whose tokens are counted."""
STEP, LONGEST = 64, 1024
"""max_seq_length is proposed in steps of so many tokens, up to so many."""


def new(
    source: str,
    base_model: str = "",
    name: str = "",
    output: Path | None = None,
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Look at a table or at conversations and write params/NAME.yaml with what differs from params/quick.yaml, and why.

    Nothing is asked and nothing is trained.
    """
    from lib.settings import Settings, yaml_value

    place = user_path(source)
    folder = PROJECT / "params" if (PROJECT / "params").is_dir() else Path("params")
    run_name = name or _run_name(place)
    path = (output or folder / f"{run_name}.yaml").absolute()
    if path.exists() and not force:
        raise refusal("cli/parameters-there", output=_short(path))
    keys, told = look(source, run_name, base_model)
    order = [key for key in Settings.model_fields if key in keys.values]
    lines = [(key, _plain(yaml_value(keys.values[key])), language.told(keys.why[key])) for key in order]
    told |= {"source": source, "file": str(_short(path)), "keys": order}
    path.parent.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    write_text(path, render(here / "new.yaml.j2", source=source, file=told["file"], lines=lines, base_model=base_model))
    show(told | {"parameters": keys.values}, as_json, render(here / "new.txt.j2", **told).rstrip())


def _short(path: Path) -> Path:
    """A path as it is written from the current folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _plain(value: str) -> str:
    """A text without marks where YAML reads it as the same text."""
    return value[1:-1] if re.fullmatch(r'"[^\W\d_][\w./-]*"', value) and value[1:-1].lower() not in _WORDS else value


_WORDS = frozenset(("true", "false", "yes", "no", "on", "off", "null", "y", "n"))
"""What YAML takes for something else than a text."""


def _run_name(place: Path) -> str:
    """A run's name made of that of the data."""
    stem = place.name if place.is_dir() else place.stem
    return re.sub(r"[^\w.-]+", "-", stem).strip("-._")[:80] or "mine"


def look(source: str, run_name: str, base_model: str = "") -> tuple[Keys, dict[str, Any]]:
    """Read, clean and divide the rows of a file or folder, and find the settings that they need.

    Returns:
        the keys of its parameter file, and what is told of the rows as 01 will divide them.

    Raises:
        InputError: as 01, or no column that can be a label.
    """
    from lib.settings import check
    from lib.stages.data.dialogues import told_by_rows
    from lib.stages.data.reading import choose_data, read_table
    from lib.stages.data.stage import divide

    table = read_table(source)
    rows = [row for split in table.splits.values() for row in split]
    keys = Keys()
    place = user_path(source)
    inside = place.is_relative_to(PROJECT)
    keys.put("run_name", run_name, "folder under runs/ and reports/")
    keys.put("dataset", str(place.relative_to(PROJECT) if inside else place), f"{table.source}, {len(rows):,} rows")
    _base_keys(keys, base_model)
    conversation = told_by_rows(rows, None)
    told: dict[str, Any] = {"rows": len(rows), "columns": list(map(str, rows[0])), "labels": [], "shown": None}
    told["splits"] = {name: len(split) for name, split in table.splits.items() if name != "all"}
    if conversation:
        _conversation_keys(keys, rows, *conversation)
    else:
        told |= label_keys(keys, source, table.splits)
    settings = check(keys.values, source)
    table = choose_data(settings)
    divided = divide(settings, table)
    if not conversation:
        settings, divided, told["shown"] = _enough_rows(keys, settings, divided, table)
        told["labels"] = _label_lines(settings, table.splits, told["label_column"], divided)
    most = len(divided.splits["train"])
    if most > FIRST_LOOK:
        keys.put("max_train_rows", FIRST_LOOK, f"of {most:,}, so that a first run stays short; 0 = all")
        keys.put("max_eval_rows", FIRST_LOOK // 10, "of validation and of test, each; 0 = all")
    told |= {"task": settings.task, "thinking": settings.thinking, "folds": settings.folds}
    told |= _what_became(divided, table.changes)
    told["tokens"] = _tokens(keys, divided)
    told["whose_tokens"] = "that base model's" if _own_tokenizer(base_model) else "the offline base's"
    return keys, told


PRETRAINED = {
    "lora_r": (8, "rank of the adapter"),
    "lora_alpha": (16, "the update is multiplied by lora_alpha / lora_r: by 2, as in quick.yaml"),
    "learning_rate": (2.0e-4, "peak value; a pretrained base takes smaller steps than the offline base"),
    "num_train_epochs": (3.0, "passes over the training rows"),
    "per_device_train_batch_size": (4, "rows a forward pass"),
    "gradient_accumulation_steps": (4, "so that an update has 16 rows"),
}
"""What the shipped profiles of pretrained models set."""


def _base_keys(keys: Keys, base_model: str) -> None:
    """A base model other than the offline one, and the training that the shipped profiles have for such models."""
    from lib.settings import OFFLINE_BASE

    if base_model in ("", OFFLINE_BASE):
        return
    keys.put("base_model", base_model, "as --base-model says")
    if base_model.startswith("Qwen/") and not user_path(base_model).exists():
        elsewhere = [{"base_model": f"modelscope:{base_model}"}]
        keys.put("fallbacks", elsewhere, "tried where the hub and its mirror cannot be reached; every page says so")
    for key, (value, why) in PRETRAINED.items():
        keys.put(key, value, why)


# Conversations.


def _conversation_keys(keys: Keys, rows: Rows, task: str, thinking: bool) -> None:
    """Task, thinking and system turn of rows with turns or with questions and answers."""
    words = "several answers a row" if task == "dialogue" else "questions with written answers"
    keys.put("task", task, words)
    if thinking:
        keys.put("thinking", True, "answers begin with reasoning")
    chinese = is_chinese(str(row) for row in rows[:500])
    prompt = "你是一个乐于助人的助手。" if chinese else "You are a helpful assistant."
    keys.put("system_prompt", prompt, "system turn of rows that bring none of their own; say what yours are about")


def _label_lines(
    settings: Settings, splits: Mapping[str, Rows], column: str, divided: DividedRows
) -> list[dict[str, Any]]:
    """Each label with the values of the file that mean it, as the cleaned rows have them, and its rows."""
    from lib.stages.data.labels import label_reader

    read, names = label_reader(settings.label_names), settings.label_names
    rows = Counter(row.label for split in divided.splits.values() for row in split)
    values = label_values([row for split in splits.values() for row in split], column)
    said = {number: [value for value in values if read(value) == number] for number in range(len(names))}
    return [{"name": name, "said": said[i] or ["?"], "rows": rows[i]} for i, name in enumerate(names)]


# What so many rows can show.


def _enough_rows(
    keys: Keys, settings: Settings, divided: DividedRows, table: Any
) -> tuple[Settings, DividedRows, dict[str, Any]]:
    """Hold out more rows, or test every row once, where the test rows could show too little and may be chosen."""
    from lib.settings import check
    from lib.stages.data.stage import divide
    from lib.statistics.noninferiority import rows_for

    margin = settings.equivalence_margin
    needed = [rows_for(share, margin / 100) for share in (0.0, 0.01, 0.02)]
    shown = _shown([divided]) | {"margin": margin, "needed": needed}
    total = sum(len(rows) for rows in divided.splits.values())
    if divided.rule.startswith("given") or shown["worth"] >= needed[1]:
        return settings, divided, shown
    said = f"{len(divided.splits['test']):,} test rows exclude at best a loss of {shown['least']:.2g} points"
    if total <= FOLDED_ROWS:
        keys.put("folds", 5, f"few rows: {said}; so each is tested by the model that did not train on it")
    else:
        share = min(0.3, math.ceil(20 * needed[1] / total) / 20)
        if share <= settings.test_share:
            return settings, divided, shown
        keys.put("test_share", share, f"more rows are held out than a tenth: {said}")
    settings = check(keys.values, "the rows")
    folds = [divide(settings, table, fold) for fold in range(1, settings.folds + 1)]
    return settings, folds[0], _shown(folds) | {"margin": margin, "needed": needed}


def _shown(folds: Sequence[DividedRows]) -> dict[str, Any]:
    """How many rows are tested, how many independent ones they are worth, and the loss that they exclude at best."""
    from lib.report.data_page import detectable
    from lib.scoring.metric import rows_of_folds

    parts = [[{"label": r.label, "group": r.group, "leaked": r.leaked} for r in fold.splits["test"]] for fold in folds]
    found = detectable(rows_of_folds(parts))
    return {"rows": found["counts"]["all"], "worth": found["worth"]["all"], "least": found["least"]["all"]}


# What the rows are.


def _what_became(divided: DividedRows, changes: Counter[str]) -> dict[str, Any]:
    """Rows left out, columns not used, copies, lengths in characters, and the split."""
    left: Counter[str] = Counter()
    for (step, _), count in divided.flow.items():
        if step.startswith(("dropped", "left out")):
            left[step.replace("dropped: ", "left out: ")] += count
    counted = divided.audit["duplicates"][-1]
    lengths = [len(row.whole) for rows in divided.splits.values() for row in rows]
    unused = [why for why in divided.changes + changes if why.startswith(("not used", "numbers of"))]
    return {
        "left_out": dict(left),
        "unused": unused + divided.notes,
        "copies": int(counted["surplus copies after normalisation"]),
        "near": int(counted["near-duplicate pairs"]),
        "conflicts": int(counted.get("texts with conflicting labels after normalisation", 0)),
        "characters": _percentiles(lengths),
        "rule": divided.rule,
        "used": {name: len(rows) for name, rows in divided.splits.items()},
    }


def _percentiles(values: Sequence[int]) -> dict[str, int]:
    import numpy as np

    found = {f"p{p}": int(np.percentile(values, p, method="nearest")) for p in (50, 95)}
    return {**found, "max": int(max(values))}


def _own_tokenizer(base_model: str) -> Path | None:
    """The folder of a base model that lies on this disk; nothing is fetched for a look."""
    folder = user_path(base_model) if base_model else None
    return folder if folder and (folder / "tokenizer.json").is_file() else None


def _tokens(keys: Keys, divided: DividedRows) -> dict[str, int] | None:
    """Tokens of rows with their prompts, and a max_seq_length that fits nearly all.

    By the base model's tokenizer where it lies here, else by the offline base's, which needs rather more tokens.
    """
    from lib.settings import Settings

    if not machine.has_module("transformers"):
        return None
    from lib.models.loading import load_tokenizer
    from lib.stages.data.stage import put_tokenizer

    train = divided.splits["train"]
    task = replace(divided.kind.task, max_seq_length=32768)  # so that nothing is cut before it is measured
    with tempfile.TemporaryDirectory() as temporary:
        if own := _own_tokenizer(keys.values.get("base_model", "")):
            tokenizer = load_tokenizer(own)
        else:
            tokenizer, _ = put_tokenizer(None, task, train, Path(temporary) / "tokenizer")
        divided.kind.write_tags_of(tokenizer, divided.splits, Counter())
        found = []
        for row in train[:MEASURED_ROWS]:
            try:
                found.append(task.encode(tokenizer, row.content).whole_length)
            except InputError:  # longer than any limit: 01 counts it
                continue
    if not found:
        return None
    lengths = _percentiles(found)
    default = Settings().max_seq_length
    if lengths["p95"] > default:
        most = min(LONGEST, STEP * math.ceil(lengths["p95"] / STEP))
        share = sum(length <= most for length in found) / len(found)
        why = f"tokens: {100 * share:.0f} % of rows fit ({default} by default); what is longer is cut and counted"
        keys.put("max_seq_length", most, why)
    return lengths
