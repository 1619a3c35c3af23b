"""The product `evaluation`: per-row scores of base and fine-tuned model, and what they say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.prompts.tasks import read_task
from lib.runs.files import read_json, read_jsonl, write_json
from lib.runs.machine import compute_dtype, device_name
from lib.scoring.journal import found_done
from lib.scoring.log_probabilities import Scores, score_rows
from lib.stages.evaluate.analysis import (
    ALL,
    BASE,
    FINETUNED,
    LEAK_FREE,
    SHOWN,
    ModelEvaluation,
    both_sides,
    compare_with,
    evaluate_scores,
    facts_of,
    forget_kept,
    notes,
    subsets,
)
from lib.stages.evaluate.answers import AnswerResult, evaluate_answers
from lib.statistics import classification, intervals, verdicts

if TYPE_CHECKING:
    from lib.runs.run import Product, Run, Work
    from lib.settings import Settings


FLOOR = "linear floor"
PARAMETERS = ("per_device_eval_batch_size", "seed", "dtype", "equivalence_margin")


@dataclass(frozen=True)
class EvaluationResult:
    """What notebook 03 shows.

    Attributes:
        product: the product `evaluation`; None only while it is being made.
        label_names: answer words in label order.
        models: "base" (zero-shot) and "finetuned".
        floor: the linear floor's reports, by subset of the rows.
        comparisons: subset -> reference ("base", "linear floor") -> the fine-tuned model against it.
        majority_share: share of the commonest label among the test rows: what answering one word always would reach.
        titles: what each model is, in words.
        scoring: what was done otherwise than usual while scoring, and of answer words of several tokens, by model;
            empty texts where there is nothing.
        labelled: True; an AnswerResult says False.
    """

    product: Product | None
    label_names: tuple[str, ...]
    models: dict[str, ModelEvaluation]
    floor: dict[str, classification.ClassificationReport]
    comparisons: dict[str, dict[str, verdicts.PairedComparison]]
    majority_share: float
    titles: dict[str, str]
    scoring: dict[str, str]
    labelled: bool = True

    def accuracies(self, subset: str = ALL) -> list[dict[str, Any]]:
        """Name, estimate, low, high and n of every model and the floor, for a figure or a table."""
        reports = {name: model.reports.get(subset) for name, model in self.models.items()}
        reports[FLOOR] = self.floor.get(subset)
        return [
            {
                "name": SHOWN.get(name, name),
                "estimate": r.accuracy.estimate,
                "low": r.accuracy.low,
                "high": r.accuracy.high,
                "n": r.n,
            }
            for name, r in reports.items()
            if r is not None
        ]

    def subsets(self) -> list[str]:
        """Names of the parts of the rows that are reported apart, "all" first."""
        return list(self.models[FINETUNED].reports)

    def class_rows(self, subset: str = ALL) -> list[dict[str, Any]]:
        """One mapping a model and class: precision, recall, F1, support."""
        return [
            {
                "model": SHOWN.get(name, name),
                "class": scores.name,
                **{key: getattr(scores, key) for key in ("precision", "recall", "f1", "support")},
            }
            for name, model in self.models.items()
            for scores in model.reports[subset].classes
        ]

    def confusions(self, subset: str = ALL) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Confusion matrix of each model: rows = true label, columns = predicted label."""
        return {SHOWN.get(name, name): model.reports[subset].confusion for name, model in self.models.items()}

    def reliability(self) -> dict[str, list[dict[str, float]]]:
        """Filled calibration bins of each model, the accuracy with its Wilson interval."""
        return {
            SHOWN.get(name, name): [
                {"confidence": b.confidence, "accuracy": b.accuracy, "low": i.low, "high": i.high, "n": b.n}
                for b in model.calibration.bins
                if b.n
                for i in [intervals.wilson(round(b.accuracy * b.n), b.n)]
            ]
            for name, model in self.models.items()
        }

    def to_json(self) -> dict[str, Any]:
        """The content of evaluation.json."""
        return {
            "label_names": list(self.label_names),
            "majority_share": self.majority_share,
            "titles": self.titles,
            "scoring": self.scoring,
            "models": {name: model.to_json() for name, model in self.models.items()},
            "linear_floor": {subset: report.to_json() for subset, report in self.floor.items()},
            "comparisons": {
                subset: {name: comparison.to_json() for name, comparison in pairs.items()}
                for subset, pairs in self.comparisons.items()
            },
        }


def evaluate(settings: Settings, run: Run) -> EvaluationResult | AnswerResult:
    """Score base and fine-tuned model on the test rows, or take the scores of last time.

    Rows without labels are scored by their reference answers (`lib.stages.evaluate.answers`).

    Raises:
        InputError: data or adapter missing; a model that cannot be loaded; log-probabilities that are not numbers.
    """
    if not read_task(run.require("data").path).label_names:
        return evaluate_answers(settings, run)
    product = run.produce(
        "evaluation",
        lambda work: _build(settings, run, work),
        parameters=settings.pick(*PARAMETERS),
        inputs=("data", "adapter"),
        force=settings.force,
        keep_partial=True,
    )
    data = run.require("data").path
    return _read(product, product.path, data, settings)


def _build(settings: Settings, run: Run, work: Work) -> None:
    from lib.models.loading import load_tokenizer

    data = run.require("data")
    task, rows = read_task(data.path), read_jsonl(data.path / "test.jsonl")
    tokenizer = load_tokenizer(data.path / "tokenizer")
    dtype, reason = compute_dtype(settings.dtype)
    work.device = device_name()
    sides, said, found = both_sides(run, dtype), {}, {}
    for side in sides:
        with side.opened(settings.per_device_eval_batch_size) as backend:
            what = f"scoring test rows with {side.words}"
            scores = score_rows(backend, tokenizer, task, rows, what, side.keep(work.folder))
            said[side.name] = notes(backend.note, task.note(tokenizer))
            found[side.name] = [scores.found]
        scores.save(work.folder / f"scores-{side.name}.jsonl")
    forget_kept(work.folder)
    titles = {side.name: side.title(", zero-shot") for side in sides}
    work.facts |= facts_of(run, sides[0], reason) | {"found_done": found_done(found)}
    result = _read(None, work.folder, data.path, settings, {"titles": titles, "scoring": said})
    write_json(work.folder / "evaluation.json", result.to_json())
    work.metrics |= _headline(result)


def _read(
    product: Product | None, folder: Path, data: Path, settings: Settings, told: dict[str, Any] | None = None
) -> EvaluationResult:
    """The result from the files of the product and of the data product."""
    task, rows = read_task(data), read_jsonl(data / "test.jsonl")
    train = read_jsonl(data / "train.jsonl")
    masks = subsets(rows, {row["pattern"] for row in train if "pattern" in row})
    models = {
        name: evaluate_scores(Scores.load(folder / f"scores-{name}.jsonl"), rows, task.label_names, masks)
        for name in (BASE, FINETUNED)
    }
    labels = models[BASE].scores.labels
    floor = np.array(read_json(data / "floor.json")["test"]["predictions"], dtype=np.int64)
    groups = np.array([row["group"] for row in rows])
    right = {BASE: models[BASE].scores.correct, FLOOR: floor == labels}
    comparisons = {
        subset: compare_with(
            models[FINETUNED].scores.correct[masks[subset]],
            {name: correct[masks[subset]] for name, correct in right.items()},
            groups[masks[subset]],
            settings.equivalence_margin,
            settings.seed,
        )
        for subset in (ALL, LEAK_FREE)
        if subset in masks
    }
    told = told or read_json(folder / "evaluation.json")
    return EvaluationResult(
        product=product,
        label_names=task.label_names,
        models=models,
        floor={
            name: classification.classification_report(labels[mask], floor[mask], task.label_names)
            for name, mask in masks.items()
        },
        comparisons=comparisons,
        majority_share=float(np.bincount(labels).max() / len(labels)),
        titles=told["titles"],
        scoring=told.get("scoring", {}),
    )


def _headline(result: EvaluationResult) -> dict[str, Any]:
    """Metrics for the manifest: accuracies with their intervals, all rows and leak-free rows."""
    metrics: dict[str, Any] = {"n": result.models[BASE].reports[ALL].n}
    for subset, ending in ((ALL, ""), (LEAK_FREE, "_leak_free")):
        for point in result.accuracies(subset):
            name = point["name"].replace(" ", "_").replace("-", "")
            metrics[f"accuracy_{name}{ending}"] = point["estimate"]
            metrics[f"accuracy_{name}{ending}_interval"] = [point["low"], point["high"]]
    metrics["near_ties"] = {name: model.scores.near_ties for name, model in result.models.items()}
    metrics["truncated"] = int(result.models[BASE].scores.truncated.sum())
    return metrics
