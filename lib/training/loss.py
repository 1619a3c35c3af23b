"""Cross-entropy at the answer tokens only, without ever making the logits of the other positions.

A classification prompt has two or three loss positions among a hundred: running the output layer at those alone gives
the same loss and gradients as `model(labels=…)` and saves the [rows, length, vocabulary] tensor (PERFORMANCE §5.1).
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from lib.training.batches import IGNORED

if TYPE_CHECKING:
    import torch


def causal_model(model: Any) -> Any:
    """The transformers model inside a PeftModel (LoRA layers stay in place), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def answer_loss(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Summed cross-entropy (nats) over the answer tokens of a batch, and their number."""
    import torch

    inner = causal_model(model)
    with autocast(inner):
        hidden = inner.get_decoder()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state
        targets = batch["labels"][:, 1:]
        chosen = targets != IGNORED
        logits = inner.get_output_embeddings()(hidden[:, :-1][chosen])
    loss = torch.nn.functional.cross_entropy(logits.float(), targets[chosen], reduction="sum")
    return loss, int(chosen.sum())


def autocast(model: Any) -> contextlib.AbstractContextManager:
    """bfloat16 products where the base is bfloat16 (the adapter's float32 weights are rounded for the product)."""
    import torch

    low = model.get_input_embeddings().weight.dtype == torch.bfloat16
    return torch.autocast(model.device.type, torch.bfloat16) if low else contextlib.nullcontext()


def check_loss(model: Any, batch: dict[str, torch.Tensor]) -> None:
    """Prove on one row that this model's logits are its output layer on its last hidden state.

    Raises:
        RuntimeError: the architecture does more (scales or caps its logits), so the shortcut would be wrong.
    """
    import torch

    one = {key: value[:1] for key, value in batch.items()}
    was_training = model.training
    model.eval()
    with torch.no_grad(), autocast(causal_model(model)):
        short, count = answer_loss(model, one)
        full = model(**one).loss.float() * count
    model.train(was_training)
    if not torch.isclose(short, full, rtol=0.02, atol=0.02 * count):
        raise RuntimeError(f"loss at the answer tokens is {short.item():.4f}, by the model itself {full.item():.4f}")
