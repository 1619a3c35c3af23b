"""Fine-tuning: LoRA or QLoRA on the answer tokens, resumable, its best checkpoint published as the adapter."""

from __future__ import annotations

from lib.training.stage import FinetuneResult, finetune

__all__ = ["FinetuneResult", "finetune"]
