"""How the rows of a micro-batch are laid out for this model: packed behind their shared prefix, or padded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lib.training.batches import Collator, Example
from lib.training.loss import answer_loss, autocast, causal_model
from lib.training.packing import PackedCollator, restore_attention, shared_prefix, use_packed_attention

if TYPE_CHECKING:
    import torch

Collate = Callable[[Sequence[Example]], "dict[str, torch.Tensor]"]


def choose_layout(model: Any, rows: Sequence[Example], pad_id: int) -> tuple[Collate, str]:
    """The collator for these rows, and in words what it does (and why, where it could not be the packed one).

    Either one's loss is first compared, on two rows, with the loss that the model itself computes.

    Args:
        rows: of training and validation together: the prefix is what all of them have in common.

    Raises:
        RuntimeError: the model's logits are not its output layer on its last hidden state (it scales or caps them),
            so that computing them at the answer tokens alone would be wrong.
    """
    padded = Collator(pad_id)
    first, last = min(rows, key=len), max(rows, key=len)
    sample = [first, last if len(last) <= 2 * len(first) else first]
    batch = _on_device(model, padded(sample))
    with _evaluating(model):
        expected = _own_loss(model, batch)
        found = _mean_loss(model, batch)
        if not _close(model, found, expected):
            raise RuntimeError(f"loss at the answer tokens is {found}, by the model itself {expected}")
        inner = causal_model(model)
        problem, before = use_packed_attention(inner)
        if problem is None:
            prefix = shared_prefix(rows)
            packed = PackedCollator(pad_id, prefix)
            if _close(model, _mean_loss(model, _on_device(model, packed(sample))), expected):
                return packed, f"packed: the {prefix} tokens that all rows begin with are computed once a micro-batch"
            problem = "its loss differs from the model's own"
            restore_attention(inner, before)
    return padded, f"padded to the longest of like length ({problem})"


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


def _own_loss(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """By the model's own forward pass, with the logits of every position."""
    with autocast(causal_model(model)):
        return model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss.item()


def _close(model: Any, found: float, expected: float) -> bool:
    import torch

    low = causal_model(model).get_input_embeddings().weight.dtype != torch.float32
    return abs(found - expected) <= (2e-2 if low else 1e-4) * (1 + abs(expected))
