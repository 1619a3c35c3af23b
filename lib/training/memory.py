"""Memory a training needs, estimated before it starts, and what to change when it is too much."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.training.loss import HEAD_ROWS

if TYPE_CHECKING:
    from lib.settings import Settings

NF4_BITS = 4.127
"""Bits a weight in NF4 with double quantization: 4 + 8/64 + 32/(64·256) (QLoRA, Dettmers et al. 2023, §3)."""


@dataclass(frozen=True)
class Shape:
    """What the estimate depends on. Sizes in numbers of weights, lengths in tokens.

    Attributes:
        length: of the longest row; prefix: tokens at its beginning that a micro-batch computes once for all rows.
        answer: loss tokens of the row that has most.
    """

    linear: int
    other: int
    adapter: int
    layers: int
    hidden: int
    intermediate: int
    key_value: int
    vocabulary: int
    rows: int
    length: int
    answer: int
    weight_bytes: float
    in_4bit: bool
    checkpointing: bool
    dropout: bool
    prefix: int = 0


@dataclass(frozen=True)
class Estimate:
    """Bytes by purpose. `process` is what Python and its libraries take already (0 on a GPU)."""

    process: int
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(dataclasses.astuple(self))

    def to_json(self) -> dict[str, int]:
        """By purpose, with the total."""
        return {**dataclasses.asdict(self), "total": self.total}


def estimate(shape: Shape, process: int = 0) -> Estimate:
    """Bytes for LoRA training.

    Weights: their stored size (NF4 for linear layers in 4 bits). Adapter, gradients, AdamW: 4, 4 and 8 bytes a
    trainable weight. Activations: the tensors that autograd keeps for a Qwen2 layer, a token: about 16 × hidden,
    6 × key/value width and 6 × intermediate in the compute format (with dropout another 7 copies of layer inputs),
    and 2 norms in float32. With gradient checkpointing one hidden state a layer and the whole of one layer.
    Logits: loss positions (HEAD_ROWS at a time) × vocabulary × 12 bytes: float32 values, log-probabilities and
    gradient; in bfloat16 values and gradient once more in that format, but the float32 values are freed first.
    """
    s = shape.weight_bytes
    weights = shape.linear * (NF4_BITS / 8 if shape.in_4bit else s) + shape.other * s
    inputs = 5 * shape.hidden + shape.intermediate + shape.key_value if shape.dropout else 0
    layer = s * (16 * shape.hidden + 6 * shape.key_value + 6 * shape.intermediate + 1.5 * inputs) + 16 * shape.hidden
    tokens = shape.prefix + shape.rows * (shape.length - shape.prefix)
    kept = shape.layers * s * shape.hidden + layer if shape.checkpointing else shape.layers * layer
    return Estimate(
        process=process,
        weights=round(weights),
        adapter=4 * shape.adapter,
        gradients=4 * shape.adapter,
        optimizer=8 * shape.adapter,
        activations=round(tokens * kept),
        logits=round(min(shape.rows * shape.answer, HEAD_ROWS) * shape.vocabulary * 12),
    )


def shape_of(model: Any, settings: Settings, length: int, answer: int, in_4bit: bool, prefix: int = 0) -> Shape:
    """The shape of this training: `length` tokens in the longest row, `answer` loss tokens a row."""
    inner = model.get_base_model()
    config = inner.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    embedding = inner.get_input_embeddings().weight
    tied = inner.get_output_embeddings().weight is embedding
    other = embedding.numel() * (1 if tied else 2)
    everything = _logical_parameters(model) - adapter
    return Shape(
        linear=everything - other,
        other=other,
        adapter=adapter,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        key_value=head * config.num_key_value_heads,
        vocabulary=config.vocab_size,
        rows=settings.per_device_train_batch_size,
        length=length,
        answer=answer,
        weight_bytes=embedding.element_size(),
        in_4bit=in_4bit,
        checkpointing=settings.gradient_checkpointing,
        dropout=settings.lora_dropout > 0,
        prefix=prefix,
    )


def _logical_parameters(model: Any) -> int:
    """Number of weights, packed 4-bit ones counted as two a byte."""
    total = 0
    for parameter in model.parameters():
        packed = getattr(parameter, "quant_state", None)
        total += packed.shape.numel() if packed is not None else parameter.numel()
    return total


def advice(need: int, available: int, settings: Settings, can_4bit: bool) -> list[str]:
    """What to change, the cheapest first, when `need` bytes exceed nine tenths of `available`; else nothing."""
    if need <= 0.9 * available:
        return []
    steps = []
    rows = settings.per_device_train_batch_size
    if rows > 1:
        more = settings.gradient_accumulation_steps * rows
        steps.append(f"per_device_train_batch_size: 1 with gradient_accumulation_steps: {more} (the same updates)")
    if settings.lora_r > 4:
        steps.append("lora_r: 4")
    if not settings.load_in_4bit and can_4bit:
        steps.append("load_in_4bit: true (and dtype: auto)")
    if settings.max_seq_length > 128:
        steps.append("max_seq_length: 128 (notebook 01 shows the share of texts cut)")
    if not settings.gradient_checkpointing:
        steps.append("gradient_checkpointing: true (about 30 % slower)")
    return steps


def refuse_impossible(need: int, total: int, steps: list[str]) -> None:
    """Raise when the machine's whole memory is less than the estimate."""
    if need > total:
        raise InputError(
            f"training needs about {need / 2**30:.1f} GiB; this machine has {total / 2**30:.1f} GiB.",
            "a training that fits.",
            "set " + ", then ".join(steps or ["base_model to a smaller one"]) + ".",
        )
