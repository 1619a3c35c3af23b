"""Stage 03: the base model, zero-shot, and the fine-tuned model on the same test rows, through the one scorer.

`evaluate` makes the product `evaluation`; `evaluate_models` judges any models on any labelled rows for the command
line, `evaluate_models_by_answers` on conversations.
"""

from __future__ import annotations

from lib.evaluation.stage import EvaluationResult, evaluate
from lib.evaluation.standalone import evaluate_models
from lib.evaluation.standalone_answers import evaluate_models_by_answers

__all__ = ["EvaluationResult", "evaluate", "evaluate_models", "evaluate_models_by_answers"]
