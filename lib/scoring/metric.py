"""What depends on the task of a run: the metric. Accuracy over answer words, or perplexity of reference answers.

A metric knows the point estimate of one model's scores, the paired comparison of several models with a reference on the
same rows, how many rows would decide, and what a change is called (`Accuracy` says what each method is for). Stages,
pages and commands ask it and do not ask whether rows have labels. Entries are those of comparison.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtri

from lib.prompts.tasks import Task
from lib.runs.files import read_jsonl
from lib.scoring.accuracy import Accuracy
from lib.scoring.log_probabilities import AnswerScores, Scores
from lib.statistics.intervals import Interval, paired_bootstrap
from lib.statistics.losses import FEWEST, cluster_test, compare_losses, limits, weighted_mean
from lib.statistics.noninferiority import FEWEST_GROUPS, LEVEL, POWER, fewest_groups
from lib.statistics.paired import clustered_share

Entry = Row = Mapping[str, Any]


@dataclass(frozen=True)
class RowGroups:
    """What the statistics must know of the rows.

    Attributes:
        groups: (n,) near-duplicate cluster of each row.
        leak_free: (n,) True where the row is no copy of a training row; None where no audit was made.
        folds: (n,) fold of each row, whose model did not train on it; None where one model answered all rows.
        weights: (n,) of each row's value in a mean (`Metric.row_values`); None where none is taken.
    """

    groups: np.ndarray
    leak_free: np.ndarray | None = None
    folds: np.ndarray | None = None
    weights: np.ndarray | None = None

    @property
    def enough(self) -> bool:
        """Whether there are groups enough for an interval."""
        return len(np.unique(self.groups)) >= FEWEST

    def subset(self, mask: np.ndarray) -> RowGroups:
        """Of the rows where `mask` is True."""
        columns = {name: None if value is None else value[mask] for name, value in vars(self).items()}
        return RowGroups(**columns)

    @classmethod
    def of(cls, rows: Sequence[Row]) -> RowGroups:
        """From rows with "group", "leaked" and "fold", where they have them; without, every row is its own group."""
        groups = np.array([row.get("group", i) for i, row in enumerate(rows)])
        audited = all("leaked" in row for row in rows)
        folds = np.array([row["fold"] for row in rows]) if all("fold" in row for row in rows) else None
        return cls(groups, np.array([not row["leaked"] for row in rows]) if audited else None, folds)


def rows_of_folds(parts: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
    """The test rows of all folds, each with its "fold"; groups are numbered in each fold, and none lies in two."""
    return [
        {**row, "fold": fold, "group": f"{fold}.{row['group']}"} for fold, rows in enumerate(parts, 1) for row in rows
    ]


class AnswerPerplexity:
    """How likely the reference answers are: exp of their mean cross-entropy a token.

    Attributes and methods are for what `lib.scoring.accuracy.Accuracy` says.
    """

    name = "answer_loss"
    words, best_words = "loss of the answers (nats a token)", "lowest loss"
    loss_unit = "% of answer perplexity"
    point = "answer_ppl"
    shown = ("answer_ppl", "answer_ppl_interval", "answer_ratio")
    in_manifest = ("answer_ppl", "answer_ratio")
    margin_setting, margin_condition = "perplexity_margin", "perplexity_margin_percent"
    least_move, move_unit = 0.01, "nats a token of the answers"

    def own(self, scores: AnswerScores, groups: np.ndarray, seed: int) -> dict[str, Any]:
        """n, groups, answer_tokens, answer_loss (nats a token), answer_ppl and answer_ppl_interval."""
        figures = scores.figures(groups)
        return {
            "n": len(scores.ids),
            "groups": len(np.unique(groups)),
            "answer_tokens": int(scores.tokens.sum()),
            "answer_loss": figures["loss"],
            "answer_ppl": figures["perplexity"],
            "answer_ppl_interval": figures["perplexity_interval"],
        }

    def classes(self, scores: AnswerScores, label_names: Sequence[str]) -> dict[str, Any]:
        return {}

    def compare(
        self,
        reference: AnswerScores,
        others: Mapping[str, AnswerScores],
        rows: RowGroups,
        seed: int,
        whole: Entry | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Beside `own`: what `compare_losses` says."""
        losses = {name: scores.row_losses for name, scores in others.items()}
        groups = rows.groups
        tests = compare_losses(reference.row_losses, losses, reference.tokens, groups, rows.folds)
        found = {"": {**self.own(reference, groups, seed), "answer_ratio": 1.0}}
        for name, test in tests.items():
            found[name] = {**self.own(others[name], groups, seed), **test}
        return found

    def loss(self, reference: AnswerScores, other: AnswerScores) -> float:
        change = np.average(other.row_losses - reference.row_losses, weights=reference.tokens)
        return 100 * math.expm1(float(change))

    def floor(self, tokenizer: Any, task: Task, train: Path | None, rows: Sequence[Row]) -> float | None:
        """Perplexity of the rows' answers under the token frequencies of the training answers alone (add-one
        smoothed); None without training rows."""
        if train is None:
            return None

        def answer_tokens(of: Sequence[Row]) -> np.ndarray:
            return np.array([token for row in of for token in task.encode(tokenizer, row).loss_ids])

        counts = np.ones(len(tokenizer))
        np.add.at(counts, answer_tokens(read_jsonl(train)), 1)
        log_p = np.log(counts / counts.sum())
        return float(np.exp(-log_p[answer_tokens(rows)].mean()))

    def entry_floor(self, floor: float | None) -> dict[str, Any]:
        return {}

    def conditions(self, margin: float, floor: float | None) -> dict[str, Any]:
        return {self.margin_condition: margin, "floor": floor, "unigram_ppl": floor}

    def problem(self, reference: Entry, floor: float | None) -> str | None:
        if fewest_groups(reference) < FEWEST_GROUPS:
            return "few"
        return None if floor is None or reference["answer_ppl_interval"][1] < floor else "unlearned"

    def rows_needed(self, entry: Entry, margin: float) -> int | None:
        """Rows with which the limit of the loss would lie below the margin in 80 % of tests, if what was seen is true.

        The standard error on the log scale shrinks with the square root of the rows; margin and loss must lie
        z(1 - level) + z(0.8) of them apart.

        Returns:
            None when the loss seen is as large as the margin.
        """
        seen, limit = (math.log1p(entry[key] / 100) for key in ("loss", "loss_limit"))
        room = math.log1p(margin / 100) - seen
        if room <= 0:
            return None
        apart = 1 + float(ndtri(POWER) / ndtri(1 - LEVEL))
        return max(math.ceil(entry["n"] * (apart * (limit - seen) / room) ** 2), entry["n"] + 1)

    def row_values(self, scores: AnswerScores) -> tuple[np.ndarray, np.ndarray]:
        """Loss, nats a token, and tokens of the answers."""
        return scores.row_losses, scores.tokens.astype(np.float64)

    def best(self, estimates: Sequence[float]) -> int:
        return int(np.argmin(estimates))

    def mean(self, values: np.ndarray, rows: RowGroups, tries: int = 1) -> Interval:
        return weighted_mean(values, rows.weights, rows.groups)

    def difference(self, change: np.ndarray, rows: RowGroups, confidence: float, tries: int = 1) -> Interval:
        return weighted_mean(change, rows.weights, rows.groups, confidence)

    def p_value(self, change: np.ndarray, rows: RowGroups, seed: int) -> float:
        """A t-test over groups; 1 where they show no spread to test against."""
        if limits(weighted_mean(change, rows.weights, rows.groups)) is None:
            return 1.0
        return cluster_test(change, rows.weights, rows.groups)

    def vectors(self, scores: AnswerScores) -> np.ndarray:
        """Log-likelihood of the answers a token."""
        return -scores.row_losses[:, None]

    def movement(self, change: np.ndarray) -> float:
        return float(np.mean(np.sum(change**2, axis=1))) ** 0.5

    def step(self, scores: AnswerScores, groups: np.ndarray, margin: float) -> dict[str, Any]:
        """Loss and perplexity of the answers, each with its interval."""
        return {"margin_percent": margin, "tokens": int(scores.tokens.sum()), **scores.figures(groups)}

    def step_change(
        self, before: AnswerScores, scores: AnswerScores, groups: np.ndarray, margin: float, seed: int
    ) -> dict[str, Any]:
        """The difference in loss (nats a token, paired bootstrap over clusters), what moved (mean absolute change of a
        row's loss: what cancels in the difference does not cancel here) and the rows whose perplexity changed by less
        than the margin, each with its interval."""
        change = scores.row_losses - before.row_losses
        moved = paired_bootstrap(np.abs(change), groups, seed, weights=scores.tokens)
        return {
            **paired_bootstrap(change, groups, seed, weights=scores.tokens).named("loss_difference"),
            **moved.named("moved"),
            **clustered_share(np.abs(change) < math.log1p(margin / 100), groups).named("agreement"),
        }


Metric = Accuracy | AnswerPerplexity
AnyScores = Scores | AnswerScores
ACCURACY, ANSWER_PERPLEXITY = Accuracy(), AnswerPerplexity()


def compare(
    metric: Metric, reference: Any, others: Mapping[str, Any], rows: RowGroups, seed: int
) -> dict[str, dict[str, Any]]:
    """Quality of every model on all rows and on the leak-free rows.

    Returns:
        what `Metric.compare` gives of all rows, and "leak_free": the same on those rows, or None. The reference, which
        is not compared with itself, has None where the others have a test.
    """
    found = metric.compare(reference, others, rows, seed)
    free: dict[str, dict[str, Any]] = {}
    if rows.leak_free is not None and rows.leak_free.any():
        mask = rows.leak_free
        kept = {name: scores.subset(mask) for name, scores in others.items()}
        free = _with_none(metric.compare(reference.subset(mask), kept, rows.subset(mask), seed, found[""]))
    return {name: {**entry, "leak_free": free.get(name)} for name, entry in _with_none(found).items()}


def _with_none(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    nothing = dict.fromkeys(key for entry in found.values() for key in entry)
    return {name: {**nothing, **entry} for name, entry in found.items()}


def metric_of(task: Task) -> Metric:
    """The metric of a run's task."""
    return ACCURACY if task.label_names else ANSWER_PERPLEXITY


def metric_in(entries: Sequence[Entry]) -> Metric:
    """The metric that the entries of a comparison.json were made with."""
    return ACCURACY if ACCURACY.point in entries[0] else ANSWER_PERPLEXITY
