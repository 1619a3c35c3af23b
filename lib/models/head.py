"""Logits from last hidden states, as a model computes them: by its output layer alone, or with what stands around it.

Logits at a few positions cost little where the output layer runs at those alone. Qwen, Llama and Gemma 3 allow that as
it is; Granite divides its logits, MiniCPM the hidden states before, Gemma 2 caps them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

Head = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states (positions, width) → logits (positions, vocabulary)."""

_ENLARGED, _ENLARGED_HALF = 1024.0, 16.0
"""Factor on the hidden states for which the logits are compared, and the one in float16, which ends at 65,504; a power
of two is exact in every number format. A cap on the logits shows at such sizes, whatever the weights are."""
_SAME = 1e-4
"""Relative difference of the logits from which on they count as others; they come from one product of one shape."""
_known: weakref.WeakKeyDictionary[Any, tuple[Any, Head]] = weakref.WeakKeyDictionary()
"""Model → its output layer when it was asked (LoRA may be put on it later), and its head."""


def output_head(model: Any) -> Head:
    """What turns the last hidden states of a causal language model (not of peft) into its logits.

    The output layer, where the model's own logits are what that makes of the same states; else the model's own code
    behind its decoder.
    """
    layer = model.get_output_embeddings()
    if model not in _known or _known[model][0] is not layer:
        _known[model] = layer, layer if _is_plain(model) else _own_head(weakref.ref(model))
    return _known[model][1]


def has_plain_head(model: Any) -> bool:
    """Whether the logits are those of the output layer alone."""
    return output_head(model) is model.get_output_embeddings()


@torch.no_grad()
def _is_plain(model: Any) -> bool:
    kind = model.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    half = torch.float16 in (cast, model.get_input_embeddings().weight.dtype)
    ids = torch.tensor([[0, 1, 2]], device=model.device) % model.config.vocab_size
    seen: list[torch.Tensor] = []
    handle = model.get_decoder().register_forward_hook(lambda *called: seen.append(called[2].last_hidden_state[0]))
    try:
        model(input_ids=ids, use_cache=False)  # the whole model first: packed weights are unpacked by its own hook
    finally:
        handle.remove()
    hidden = seen[0] * (_ENLARGED_HALF if half else _ENLARGED)
    own, plain = _own_logits(model, hidden).float(), model.get_output_embeddings()(hidden).float()
    return bool((own - plain).abs().max() <= _SAME * plain.abs().max())


def _own_head(model: weakref.ref[Any]) -> Head:
    return lambda hidden: _own_logits(model(), hidden)


def _own_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The model run on one token, with `hidden` in place of what its decoder gives."""
    with _decoder_gives(model, hidden[None]):
        ids = torch.zeros((1, 1), dtype=torch.int64, device=hidden.device)
        return model(input_ids=ids, use_cache=False).logits[0]


@contextlib.contextmanager
def _decoder_gives(model: Any, hidden: torch.Tensor) -> Iterator[None]:
    def replace(module: Any, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = hidden
        return output

    handle = model.get_decoder().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
