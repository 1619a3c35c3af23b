"""What notebook 02 shows, read back from the product `adapter`.
The chosen checkpoint becomes the product `adapter`.
Notebook 02: a LoRA or QLoRA on the run's base model; the product `adapter`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.models.base_model import Base, base_of
from lib.runs import machine
from lib.runs.files import read_json, read_jsonl, write_json, write_text
from lib.runs.machine import quiet
from lib.runs.resources import ResourceSampler, read_samples, summary
from lib.stages.finetune import checkpoints
from lib.stages.finetune.adopt import take, write_config
from lib.stages.finetune.checkpoints import same_or_afresh
from lib.stages.finetune.processes import made_once, train_in_processes
from lib.stages.finetune.session import DrawLosses, LossPlot, TrainingInputs, train, until_it_fits

if TYPE_CHECKING:
    from lib.runs.run import Product, Run, Work
    from lib.settings import Settings


# What notebook 02 shows, read back from the product `adapter`.

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
        samples: what the machine did (`lib.runs.resources`): seconds, cpu_percent, rss_mib, gpu_percent, gpu_mib.
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


# The chosen checkpoint becomes the product `adapter`.


def publish(work: Work, base: Base, facts: dict[str, Any], in_4bit: bool) -> None:
    """The chosen checkpoint's adapter with its card beside the history; facts for the manifest."""
    chosen = work.folder / "checkpoints" / f"checkpoint-{facts['chosen_step']}"
    shutil.copyfile(chosen / "adapter_model.safetensors", work.folder / "adapter_model.safetensors")
    if _is_zero(work.folder / "adapter_model.safetensors"):
        work.notes.append("the adapter is zero: the training changed nothing, and the model is the base model")
    write_config(work.folder, read_json(chosen / "adapter_config.json"), base)
    write_json(work.folder / "training.json", facts)
    loss = read_json(chosen / checkpoints.RECORD)["eval_loss"]
    write_text(work.folder / "README.md", _readme(base, facts, loss))
    work.facts |= {
        "base_model": base.id,
        "base_revision": base.revision,
        "offline_base": base.offline,
        "method": "QLoRA" if in_4bit else "LoRA",
        **{
            key: facts[key]
            for key in ("chosen_step", "steps", "trainable", "total", "dtype", "resumed_from", "micro_batch")
        },
    }
    work.metrics |= {"eval_loss": loss, "tokens_per_second": facts["throughput"]}


def _is_zero(adapter: Path) -> bool:
    """Whether the second factor of every layer is as it began."""
    from safetensors.numpy import load_file

    return not any(tensor.any() for name, tensor in load_file(adapter).items() if ".lora_B." in name)


def _readme(base: Base, facts: dict[str, Any], loss: float) -> str:
    front = {"base_model": base.id, "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora"]}
    lines = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items())
    return f"""---
{lines}
---
# Adapter: {facts["method"]}

Trained on the answer tokens of {facts["train_rows"]} rows over base model {base.id} (revision {base.revision}).
This is the state after update {facts["chosen_step"]} of {facts["steps"]}, which had the lowest validation loss
({loss:.4f} nats an answer token on {facts["validation_rows"]} rows). {facts["trainable"]:,} of {facts["total"]:,}
weights were trained.
"""


# Notebook 02: a LoRA or QLoRA on the run's base model; the product `adapter`.

PARAMETERS = (
    *("seed", "load_in_4bit", "lora_r", "lora_alpha", "lora_dropout", "target_modules", "learning_rate"),
    *("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "dtype"),
    *("gradient_checkpointing", "save_steps", "num_processes"),
)
"""Settings that the adapter depends on (those of the data come in through the data product)."""


def finetune(settings: Settings, run: Run, draw: DrawLosses = LossPlot) -> FinetuneResult:
    """Train the adapter, or find it unchanged; an interrupted training continues from its newest whole checkpoint.

    With the setting `adapter` nothing is trained: that adapter is checked against the base model and adopted.

    Args:
        draw: draws the losses while they come.

    Raises:
        InputError: no data product, an unusable base model, no room in memory or on the disk, unknown target_modules.
    """
    if settings.adapter:
        return FinetuneResult.read(take(settings, run, settings.force))

    def make() -> Product:
        return run.produce(
            "adapter",
            lambda work: _build(settings, run, work, draw),
            parameters=settings.pick(*PARAMETERS) | {"seed": settings.training_seed},
            inputs=("data",),
            force=settings.force,
            keep_partial=True,
        )

    return FinetuneResult.read(made_once(make, run, "adapter", settings.num_processes))


def _build(settings: Settings, run: Run, work: Work, draw: DrawLosses) -> None:
    quiet()  # also where other processes train: this one loads the same libraries
    in_4bit, base = _four_bits(settings, work), base_of(run)
    inputs = TrainingInputs(settings, run.require("data").path, base, work.folder, in_4bit, draw)
    messages = same_or_afresh(work.folder, settings, in_4bit)
    with ResourceSampler(work.folder / RESOURCES, gpus=settings.num_processes):
        facts, notes = until_it_fits(inputs, train if settings.num_processes == 1 else train_in_processes)
    work.notes += notes
    facts["messages"] = [*messages, *facts["messages"]]
    work.facts["resources"] = summary(read_samples(work.folder / RESOURCES))
    work.device = facts.pop("device")
    facts["base"] = {"id": base.id, "revision": base.revision, "offline": base.offline}
    publish(work, base, facts, in_4bit)


def _four_bits(settings: Settings, work: Work) -> bool:
    problem = machine.bitsandbytes_problem() if settings.load_in_4bit else None
    if problem:
        work.notes.append(
            f"QLoRA was asked for, but 4-bit layers do not work here ({problem}): plain LoRA was trained instead."
        )
    return settings.load_in_4bit and not problem
