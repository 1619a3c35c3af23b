"""What the stage does alike for every task: limits, the tokenizer of the base model, the stamps."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lib.data import splitting
from lib.data.cleaning import Row
from lib.models.resolving import ChosenBase
from lib.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

R = TypeVar("R", bound=Row)

STAMPS = {
    (True, True): "offline base model, sample data: not a result about Qwen or ChnSentiCorp",
    (True, False): "offline base model: not a result about Qwen",
    (False, True): "sample data: not a result about ChnSentiCorp",
}
"""What every page must say, by (offline base, sample data)."""


def limit(splits: Mapping[str, list[R]], settings: Settings) -> dict[str, list[R]]:
    """At most `max_train_rows` and `max_eval_rows` rows."""
    most = {"train": settings.max_train_rows}
    return {
        name: splitting.subsample(rows, most.get(name, settings.max_eval_rows), settings.seed)
        for name, rows in splits.items()
    }


def put_tokenizer(
    chosen: ChosenBase, texts: list[str], words: Sequence[str], folder: Path
) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """Put the run's tokenizer into `folder`; also the facts about the base model.

    Args:
        texts: training texts, of which the offline base's tokenizer is made.
        words: answer words and prompts, which should cost it few tokens.
    """
    from lib.models import loading

    facts = {"base_model": chosen.source, "offline_base": chosen.base is None}
    if chosen.base is None:
        from lib.models.offline import ensure_tokenizer

        made = ensure_tokenizer(texts, [word for word in words if word.strip()])
        shutil.copytree(made, folder)
        return loading.load_tokenizer(folder), facts | {"base_revision": made.name}
    tokenizer = loading.load_tokenizer(chosen.base.path)
    tokenizer.save_pretrained(folder)
    return tokenizer, facts | {"base_revision": chosen.base.revision}
