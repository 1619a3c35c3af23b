"""What 01_data shows, read back from the product folder.
The stage `data`: read, clean, audit, split, measure, and write the product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.prompts.tasks import Task, read_task, task_of
from lib.runs.files import read_json, read_jsonl, user_path, write_json, write_jsonl
from lib.runs.run import Product, Run, Work
from lib.settings import SAMPLE_DATASET, Settings
from lib.stages.data import conversations, near_duplicates, sample
from lib.stages.data.cleaning import Row, clean_split, require_labels, unlabelled
from lib.stages.data.conversations import (
    base_parameters,
    choose_data,
    chosen_base,
    count_steps,
    limit,
    put_tokenizer,
    record_sources,
)
from lib.stages.data.near_duplicates import Audit, audit, find_duplicates
from lib.stages.data.reading import SPLITS, Table, read_table
from lib.stages.data.text_audit import audit_texts
from lib.stages.data.text_files import file_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# What 01_data shows, read back from the product folder.


@dataclass(frozen=True)
class DataResult:
    """The product `data` for readers.

    Attributes:
        product: folder and manifest entry.
        task: prompts, label names, length limit; of rows without labels a ConversationTask.
        source: where the rows really came from, in words.
        split_rule: how the split came about, in words.
        flow: rows read, dropped (and why), used; one dict a step, ready to be a table.
        changes: what was changed in texts or files, and how often.
        balance: rows a label and split; without labels rows and turns a split.
        duplicates: copies and conflicts within each split, and over all rows.
        overlaps: rows of one split that are copies of another's, as read.
        overlaps_used: the same after splitting (equal to `overlaps` when the split is the given one).
        leaked_examples, conflict_examples: as text.
        lengths: tokens of each used row, by split; length_table: percentiles and truncated share.
        example: one row as the model sees it (see `lengths.worked_example`).
        floor: the linear floor (see `floor.linear_floor`); empty without labels, for there is nothing to classify.
        text_audit: what the characters of the used rows are (see `textaudit.audit_texts`); empty in a product made
            before there was this audit.
    """

    product: Product
    task: Task
    source: str
    split_rule: str
    flow: list[dict[str, Any]]
    changes: dict[str, int]
    balance: list[dict[str, Any]]
    duplicates: list[dict[str, Any]]
    overlaps: list[dict[str, Any]]
    overlaps_used: list[dict[str, Any]]
    leaked_examples: list[dict[str, Any]]
    conflict_examples: list[dict[str, Any]]
    lengths: dict[str, list[int]]
    length_table: list[dict[str, Any]]
    example: dict[str, Any]
    floor: dict[str, Any]
    text_audit: dict[str, Any] = field(default_factory=dict)

    @property
    def labelled(self) -> bool:
        """Whether the rows have labels."""
        return bool(self.task.label_names)

    @classmethod
    def read(cls, product: Product) -> DataResult:
        """From the product's files."""
        folder = product.path
        return cls(
            product=product,
            task=read_task(folder),
            floor=read_json(folder / "floor.json") if (folder / "floor.json").is_file() else {},
            **read_json(folder / "audit.json"),
        )

    def rows(self, split: str) -> list[dict[str, Any]]:
        """The rows of a split: id, text and label (or messages), group, leaked, and what else they brought."""
        return read_jsonl(self.product.path / f"{split}.jsonl")


# The stage `data`: read, clean, audit, split, measure, and write the product.

KEYS = (
    *("dataset", "text_column", "label_column", "label_names", "split", "system_prompt", "user_prompt"),
    *("base_model", "revision", "max_seq_length", "max_train_rows", "max_eval_rows", "seed"),
)
FEWEST = 10
"""Distinct rows a label that a split 8 : 1 : 1 needs."""


def prepare(settings: Settings, run: Run) -> DataResult:
    """Make (or find) the product `data` of a run.

    With a given split no row is dropped but empty and unlabelled ones: copies stay, and leaked rows are flagged, so
    that results compare with the literature. Splitting by cluster drops copies and texts with two labels first.
    `leaked` refers to all training rows, also when `max_train_rows` uses fewer.

    Raises:
        InputError: the data set or the base model's tokenizer cannot be used; the message says what to do.
    """
    labelled = settings.task == "classification"
    parameters = settings.pick(*(KEYS if labelled else conversations.KEYS))
    if settings.dataset == SAMPLE_DATASET:
        parameters["sample_version"] = sample.VERSION
    elif (path := user_path(settings.dataset)).exists():
        parameters["dataset_sha256"] = file_fingerprint(path)
    if settings.fallbacks:
        parameters["fallbacks"] = [_with_hash(entry) for entry in settings.fallbacks]
    parameters |= base_parameters(settings)
    build = _build if labelled else conversations.build
    product = run.produce("data", lambda work: build(settings, work), parameters, force=settings.force)
    return DataResult.read(product)


def _with_hash(entry: Mapping[str, str | int]) -> dict[str, str | int]:
    """An entry of `fallbacks`; a local data set with the hash of its files, so that a change is seen."""
    path = user_path(str(entry.get("dataset", "")))
    local = entry.get("dataset") not in (None, SAMPLE_DATASET) and path.exists()
    return {**entry, "files_sha256": file_fingerprint(path)} if local else dict(entry)


def rows_from_file(
    source: str | Path, label_names: Sequence[str], text_column: str = "", label_column: str = ""
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows to evaluate on, from a file (all rows) or a folder or hub id (its test split), and what became of them.

    The columns `id`, `leaked` and `group` of a run's own test.jsonl are kept; other rows are numbered, count as not
    leaked, and are grouped by near-duplication.

    Returns:
        The rows, and {"rows_available": rows that were read, "left_out": why some cannot be used -> how many}.

    Raises:
        InputError: unreadable, or without usable rows.
    """
    table = read_table(str(source))
    name = "test" if "test" in table.splits else next(iter(table.splits))
    ours = {"id", "leaked", "group"}
    keep = ours | {"pattern"} if ours <= set(table.splits[name].column_names) else ()
    rows, counts = clean_split(table.splits[name], str(source), text_column, label_column, label_names, keep=keep)
    if not rows:
        raise InputError(f"{source}: no usable row.", "rows with a text and a label.", "correct the file.")
    for row, group in zip(rows, find_duplicates([row.text for row in rows]).groups.tolist(), strict=True):
        row.group = group
    dropped = "dropped: "
    left_out = {why.removeprefix(dropped): count for why, count in counts.items() if why.startswith(dropped)}
    return [row.to_json("row") for row in rows], {"rows_available": len(table.splits[name]), "left_out": left_out}


def _build(settings: Settings, work: Work) -> None:
    chosen = choose_data(settings)
    table, notes = _labelled(chosen.table, settings)
    splits, flow, changes = _clean(table, settings)
    found = audit(splits)
    final, rule, dropped = _divide(splits, table.given, settings)
    if dropped:
        flow += [{"step": reason, "split": "all", "rows": count} for reason, count in dropped.items()]
    used = found if rule.startswith("given: kept") else audit(final)
    require_labels(final["train"], settings.label_names, "train")
    require_labels(final["validation"], settings.label_names, "validation")
    require_labels(final["test"], settings.label_names, "test")
    final = limit(final, settings)
    flow += [{"step": "used", "split": name, "rows": len(rows)} for name, rows in final.items()]
    task = task_of(settings)
    base_chosen = chosen_base(settings)
    words = [*task.label_names, task.system_prompt, *task.user_prompt.split("{text}")]
    texts = [row.text for row in final["train"]]
    tokenizer, base = put_tokenizer(base_chosen, texts, words, work.folder / "tokenizer")
    _measure(
        work,
        final,
        task,
        tokenizer,
        settings.seed,
        {
            "source": table.source,
            "split_rule": rule,
            "flow": flow,
            "changes": dict(changes + table.changes),
            **_audit_json(found, used),
            "balance": _balance(final, settings.label_names),
            "text_audit": audit_texts({name: [row.text for row in rows] for name, rows in final.items()}),
        },
    )
    for name, rows in final.items():
        write_jsonl(work.folder / f"{name}.jsonl", [row.to_json(name) for row in rows])
    record_sources(work, chosen, base_chosen, base, final, task.fingerprint(tokenizer), notes)


def _labelled(table: Table, settings: Settings) -> tuple[Table, list[str]]:
    """Without splits that have no labels; a labelled validation split stands in for such a test split."""
    notes = []
    for name in ("validation", "test"):
        if name in table.splits and unlabelled(table.splits[name], settings.label_column):
            del table.splits[name]
            notes.append(f"the {name} split of the data has no labels and was left out")
    if "test" not in table.splits and "validation" in table.splits:
        table.splits["test"] = table.splits.pop("validation")
        notes.append("the data has no test split with labels: its validation split is the test split of this run")
    table.given = "test" in table.splits
    return table, notes


def _clean(table: Table, settings: Settings) -> tuple[dict[str, list[Row]], list[dict[str, Any]], Counter[str]]:
    splits, flow, changes = {}, [], Counter[str]()
    for name in [name for name in (*SPLITS, "all") if name in table.splits]:
        rows, counts = clean_split(
            table.splits[name], name, settings.text_column, settings.label_column, settings.label_names
        )
        splits[name] = rows
        count_steps(name, len(table.splits[name]), counts, flow, changes)
    everything = [row for rows in splits.values() for row in rows]
    require_labels(everything, settings.label_names, "the data set")
    return splits, flow, changes


def _divide(
    splits: dict[str, list[Row]], given: bool, settings: Settings
) -> tuple[dict[str, list[Row]], str, Counter[str]]:
    """The three splits, the rule in words, and rows dropped on the way (`group` is set on all rows)."""
    if settings.split == "given" and not given:
        raise InputError(
            "split: given, for data without a test split.", "files train and test.", "set split to auto or cluster."
        )
    if given and settings.split != "cluster":
        if "validation" in splits:
            return splits, "given: kept as it came, leaked rows flagged", Counter()
        parts = near_duplicates.split_by_cluster(splits["train"], settings.seed, {"train": 0.9, "validation": 0.1})
        return (
            {**parts, "test": splits["test"]},
            "given, but validation is a tenth of train, by duplicate cluster",
            Counter(),
        )
    rows = [row for name in splits for row in splits[name]]
    for index, row in enumerate(rows if len(splits) > 1 else []):
        row.index = index
    kept, dropped = near_duplicates.drop_copies(rows)
    fewest = Counter(row.label for row in kept)
    if min(fewest.values(), default=0) < FEWEST:
        counts = ", ".join(f"{name!r}: {fewest[label]}" for label, name in enumerate(settings.label_names))
        raise InputError(
            f"distinct rows by label {counts}.",
            f"at least {FEWEST} of each label for a split 8 : 1 : 1.",
            "add rows, or give a folder with train, validation and test files.",
        )
    rule = f"8 : 1 : 1 by duplicate cluster, seed {settings.seed}; copies and conflicting texts dropped first"
    return near_duplicates.split_by_cluster(kept, settings.seed), rule, dropped


def _measure(
    work: Work, splits: dict[str, list[Row]], task: Task, tokenizer: PreTrainedTokenizerBase, seed: int, shown: dict
) -> None:
    from lib.stages.data.baseline import linear_floor
    from lib.stages.data.lengths import token_lengths, worked_example

    lengths, table = token_lengths(tokenizer, task, splits)
    example = worked_example(tokenizer, task, splits["train"], lengths["train"])
    floor = linear_floor(splits, task.label_names, seed)
    write_json(work.folder / "task.json", task.to_json())
    write_json(work.folder / "audit.json", {**shown, "lengths": lengths, "length_table": table, "example": example})
    write_json(work.folder / "floor.json", floor)
    leaked = sum(row.leaked for row in splits["test"])
    clean = floor["test"]["leak_free"]
    work.metrics |= {
        "test_rows": len(splits["test"]),
        "leaked_test_rows": leaked,
        "floor_accuracy": floor["test"]["accuracy"],
        "floor_accuracy_leak_free": clean["accuracy"] if clean else None,
    }


def _audit_json(found: Audit, used: Audit) -> dict[str, Any]:
    shown = asdict(found)
    return {
        "duplicates": shown["within"] + [{"split": "all splits", **shown["total"]}] * (len(shown["within"]) > 1),
        "overlaps": shown["across"],
        "overlaps_used": asdict(used)["across"],
        "leaked_examples": shown["leaked_examples"],
        "conflict_examples": shown["conflict_examples"],
    }


def _balance(splits: dict[str, list[Row]], label_names: Sequence[str]) -> list[dict[str, Any]]:
    counts = {name: Counter(row.label for row in rows) for name, rows in splits.items()}
    return [
        {"split": name, **{label: counts[name][number] for number, label in enumerate(label_names)}} for name in splits
    ]
