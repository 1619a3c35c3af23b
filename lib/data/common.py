"""What the stage does alike for every task: limits, the tokenizer of the base model, the stamps."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lib.data import splitting
from lib.data.cleaning import Row
from lib.models.resolving import ChosenBase, choose_base, refuse_without_template, resolve_base
from lib.models.unpacking import RECORD as UNPACKED
from lib.run.files import write_json
from lib.run.folders import user_path
from lib.settings import OFFLINE_BASE, SAMPLE_DATASET, Settings

if TYPE_CHECKING:
    from collections import Counter

    from transformers import PreTrainedTokenizerBase

    from lib.data.choosing import ChosenData
    from lib.run import Work

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


def base_parameters(settings: Settings) -> dict[str, Any]:
    """What the product depends on, beside the name of the base model: the hash of a local one, how it is unpacked."""
    path = user_path(settings.base_model)
    gguf = {"gguf_dtype": settings.gguf_dtype, "gguf_off_grid": settings.gguf_off_grid}
    listed = [str(entry.get("base_model", "")) for entry in settings.fallbacks]
    asked = settings.gguf_off_grid or any(name.lower().endswith(".gguf") for name in listed)
    if settings.base_model == OFFLINE_BASE or not path.exists():
        return gguf if asked else {}
    refuse_without_template(settings.base_model)
    unpacking = gguf if path.is_file() or asked else {}
    return {"base_revision": resolve_base(settings.base_model, settings.revision, **gguf).revision, **unpacking}


def chosen_base(settings: Settings) -> ChosenBase:
    """The base model that the settings name, or the first of the fallbacks that can be had."""
    unpacking = (settings.gguf_dtype, settings.gguf_off_grid)
    return choose_base(settings.base_model, settings.revision, settings.fallbacks, *unpacking)


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
    return tokenizer, facts | {"base_revision": chosen.base.revision, **chosen.base.facts}


def count_steps(split: str, read: int, counts: Counter[str], flow: list[dict[str, Any]], changes: Counter[str]) -> None:
    """Add to `flow` how many rows of a split were read and dropped, and to `changes` what was altered in the others."""
    flow.append({"step": "read", "split": split, "rows": read})
    for reason, count in counts.items():
        if reason.startswith("dropped"):
            flow.append({"step": reason, "split": split, "rows": count})
        else:
            changes[reason] += count


def record_sources(
    work: Work,
    data: ChosenData,
    chosen: ChosenBase,
    base: Mapping[str, Any],
    splits: Mapping[str, Sequence[Row]],
    prompt_hash: str,
    notes: Sequence[str] = (),
) -> None:
    """What the manifest and every page say of where the rows and the base model came from.

    Args:
        base: facts of `put_tokenizer`. notes: more sentences for the pages.
    """
    if chosen.base is not None and chosen.base.unpacked is not None:  # other weights must make another product
        write_json(work.folder / UNPACKED, dict(chosen.base.unpacked))
    table, sample = data.table, data.source == SAMPLE_DATASET
    stamp = STAMPS.get((base["offline_base"], sample))
    work.notes += [*([stamp] if stamp else []), *chosen.notes, *data.notes, *notes]
    work.facts |= {
        "source": table.source,
        "sample_data": sample,
        "dataset": {"source": data.source, "revision": table.revision, "rows": table.rows, "sha256": table.hashes},
        **base,
        "prompt_hash": prompt_hash,
        "rows": {name: len(rows) for name, rows in splits.items()},
    }
