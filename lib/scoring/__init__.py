"""One scorer for every kind of model: log-probabilities of the answer words, from raw logits, on the same token ids.

`TransformersBackend` scores transformers, bitsandbytes and peft models, `LlamaCppBackend` scores GGUF files; both take
token ids only, so that no text is ever tokenized twice. `lib.scoring.perplexity` holds perplexity and KL divergence as
llama-perplexity defines them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lib.scoring.backend import Backend
from lib.scoring.scores import NEAR_TIE, NEAR_TIE_LOW, Keep, Scores, score_rows

if TYPE_CHECKING:
    from lib.scoring.llama import LlamaCppBackend
    from lib.scoring.torch_backend import TransformersBackend

__all__ = [
    "NEAR_TIE",
    "NEAR_TIE_LOW",
    "Backend",
    "Keep",
    "LlamaCppBackend",
    "Scores",
    "TransformersBackend",
    "score_rows",
]


def __getattr__(name: str) -> Any:
    """The two backends, imported when they are used: torch and llama.cpp take seconds."""
    if name == "TransformersBackend":
        from lib.scoring.torch_backend import TransformersBackend

        return TransformersBackend
    if name == "LlamaCppBackend":
        from lib.scoring.llama import LlamaCppBackend

        return LlamaCppBackend
    raise AttributeError(name)
