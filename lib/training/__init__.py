"""Fine-tuning: LoRA or QLoRA on the answer tokens, resumable, its best checkpoint published as the adapter."""

from __future__ import annotations

from lib.training.adopting import take
from lib.training.result import FinetuneResult
from lib.training.stage import finetune

__all__ = ["FinetuneResult", "finetune", "take"]
