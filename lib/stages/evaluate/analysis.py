"""The two models that notebook 03 judges: the base, and the base with the run's adapter.
What the scores of one or several models on the same rows say, with intervals, paired tests and examples.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError
from lib.runs.files import sha256_json
from lib.scoring.journal import Keep
from lib.scoring.log_probabilities import Scores
from lib.statistics import classification, paired, verdicts

if TYPE_CHECKING:
    from lib.models.base_model import Base
    from lib.runs.run import Product, Run
    from lib.scoring.torch_backend import TransformersBackend


# The two models that notebook 03 judges: the base, and the base with the run's adapter.

BASE, FINETUNED = "base", "finetuned"
SHOWN = {BASE: "base", FINETUNED: "fine-tuned"}
"""How a model is called on pages."""


@dataclass(frozen=True)
class Side:
    """One of the two models.

    Attributes:
        name: `BASE` or `FINETUNED`.
        base: the base model.
        adapter: the product of the adapter; None for the base alone.
        dtype: in which it computes.
    """

    name: str
    base: Base
    adapter: Product | None
    dtype: str

    @property
    def words(self) -> str:
        """What it is, in a sentence."""
        return f"the {SHOWN[self.name]} model"

    @property
    def in_4bit(self) -> bool:
        """Whether the base is held in 4 bits, as it was while the adapter was trained."""
        return self.adapter is not None and self.adapter.entry.facts.get("method") == "QLoRA"

    def title(self, alone: str = "") -> str:
        """What it is, exactly; `alone` stands behind the id of the base alone."""
        if self.adapter is None:
            return f"{self.base.id}{alone} ({self.dtype})"
        return f"{self.base.id} with the adapter ({'NF4 base, ' if self.in_4bit else ''}{self.dtype})"

    def keep(self, folder: Path) -> Keep:
        """Where its scores are kept as they come."""
        digest = self.adapter.entry.digest if self.adapter else None
        weights = [self.base.id, self.base.revision, digest, self.in_4bit, self.dtype]
        return Keep(folder / f"kept-{self.name}.jsonl", sha256_json(weights))

    @contextlib.contextmanager
    def opened(self, batch_size: int) -> Iterator[TransformersBackend]:
        """The loaded model, which is freed again."""
        from lib.models.loading import load_model
        from lib.scoring.torch_backend import TransformersBackend

        adapter = self.adapter.path if self.adapter else None
        model = load_model(self.base.path, dtype=self.dtype, load_in_4bit=self.in_4bit, adapter=adapter)
        backend = TransformersBackend(model, batch_size, self.words)
        del model
        try:
            yield backend
        finally:
            backend.close()
            gc.collect()


def both_sides(run: Run, dtype: str) -> tuple[Side, Side]:
    """The base and the fine-tuned model of a run."""
    from lib.models.base_model import base_of

    base = base_of(run)
    return Side(BASE, base, None, dtype), Side(FINETUNED, base, run.require("adapter"), dtype)


def notes(*texts: str) -> str:
    """What is to be said of a scoring, in one text; empty where nothing is."""
    return "; ".join(filter(None, texts))


def forget_kept(folder: Path) -> None:
    """Remove what was kept for an interruption."""
    for path in folder.glob("kept-*.jsonl"):
        path.unlink()


def facts_of(run: Run, side: Side, dtype_reason: str, *also: str) -> dict[str, Any]:
    """For the manifest: data and base, and the keys `also` of the data's own facts."""
    facts = run.require("data").entry.facts
    return {
        **{key: facts[key] for key in (*also, "source", "sample_data", "prompt_hash") if key in facts},
        "base_model": side.base.id,
        "base_revision": side.base.revision,
        "offline_base": side.base.offline,
        "dtype": side.dtype,
        "dtype_reason": dtype_reason,
    }


# What the scores of one or several models on the same rows say, with intervals, paired tests and examples.

ALL, LEAK_FREE, SEEN, UNSEEN = "all", "leak_free", "seen_pattern", "unseen_pattern"
MISTAKES_SHOWN = 10


@dataclass(frozen=True)
class Mistake:
    """A wrong answer: the row, what was said, and the probability given to it among the answer words."""

    id: str
    text: str
    label: int
    prediction: int
    probability: float
    leaked: bool


@dataclass(frozen=True)
class ModelEvaluation:
    """One model on the rows.

    Attributes:
        scores: per row.
        reports: accuracy with Wilson interval, per-class scores and confusion matrix, for each subset of the rows.
        calibration: reliability bins and expected calibration error on all rows.
        mistakes: the most confident wrong answers, most confident first.
    """

    scores: Scores
    reports: dict[str, classification.ClassificationReport]
    calibration: classification.Calibration
    mistakes: tuple[Mistake, ...]

    def to_json(self) -> dict[str, Any]:
        """The reports by subset, calibration, mistakes, cost."""
        bins = [{k: None if v != v else v for k, v in asdict(b).items()} for b in self.calibration.bins]
        return {
            **{subset: report.to_json() for subset, report in self.reports.items()},
            "calibration": {"ece": self.calibration.ece, "bins": bins},
            "mistakes": [asdict(mistake) for mistake in self.mistakes],
            "near_ties": self.scores.near_ties,
            "truncated": int(self.scores.truncated.sum()),
            "seconds_per_sample": self.scores.seconds_per_sample,
        }


def subsets(rows: Sequence[Mapping[str, Any]], train_patterns: set[str] | None = None) -> dict[str, np.ndarray]:
    """Boolean masks of the parts of the rows that are reported apart; empty parts and unknown ones are left out.

    Args:
        rows: with "leaked" where the leak audit was made, and "pattern" in the sample corpus.
        train_patterns: patterns of the training rows.
    """
    masks = {ALL: np.ones(len(rows), dtype=bool)}
    if all("leaked" in row for row in rows):
        masks[LEAK_FREE] = np.array([not row["leaked"] for row in rows])
    if train_patterns and all("pattern" in row for row in rows):
        masks[SEEN] = np.array([row["pattern"] in train_patterns for row in rows])
        masks[UNSEEN] = ~masks[SEEN]
    return {name: mask for name, mask in masks.items() if mask.any()}


def evaluate_scores(
    scores: Scores,
    rows: Sequence[Mapping[str, Any]],
    label_names: Sequence[str],
    masks: Mapping[str, np.ndarray],
) -> ModelEvaluation:
    """Everything that is said of one model.

    Raises:
        InputError: the scores belong to other rows.
    """
    if scores.ids != [row["id"] for row in rows]:
        raise InputError(
            "scores of other rows.", "one score a row, in order.", "run 03_evaluate again with force: true."
        )
    reports = {
        name: classification.classification_report(scores.labels[mask], scores.predictions[mask], label_names)
        for name, mask in masks.items()
    }
    confidence = classification.confidences(scores.log_probs)
    wrong = np.flatnonzero(~scores.correct)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES_SHOWN]
    mistakes = tuple(
        Mistake(
            id=rows[i]["id"],
            text=rows[i]["text"],
            label=int(scores.labels[i]),
            prediction=int(scores.predictions[i]),
            probability=float(confidence[i]),
            leaked=bool(rows[i].get("leaked", False)),
        )
        for i in worst
    )
    return ModelEvaluation(scores, reports, classification.calibration(confidence, scores.correct), mistakes)


def compare_with(
    candidate: np.ndarray,
    references: Mapping[str, np.ndarray],
    groups: np.ndarray,
    margin_points: float,
    seed: int,
) -> dict[str, verdicts.PairedComparison]:
    """One candidate against several references on the same rows; p-values Holm-corrected over the references.

    Args:
        candidate: (n,) right or wrong.
        references: name -> (n,) right or wrong.
        groups: (n,) near-duplicate cluster of each row.
    """
    alone = {
        name: verdicts.compare(reference, candidate, groups, margin_points, seed, len(references))
        for name, reference in references.items()
    }
    adjusted = paired.holm([comparison.p for comparison in alone.values()])
    return {
        name: replace(
            comparison,
            p_adjusted=p,
            verdict=verdicts.verdict(comparison.difference, p, margin_points, comparison.mde),
        )
        for (name, comparison), p in zip(alone.items(), adjusted, strict=True)
    }
