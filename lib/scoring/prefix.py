"""The tokens that all prompts begin with, computed once: their keys and values stand before every batch.

Exact up to rounding for causal models with a plain key-value cache (Qwen2, Qwen3, Llama, also quantized and adapted).
Where the cache is of another kind, or the model does not answer alike with it, prompts are computed whole and `note`
says so.
"""

from __future__ import annotations

from typing import Any

import torch

_SHORTEST = 8
"""Fewest shared tokens that are worth a cache."""

_TRIAL = 12
_LARGEST_ERROR = 0.05
"""Largest difference of the trial's hidden states, relative; rounding in bfloat16 makes about 0.01, a wrong position or
a wrong mask far more."""


class SharedPrefix:
    """Runs a decoder on sequences that begin alike.

    Args:
        decoder: a decoder-only model of transformers without its head.
        vocab_size: number of its tokens.

    Attributes:
        note: why nothing is shared, in words; empty otherwise.
    """

    def __init__(self, decoder: Any, vocab_size: int) -> None:
        self._decoder, self._vocab_size = decoder, vocab_size
        self._ids: list[int] = []
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._tried = False
        self.note = ""

    @torch.inference_mode()
    def share(self, ids: list[int], device: torch.device) -> int:
        """Number of tokens of `ids` that `hidden` may leave out; 0 where sharing does not pay or cannot be done."""
        if len(ids) < _SHORTEST:
            return 0
        if not self._tried:
            self._tried, self.note = True, self._try(device)
        if self.note:
            return 0
        self._ids, self._layers = list(ids), []
        return len(ids)

    @torch.inference_mode()
    def hidden(self, ids: torch.Tensor, shared: int) -> torch.Tensor:
        """Last hidden states of `ids` behind the `shared` tokens, (sequences, longest, width)."""
        if not shared:
            return self._decoder(input_ids=ids, use_cache=False).last_hidden_state
        if not self._layers:
            self._layers = self._compute(torch.tensor([self._ids], device=ids.device))
        return self._behind(ids)

    def close(self) -> None:
        """Drop the references to the model."""
        self._decoder, self._layers = None, []

    def _compute(self, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        from transformers import DynamicCache

        cache = DynamicCache(config=self._decoder.config)
        self._decoder(input_ids=ids, past_key_values=cache, use_cache=True)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _behind(self, ids: torch.Tensor) -> torch.Tensor:
        from transformers import DynamicCache

        cache = DynamicCache(config=self._decoder.config)
        for number, (keys, values) in enumerate(self._layers):
            size = (len(ids), *keys.shape[1:])
            cache.update(keys.expand(size), values.expand(size), number)
        return self._decoder(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state

    def _try(self, device: torch.device) -> str:
        """Whether this model can do it: its kind of cache, and a few tokens with and without; "" when it can."""
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        kinds = {type(layer).__name__ for layer in DynamicCache(config=self._decoder.config).layers}
        if kinds - {DynamicLayer.__name__}:
            return f"prompts are computed whole: the model keeps {', '.join(sorted(kinds))}"
        ids = torch.arange(_TRIAL, device=device)[None] * 7 % self._vocab_size
        whole = self._decoder(input_ids=ids, use_cache=False).last_hidden_state[:, _TRIAL // 2 :].float()
        self._layers = self._compute(ids[:, : _TRIAL // 2])
        behind = self._behind(ids[:, _TRIAL // 2 :].expand(2, -1)).float()
        error = float((behind - whole).norm() / (2**0.5 * whole.norm()))
        if not error <= _LARGEST_ERROR:  # written so that NaN fails
            return f"prompts are computed whole: with a key-value cache the model is {error:.1%} off"
        return ""
