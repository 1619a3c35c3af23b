"""What notebook 02 shows, read back from the product `adapter`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lib.run.files import read_json, read_jsonl
from lib.run.resources import read_samples

if TYPE_CHECKING:
    from lib.run import Product


RESOURCES = "resources.jsonl"


@dataclass(frozen=True)
class FinetuneResult:
    """The adapter and how it came about.

    Attributes:
        product: the folder with adapter_model.safetensors (the chosen checkpoint), history.jsonl, training.log.
        method: in words, e.g. "LoRA r=8, alpha=16 on 14 linear layers".
        trainable, total: number of trained weights, and of all weights.
        history: rows {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second"} and
            {"step", "epoch", "eval_loss"}; losses in nats an answer token.
        chosen_step, steps: the update with the lowest validation loss, and all updates.
        estimate: bytes by purpose, expected before the start; "total" in all.
        memory: bytes that were free then ("available"), and that the device has ("total").
        advice: what to change when memory is scarce, cheapest first; empty when it is not.
        throughput: median non-padding tokens a second.
        peak_memory_mib: largest resident memory while training (the process and its children).
        peak_device_mib: most that the tensors took on a GPU then, of several the fullest; None where there is none.
        resumed_from: step of the checkpoint that this training continued from; None if it ran in one go.
        layout: how the rows of a micro-batch were laid out, in words.
        messages: what was found on resuming (damaged checkpoints passed over).
        seconds: of the last, uninterrupted part of the training.
        micro_batch: {"asked", "used"}: rows and passes an update each; "out_of_memory": the sizes that did not fit.
        notes: fallbacks, e.g. LoRA where QLoRA was asked for.
        samples: what the machine did (`lib.run.resources`): seconds, cpu_percent, rss_mib, gpu_percent, gpu_mib.
        adopted: {"id", "revision", and what its files say} of an adapter that was not trained here; then everything
            that only a training has is zero or empty. None when it was trained here.
    """

    product: Product
    method: str
    trainable: int
    total: int
    history: list[dict[str, float]]
    chosen_step: int
    steps: int
    train_rows: int
    validation_rows: int
    estimate: dict[str, int]
    memory: dict[str, int]
    advice: list[str]
    throughput: float
    peak_memory_mib: float
    resumed_from: int | None
    layout: str
    messages: list[str]
    seconds: float
    dtype: str
    dtype_reason: str
    base: dict[str, Any]
    notes: list[str]
    samples: list[dict[str, float]]
    adopted: dict[str, Any] | None = None
    peak_device_mib: float | None = None
    micro_batch: dict[str, Any] = field(default_factory=dict)

    @property
    def trainable_share(self) -> float:
        """Trained share of all weights."""
        return self.trainable / self.total

    @classmethod
    def read(cls, product: Product) -> FinetuneResult:
        """From the product's files."""
        facts = read_json(product.path / "training.json")
        history = read_jsonl(product.path / "history.jsonl")
        samples = read_samples(product.path / RESOURCES)
        return cls(product=product, history=history, samples=samples, notes=product.entry.notes, **facts)
