"""What depends on the task of a run: the metric. Accuracy over answer words, or perplexity of reference answers.

A metric knows the point estimate of one model's scores, the paired comparison of several models with a reference on the
same rows, how many rows would decide, and what a change is called. Stages, pages and commands ask it and do not ask
whether rows have labels. Entries are those of comparison.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from lib.scoring.accuracy import Accuracy
from lib.scoring.answer_perplexity import AnswerPerplexity
from lib.scoring.log_probabilities import AnswerScores, Scores
from lib.statistics.intervals import Interval
from lib.statistics.losses import FEWEST

if TYPE_CHECKING:
    from lib.prompts.tasks import Task

AnyScores = Scores | AnswerScores
Entry = Row = Mapping[str, Any]

REFERENCE_VERDICT = "reference"


@dataclass(frozen=True)
class RowGroups:
    """What the statistics must know of the rows.

    Attributes:
        groups: (n,) near-duplicate cluster of each row.
        leak_free: (n,) True where the row is no copy of a training row; None where no audit was made.
        weights: (n,) of each row's value in a mean (`Metric.row_values`); None where none is taken.
    """

    groups: np.ndarray
    leak_free: np.ndarray | None = None
    weights: np.ndarray | None = None

    @property
    def enough(self) -> bool:
        """Whether there are groups enough for an interval."""
        return len(np.unique(self.groups)) >= FEWEST

    @classmethod
    def of(cls, rows: Sequence[Row]) -> RowGroups:
        """From rows with "group" and "leaked", where they have them; without, every row is its own group."""
        groups = np.array([row.get("group", i) for i, row in enumerate(rows)])
        audited = all("leaked" in row for row in rows)
        return cls(groups, np.array([not row["leaked"] for row in rows]) if audited else None)


class Metric(Protocol):
    """Point estimate, paired comparison, power and words of one kind of task.

    Attributes:
        name: in JSON files.
        words: of the point estimate, as in "… 0.9 on 200 rows".
        best_words: what the best of several estimates is called.
        loss_unit: of `loss` and of the margin.
        point: key of the point estimate in an entry; its interval has the key with "_interval" behind it.
        shown: keys of an entry that a short table shows, beside size, KL divergence and verdict.
        in_manifest: the same in the manifest.
        margin_setting: the setting with the equivalence margin. margin_condition: the same in comparison.json.
        endpoints: how many tests of a candidate Holm corrects together.
        tells_rows: whether a recommendation says how many rows would decide about an undecided file.
        least_move: root mean square of a row's change by fine-tuning below which no share of it is told, nats: what
            rounding alone moves. move_unit: the unit in words.
    """

    name: ClassVar[str]
    words: ClassVar[str]
    best_words: ClassVar[str]
    loss_unit: ClassVar[str]
    point: ClassVar[str]
    shown: ClassVar[tuple[str, ...]]
    in_manifest: ClassVar[tuple[str, ...]]
    margin_setting: ClassVar[str]
    margin_condition: ClassVar[str]
    endpoints: ClassVar[int]
    tells_rows: ClassVar[bool]
    least_move: ClassVar[float]
    move_unit: ClassVar[str]

    def compare(
        self, reference: Any, others: Mapping[str, Any], groups: np.ndarray, margin: float, seed: int
    ) -> dict[str, dict[str, Any]]:
        """Several models with a reference on one set of rows, Holm-corrected over the models.

        Args:
            others: scores by name, the reference not among them.
            margin: what counts as equivalent, in `loss_unit`.

        Returns:
            by name, and for "" (the reference itself): what `own` gives, "verdict", and of all but the reference the
            metric's tests.
        """

    def own(self, scores: Any, groups: np.ndarray, seed: int) -> dict[str, Any]:
        """The point estimate with its interval, and what stands beside it."""

    def floor(self, tokenizer: Any, task: Task, train: Path | None, rows: Sequence[Row]) -> float | None:
        """What a model that has learned nothing but frequencies reaches on the rows; None where it is not known.

        Args:
            train: file of the training rows.
        """

    def entry_floor(self, floor: float | None) -> dict[str, Any]:
        """What every entry says of the floor."""

    def conditions(self, margin: float, floor: float | None) -> dict[str, Any]:
        """What the conditions of a comparison say of margin and floor."""

    def learned(self, reference: Entry, floor: float | None) -> bool:
        """Whether a reference is clearly better than the floor; if not, equal quality says nothing about a file."""

    def loss(self, entry: Entry) -> tuple[float, float | None, float | None]:
        """How much worse than the reference, with its interval, in `loss_unit` (positive = worse)."""

    def distance(self, entry: Entry) -> float:
        """How far a file is from the reference, to find the nearest of several that are undecided."""

    def rows_needed(self, entry: Entry, margin: float, one_sided: bool = False) -> int | None:
        """Rows that would decide about an undecided entry, if what was seen of it is the truth; None: no number."""

    def row_values(self, scores: Any) -> tuple[np.ndarray, np.ndarray]:
        """(n,) value of each row, whose weighted mean is the estimate (of perplexity: its logarithm), and weights."""

    def best(self, estimates: Sequence[float]) -> int:
        """Place of the best of several estimates of `row_values`; the first of equals."""

    def mean(self, values: np.ndarray, rows: RowGroups, tries: int = 1) -> Interval:
        """The mean of `row_values`, each the mean of several tries, with its 95 % interval (infinite: none)."""

    def difference(self, change: np.ndarray, rows: RowGroups, confidence: float, tries: int = 1) -> Interval:
        """The mean of a paired difference of `row_values`; `tries`: the larger number behind either of the two."""

    def p_value(self, change: np.ndarray, rows: RowGroups, seed: int) -> float:
        """Two-sided p of "no difference" of two models' `row_values`."""

    def vectors(self, scores: Any) -> np.ndarray:
        """What a model says of each row, nats, (n, d): the coordinates in which fine-tuning moves a row."""

    def movement(self, change: np.ndarray) -> float:
        """Root mean square of a change of `vectors`, in `move_unit`."""

    def step(self, scores: Any, groups: np.ndarray, margin: float) -> dict[str, Any]:
        """A step of the error ladder on its own."""

    def step_change(self, before: Any, scores: Any, groups: np.ndarray, margin: float, seed: int) -> dict[str, Any]:
        """A step of the error ladder against an earlier one."""


def compare(
    metric: Metric, reference: Any, others: Mapping[str, Any], rows: RowGroups, margin: float, seed: int
) -> dict[str, dict[str, Any]]:
    """Quality of every model on all rows and on the leak-free rows.

    Returns:
        what `Metric.compare` gives of all rows, and "leak_free": the same on those rows, or None. The reference, which
        is not compared with itself, has None where the others have a test.
    """
    found = metric.compare(reference, others, rows.groups, margin, seed)
    free: dict[str, dict[str, Any]] = {}
    if rows.leak_free is not None and rows.leak_free.any():
        mask = rows.leak_free
        kept = {name: scores.subset(mask) for name, scores in others.items()}
        free = _with_none(metric.compare(reference.subset(mask), kept, rows.groups[mask], margin, seed))
    return {name: {**entry, "leak_free": free.get(name)} for name, entry in _with_none(found).items()}


def _with_none(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    nothing = dict.fromkeys(key for entry in found.values() for key in entry)
    return {name: {**nothing, **entry} for name, entry in found.items()}


ACCURACY: Metric = Accuracy()
ANSWER_PERPLEXITY: Metric = AnswerPerplexity()


def metric_of(task: Task) -> Metric:
    """The metric of a run's task."""
    return ACCURACY if task.label_names else ANSWER_PERPLEXITY


def metric_in(entries: Sequence[Entry]) -> Metric:
    """The metric that the entries of a comparison.json were made with."""
    return ACCURACY if ACCURACY.point in entries[0] else ANSWER_PERPLEXITY
