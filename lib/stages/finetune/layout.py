"""The loss at the answer tokens alone, and whether this model's micro-batches are packed behind a prefix, or padded."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.utils.checkpoint

from lib.errors import refusal
from lib.models.head import has_plain_head, output_head
from lib.models.loading import causal_model
from lib.prompts.conversations import Encoded
from lib.settings import Settings
from lib.stages.finetune import batches
from lib.stages.finetune.batches import Collate, Collator, PackedCollator
from lib.stages.finetune.memory import HEAD_ROWS

# Cross-entropy at the answer tokens only, without ever making the logits of the other positions.
#
# A classification prompt has two or three loss positions among a hundred: running the output layer at those alone gives
# the same loss and gradients as `model(labels=…)` and saves the [rows, length, vocabulary] tensor (PERFORMANCE §5.1).


def train_whole(model: Any, settings: Settings, dtype: str) -> Any:
    """Make every weight of a float32 model trained, with products in `dtype`; small steps are lost in 16 bits.

    With `qat` the matrices of the layers go through the model as torchao rounds them: to the integers −8 to 7 with a
    scale for each group of `GROUP` weights of a row. Gradients pass the rounding as if it were not there (Bengio et al.
    2013, arXiv 1308.3432), but for weights that were cut to 7. What is stored is the weights before the rounding.
    Embedding and output layer are not rounded, as no file of 4 bits rounds them to 4.

    Raises:
        InputError: rows that are no whole number of groups.
    """
    model.requires_grad_(True)
    model.computes_in = getattr(torch, dtype)
    if settings.qat != "none":
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        head = output_head(model)
        layers = {name: m for name, m in model.named_modules() if type(m) is torch.nn.Linear and m is not head}
        if odd := {name: m.in_features for name, m in layers.items() if m.in_features % GROUP}:
            raise refusal("finetune/no-whole-groups", group=GROUP, layer=min(odd), width=odd[min(odd)])
        rounding = IntxFakeQuantizeConfig(getattr(torch, settings.qat), group_size=GROUP, is_symmetric=True)
        quantize_(model, QATConfig(weight_config=rounding), filter_fn=lambda _, name: name in layers)
    return model


GROUP = 32
"""Weights that share a scale while they are trained with `qat`: as in llama.cpp's Q4_0."""


def arithmetic(model: Any) -> torch.dtype:
    """The number format of a model's products: that of its weights, unless `train_whole` has set another."""
    inner = causal_model(model)
    return getattr(inner, "computes_in", inner.get_input_embeddings().weight.dtype)


def answer_loss(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Summed cross-entropy (nats) over the answer tokens of a batch (padded or packed), and their number.

    Of a batch with a teacher's probabilities (`lib.stages.finetune.teacher`) it is mixed with the divergence from them.
    """
    inner = causal_model(model)
    inputs = (
        batches.packed_inputs(batch) if "gather" in batch else {k: batch[k] for k in ("input_ids", "attention_mask")}
    )
    with autocast(inner):
        hidden = inner.get_decoder()(**inputs, use_cache=False).last_hidden_state
        targets = batch["labels"][:, 1:]
        chosen = targets != batches.IGNORED
        head, states = output_head(inner), hidden[:, :-1][chosen]
        if "teacher_ids" in batch:
            told = [batch[f"teacher_{name}"] for name in ("ids", "log_probs", "weight")]
            loss = _taught_loss(head, states, targets[chosen], *told)
        else:
            loss = head_loss(head, states, targets[chosen])
    return loss, int(chosen.sum())


def head_loss(head: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy (nats) of the output layer at the given positions.

    A frozen output layer works through HEAD_ROWS positions at a time and keeps their gradient in place of their
    logits, so a long answer needs no [positions, vocabulary] tensor and no second pass.

    Args:
        hidden: (positions, width), the last hidden states.
        targets: int64 (positions,).
    """
    frozen = type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad
    if frozen and len(hidden) > HEAD_ROWS:
        return _FrozenHead.apply(hidden, head.weight, targets)
    return torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")


def _taught_loss(
    head: Any, hidden: torch.Tensor, targets: torch.Tensor, ids: torch.Tensor, told: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Summed over positions: (1 − weight)·cross-entropy + weight·KL(teacher ‖ model), in nats.

    HEAD_ROWS positions at a time, whose logits are computed once more for the gradient.

    Args:
        hidden: (positions, width). targets: int64 (positions,).
        ids, told: (positions, kept), the teacher's likeliest tokens and their log-probabilities.
    """

    def part(hidden: torch.Tensor, targets: torch.Tensor, ids: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        logits = head(hidden).float().log_softmax(-1)
        own, left = logits.gather(1, ids), 1 - told.exp().sum(1)
        divergence = (told.exp() * (told - own)).sum(1)
        own_left = (1 - own.exp().sum(1)).clamp_min(LEFT)
        counted = left > LEFT  # less is the rounding of the sum
        divergence = divergence + torch.where(counted, left * (left.clamp_min(LEFT) / own_left).log(), 0.0)
        plain = -logits.gather(1, targets[:, None])[:, 0]
        return ((1 - weight) * plain + weight * divergence).sum()

    loss = torch.zeros((), device=hidden.device)
    for start in range(0, len(hidden), HEAD_ROWS):
        piece = slice(start, start + HEAD_ROWS)
        given = (hidden[piece], targets[piece], ids[piece], told[piece])
        loss = loss + torch.utils.checkpoint.checkpoint(part, *given, use_reentrant=False)
    return loss


LEFT = 1e-6
"""Probability behind the kept tokens from which on it counts, in float32."""


class _FrozenHead(torch.autograd.Function):
    """Cross-entropy behind a frozen linear layer; the gradient is computed with the value, chunk by chunk.

    In float16 the probabilities are enlarged for the product, and the gradient waits in float32 for the loss scale: as
    they are, most would be below the smallest number of the format.
    """

    @staticmethod
    def forward(context: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = torch.zeros((), device=hidden.device)
        half = hidden.dtype == torch.float16
        enlarged = ENLARGED if half else 1.0
        kind = torch.float32 if half else hidden.dtype
        gradient = torch.empty_like(hidden, dtype=kind) if context.needs_input_grad[0] else None
        context.kind = hidden.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), HEAD_ROWS):
                part = slice(start, start + HEAD_ROWS)
                logits = (hidden[part].to(weight.dtype) @ weight.T).float()
                true = targets[part, None]
                loss += (logits.logsumexp(1) - logits.gather(1, true)[:, 0]).sum()
                if gradient is not None:
                    logits = logits.softmax(1)
                    logits.scatter_add_(1, true, torch.full_like(true, -1, dtype=logits.dtype))
                    product = ((logits * enlarged).to(weight.dtype) @ weight).to(kind)
                    gradient[part] = product / enlarged
        context.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(context: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = context.saved_tensors
        return (gradient * upstream.to(gradient.dtype)).to(context.kind), None, None


def autocast(model: Any) -> contextlib.AbstractContextManager:
    """Products in 16 bits where the base has them (the adapter's float32 weights are rounded for the product)."""
    dtype = arithmetic(model)
    low = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(model.device.type, dtype) if low else contextlib.nullcontext()


# How the rows of a micro-batch are laid out for this model: packed behind their shared prefix, or padded.

ENLARGED = 1024.0
"""Factor on probabilities in float16, so that small gradients are not below its smallest number; a power of two."""

LEAK = 1e-5
"""Relative change of a row's loss from which on its neighbours count as seen: of equal shapes, so rounding is none."""

CLOSE, CLOSE_LOW = 1e-4, 5e-2
"""Difference of the two layouts' losses, relative to 1 + the loss, up to which they count as equal: in float32, and in
16 bits. SmolLM2-135M, six pairs of rows: at most 2e-6 in float32, 0.8 to 3.0 % in bfloat16, whose step at logits of 32
is a quarter of a nat (0.5 %, set on random weights, left the packed layout out for no fault). Padded batches of other
sizes are no yardstick for that: they give equal bits. A leak between rows is found by `LEAK`, exact in every format."""


def choose_layout(model: Any, rows: Sequence[Encoded], pad_id: int, problem: str | None = None) -> tuple[Collate, str]:
    """The collator for these rows, and in words what it does (and why, where it could not be the packed one).

    The packed layout is taken where the configuration allows it and it proves right on the shortest and the longest
    row: its loss is that of the padded layout, and the shorter row does not change the loss of the longer one.

    Args:
        rows: of training and validation together: the prefix is what all of them have in common.
        problem: why this training needs padded rows, whatever the model allows.
    """
    padded = Collator(pad_id)
    sample = [min(rows, key=len), max(rows, key=len)]
    inner = causal_model(model)
    with _evaluating(model):
        with autocast(inner):
            plain = has_plain_head(inner)
        problem = problem or (None if plain else "the model scales or caps its logits")
        problem = problem or batches.unpackable(inner, len(sample[1]))
        if problem is None:
            packed = PackedCollator(pad_id, batches.shared_prefix(rows))
            problem = _try_packing(model, padded, packed, sample)
        if problem is None:
            text = f"packed: the {packed.prefix} tokens that all rows begin with are computed once a micro-batch"
            return packed, text
    return padded, f"padded to the longest of like length ({problem})"


def refuse_overflow(model: Any, batch: dict[str, torch.Tensor]) -> None:
    """Raise where the loss of a batch is no number: in float16, then, the model itself overflows.

    Raises:
        InputError: it does.
    """
    with _evaluating(model):
        if not math.isfinite(_mean_loss(model, batch)):
            raise refusal("finetune/float16-overflows")


def _try_packing(model: Any, padded: Collator, packed: PackedCollator, sample: list[Encoded]) -> str | None:
    """Switch the model to the packed layout; or say why not, with the model as it was."""
    inner = causal_model(model)
    expected = _mean_loss(model, padded(sample))
    problem, before = batches.use_packed_attention(inner)
    if problem is not None:
        return problem
    if not _close(model, _mean_loss(model, packed(sample)), expected):  # also where it is no number
        problem = "its loss differs from the model's own"
    elif _sees_neighbours(model, packed, sample):
        problem = "its rows see one another"
    if problem is not None:
        inner.set_attn_implementation(before)
    return problem


def _sees_neighbours(model: Any, packed: PackedCollator, sample: list[Encoded]) -> bool:
    """Whether the second row's loss changes with the first row's own tokens.

    Both batches have one shape, so without a leak even bfloat16 computes the same numbers: this finds a state that
    leaks from row to row where the loss as such differs by no more than rounding does.
    """
    first, second = sample
    other = [*first.ids[: packed.prefix], *[packed.pad_id] * (len(first) - packed.prefix)]
    losses = [_mean_loss(model, packed([Encoded(ids, []), second])) for ids in (first.ids, other)]
    return abs(losses[0] - losses[1]) > LEAK * (1 + abs(losses[0]))


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """The model without dropout and gradients, and back."""
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
    total, count = answer_loss(model, _on_device(model, batch))
    return total.item() / count


def _close(model: Any, found: float, expected: float) -> bool:
    low = arithmetic(model) != torch.float32
    return abs(found - expected) <= (CLOSE_LOW if low else CLOSE) * (1 + abs(expected))
