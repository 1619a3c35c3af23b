"""The rows that a run takes: of the data set asked for, or of the first listed fallback that can be had.
What the stage does alike for every task: limits, the tokenizer of the base model, the stamps.
The stage `data` for rows without labels: conversations read, audited by opening and as a whole, split by group.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lib.errors import InputError
from lib.hub.sources import SourceError
from lib.models.base_model import (
    ChosenBase,
    called,
    choose_base,
    fallback_note,
    none_left,
    refuse_without_template,
    resolve_base,
)
from lib.models.unpack import RECORD as UNPACKED
from lib.prompts.tasks import Task, task_of, texts_of
from lib.runs.files import user_path, write_json, write_jsonl
from lib.runs.run import Work
from lib.settings import OFFLINE_BASE, SAMPLE_DATASET, Settings
from lib.stages.data import near_duplicates, sample
from lib.stages.data.cleaning import Row
from lib.stages.data.dialogues import Conversation, clean_conversations, in_tags_of
from lib.stages.data.lengths import conversation_example, conversation_lengths
from lib.stages.data.near_duplicates import Audit, audit, normalise
from lib.stages.data.reading import SPLITS, Table, read_table
from lib.stages.data.text_audit import audit_texts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedTokenizerBase


# The rows that a run takes: of the data set asked for, or of the first listed fallback that can be had.


@dataclass(frozen=True)
class ChosenData:
    """Attributes: source as written in the parameter file; the table; what every page must say about it."""

    source: str
    table: Table
    notes: tuple[str, ...]


def choose_data(settings: Settings) -> ChosenData:
    """Read `dataset`; where it cannot be had, the `fallbacks` in order, each checked as it is listed.

    Raises:
        InputError: none can be had; or the first that can be had is unreadable or not the one that was listed.
    """
    listed: list[Mapping[str, Any]] = [{"dataset": settings.dataset, "revision": settings.revision}]
    listed += [entry for entry in settings.fallbacks if "dataset" in entry]
    failures: list[SourceError] = []
    for entry in listed:
        source = str(entry["dataset"])
        try:
            table = _read(source, str(entry.get("revision", "main")), settings)
        except SourceError as error:
            failures.append(error)
            continue
        if failures:
            _check(table, entry)
        name = f"{table.known.name} ({called(source)})" if table.known else source
        stamp = (table.known.stamp,) if table.known else ()
        return ChosenData(source, table, (*fallback_note("data set", settings.dataset, name, failures), *stamp))
    raise none_left(failures, [str(entry["dataset"]) for entry in listed])


def _read(source: str, revision: str, settings: Settings) -> Table:
    if source != SAMPLE_DATASET:
        return read_table(source, revision)
    if len(settings.label_names) != 2:
        raise InputError(
            f"label_names with {len(settings.label_names)} names for the sample corpus.",
            "two: negative, positive.",
            "give two names, or set dataset to your own data.",
        )
    words = f"the embedded sample corpus, grammar version {sample.VERSION}"
    return Table(sample.sample_tables(), words, Counter(), given=True)


def _check(table: Table, entry: Mapping[str, Any]) -> None:
    """Refuse a fallback that is not what the parameter file lists."""
    do = "check where it comes from; correct the entry of fallbacks if these are the rows you mean."
    if "rows" in entry and table.rows != entry["rows"]:
        raise InputError(f"fallback {entry['dataset']}: {table.rows:,} rows.", f"{entry['rows']:,} rows.", do)
    if "sha256" in entry and table.sha256 != str(entry["sha256"]).lower():
        names = ", ".join(table.hashes) or "no file"
        raise InputError(f"fallback {entry['dataset']}: SHA-256 {table.sha256} ({names}).", f"{entry['sha256']}.", do)


# What the stage does alike for every task: limits, the tokenizer of the base model, the stamps.

R = TypeVar("R", bound=Row)

STAMPS = {
    (True, True): "offline base model, sample data: not a result about Qwen or ChnSentiCorp",
    (True, False): "offline base model: not a result about Qwen",
    (False, True): "sample data: not a result about ChnSentiCorp",
}
"""What every page must say, by (offline base, sample data)."""


def limit(splits: Mapping[str, list[R]], settings: Settings) -> dict[str, list[R]]:
    """At most `max_train_rows` and `max_eval_rows` rows."""
    most = {"train": settings.max_train_rows}
    return {
        name: near_duplicates.subsample(rows, most.get(name, settings.max_eval_rows), settings.seed)
        for name, rows in splits.items()
    }


def base_parameters(settings: Settings) -> dict[str, Any]:
    """What the product depends on, beside the name of the base model: the hash of a local one, how it is unpacked."""
    path = user_path(settings.base_model)
    gguf = {"gguf_dtype": settings.gguf_dtype, "gguf_off_grid": settings.gguf_off_grid}
    listed = [str(entry.get("base_model", "")) for entry in settings.fallbacks]
    asked = settings.gguf_off_grid or any(name.lower().endswith(".gguf") for name in listed)
    if settings.base_model == OFFLINE_BASE or not path.exists():
        return gguf if asked else {}
    refuse_without_template(settings.base_model)
    unpacking = gguf if path.is_file() or asked else {}
    return {"base_revision": resolve_base(settings.base_model, settings.revision, **gguf).revision, **unpacking}


def chosen_base(settings: Settings) -> ChosenBase:
    """The base model that the settings name, or the first of the fallbacks that can be had."""
    unpacking = (settings.gguf_dtype, settings.gguf_off_grid)
    return choose_base(settings.base_model, settings.revision, settings.fallbacks, *unpacking)


def put_tokenizer(
    chosen: ChosenBase, texts: list[str], words: Sequence[str], folder: Path
) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """Put the run's tokenizer into `folder`; also the facts about the base model.

    Args:
        texts: training texts, of which the offline base's tokenizer is made.
        words: answer words and prompts, which should cost it few tokens.
    """
    from lib.models import loading

    facts = {"base_model": chosen.source, "offline_base": chosen.base is None}
    if chosen.base is None:
        from lib.models.offline_base import ensure_tokenizer

        made = ensure_tokenizer(texts, [word for word in words if word.strip()])
        shutil.copytree(made, folder)
        return loading.load_tokenizer(folder), facts | {"base_revision": made.name}
    tokenizer = loading.load_tokenizer(chosen.base.path)
    tokenizer.save_pretrained(folder)
    return tokenizer, facts | {"base_revision": chosen.base.revision, **chosen.base.facts}


def count_steps(split: str, read: int, counts: Counter[str], flow: list[dict[str, Any]], changes: Counter[str]) -> None:
    """Add to `flow` how many rows of a split were read and dropped, and to `changes` what was altered in the others."""
    flow.append({"step": "read", "split": split, "rows": read})
    for reason, count in counts.items():
        if reason.startswith("dropped"):
            flow.append({"step": reason, "split": split, "rows": count})
        else:
            changes[reason] += count


def record_sources(
    work: Work,
    data: ChosenData,
    chosen: ChosenBase,
    base: Mapping[str, Any],
    splits: Mapping[str, Sequence[Row]],
    prompt_hash: str,
    notes: Sequence[str] = (),
) -> None:
    """What the manifest and every page say of where the rows and the base model came from.

    Args:
        base: facts of `put_tokenizer`. notes: more sentences for the pages.
    """
    if chosen.base is not None and chosen.base.unpacked is not None:  # other weights must make another product
        write_json(work.folder / UNPACKED, dict(chosen.base.unpacked))
    table, sample = data.table, data.source == SAMPLE_DATASET
    stamp = STAMPS.get((base["offline_base"], sample))
    work.notes += [*([stamp] if stamp else []), *chosen.notes, *data.notes, *notes]
    work.facts |= {
        "source": table.source,
        "sample_data": sample,
        "dataset": {"source": data.source, "revision": table.revision, "rows": table.rows, "sha256": table.hashes},
        **base,
        "prompt_hash": prompt_hash,
        "rows": {name: len(rows) for name, rows in splits.items()},
    }


# The stage `data` for rows without labels: conversations read, audited by opening and as a whole, split by group.

KEYS = (
    *("task", "thinking", "dataset", "split", "system_prompt", "base_model", "revision"),
    *("max_seq_length", "max_train_rows", "max_eval_rows", "seed"),
)
FEWEST = 5
"""Groups of rows that a split 8 : 1 : 1 needs, so that each part gets one; with so few the pages can tell nothing."""

Splits = dict[str, list[Conversation]]


def build(settings: Settings, work: Work) -> None:
    """Fill in the product `data`; what it holds is said in `lib.stages.data.stage`.

    Raises:
        InputError: the data set or the base model's tokenizer cannot be used.
    """
    task = task_of(settings)
    chosen = choose_data(settings)
    notes = _test_from_validation(chosen.table)
    splits, flow, changes = _clean(chosen.table, task)
    found = audit_conversations(splits)
    splits, rule, dropped = _divide(splits, settings)
    flow += [{"step": reason, "split": "all", "rows": count} for reason, count in dropped.items()]
    used = found if rule.startswith("given: kept") else audit_conversations(splits)
    splits = limit(splits, settings)
    base_chosen = chosen_base(settings)
    texts = [text for row in splits["train"] for text in texts_of({"messages": row.messages})]
    tokenizer, base = put_tokenizer(base_chosen, texts, [settings.system_prompt], work.folder / "tokenizer")
    for row in (row for rows in splits.values() for row in rows):
        row.messages = in_tags_of(tokenizer, row.messages, changes)
    before = {name: len(rows) for name, rows in splits.items()}
    splits, lengths, table = conversation_lengths(tokenizer, task, splits)
    flow += _left(task, before, splits)
    shown = {
        "source": chosen.table.source,
        "split_rule": rule,
        "flow": flow,
        "changes": dict(changes + chosen.table.changes),
        **found,
        "overlaps_used": used["overlaps"],
        "text_audit": audit_texts({name: [_audited(row, task) for row in rows] for name, rows in splits.items()}),
        "lengths": lengths,
        "length_table": table,
        "example": conversation_example(tokenizer, task, splits["train"], lengths["train"]),
    }
    _write(work, task, splits, shown)
    record_sources(work, chosen, base_chosen, base, splits, task.fingerprint(tokenizer), notes)
    work.facts["task"] = task.kind


def _audited(row: Conversation, task: Task) -> str:
    """All turns of a row, its system turn where it brought its own."""
    system = row.messages[0]["content"]
    return row.whole if system == task.system_prompt else f"{system}\n{row.whole}"


def _write(work: Work, task: Task, splits: Splits, shown: dict[str, Any]) -> None:
    """The files of the product."""
    more = {"conflict_examples": [], "balance": [_shape(name, rows) for name, rows in splits.items()]}
    write_json(work.folder / "task.json", task.to_json())
    write_json(work.folder / "audit.json", {**shown, **more})
    for name, rows in splits.items():
        write_jsonl(work.folder / f"{name}.jsonl", [row.to_json(name) for row in rows])
    leaked = sum(row.leaked for row in splits["test"])
    work.metrics |= {"test_rows": len(splits["test"]), "leaked_test_rows": leaked}


def _test_from_validation(table: Table) -> list[str]:
    """A validation split stands in for a test split that is missing; the note that says so."""
    if "test" in table.splits or "validation" not in table.splits:
        return []
    table.splits["test"] = table.splits.pop("validation")
    return ["the data has no test split: its validation split is the test split of this run"]


def _clean(table: Table, task: Task) -> tuple[Splits, list[dict[str, Any]], Counter[str]]:
    splits: Splits = {}
    flow: list[dict[str, Any]] = []
    changes: Counter[str] = Counter()
    for name in [name for name in (*SPLITS, "all") if name in table.splits]:
        splits[name], counts = clean_conversations(table.splits[name], name, task)
        count_steps(name, len(table.splits[name]), counts, flow, changes)
    if not any(splits.values()):
        reasons = "; ".join(f"{line['rows']:,} rows {line['step']}" for line in flow)
        raise InputError(f"no usable conversation ({reasons}).", "rows with a question and an answer.", "correct them.")
    return splits, flow, changes


def audit_conversations(splits: Mapping[str, list[Conversation]]) -> dict[str, list[dict[str, Any]]]:
    """Compare openings, and whole rows; set each row's `group` (alike in either) and `leaked`.

    Returns:
        "duplicates", "overlaps" (each with the column "compared") and "leaked_examples", ready to be tables.
    """
    rows = [row for split in splits.values() for row in split]
    shadows = {name: [Row(row.index, row.compared, 0) for row in split] for name, split in splits.items()}
    whole = audit(shadows)
    opening = audit(splits, contained=True)
    copies = [row for split in shadows.values() for row in split]
    groups = _joined([row.group for row in rows], [row.group for row in copies])
    for row, copy, group in zip(rows, copies, groups, strict=True):
        row.group, row.leaked = group, row.leaked or copy.leaked
    named = {"opening": opening, "whole row": whole}
    return {
        "duplicates": [line for what, found in named.items() for line in _within(what, found)],
        "overlaps": [
            {"compared": what, **{key: value for key, value in line.items() if key != "label agrees"}}
            for what, found in named.items()
            for line in found.across
        ],
        "leaked_examples": [
            {key: value for key, value in line.items() if "label" not in key} for line in opening.leaked_examples
        ],
    }


def _within(what: str, found: Audit) -> list[dict[str, Any]]:
    lines = [*found.within, *([{"split": "all splits", **found.total}] if len(found.within) > 1 else [])]
    return [{"compared": what, **{k: v for k, v in line.items() if "conflicting" not in k}} for line in lines]


def _joined(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """Number of each row's group when rows that are alike in either of two groupings belong together."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    one, two = np.asarray(first), np.asarray(second) + max(first, default=0) + 1
    size = int(two.max()) + 1 if len(two) else 0
    parts = connected_components(coo_matrix((np.ones(len(one)), (one, two)), shape=(size, size)), directed=False)[1]
    number: dict[int, int] = {}
    return [number.setdefault(int(part), len(number)) for part in parts[one]]


def _divide(splits: Splits, settings: Settings) -> tuple[Splits, str, Counter[str]]:
    """The three splits, the rule in words, and rows dropped on the way."""
    if settings.split == "given" and "test" not in splits:
        raise InputError(
            "split: given, for data without a test split.", "files train and test.", "set split to auto or cluster."
        )
    if "test" in splits and settings.split != "cluster":
        if "validation" in splits:
            return splits, "given: kept as it came, leaked rows flagged", Counter()
        parts = near_duplicates.split_by_cluster(splits["train"], settings.seed, {"train": 0.9, "validation": 0.1})
        return {**parts, "test": splits["test"]}, "given, but validation is a tenth of train, by group", Counter()
    rows = [row for split in splits.values() for row in split]
    for index, row in enumerate(rows if len(splits) > 1 else []):
        row.index = index
    kept = list({normalise(row.whole): row for row in reversed(rows)}.values())[::-1]
    groups = len({row.group for row in kept})
    if groups < FEWEST:
        raise _too_few(kept, groups)
    dropped = Counter({"dropped: copy of an earlier row": len(rows) - len(kept)})
    alike = "openings or texts nearly the same, or opening within opening"
    rule = f"8 : 1 : 1 by group ({alike}), seed {settings.seed}; copies dropped first"
    return near_duplicates.split_by_cluster(kept, settings.seed), rule, +dropped


def _too_few(rows: Sequence[Conversation], groups: int) -> InputError:
    """The refusal of rows that make too few groups, with what the largest one has in common."""
    [(largest, size)] = Counter(row.group for row in rows).most_common(1)
    first = next(row for row in rows if row.group == largest)
    return InputError(
        f"{len(rows)} rows in {groups} groups of conversations that differ; {size} have nearly one opening or text, "
        f"e.g. {first.text[:60]!r}.",
        f"at least {FEWEST} groups for a split 8 : 1 : 1.",
        "add rows that differ, or put what all questions share into system_prompt (Alpaca: into instruction, the "
        "question into input).",
    )


def _left(task: Task, before: Mapping[str, int], splits: Splits) -> list[dict[str, Any]]:
    """Steps of the flow: rows too long, and rows used; a split without any is refused with its reason."""
    what = "no answer with its reasoning within" if task.thinking else "first exchange over"
    reason = f"dropped: {what} {task.max_seq_length} tokens"
    lost = {name: before[name] - len(rows) for name, rows in splits.items() if before[name] > len(rows)}
    for name, rows in splits.items():
        if not rows:
            why = f" ({lost[name]:,} rows {reason})" if name in lost else ""
            raise InputError(f"{name}: no usable row{why}.", "at least one.", "add rows, or raise max_seq_length.")
    flow = [{"step": reason, "split": name, "rows": count} for name, count in lost.items()]
    return flow + [{"step": "used", "split": name, "rows": len(rows)} for name, rows in splits.items()]


def _shape(name: str, rows: Iterable[Conversation]) -> dict[str, Any]:
    """What the rows of a split hold, one line of a table."""
    turns = [len(texts_of({"messages": row.messages})) for row in rows]
    return {
        "split": name,
        "rows": len(turns),
        "turns": sum(turns),
        "median turns a row": float(np.median(turns)),
        "longest, turns": max(turns),
    }
