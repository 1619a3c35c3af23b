"""The stage `data` for rows without labels: conversations read, audited by opening and as a whole, split by group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.data import splitting
from lib.data.audit import Audit, audit, normalise
from lib.data.choosing import choose_data
from lib.data.cleaning import Row
from lib.data.common import chosen_base, count_steps, limit, put_tokenizer, record_sources
from lib.data.dialogues import Conversation, clean_conversations, in_tags_of
from lib.data.lengths import conversation_example, conversation_lengths
from lib.data.reading import SPLITS, Table
from lib.data.textaudit import audit_texts
from lib.errors import InputError
from lib.models.conversations import ConversationTask, conversation_hash
from lib.models.tasks import texts_of
from lib.run import Work
from lib.run.files import write_json, write_jsonl
from lib.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterable

KEYS = (
    *("task", "thinking", "dataset", "split", "system_prompt", "base_model", "revision"),
    *("max_seq_length", "max_train_rows", "max_eval_rows", "seed"),
)
FEWEST = 5
"""Groups of rows that a split 8 : 1 : 1 needs, so that each part gets one; with so few the pages can tell nothing."""

Splits = dict[str, list[Conversation]]


def build(settings: Settings, work: Work) -> None:
    """Fill in the product `data`; what it holds is said in `lib.data.result`.

    Raises:
        InputError: the data set or the base model's tokenizer cannot be used.
    """
    task = ConversationTask(settings.task, settings.system_prompt, settings.max_seq_length, settings.thinking)
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
    record_sources(work, chosen, base_chosen, base, splits, conversation_hash(tokenizer, task), notes)
    work.facts["task"] = task.kind


def _audited(row: Conversation, task: ConversationTask) -> str:
    """All turns of a row, its system turn where it brought its own."""
    system = row.messages[0]["content"]
    return row.whole if system == task.system_prompt else f"{system}\n{row.whole}"


def _write(work: Work, task: ConversationTask, splits: Splits, shown: dict[str, Any]) -> None:
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


def _clean(table: Table, task: ConversationTask) -> tuple[Splits, list[dict[str, Any]], Counter[str]]:
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
        parts = splitting.split_by_cluster(splits["train"], settings.seed, {"train": 0.9, "validation": 0.1})
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
    return splitting.split_by_cluster(kept, settings.seed), rule, +dropped


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


def _left(task: ConversationTask, before: Mapping[str, int], splits: Splits) -> list[dict[str, Any]]:
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
