"""Stage 03: the base model, zero-shot, and the fine-tuned model on the same test rows, through the one scorer.

`evaluate` makes the product `evaluation`; `evaluate_models` judges any models on any labelled rows for the command
line.
"""

from __future__ import annotations

from lib.evaluation.stage import EvaluationResult, evaluate
from lib.evaluation.standalone import evaluate_models

__all__ = ["EvaluationResult", "evaluate", "evaluate_models"]
