"""What 01_data shows, read back from the product folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lib.models.tasks import AnyTask, has_labels, read_task
from lib.run import Product
from lib.run.files import read_json, read_jsonl


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
    task: AnyTask
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
        return has_labels(self.task)

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
