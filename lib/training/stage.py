"""Notebook 02: a LoRA or QLoRA on the run's base model; the product `adapter`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib import device
from lib.models.loading import base_of
from lib.models.quiet import quiet
from lib.run.resources import ResourceSampler, read_samples, summary
from lib.training.adopting import take
from lib.training.arithmetic import same_or_afresh
from lib.training.attempts import until_it_fits
from lib.training.drawing import Draw, Drawing
from lib.training.launching import train_in_processes
from lib.training.publishing import publish
from lib.training.result import RESOURCES, FinetuneResult
from lib.training.session import Job, train
from lib.training.torchrun import made_once

if TYPE_CHECKING:
    from lib.run import Product, Run, Work
    from lib.settings import Settings

PARAMETERS = (
    *("seed", "load_in_4bit", "lora_r", "lora_alpha", "lora_dropout", "target_modules", "learning_rate"),
    *("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "dtype"),
    *("gradient_checkpointing", "save_steps", "num_processes"),
)
"""Settings that the adapter depends on (those of the data come in through the data product)."""


def finetune(settings: Settings, run: Run, draw: Draw = Drawing) -> FinetuneResult:
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


def _build(settings: Settings, run: Run, work: Work, draw: Draw) -> None:
    quiet()  # also where other processes train: this one loads the same libraries
    in_4bit, base = _four_bits(settings, work), base_of(run)
    job = Job(settings, run.require("data").path, base, work.folder, in_4bit, draw)
    messages = same_or_afresh(work.folder, settings, in_4bit)
    with ResourceSampler(work.folder / RESOURCES, gpus=settings.num_processes):
        facts, notes = until_it_fits(job, train if settings.num_processes == 1 else train_in_processes)
    work.notes += notes
    facts["messages"] = [*messages, *facts["messages"]]
    work.facts["resources"] = summary(read_samples(work.folder / RESOURCES))
    work.device = facts.pop("device")
    facts["base"] = {"id": base.id, "revision": base.revision, "offline": base.offline}
    publish(work, base, facts, in_4bit)


def _four_bits(settings: Settings, work: Work) -> bool:
    problem = device.bitsandbytes_problem() if settings.load_in_4bit else None
    if problem:
        work.notes.append(
            f"QLoRA was asked for, but 4-bit layers do not work here ({problem}): plain LoRA was trained instead."
        )
    return settings.load_in_4bit and not problem
