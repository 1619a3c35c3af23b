"""How the rows of a micro-batch are laid out for this model: packed behind their shared prefix, or padded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.training.batches import Collate, Collator, Example
from lib.training.loss import answer_loss, autocast, causal_model
from lib.training.packing import PackedCollator, restore_attention, shared_prefix, unpackable, use_packed_attention

if TYPE_CHECKING:
    import torch


ENLARGED = 1024.0
"""Factor on the hidden states for which the logits are compared; a power of two is exact in every number format."""

SAME = 1e-4
"""Relative difference of the logits from which on they count as others; they come from one product of one shape."""

LEAK = 1e-5
"""Relative change of a row's loss from which on its neighbours count as seen: of equal shapes, so rounding is none."""

CLOSE, CLOSE_LOW = 1e-4, 5e-2
"""Difference of the two layouts' losses, relative to 1 + the loss, up to which they count as equal: in float32, and in
16 bits. SmolLM2-135M, six pairs of rows: at most 2e-6 in float32, 0.8 to 3.0 % in bfloat16, whose step at logits of 32
is a quarter of a nat (0.5 %, set on random weights, left the packed layout out for no fault). Padded batches of other
sizes are no yardstick for that: they give equal bits. A leak between rows is found by `LEAK`, exact in every format."""


def choose_layout(model: Any, rows: Sequence[Example], pad_id: int) -> tuple[Collate, str]:
    """The collator for these rows, and in words what it does (and why, where it could not be the packed one).

    The packed layout is taken where the configuration allows it and it proves right on the shortest and the longest
    row: its loss is that of the padded layout, and the shorter row does not change the loss of the longer one.

    Args:
        rows: of training and validation together: the prefix is what all of them have in common.

    Raises:
        InputError: the model's logits are not its output layer on its last hidden state (it scales or caps them), so
            that computing them at the answer tokens alone would be wrong.
    """
    padded = Collator(pad_id)
    sample = [min(rows, key=len), max(rows, key=len)]
    inner = causal_model(model)
    with _evaluating(model):
        _require_plain_logits(model, _on_device(model, padded([sample[0]])))
        problem = unpackable(inner, len(sample[1]))
        if problem is None:
            packed = PackedCollator(pad_id, shared_prefix(rows))
            problem = _try_packing(model, padded, packed, sample)
        if problem is None:
            text = f"packed: the {packed.prefix} tokens that all rows begin with are computed once a micro-batch"
            return packed, text
    return padded, f"padded to the longest of like length ({problem})"


def _try_packing(model: Any, padded: Collator, packed: PackedCollator, sample: list[Example]) -> str | None:
    """Switch the model to the packed layout; or say why not, with the model as it was."""
    inner = causal_model(model)
    expected = _mean_loss(model, _on_device(model, padded(sample)))
    problem, before = use_packed_attention(inner)
    if problem is not None:
        return problem
    if not _close(model, _mean_loss(model, _on_device(model, packed(sample))), expected):
        problem = "its loss differs from the model's own"
    elif _sees_neighbours(model, packed, sample):
        problem = "its rows see one another"
    if problem is not None:
        restore_attention(inner, before)
    return problem


def _sees_neighbours(model: Any, packed: PackedCollator, sample: list[Example]) -> bool:
    """Whether the second row's loss changes with the first row's own tokens.

    Both batches have one shape, so without a leak even bfloat16 computes the same numbers: this finds a state that
    leaks from row to row where the loss as such differs by no more than rounding does.
    """
    first, second = sample
    other = [*first.ids[: packed.prefix], *[packed.pad_id] * (len(first) - packed.prefix)]
    losses = [
        _mean_loss(model, _on_device(model, packed([Example(ids, first.prompt_length, ()), second])))
        for ids in (first.ids, other)
    ]
    return abs(losses[0] - losses[1]) > LEAK * (1 + abs(losses[0]))


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """The model without dropout and gradients, and back."""
    import torch

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _on_device(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    device = causal_model(model).device
    return {key: value.to(device) for key, value in batch.items()}


def _mean_loss(model: Any, batch: dict[str, torch.Tensor]) -> float:
    total, count = answer_loss(model, batch)
    return total.item() / count


def _require_plain_logits(model: Any, batch: dict[str, torch.Tensor]) -> None:
    """The model's own logits are what its output layer makes of the same hidden states.

    Those are enlarged, so that a cap on the logits shows whatever their size is.
    """
    inner, seen = causal_model(model), []

    def enlarge(module: Any, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * ENLARGED
        seen.append(output.last_hidden_state)
        return output

    handle = inner.get_decoder().register_forward_hook(enlarge)
    try:
        with autocast(inner):
            own = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits.float()
            plain = inner.get_output_embeddings()(seen[0]).float()
    finally:
        handle.remove()
    if (own - plain).abs().max() > SAME * plain.abs().max():
        raise InputError(
            "the base model scales or caps its logits (as Gemma 2 and Granite do).",
            "logits that are the output layer's (Qwen, Llama, Mistral, Phi-3, Gemma 3).",
            "choose another base_model.",
        )


def _close(model: Any, found: float, expected: float) -> bool:
    import torch

    low = causal_model(model).get_input_embeddings().weight.dtype != torch.float32
    return abs(found - expected) <= (CLOSE_LOW if low else CLOSE) * (1 + abs(expected))
