"""What the scores of base and fine-tuned model say: by labels (`LabelEvaluation`) or by answers (`AnswerEvaluation`).

Each of the two knows the settings that its product depends on, what evaluation.json and the manifest hold, and what
`workbook evaluate` says of a single model. `result_of` picks the one that belongs to a task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from lib.errors import refusal
from lib.prompts.tasks import Task, read_task
from lib.runs.files import read_json, read_jsonl, sha256_json
from lib.runs.run import Product
from lib.scoring import answer_metrics
from lib.scoring.log_probabilities import AnswerScores, Scores, exponentials
from lib.scoring.word_lists import prompt_set, read_prompts, read_terms
from lib.settings import Settings
from lib.statistics import classification, paired
from lib.statistics.losses import cluster_test, limits, weighted_mean

Row = Mapping[str, Any]

BASE, FINETUNED, FLOOR = "base", "finetuned", "linear floor"
SHOWN = {BASE: "base", FINETUNED: "fine-tuned"}
"""How a model is called on pages."""

SUMMARY, GENERATED, PROMPTS_FILE = "evaluation.json", "generated.jsonl", "prompts.json"

ALL, LEAK_FREE, SEEN, UNSEEN = "all", "leak_free", "seen_pattern", "unseen_pattern"
MISTAKES_SHOWN = 10


def told_apart(rows: Mapping[str, int | None]) -> list[str]:
    """Of the parts of the test rows, by their numbers of rows, those to tell: leak-free rows are no part of their own
    where no row leaked."""
    return [part for part, n in rows.items() if part != LEAK_FREE or n != rows.get(ALL)]


def subsets(rows: Sequence[Row], train_patterns: set[str] | None = None) -> dict[str, np.ndarray]:
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


@dataclass(frozen=True)
class EvaluationResult:
    """What notebook 03 shows.

    Both kinds have the same methods. `parameters`: what the product depends on, beside its inputs. `read`: the result
    from the files of the product (in `folder`) and of the data product; `told` is what only the making of the product
    knows, or evaluation.json. `to_json`: the content of evaluation.json. `headline`: metrics for the manifest. `asked`
    and `of_model`: what `workbook evaluate` says of the task and of one model (see `evaluate_models`), given facts of
    the rows as the model's tokenizer cut them.

    Attributes:
        product: the product `evaluation`; None only while it is being made.
        task: what was asked.
        scores: per row, of "base" and "finetuned"; of "base" alone where nothing was trained.
        titles: what each model is, in words.
    """

    product: Product | None
    task: Task
    scores: dict[str, Any]
    titles: dict[str, str]

    @property
    def trained(self) -> bool:
        """Whether there is a fine-tuned model beside the base."""
        return FINETUNED in self.scores

    @property
    def judged(self) -> str:
        """The model that the page is about: the fine-tuned one, or the base where nothing was trained."""
        return FINETUNED if self.trained else BASE

    @property
    def shown(self) -> dict[str, str]:
        """The models, and how pages call them."""
        return {name: SHOWN[name] for name in self.scores}

    writes: ClassVar[bool]
    """Whether the models also write answers."""
    alone: ClassVar[str]
    """What stands behind the base's id in its title."""
    columns: ClassVar[tuple[str, ...]]
    """Keys of `of_model` that a short table shows."""


def result_of(task: Task) -> type[LabelEvaluation] | type[AnswerEvaluation]:
    """The kind of result that a task has."""
    return LabelEvaluation if task.label_names else AnswerEvaluation


# Rows with labels: accuracy, confusion, calibration, mistakes, beside the linear floor.


@dataclass(frozen=True)
class ModelEvaluation:
    """One model on the rows.

    Attributes:
        scores: per row.
        reports: accuracy with Wilson interval, per-class scores and confusion matrix, for each subset of the rows.
        calibration: reliability bins and expected calibration error on all rows.
        mistakes: the most confident wrong answers, most confident first: "id", "text", "label" and "leaked" of the
            row, "prediction", and the "probability" given to it among the answer words.
    """

    scores: Scores
    reports: dict[str, classification.ClassificationReport]
    calibration: classification.Calibration
    mistakes: list[dict[str, Any]]

    @property
    def costs(self) -> dict[str, Any]:
        """Near ties, truncated rows and time, JSON values."""
        return {
            "near_ties": self.scores.near_ties,
            "truncated": int(self.scores.truncated.sum()),
            "seconds_per_sample": self.scores.seconds_per_sample,
        }

    def to_json(self) -> dict[str, Any]:
        """The reports by subset, calibration, mistakes, cost."""
        bins = [{k: None if v != v else v for k, v in asdict(b).items()} for b in self.calibration.bins]
        return {
            **{subset: report.to_json() for subset, report in self.reports.items()},
            "calibration": {"ece": self.calibration.ece, "bins": bins},
            "mistakes": self.mistakes,
            **self.costs,
        }


def evaluate_scores(
    scores: Scores, rows: Sequence[Row], label_names: Sequence[str], masks: Mapping[str, np.ndarray]
) -> ModelEvaluation:
    """Everything that is said of one model.

    Raises:
        InputError: the scores belong to other rows.
    """
    if scores.ids != [row["id"] for row in rows]:
        raise refusal("evaluate/other-scores")
    reports = {
        name: classification.classification_report(scores.labels[mask], scores.predictions[mask], label_names)
        for name, mask in masks.items()
    }
    confidence = scores.probabilities.max(axis=1)
    wrong = np.flatnonzero(~scores.correct)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES_SHOWN]
    mistakes = [
        {
            "id": rows[i]["id"],
            "text": rows[i]["text"],
            "label": int(scores.labels[i]),
            "prediction": int(scores.predictions[i]),
            "probability": float(confidence[i]),
            "leaked": bool(rows[i].get("leaked", False)),
        }
        for i in worst
    ]
    return ModelEvaluation(scores, reports, classification.calibration(confidence, scores.correct), mistakes)


@dataclass(frozen=True)
class LabelEvaluation(EvaluationResult):
    """How often the models are right.

    Attributes:
        models: "base" (zero-shot) and "finetuned", as `scores`.
        floor: the linear floor's reports, by subset of the rows.
        comparisons: subset -> reference ("base", "linear floor") -> the judged model against it.
        majority_share: share of the commonest label among the test rows: what answering one word always would reach.
        scoring: what was done otherwise than usual while scoring, and of answer words of several tokens, by model;
            empty texts where there is nothing.
    """

    models: dict[str, ModelEvaluation]
    floor: dict[str, classification.ClassificationReport]
    comparisons: dict[str, dict[str, paired.PairedComparison]]
    majority_share: float
    scoring: dict[str, str]

    writes = False
    alone = ", zero-shot"
    columns = ("accuracy", "accuracy_interval", "macro_f1")

    @classmethod
    def parameters(cls, settings: Settings) -> dict[str, Any]:
        return settings.pick("per_device_eval_batch_size", "seed", "dtype")

    @classmethod
    def read(cls, product: Product | None, folder: Path, data: Path, settings: Settings, told: dict[str, Any]) -> Self:
        task, rows = read_task(data), read_jsonl(data / "test.jsonl")
        patterns = {row["pattern"] for row in read_jsonl(data / "train.jsonl") if "pattern" in row}
        masks, names = subsets(rows, patterns), task.label_names
        scores = {name: Scores.load(folder / f"scores-{name}.jsonl") for name in told["titles"]}
        models = {name: evaluate_scores(own, rows, names, masks) for name, own in scores.items()}
        labels = scores[BASE].labels
        floor = np.array(read_json(data / "floor.json")["test"]["predictions"], dtype=np.int64)
        *references, judged = scores
        right = {**{name: scores[name].correct for name in references}, FLOOR: floor == labels}
        groups = np.array([row["group"] for row in rows])
        comparisons = {
            subset: paired.compare_pairs(
                {name: (correct[mask], scores[judged].correct[mask]) for name, correct in right.items()},
                groups[mask],
                settings.seed,
            )
            for subset, mask in masks.items()
            if subset in (ALL, LEAK_FREE)
        }
        return cls(
            product=product,
            task=task,
            scores=scores,
            titles=told["titles"],
            models=models,
            floor={
                name: classification.classification_report(labels[mask], floor[mask], names)
                for name, mask in masks.items()
            },
            comparisons=comparisons,
            majority_share=float(np.bincount(labels).max() / len(labels)),
            scoring=told.get("scoring", {}),
        )

    def accuracies(self, subset: str = ALL) -> list[dict[str, Any]]:
        """Name, estimate, low, high, n, balanced_accuracy and macro_f1 of every model and the floor."""
        reports = {SHOWN[name]: model.reports for name, model in self.models.items()} | {FLOOR: self.floor}
        found = {name: own[subset] for name, own in reports.items() if subset in own}
        return [
            {
                "name": name,
                **{key: getattr(r.accuracy, key) for key in ("estimate", "low", "high")},
                **{key: getattr(r, key) for key in ("n", "balanced_accuracy", "macro_f1")},
            }
            for name, r in found.items()
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "label_names": list(self.task.label_names),
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

    def headline(self) -> dict[str, Any]:
        """Accuracies with their intervals, all rows and leak-free rows."""
        metrics: dict[str, Any] = {"n": self.models[BASE].reports[ALL].n}
        for subset, ending in ((ALL, ""), (LEAK_FREE, "_leak_free")):
            for point in self.accuracies(subset):
                name = point["name"].replace(" ", "_").replace("-", "")
                metrics[f"accuracy_{name}{ending}"] = point["estimate"]
                metrics[f"accuracy_{name}{ending}_interval"] = [point["low"], point["high"]]
        metrics["near_ties"] = {name: scores.near_ties for name, scores in self.scores.items()}
        metrics["truncated"] = int(self.scores[BASE].truncated.sum())
        return metrics

    @classmethod
    def asked(cls, task: Task) -> dict[str, Any]:
        return {"labels": list(task.label_names)}

    @classmethod
    def of_model(cls, scores: Any, rows: Sequence[Row], task: Task, facts: Mapping[str, Any]) -> dict[str, Any]:
        evaluation = evaluate_scores(scores, rows, task.label_names, subsets(rows))
        free = evaluation.reports.get(LEAK_FREE)
        return {
            **evaluation.reports[ALL].to_json(),
            "leak_free": free.to_json() if free else None,
            "ece": evaluation.calibration.ece,
            **evaluation.costs,
            "note": facts["note"],
        }


# Conversations: how likely the reference answers are, and what the models write.


@dataclass(frozen=True)
class AnswerEvaluation(EvaluationResult):
    """How likely the models find the reference answers, and what they write.

    Attributes:
        content: evaluation.json: "titles", "parts" (see `summary`), "decoding", "answers" (entries of `summarise`;
            empty where none were written), "chrf" (signature), "terms" (name and number of the list, or None).
        generated: {"id", "question", "reference", "base", "fine-tuned", "measured", …} of some test rows.
        prompts: prompts.json: what both models answer to a few prompts, greedily and drawn, with latency.
    """

    content: dict[str, Any]
    generated: list[dict[str, Any]]
    prompts: dict[str, Any]

    writes = True
    alone = ""
    columns = ("answer_tokens", "perplexity", "perplexity_interval", "bits_per_character", "turns_cut")

    @classmethod
    def parameters(cls, settings: Settings) -> dict[str, Any]:
        """Hashes of the lists that settings name show a change in a file."""
        terms = read_terms(settings.terms)
        return {
            **settings.pick("per_device_eval_batch_size", "seed", "dtype"),
            **settings.pick("generated_rows", "max_new_tokens", "terms", "prompts_file"),
            **answer_metrics.parameter(settings),
            "terms_sha256": terms and terms.sha256,
            "prompts_sha256": sha256_json(read_prompts(prompt_set(settings))),
        }

    @classmethod
    def read(cls, product: Product | None, folder: Path, data: Path, settings: Settings, told: dict[str, Any]) -> Self:
        task, rows = read_task(data), read_jsonl(data / "test.jsonl")
        scores = {name: AnswerScores.load(folder / f"scores-{name}.jsonl") for name in told["titles"]}
        return cls(
            product=product,
            task=task,
            scores=scores,
            titles=told["titles"],
            content={**told, "parts": summary(scores, rows)},  # of whatever version wrote the product
            generated=read_jsonl(folder / GENERATED),
            prompts=read_json(folder / PROMPTS_FILE),
        )

    @property
    def part(self) -> dict[str, Any]:
        """The leak-free rows where there are any, else all."""
        return self.content["parts"].get(LEAK_FREE) or self.content["parts"][ALL]

    def to_json(self) -> dict[str, Any]:
        return {"task": self.task.kind, "thinking": self.task.thinking, **self.content}

    def headline(self) -> dict[str, Any]:
        """Losses and perplexities of all rows."""
        whole = self.content["parts"][ALL]
        figures = {f"{key}_{name}": whole[name][key] for name in self.scores for key in ("loss", "perplexity")}
        return {"n": whole["n"], "tokens": whole["tokens"], **figures}

    @classmethod
    def asked(cls, task: Task) -> dict[str, Any]:
        return {"task": task.kind}

    @classmethod
    def of_model(cls, scores: Any, rows: Sequence[Row], task: Task, facts: Mapping[str, Any]) -> dict[str, Any]:
        characters, groups = np.array(facts["characters"]), [row.get("group", -1 - i) for i, row in enumerate(rows)]
        leaked = np.array([row.get("leaked") is not False for row in rows])

        def figures(mask: np.ndarray) -> dict[str, Any]:
            part = scores.subset(mask)
            bits = -part.log_probs.sum() / math.log(2) / characters[mask].sum()
            return {
                "n": len(part.ids),
                "answer_tokens": int(part.tokens.sum()),
                **part.figures(np.array(groups)[mask]),
                "bits_per_character": float(bits),
            }

        return {
            **figures(np.ones(len(rows), dtype=bool)),
            "turns_cut": sum(facts["turns_cut"]),
            "leak_free": None if leaked.all() else figures(~leaked),
            "seconds_per_sample": scores.seconds_per_sample,
        }


def summary(scores: Mapping[str, AnswerScores], rows: Sequence[Row]) -> dict[str, Any]:
    """Losses, perplexities and, of two models, their paired difference on all rows and on the leak-free rows.

    Intervals are Student's over groups, None where the groups show no spread; "p" is the test that belongs to them,
    "mde" the smallest difference that these rows could have shown with 80 % power, nats a token (None: any).
    """
    groups = np.array([row["group"] for row in rows])
    parts = {}
    for part, mask in subsets(rows).items():
        own = {name: found.subset(mask) for name, found in scores.items()}
        base = own[BASE]
        parts[part] = {
            "n": int(mask.sum()),
            "groups": len(np.unique(groups[mask])),
            "tokens": int(base.tokens.sum()),
            **{name: found.figures(groups[mask]) for name, found in own.items()},
        }
        if FINETUNED not in own:
            continue
        losses = own[FINETUNED].row_losses - base.row_losses
        change = weighted_mean(losses, base.tokens, groups[mask])
        parts[part] |= {
            "difference": change.estimate,
            "difference_interval": limits(change),
            "p": cluster_test(losses, base.tokens, groups[mask]),
            "ratio": math.exp(change.estimate),
            "ratio_interval": exponentials(limits(change)),
        }
    return parts
