"""The offline base model: a real, small Qwen2 with its own tokenizer, made from the run's training texts."""

from __future__ import annotations

from lib.models.offline_tokenizer import ensure_tokenizer, train_tokenizer

__all__ = ["ensure_tokenizer", "train_tokenizer"]
