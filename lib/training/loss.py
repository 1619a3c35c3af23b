"""Cross-entropy at the answer tokens only, without ever making the logits of the other positions.

A classification prompt has two or three loss positions among a hundred: running the output layer at those alone gives
the same loss and gradients as `model(labels=…)` and saves the [rows, length, vocabulary] tensor (PERFORMANCE §5.1).
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

from lib.training.batches import IGNORED
from lib.training.packing import packed_inputs

if TYPE_CHECKING:
    import torch

HEAD_ROWS = 256
"""Positions whose logits exist at one time: 156 MB in float32 for a vocabulary of 151,936."""


def causal_model(model: Any) -> Any:
    """The transformers model inside a PeftModel (LoRA layers stay in place), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def answer_loss(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Summed cross-entropy (nats) over the answer tokens of a batch (padded or packed), and their number."""
    inner = causal_model(model)
    inputs = packed_inputs(batch) if "gather" in batch else {k: batch[k] for k in ("input_ids", "attention_mask")}
    with autocast(inner):
        hidden = inner.get_decoder()(**inputs, use_cache=False).last_hidden_state
        targets = batch["labels"][:, 1:]
        chosen = targets != IGNORED
        loss = head_loss(inner.get_output_embeddings(), hidden[:, :-1][chosen], targets[chosen])
    return loss, int(chosen.sum())


def head_loss(head: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy (nats) of the output layer at the given positions.

    A frozen output layer works through HEAD_ROWS positions at a time and keeps their gradient in place of their
    logits, so a long answer needs no [positions, vocabulary] tensor and no second pass.

    Args:
        hidden: (positions, width), the last hidden states.
        targets: int64 (positions,).
    """
    import torch

    frozen = type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad
    if frozen and len(hidden) > HEAD_ROWS:
        return _frozen_head()(hidden, head.weight, targets)
    return torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")


@functools.cache
def _frozen_head() -> Any:
    import torch

    class FrozenHead(torch.autograd.Function):
        """Cross-entropy behind a frozen linear layer; the gradient is computed with the value, chunk by chunk."""

        @staticmethod
        def forward(context: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            loss = torch.zeros((), device=hidden.device)
            gradient = torch.empty_like(hidden) if context.needs_input_grad[0] else None
            with torch.autocast(hidden.device.type, enabled=False):
                for start in range(0, len(hidden), HEAD_ROWS):
                    part = slice(start, start + HEAD_ROWS)
                    logits = (hidden[part].to(weight.dtype) @ weight.T).float()
                    true = targets[part, None]
                    loss += (logits.logsumexp(1) - logits.gather(1, true)[:, 0]).sum()
                    if gradient is not None:
                        logits = logits.softmax(1)
                        logits.scatter_add_(1, true, torch.full_like(true, -1, dtype=logits.dtype))
                        gradient[part] = (logits.to(weight.dtype) @ weight).to(hidden.dtype)
            context.save_for_backward(gradient)
            return loss

        @staticmethod
        def backward(context: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
            (gradient,) = context.saved_tensors
            return gradient * upstream.to(gradient.dtype), None, None

    return FrozenHead.apply


def autocast(model: Any) -> contextlib.AbstractContextManager:
    """bfloat16 products where the base is bfloat16 (the adapter's float32 weights are rounded for the product)."""
    import torch

    low = model.get_input_embeddings().weight.dtype == torch.bfloat16
    return torch.autocast(model.device.type, torch.bfloat16) if low else contextlib.nullcontext()
