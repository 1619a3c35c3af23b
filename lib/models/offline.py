"""The offline base model: a real, small Qwen2 with its own tokenizer, made from the run's training texts.

Both parts are stored under runs/_offline/ by a key of everything that determines them, and reused by every run.
"""

from __future__ import annotations

from lib.models.offline_base import BaseRecipe, ensure_base, offline_card
from lib.models.offline_tokenizer import TokenizerRecipe, ensure_tokenizer, train_tokenizer

__all__ = ["BaseRecipe", "TokenizerRecipe", "ensure_base", "ensure_tokenizer", "offline_card", "train_tokenizer"]
