"""The two models that notebook 03 judges: the base, and the base with the run's adapter."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.run.files import sha256_json
from lib.scoring import Keep

if TYPE_CHECKING:
    from lib.models.loading import Base
    from lib.run import Product, Run
    from lib.scoring import TransformersBackend

BASE, FINETUNED = "base", "finetuned"
SHOWN = {BASE: "base", FINETUNED: "fine-tuned"}
"""How a model is called on pages."""


@dataclass(frozen=True)
class Side:
    """One of the two models.

    Attributes:
        name: `BASE` or `FINETUNED`.
        base: the base model.
        adapter: the product of the adapter; None for the base alone.
        dtype: in which it computes.
    """

    name: str
    base: Base
    adapter: Product | None
    dtype: str

    @property
    def words(self) -> str:
        """What it is, in a sentence."""
        return f"the {SHOWN[self.name]} model"

    @property
    def in_4bit(self) -> bool:
        """Whether the base is held in 4 bits, as it was while the adapter was trained."""
        return self.adapter is not None and self.adapter.entry.facts.get("method") == "QLoRA"

    def title(self, alone: str = "") -> str:
        """What it is, exactly; `alone` stands behind the id of the base alone."""
        if self.adapter is None:
            return f"{self.base.id}{alone} ({self.dtype})"
        return f"{self.base.id} with the adapter ({'NF4 base, ' if self.in_4bit else ''}{self.dtype})"

    def keep(self, folder: Path) -> Keep:
        """Where its scores are kept as they come."""
        digest = self.adapter.entry.digest if self.adapter else None
        weights = [self.base.id, self.base.revision, digest, self.in_4bit, self.dtype]
        return Keep(folder / f"kept-{self.name}.jsonl", sha256_json(weights))

    @contextlib.contextmanager
    def opened(self, batch_size: int) -> Iterator[TransformersBackend]:
        """The loaded model, which is freed again."""
        from lib.models.loading import load_model
        from lib.scoring import TransformersBackend

        adapter = self.adapter.path if self.adapter else None
        model = load_model(self.base.path, dtype=self.dtype, load_in_4bit=self.in_4bit, adapter=adapter)
        backend = TransformersBackend(model, batch_size, self.words)
        del model
        try:
            yield backend
        finally:
            backend.close()
            gc.collect()


def both_sides(run: Run, dtype: str) -> tuple[Side, Side]:
    """The base and the fine-tuned model of a run."""
    from lib.models.loading import base_of

    base = base_of(run)
    return Side(BASE, base, None, dtype), Side(FINETUNED, base, run.require("adapter"), dtype)


def notes(*texts: str) -> str:
    """What is to be said of a scoring, in one text; empty where nothing is."""
    return "; ".join(filter(None, texts))


def forget_kept(folder: Path) -> None:
    """Remove what was kept for an interruption."""
    for path in folder.glob("kept-*.jsonl"):
        path.unlink()


def facts_of(run: Run, side: Side, dtype_reason: str, *also: str) -> dict[str, Any]:
    """For the manifest: data and base, and the keys `also` of the data's own facts."""
    facts = run.require("data").entry.facts
    return {
        **{key: facts[key] for key in (*also, "source", "sample_data", "prompt_hash") if key in facts},
        "base_model": side.base.id,
        "base_revision": side.base.revision,
        "offline_base": side.base.offline,
        "dtype": side.dtype,
        "dtype_reason": dtype_reason,
    }
