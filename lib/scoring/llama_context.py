"""A GGUF file opened by llama.cpp: its tokenizer, batches of tokens and their logits.

llama.cpp ends the process on what it takes for a programming error, so everything is checked before it is called: ids,
lengths, tokens a batch, outputs a batch, sequences.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from lib.device import physical_cores
from lib.errors import InputError
from lib.models.gguf_file import check_gguf
from lib.scoring.llama_log import forget_errors, last_error, llama

SEQUENCES = 8
"""Sequences that one context holds."""

OUTPUTS = 128
"""Positions a batch whose logits are computed, where nothing else is asked for."""

_CACHE_TYPES = {"f32": "GGML_TYPE_F32", "f16": "GGML_TYPE_F16"}


class LlamaContext:
    """A GGUF file opened by llama.cpp; use as a context manager, or close it.

    Args:
        path: the file.
        n_ctx: most tokens a prompt or window.
        n_threads: CPU threads; 0 = physical cores.
        n_gpu_layers: layers on the GPU; -1 = all.
        cache_type: number format of keys and values, "f16" (as users run it) or "f32" (for exact comparison).
        flash_attention: None lets llama.cpp choose; False for exact comparison.
        n_outputs: most positions a batch whose logits are computed; llama.cpp reserves vocabulary × this × 4 bytes.

    Raises:
        InputError: not a GGUF file, or one that llama.cpp refuses (with its reason).
    """

    def __init__(
        self,
        path: Path | str,
        n_ctx: int = 512,
        n_threads: int = 0,
        n_gpu_layers: int = 0,
        cache_type: str = "f16",
        flash_attention: bool | None = None,
        n_outputs: int = OUTPUTS,
    ) -> None:
        self._model = self._context = self._batch = None
        self.path = check_gguf(path)
        self._api = llama()
        self.name = self.path.name
        self.n_ctx, self.n_outputs, self.n_gpu_layers = n_ctx, max(n_outputs, OUTPUTS), n_gpu_layers
        self.cache_type, self.flash_attention = cache_type, flash_attention
        self.n_threads = n_threads or physical_cores()
        self._open_model(n_gpu_layers)
        self._open_context(n_gpu_layers, cache_type, flash_attention)
        on_gpu = n_gpu_layers != 0 and self._api.llama_supports_gpu_offload()
        self.device = "gpu (llama.cpp)" if on_gpu else f"cpu (llama.cpp, {self.n_threads} threads)"

    def _open_model(self, n_gpu_layers: int) -> None:
        forget_errors()
        parameters = self._api.llama_model_default_params()
        parameters.n_gpu_layers = n_gpu_layers
        self._model = self._api.llama_model_load_from_file(str(self.path).encode("utf-8"), parameters)
        if not self._model:
            reason = last_error() or "no reason given"
            raise InputError(
                f"llama.cpp cannot load {self.path}: {reason}.",
                "a complete model of a kind that llama.cpp knows.",
                "make or download the file again.",
            )
        self._vocab = self._api.llama_model_get_vocab(self._model)
        self.vocab_size = self._api.llama_vocab_n_tokens(self._vocab)

    def _open_context(self, n_gpu_layers: int, cache_type: str, flash_attention: bool | None) -> None:
        api = self._api
        parameters = api.llama_context_default_params()
        self.n_batch = max(2048, self.n_ctx)
        parameters.n_ctx = parameters.n_batch = self.n_batch
        parameters.n_seq_max = SEQUENCES
        parameters.kv_unified = True
        parameters.n_outputs_max = self.n_outputs
        parameters.n_threads = parameters.n_threads_batch = self.n_threads
        parameters.type_k = parameters.type_v = getattr(api, _CACHE_TYPES[cache_type])
        parameters.offload_kqv = n_gpu_layers != 0
        parameters.no_perf = True
        if flash_attention is not None:
            choice = "ENABLED" if flash_attention else "DISABLED"
            parameters.flash_attn_type = getattr(api, f"LLAMA_FLASH_ATTN_TYPE_{choice}")
        forget_errors()
        self._context = api.llama_init_from_model(self._model, parameters)
        if not self._context:
            self.close()
            raise InputError(
                f"llama.cpp cannot open {self.path} with {self.n_batch} tokens: {last_error() or 'no reason given'}.",
                "enough memory for the context.",
                "use a smaller context or a smaller model.",
            )
        self._memory = api.llama_get_memory(self._context)
        self._batch = api.llama_batch_init(self.n_batch, 0, SEQUENCES)

    @property
    def begin_token(self) -> int | None:
        """The token that this model wants at the beginning of every text; None for Qwen models."""
        return self._api.llama_vocab_bos(self._vocab) if self._api.llama_vocab_get_add_bos(self._vocab) else None

    def tokenize(self, text: str) -> list[int]:
        """Ids by llama.cpp's own tokenizer, as its tools read a file: names of special tokens are plain text."""
        raw = text.encode("utf-8")
        ids = (self._api.llama_token * (len(raw) + 2))()
        count = self._api.llama_tokenize(self._vocab, raw, len(raw), ids, len(ids), True, False)
        if count < 0:
            raise InputError(f"llama.cpp cannot tokenize {len(raw)} bytes.", "a shorter text.", "cut the text.")
        return ids[:count]

    def piece(self, token: int) -> bytes:
        """The bytes of text that a token stands for; none for a special token."""
        buffer = ctypes.create_string_buffer(256)
        count = self._api.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[: max(0, count)]

    def clear(self) -> None:
        """Forget every sequence."""
        self._api.llama_memory_clear(self._memory, True)

    def forget(self, sequence: int, first: int) -> None:
        """Forget the tokens of a sequence from position `first` on."""
        self._api.llama_memory_seq_rm(self._memory, sequence, first, -1)

    def decode(self, tokens: Sequence[tuple[int, int, Sequence[int], bool]]) -> None:
        """Run (token, position, sequences, wants logits) in one batch of at most `n_batch` tokens."""
        if not tokens:
            return
        batch = self._batch
        for i, (token, position, sequences, output) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, output
            batch.n_seq_id[i] = len(sequences)
            ids = batch.seq_id[i]
            for k, sequence in enumerate(sequences):
                ids[k] = sequence
        batch.n_tokens = len(tokens)
        forget_errors()
        code = self._api.llama_decode(self._context, batch)
        if code != 0:
            raise InputError(
                f"llama.cpp ended a batch of {self.name} with code {code}: {last_error() or 'no reason given'}.",
                "code 0.",
                "use a smaller context; if that does not help, make the file again.",
            )

    def logits(self, index: int) -> np.ndarray:
        """Logits of the last batch's token `index`, which wanted them, float64, (V,)."""
        pointer = self._api.llama_get_logits_ith(self._context, ctypes.c_int32(index))
        if not pointer:
            raise RuntimeError(f"llama.cpp has no logits for token {index} of the batch")
        return np.ctypeslib.as_array(pointer, shape=(self.vocab_size,)).astype(np.float64)

    def close(self) -> None:
        """Free the model's memory; may be called twice."""
        if self._batch is not None:
            self._api.llama_batch_free(self._batch)
        if self._context:
            self._api.llama_free(self._context)
        if self._model:
            self._api.llama_model_free(self._model)
        self._model = self._context = self._batch = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
