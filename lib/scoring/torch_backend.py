"""Scoring with transformers: full-precision, bfloat16, quantized and adapted (peft) models alike."""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lib.models.head import output_head
from lib.models.loading import causal_model
from lib.runs.machine import return_freed_memory
from lib.scoring.backend import Backend, Feed, Job, Run, common_prefix, cut, grouped

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# The tokens that all prompts begin with, computed once: their keys and values stand before every batch.
#
# Exact up to rounding for causal models with a plain key-value cache (Qwen2, Qwen3, Llama, also quantized and adapted).
# Where the cache is of another kind, or the model does not answer alike with it, prompts are computed whole and `note`
# says so.

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
        cache = DynamicCache(config=self._decoder.config)
        self._decoder(input_ids=ids, past_key_values=cache, use_cache=True)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _behind(self, ids: torch.Tensor) -> torch.Tensor:
        cache = DynamicCache(config=self._decoder.config)
        for number, (keys, values) in enumerate(self._layers):
            cache.update(keys.expand(len(ids), -1, -1, -1), values.expand(len(ids), -1, -1, -1), number)
        return self._decoder(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state

    def _try(self, device: torch.device) -> str:
        """Whether this model can do it: its kind of cache, and a few tokens with and without; "" when it can."""
        kinds = {type(layer).__name__ for layer in DynamicCache(config=self._decoder.config).layers}
        if kinds - {DynamicLayer.__name__}:
            return f"prompts are computed whole: the model keeps {', '.join(sorted(kinds))}"
        ids = torch.arange(_TRIAL, device=device)[None] * 7 % self._vocab_size
        whole = self._decoder(input_ids=ids, use_cache=False).last_hidden_state[:, _TRIAL // 2 :].float()
        self._layers = self._compute(ids[:, : _TRIAL // 2])
        behind = self._behind(ids[:, _TRIAL // 2 :].expand(2, -1)).float()
        error = float((behind - whole).norm() / (2**0.5 * whole.norm()))
        if not error <= _LARGEST_ERROR:  # written so that NaN fails
            return f"prompts are computed whole: behind a key-value cache hidden states are {error:.1%} off"
        return ""


# Scoring with transformers: full-precision, bfloat16, quantized and adapted (peft) models alike.

_HEAD_ROWS = 256
"""Positions whose logits are held at once: 256 rows of a vocabulary of 151,936 in float32 are 156 MB."""

_TOKENS = 8192
"""Most tokens of a forward pass over whole conversations, padding included."""

_PASS = {"cpu": 48}
_PASS_ELSEWHERE = 4096
"""What a forward pass costs beside its tokens (reading the weights, small products), in tokens, by kind of device."""


class TransformersBackend(Backend):
    """Scores a causal language model of transformers that is already loaded, in evaluation mode.

    What all prompts begin with is computed once. The rest is padded on the right: a causal model cannot see what
    comes later, so padding changes nothing and no mask is needed. The vocabulary projection runs only at the positions
    that are read.

    Args:
        model: a causal language model, possibly wrapped by peft.
        batch_size: sequences a forward pass.
        name: what the model is, in words.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int = 32, name: str = "") -> None:
        self.model = model
        causal = causal_model(model)
        self._decoder, self._device = causal.get_decoder(), causal.get_output_embeddings().weight.device
        self.batch_size = batch_size
        self.name = name or causal.config.name_or_path or type(causal).__name__
        self.device = str(self._device)
        self.vocab_size = causal.config.vocab_size
        self._pass_cost = _PASS.get(self._device.type, _PASS_ELSEWHERE)
        self._prefix = SharedPrefix(self._decoder, self.vocab_size)
        # LLM.int8() on a CPU cuts pieces of ever other sizes, one for every number of outlier columns, and glibc keeps
        # them: 4.4 GB for a model of 0.16 GB; about 2 where what is freed is given back after every pass.
        self._scatters = self.device == "cpu" and bool(getattr(model, "is_loaded_in_8bit", False))
        model.eval()
        with torch.inference_mode():
            self._head = output_head(causal)

    @property
    def settings(self) -> dict[str, Any]:
        """See `lib.scoring.backend.Backend`."""
        return {
            "batch_size": self.batch_size,
            "pass_cost": self._pass_cost,
            "dtype": str(self.model.dtype),
            "device": self.device,
            "threads": torch.get_num_threads(),
            **{name: metadata.version(name) for name in ("torch", "transformers")},
        }

    def _plan(self, jobs: Sequence[Job], alike: bool) -> tuple[Iterable[Sequence[Job]], Run]:
        """See `lib.scoring.backend.Backend`; long conversations make small batches."""

        def full(batch: Sequence[Job], job: Job) -> bool:
            return len(batch) == self.batch_size or (len(batch) + 1) * len(job.ids) > _TOKENS

        if not alike:
            return grouped(jobs, full), self._run
        shared = self._prefix.share(common_prefix(jobs), self._device) if len(jobs) > 1 else 0
        self.note = self._prefix.note
        return self._batches(jobs, shared), functools.partial(self._run, shared=shared)

    def _batches(self, jobs: Sequence[Job], shared: int) -> list[Sequence[Job]]:
        """Jobs in order (shortest first), cut where padding would cost more than another forward pass."""
        widths = [len(job.ids) - shared for job in jobs]
        sizes = cut(widths, self.batch_size, self._pass_cost)
        ends = list(itertools.accumulate(sizes))
        return [jobs[end - size : end] for size, end in zip(sizes, ends, strict=True)]

    @torch.inference_mode()
    def _run(self, batch: Sequence[Job], shared: int = 0) -> list[np.ndarray]:
        """The read log-probabilities of one batch of sequences, whose first `shared` tokens are those of the prefix."""
        hidden = self._hidden([job.ids[shared:] for job in batch], shared)
        places = sorted({(b, position - shared) for b, job in enumerate(batch) for _, position, _ in job.reads})
        row_of = {place: i for i, place in enumerate(places)}
        sequence, position = (torch.tensor(index, device=hidden.device) for index in zip(*places, strict=True))
        reads = [
            (row_of[b, position - shared], token) for b, job in enumerate(batch) for _, position, token in job.reads
        ]
        values = self._pick(hidden[sequence, position], reads)
        ends = np.cumsum([len(job.reads) for job in batch])[:-1]
        return np.split(values, ends)

    def _hidden(self, sequences: list[list[int]], shared: int = 0) -> torch.Tensor:
        """Last hidden states, (sequences, longest, width); what stands behind a sequence's end is meaningless."""
        hidden = self._prefix.hidden(self._pad(sequences).to(self._device), shared)
        if self._scatters:
            return_freed_memory()
        return hidden

    @staticmethod
    def _pad(sequences: list[list[int]]) -> torch.Tensor:
        """Token ids padded on the right with id 0, (sequences, longest)."""
        longest = max(map(len, sequences))
        return torch.tensor([ids + [0] * (longest - len(ids)) for ids in sequences])

    def _pick(self, hidden: torch.Tensor, reads: list[tuple[int, int]]) -> np.ndarray:
        """Log-probability of each (row of `hidden`, token), over the full vocabulary, in float32."""
        rows, tokens = (torch.tensor(index, device=hidden.device) for index in zip(*reads, strict=True))
        values = torch.empty(len(reads), dtype=torch.float32, device=hidden.device)
        for i in range(0, len(hidden), _HEAD_ROWS):
            logits = self._head(hidden[i : i + _HEAD_ROWS]).float()
            here = (rows >= i) & (rows < i + _HEAD_ROWS)
            chosen = logits[rows[here] - i, tokens[here]]
            values[here] = chosen - torch.logsumexp(logits, dim=-1)[rows[here] - i]
        return values.cpu().numpy().astype(np.float64)

    @torch.inference_mode()
    def window_logits(self, ids: list[int], first: int = 0) -> np.ndarray:
        """Raw logits of the next token after each position of `ids` from `first` on, float32, (T - first, V)."""
        self.check_ids([ids])
        hidden = self._hidden([ids])[0, first:]
        result = np.empty((len(hidden), self.vocab_size), dtype=np.float32)
        for i in range(0, len(hidden), _HEAD_ROWS):
            result[i : i + _HEAD_ROWS] = self._head(hidden[i : i + _HEAD_ROWS]).float().cpu().numpy()
        return result

    def window_log_probs(self, ids: list[int], first: int = 0) -> np.ndarray:
        """See `lib.scoring.backend.Backend`."""
        return torch.log_softmax(torch.from_numpy(self.window_logits(ids, first)), dim=-1).numpy()

    def new_text(self) -> Feed:
        """See `lib.scoring.backend.Backend`."""
        cache: Any = None

        @torch.inference_mode()
        def feed(ids: Sequence[int]) -> np.ndarray:
            nonlocal cache
            given = torch.tensor([list(ids)], device=self._device)
            output = self.model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            return output.logits[0, -1].float().cpu().numpy()

        return feed

    def close(self) -> None:
        """Drop the references to the model; on a GPU its memory is given back."""
        self.model = self._decoder = self._head = None
        self._prefix.close()
        gc.collect()  # gone before the next one is loaded
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
