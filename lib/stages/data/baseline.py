"""The linear floor: what character counts alone achieve on the same rows; a fine-tuned model must beat it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.progress import Progress
from lib.statistics.classification import classification_report

if TYPE_CHECKING:
    from lib.stages.data.cleaning import Row

MODEL = "TF-IDF of character 1- to 4-grams (sublinear, seen in at least 2 training rows) + linear SVM (C = 1)"


def linear_floor(splits: dict[str, list[Row]], label_names: Sequence[str], seed: int) -> dict[str, Any]:
    """Train on the training rows as given, score validation and test.

    Returns:
        model: in words; features; trained_on: rows. "validation" and "test": one entry a row in `ids`, `predictions`,
        `decision_values` (signed for two labels, else best minus second) and `log_odds` (the decision value times a
        slope fitted on validation rows, so its sign is the prediction's); `accuracy`, `all`, `leak_free` and
        `by_pattern` (sample corpus) as `ClassificationReport.to_json`, None without rows. "decontaminated": the same
        model without the training rows that share a cluster with a validation or test row.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    train = splits["train"]
    labels = np.array([row.label for row in train])
    with Progress("linear floor", 4) as progress:
        vectorizer = TfidfVectorizer(
            analyzer="char", ngram_range=(1, 4), sublinear_tf=True, min_df=min(2, len(train)), dtype=np.float32
        )
        features = vectorizer.fit_transform([row.text for row in train])
        progress.advance(note="features")
        scored = {name: vectorizer.transform([row.text for row in splits[name]]) for name in ("validation", "test")}
        model = _fit(features, labels, seed)
        progress.advance(note="trained")
        values = {name: _decide(model, matrix) for name, matrix in scored.items()}
        slope = _slope(values["validation"], splits["validation"])
        progress.advance(note="scored")
        result: dict[str, Any] = {"model": MODEL, "features": features.shape[1], "trained_on": len(train)}
        for name, (predictions, decisions) in values.items():
            result[name] = {
                "ids": [row.to_json(name)["id"] for row in splits[name]],
                "predictions": predictions.tolist(),
                "decision_values": np.round(decisions, 6).tolist(),
                "log_odds": np.round(slope * decisions, 6).tolist(),
                **_reports(splits[name], predictions, label_names),
            }
        result["decontaminated"] = _decontaminated(splits, features, labels, scored["test"], label_names, seed)
        progress.advance()
    return result


def _fit(features: Any, labels: np.ndarray, seed: int) -> Any:
    from sklearn.svm import LinearSVC

    return LinearSVC(C=1.0, random_state=seed).fit(features, labels)


def _decide(model: Any, matrix: Any) -> tuple[np.ndarray, np.ndarray]:
    """Predictions, and the signed decision value (two labels) or best minus second."""
    values = model.decision_function(matrix)
    if values.ndim == 1:
        return model.classes_[(values > 0).astype(int)], values
    ordered = np.sort(values, axis=1)
    return model.classes_[values.argmax(axis=1)], ordered[:, -1] - ordered[:, -2]


def _slope(values: tuple[np.ndarray, np.ndarray], rows: list[Row]) -> float:
    """Slope through the origin that turns decision values into log-odds (Platt 1999 without intercept)."""
    from sklearn.linear_model import LogisticRegression

    predictions, decisions = values
    use = np.array([not row.leaked for row in rows])
    truth = np.array([row.label for row in rows])
    target = truth if (decisions < 0).any() else (predictions == truth).astype(int)
    if len(set(target[use].tolist())) < 2:
        return 1.0
    fitted = LogisticRegression(fit_intercept=False).fit(decisions[use, None], target[use])
    return max(float(fitted.coef_[0, 0]), 1e-6)


def _reports(rows: list[Row], predictions: np.ndarray, label_names: Sequence[str]) -> dict[str, Any]:
    labels = np.array([row.label for row in rows])

    def report(use: np.ndarray) -> dict[str, Any] | None:
        return classification_report(labels[use], predictions[use], label_names).to_json() if use.any() else None

    patterns = sorted({row.extra["pattern"] for row in rows if row.extra.get("pattern")})
    whole = report(np.ones(len(rows), dtype=bool))
    return {
        "accuracy": whole["accuracy"] if whole else None,
        "all": whole,
        "leak_free": report(np.array([not row.leaked for row in rows])),
        "by_pattern": {p: report(np.array([row.extra.get("pattern") == p for row in rows])) for p in patterns},
    }


def _decontaminated(
    splits: dict[str, list[Row]], features: Any, labels: np.ndarray, test: Any, label_names: Sequence[str], seed: int
) -> dict[str, Any] | None:
    """The floor without contaminated training rows (the gram weights stay: they use no labels)."""
    held_out = {row.group for name in ("validation", "test") for row in splits[name]}
    keep = np.array([row.group not in held_out for row in splits["train"]])
    if keep.all() or len(set(labels[keep].tolist())) < 2:
        return None
    predictions, _ = _decide(_fit(features[keep], labels[keep], seed), test)
    reports = _reports(splits["test"], predictions, label_names)
    return {"trained_on": int(keep.sum()), "all": reports["all"], "leak_free": reports["leak_free"]}
