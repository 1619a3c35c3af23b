"""Answers written token by token, greedily or drawn with a fixed seed, by the same code for both backends."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError
from lib.scoring.backend import check_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lib.scoring.llama_context import LlamaContext

Feed = Callable[[Sequence[int]], np.ndarray]
"""Takes further token ids of one text and gives the logits behind the last, (V,)."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: from the smallest set of tokens whose probabilities reach `top_p`."""

    temperature: float = 0.7
    top_p: float = 0.8
    seed: int = 42

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Written:
    """One answer.

    Attributes:
        ids: its tokens, without the one that ended it.
        ended: whether it ended by itself; False: cut at the limit.
        steps: tokens written, the ending one included.
        first_token_seconds: from the call to the first token, reading the prompt included.
        seconds: from the call to the last token.
    """

    ids: list[int]
    ended: bool
    steps: int
    first_token_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first, a second; None where there is only one."""
        later = self.seconds - self.first_token_seconds
        return (self.steps - 1) / later if self.steps > 1 and later > 0 else None


def end_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer: end of turn, end of text."""
    from lib.models.prompting import end_of_turn_id

    vocabulary = tokenizer.get_vocab()
    found = (end_of_turn_id(tokenizer), tokenizer.eos_token_id, vocabulary.get("<|endoftext|>"))
    return {number for number in found if number is not None}


def write(
    feed: Feed, prompt: Sequence[int], most: int, ends: Collection[int], sampling: Sampling | None = None
) -> Written:
    """Write an answer to a prompt.

    Args:
        feed: of a backend, at the beginning of a text.
        most: tokens at which it is cut.
        ends: ids that end it.
        sampling: None = greedy.

    Raises:
        InputError: logits that are not numbers.
    """
    draw = np.random.default_rng(sampling.seed) if sampling else None
    started = time.perf_counter()
    ids, first, token, given = [], 0.0, -1, list(prompt)
    for step in range(1, most + 1):
        logits = feed(given)
        token = pick(logits, sampling, draw)
        first = first or time.perf_counter() - started
        if token in ends:
            return Written(ids, True, step, first, time.perf_counter() - started)
        ids.append(token)
        given = [token]
    return Written(ids, False, most, first, time.perf_counter() - started)


def pick(logits: np.ndarray, sampling: Sampling | None, draw: np.random.Generator | None) -> int:
    """The next token: the likeliest, or one drawn."""
    if not np.isfinite(logits.max()):
        raise InputError("logits that are not numbers.", "finite logits.", "check the model's weights for NaN.")
    if sampling is None or draw is None:
        return int(logits.argmax())
    scaled = (logits.astype(np.float64) - logits.max()) / sampling.temperature
    chances = np.exp(scaled)
    chances /= chances.sum()
    order = np.argsort(-chances, kind="stable")
    sums = np.cumsum(chances[order])
    kept = int(np.searchsorted(sums, sampling.top_p)) + 1  # the one that reaches top_p belongs to them
    place = np.searchsorted(sums[:kept], draw.random() * sums[min(kept, len(sums)) - 1], side="right")
    return int(order[min(int(place), kept - 1)])


def torch_feed(model: Any) -> Feed:
    """A new text for a model of transformers, with its key-value cache."""
    import torch

    cache: Any = None

    @torch.inference_mode()
    def feed(ids: Sequence[int]) -> np.ndarray:
        nonlocal cache
        given = torch.tensor([list(ids)], device=model.device)
        output = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        return output.logits[0, -1].float().cpu().numpy()

    return feed


def llama_feed(backend: LlamaContext) -> Feed:
    """A new text for a GGUF file; whatever its context held is forgotten.

    The context must have room for prompt and answer (`n_ctx`).
    """
    backend.clear()
    done = 0

    def feed(ids: Sequence[int]) -> np.ndarray:
        nonlocal done
        check_ids([list(ids)], backend.vocab_size, backend.n_ctx - done, backend.name)
        last = len(ids) - 1
        backend.decode([(token, done + i, (0,), i == last) for i, token in enumerate(ids)])
        done += len(ids)
        return backend.logits(last)

    return feed
