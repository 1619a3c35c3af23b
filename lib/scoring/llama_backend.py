"""Scoring GGUF files with llama.cpp, several prompts a batch and their common beginning computed once."""

from __future__ import annotations

import collections
import ctypes
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lib.errors import InputError, refusal
from lib.models.gguf_file import check_model_gguf
from lib.runs.machine import llama_cpp_problem, physical_cores
from lib.scoring.backend import Backend, Feed, Job, Run, check_ids, common_prefix, grouped

# llama.cpp's log: silenced, its last error lines kept for error messages, every line passed to one listener.
#
# llama.cpp has one log callback for the whole process and calls whatever was set last, also after it is gone. So this
# is the only place that sets it, once.

ERROR, _CONTINUED = 4, 5  # ggml_log_level
_errors: collections.deque[str] = collections.deque(maxlen=20)
_listeners: list[Callable[[int, str], None]] = []
_kept: list[object] = []  # the callback must outlive every call of llama.cpp


@functools.cache
def llama() -> ModuleType:
    """The module llama_cpp.llama_cpp, its backend started and its log silenced.

    Raises:
        InputError: llama-cpp-python cannot be imported here.
    """
    if problem := llama_cpp_problem():
        raise refusal("scoring/no-llama-cpp", problem=problem)
    import llama_cpp
    from llama_cpp import llama_cpp as api

    level_before = 0

    @api.llama_log_callback
    def keep_errors(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        nonlocal level_before
        level = level_before if level == _CONTINUED else level
        level_before = level
        line = text.decode("utf-8", "replace")
        for listener in _listeners:
            listener(level, line)
        line = line.strip()
        if level == ERROR and line:
            _errors.append(line)

    _kept.extend([keep_errors, llama_cpp])
    api.llama_log_set(keep_errors, ctypes.c_void_p(0))
    api.llama_backend_init()
    return api


def listen(listener: Callable[[int, str], None]) -> None:
    """Pass (level, text) of everything that llama.cpp logs from now on to `listener`, and to no earlier one."""
    llama()
    _listeners[:] = [listener]


def forget_errors() -> None:
    """Drop the kept lines, before a call whose errors matter."""
    _errors.clear()


def last_error() -> str:
    """The last error lines of llama.cpp since `forget_errors`, as words for a message; empty when there is none."""
    return " | ".join(list(_errors)[-2:])


# A GGUF file opened by llama.cpp: its tokenizer, batches of tokens and their logits.
#
# llama.cpp ends the process on what it takes for a programming error, so everything is checked before it is called:
# ids, lengths, tokens a batch, outputs a batch, sequences.

SEQUENCES = 8
"""Sequences that one context holds."""

OUTPUTS = 128
"""Positions a batch whose logits are computed, where nothing else is asked for."""

_TOKENS_ON_CPU = 256
"""Tokens of several sequences that a CPU takes at once. The keys of all of them are looked at for every token, and the
products of matrices gain nothing from more: 8 sequences of 100 tokens cost 8 % more than 256 tokens at a time."""


def open_model(path: Path, n_gpu_layers: int, **values: Any) -> Any:
    """llama.cpp's handle of a GGUF file; `values`: other parameters of the model.

    Raises:
        InputError: llama.cpp refuses it (with its reason).
    """
    api = llama()
    forget_errors()
    parameters = api.llama_model_default_params()
    for key, value in {"n_gpu_layers": n_gpu_layers, **values}.items():
        setattr(parameters, key, value)
    model = api.llama_model_load_from_file(str(path).encode("utf-8"), parameters)
    if not model:
        raise refusal("scoring/cannot-load", path=path, why=last_error() or "no reason given")
    return model


def token_ids(vocabulary: Any, text: bytes, add_special: bool, parse_special: bool) -> list[int]:
    """Ids by llama.cpp's own tokenizer, which adds special tokens and recognises their names if asked."""
    ids = (llama().llama_token * (len(text) + 8))()  # a token is at least one byte
    count = llama().llama_tokenize(vocabulary, text, len(text), ids, len(ids), add_special, parse_special)
    if count < 0:
        raise InputError(f"llama.cpp cannot tokenize {len(text)} bytes.", "a shorter text.", "cut the text.")
    return ids[:count]


def open_context(model: Any, path: Path, tokens: int, do: str, **values: Any) -> Any:
    """llama.cpp's handle of a context for so many tokens.

    Args:
        do: what to do where there is no room for it.
        values: other parameters of the context.
    """
    api = llama()
    parameters = api.llama_context_default_params()
    for key, value in {"n_ctx": tokens, "n_batch": tokens, "no_perf": True, **values}.items():
        setattr(parameters, key, value)
    forget_errors()
    context = api.llama_init_from_model(model, parameters)
    if not context:
        why = last_error() or "no reason given"
        raise refusal("scoring/cannot-open", path=path, tokens=tokens, why=why, do=do)
    return context


class LlamaCppBackend(Backend):
    """A GGUF file opened by llama.cpp; use as a context manager, or close it.

    It scores several prompts a batch, their common beginning computed once.

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

    most_answer = OUTPUTS

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
        self.path = check_model_gguf(path)
        self._api = api = llama()
        self.name = self.path.name
        self.n_ctx, self.n_batch, self.n_outputs = n_ctx, max(2048, n_ctx), max(n_outputs, OUTPUTS)
        self.n_threads, self.n_gpu_layers = n_threads or physical_cores(), n_gpu_layers
        self.cache_type, self.flash_attention = cache_type, flash_attention
        self._most_tokens = self.n_batch if n_gpu_layers else _TOKENS_ON_CPU
        self._beginning: list[int] | None = None
        self._model = open_model(self.path, n_gpu_layers)
        self._vocab = api.llama_model_get_vocab(self._model)
        self.vocab_size = api.llama_vocab_n_tokens(self._vocab)
        on_gpu = n_gpu_layers != 0 and api.llama_supports_gpu_offload()
        self.device = "gpu (llama.cpp)" if on_gpu else f"cpu (llama.cpp, {self.n_threads} threads)"
        cache = getattr(api, f"GGML_TYPE_{cache_type.upper()}")
        values = {"n_seq_max": SEQUENCES, "kv_unified": True, "n_outputs_max": self.n_outputs}
        values |= {"n_threads": self.n_threads, "n_threads_batch": self.n_threads, "offload_kqv": n_gpu_layers != 0}
        values |= {"type_k": cache, "type_v": cache}
        if flash_attention is not None:
            choice = "ENABLED" if flash_attention else "DISABLED"
            values["flash_attn_type"] = getattr(api, f"LLAMA_FLASH_ATTN_TYPE_{choice}")
        do = "use a smaller context or a smaller model."
        try:
            self._context = open_context(self._model, self.path, self.n_batch, do, **values)
        except InputError:
            self.close()
            raise
        self._memory = api.llama_get_memory(self._context)
        # a state that is updated by every token (Qwen3.5, Mamba) can be copied or dropped whole, never cut back
        self._stateful = api.llama_model_is_recurrent(self._model) or api.llama_model_is_hybrid(self._model)
        self._free = range(1, SEQUENCES) if self._stateful else range(SEQUENCES)
        self._batch = api.llama_batch_init(self.n_batch, 0, SEQUENCES)

    @property
    def begin_token(self) -> int | None:
        """The token that this model wants at the beginning of every text; None for Qwen models."""
        return self._api.llama_vocab_bos(self._vocab) if self._api.llama_vocab_get_add_bos(self._vocab) else None

    @property
    def totals(self) -> tuple[int, int]:
        """Weights, and bytes of all tensors, as llama.cpp counts them: it knows types that gguf does not."""
        return self._api.llama_model_n_params(self._model), self._api.llama_model_size(self._model)

    def tokenize(self, text: str) -> list[int]:
        """Ids by llama.cpp's own tokenizer, as its tools read a file: names of special tokens are plain text."""
        return token_ids(self._vocab, text.encode("utf-8"), True, False)

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
            raise refusal("scoring/batch-failed", name=self.name, code=code, why=last_error() or "no reason given")

    def logits(self, index: int) -> np.ndarray:
        """Logits of the last batch's token `index`, which wanted them, float64, (V,)."""
        pointer = self._api.llama_get_logits_ith(self._context, ctypes.c_int32(index))
        if not pointer:
            raise RuntimeError(f"llama.cpp has no logits for token {index} of the batch")
        return np.ctypeslib.as_array(pointer, shape=(self.vocab_size,)).astype(np.float64)

    def new_text(self) -> Feed:
        """See `lib.scoring.backend.Backend`; the context must have room for the whole text (`n_ctx`)."""
        self.clear()
        done = 0

        def feed(ids: Sequence[int]) -> np.ndarray:
            nonlocal done
            check_ids([list(ids)], self.vocab_size, self.n_ctx - done, self.name)
            last = len(ids) - 1
            self.decode([(token, done + i, (0,), i == last) for i, token in enumerate(ids)])
            done += len(ids)
            return self.logits(last)

        return feed

    def close(self) -> None:
        """Free the model's memory; may be called twice."""
        if self._batch is not None:
            self._api.llama_batch_free(self._batch)
        if self._context:
            self._api.llama_free(self._context)
        if self._model:
            self._api.llama_model_free(self._model)
        self._model = self._context = self._batch = None

    def __del__(self) -> None:
        self.close()

    @property
    def settings(self) -> dict[str, Any]:
        """See `lib.scoring.backend.Backend`."""
        keys = ("n_ctx", "n_batch", "n_threads", "device", "cache_type", "flash_attention")
        version = metadata.version("llama_cpp_python")
        more = {"sequences": SEQUENCES, "tokens": self._most_tokens, "llama_cpp_python": version}
        return {**{key: getattr(self, key) for key in keys}, **more}

    def _plan(self, jobs: Sequence[Job], alike: bool) -> tuple[Iterable[Sequence[Job]], Run]:
        """See `lib.scoring.backend.Backend`; conversations run one after another."""
        if not alike:
            return ([job] for job in jobs), self._run_alone
        shared = self._share(jobs)
        return self._groups(jobs, shared), functools.partial(self._run, shared=shared)

    def _share(self, jobs: Sequence[Job]) -> int:
        """Length of what all jobs begin with; it is not computed before a batch needs it, for all of them may stand in
        the journal."""
        self._beginning = common_prefix(jobs)
        return len(self._beginning)

    def _groups(self, jobs: Sequence[Job], shared: int) -> Iterator[list[Job]]:
        """Jobs in order, cut into batches that respect every limit of the context; a long job is a batch alone."""
        most = min(self._most_tokens, self.n_batch - shared)

        def full(group: list[Job], job: Job) -> bool:
            tokens = sum(len(one.ids) - shared for one in (*group, job))
            outputs = sum(len(one.ids) - one.start for one in (*group, job))
            return len(group) == len(self._free) or tokens > most or outputs > OUTPUTS

        return grouped(jobs, full)

    def _decoded(self, group: Sequence[Job], shared: int) -> Iterator[tuple[Job, int]]:
        """Run one batch, with logits where its jobs read; the cache holds only the shared beginning afterwards.

        The beginning is computed once: in all sequences together, or where the model has a state in sequence 0, of
        which the others get copies.

        Yields:
            every job, and the place in the batch at which its position 0 would stand.
        """
        if self._beginning is not None:
            self.clear()
            owners = (0,) if self._stateful else self._free
            self.decode([(token, place, owners, False) for place, token in enumerate(self._beginning)])
            self._beginning = None
        tokens = []
        for s, job in zip(self._free, group, strict=False):
            if self._stateful:
                self._api.llama_memory_seq_cp(self._memory, 0, s, -1, -1)
            read = {position for _, position, _ in job.reads}
            tokens += [
                (token, position, (s,), position in read)
                for position, token in enumerate(job.ids[shared:], start=shared)
            ]
        self.decode(tokens)
        first = -shared
        for job in group:
            yield job, first
            first += len(job.ids) - shared
        for s in self._free[: len(group)]:
            self.forget(s, 0 if self._stateful else shared)

    def _run(self, group: Sequence[Job], shared: int) -> list[np.ndarray]:
        """The read log-probabilities of one batch."""
        values = []
        for job, first in self._decoded(group, shared):
            logits = {position: self.logits(first + position) for position in {read[1] for read in job.reads}}
            totals = {position: _log_sum_exp(row) for position, row in logits.items()}
            values.append(np.array([logits[p][token] - totals[p] for _, p, token in job.reads]))
        return values

    def _run_alone(self, batch: Sequence[Job]) -> list[np.ndarray]:
        """One sequence: first what needs no logits, then pieces of as many positions as llama.cpp keeps."""
        (job,) = batch
        wanted = {place for _, place, _ in job.reads}
        self.clear()
        self.decode([(token, place, (0,), False) for place, token in enumerate(job.ids[: job.start])])
        values = np.empty(len(job.reads))
        for start in range(job.start, len(job.ids), OUTPUTS):
            part = range(start, min(start + OUTPUTS, len(job.ids)))
            self.decode([(job.ids[place], place, (0,), place in wanted) for place in part])
            for number, (_, place, token) in enumerate(job.reads):
                if place in part:
                    logits = self.logits(place - start)
                    values[number] = logits[token] - _log_sum_exp(logits)
        return [values]

    def read_logits(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, np.ndarray]]:
        """Raw logits at the positions that every job reads, float32, (reads, V), in the jobs' order.

        Several jobs a batch; their common beginning is computed once. A job may read at most `n_outputs` positions.
        """
        self.check_ids([job.ids for job in jobs])
        shared = self._share(jobs)
        for group in self._groups(jobs, shared):
            for job, first in self._decoded(group, shared):
                logits = np.empty((len(job.reads), self.vocab_size), dtype=np.float32)
                for number, (_, position, _) in enumerate(job.reads):
                    logits[number] = self.logits(first + position)
                yield job, logits

    def window_logits(self, ids: list[int], first: int = 0) -> np.ndarray:
        """Raw logits of the next token after each position of `ids` from `first` on, float32, (T - first, V).

        In one batch where `n_outputs` allows it, as llama-perplexity has it: the size of a batch changes the rounding.
        """
        self.check_ids([ids])
        self.clear()
        result = np.empty((len(ids) - first, self.vocab_size), dtype=np.float32)
        edges = [0, len(ids)]
        if len(ids) - first > self.n_outputs:
            edges = [*range(first, len(ids), self.n_outputs), len(ids)]
            edges = edges if first == 0 else [0, *edges]
        for start, end in itertools.pairwise(edges):
            self.decode([(ids[p], p, (0,), p >= first) for p in range(start, end)])
            for position in range(max(start, first), end):
                result[position - first] = self.logits(position - start)
        return result

    def window_log_probs(self, ids: list[int], first: int = 0) -> np.ndarray:
        """See `lib.scoring.backend.Backend`."""
        result = self.window_logits(ids, first)
        for row in result:
            row -= _log_sum_exp(row.astype(np.float64))
        return result


def _log_sum_exp(logits: np.ndarray) -> float:
    """ln Σ exp(logits), without overflow."""
    top = logits.max()
    return float(top + np.log(np.exp(logits - top).sum()))
