"""One training in this process: model, plan, Trainer, from the newest verified checkpoint to the end."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from lib.errors import InputError
from lib.models.base_model import Base
from lib.models.loading import load_model, load_tokenizer
from lib.progress import Progress
from lib.prompts.tasks import Task, read_task
from lib.runs import machine
from lib.runs.files import read_jsonl, require_space, write_jsonl
from lib.runs.machine import DevicePeak, PeakMemory, no_warnings, quiet
from lib.stages.finetune import checkpoints, memory
from lib.stages.finetune.batches import Collate, Example, examples
from lib.stages.finetune.drawing import Draw, Drawing
from lib.stages.finetune.layout import choose_layout
from lib.stages.finetune.memory import with_adapter

if TYPE_CHECKING:
    from lib.settings import Settings
    from lib.stages.finetune.trainer import Team


@dataclass(frozen=True)
class Job:
    """What a training depends on beside its settings.

    Attributes:
        settings: with the sizes of the micro-batches that are to be used (`lib.stages.finetune.out_of_memory` makes
        them smaller).
        data: folder of the data product. base: the base model.
        folder: where checkpoints, history and log go.
        in_4bit: the base in NF4.
        draw: who draws the losses of the file that it is given, while the training writes them.
    """

    settings: Settings
    data: Path
    base: Base
    folder: Path
    in_4bit: bool
    draw: Draw = Drawing


def train(job: Job, team: Team | None = None) -> dict[str, Any]:
    """Train to the end and choose a checkpoint; returns the facts of training.json (JSON values).

    Args:
        team: this process's place among several; of them only the first returns facts.

    Raises:
        InputError: no rows, no room in memory or on the disk, unknown target_modules, a loss that is not finite.
        torch.OutOfMemoryError: the device has no room for a micro-batch.
    """
    quiet()
    from lib.stages.finetune import out_of_memory

    settings = job.settings
    task, tokenizer = read_task(job.data), load_tokenizer(job.data / "tokenizer")
    train, validation = (_rows(job, task, tokenizer, name) for name in ("train", "validation"))
    dtype, reason = machine.compute_dtype(settings.dtype)
    with out_of_memory.loading():
        model = _new_model(job.base, settings, dtype, job.in_4bit)
    filler = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    collate, layout = choose_layout(model, [*train, *validation], filler or 0)
    plan = _plan(model, settings, train + validation, job.in_4bit, getattr(collate, "prefix", 0))
    require_space(job.folder, 5 * 12 * plan["trainable"] + (32 << 20), "checkpoints and the adapter")
    with PeakMemory() as peak, DevicePeak() as on_gpu:  # of the training alone: making the offline base needs more
        outcome = _train(job, model, train, validation, (collate, layout), team)
    most = on_gpu.bytes if team is None else round(team.most(on_gpu.bytes))
    if outcome is None:
        return {}
    method = f"{'QLoRA (NF4)' if job.in_4bit else 'LoRA'} r={settings.lora_r}, alpha={settings.lora_alpha}"
    return {
        "method": f"{method} on {plan.pop('layers')} linear layers",
        **plan,
        **outcome,
        "peak_memory_mib": round(peak.bytes / 2**20, 1),
        "peak_device_mib": round(most / 2**20, 1) if most else None,
        "train_rows": len(train),
        "validation_rows": len(validation),
        "dtype": dtype,
        "dtype_reason": reason,
        "device": machine.device_name(),
    }


def _rows(job: Job, task: Task, tokenizer: Any, name: str) -> list[Example]:
    what = {"train": "training"}.get(name, name)
    rows = examples(read_jsonl(job.data / f"{name}.jsonl"), task, tokenizer, what)
    if not rows:
        raise InputError(f"the data product holds no {what} row.", "at least one.", "run 01_data with more rows.")
    return rows


def _new_model(base: Base, settings: Settings, dtype: str, in_4bit: bool) -> Any:
    """The frozen base with a fresh adapter (float32), from the run's seed."""
    from transformers import set_seed

    model = load_model(base.path, dtype=dtype, load_in_4bit=in_4bit)
    model.config.use_cache = False
    set_seed(settings.training_seed)
    return with_adapter(model, settings)


def _plan(model: Any, settings: Settings, rows: list[Example], in_4bit: bool, prefix: int) -> dict[str, Any]:
    """Sizes, the memory estimate and the advice; refuses what cannot fit."""
    answer = max(row.loss_tokens for row in rows)
    shape = memory.shape_of(model, settings, max(map(len, rows)), answer, in_4bit, prefix)
    if machine.torch_device() == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info()
        estimate = memory.estimate(shape)
        free += torch.cuda.memory_allocated()
    else:
        total, process = machine.total_memory(), psutil.Process().memory_info().rss
        estimate = memory.estimate(shape, max(0, process - memory.estimate(shape).weights))
        free = machine.available_memory() + process
    can_4bit = machine.bitsandbytes_problem() is None
    need = estimate.total * (settings.num_processes if machine.torch_device() == "cpu" else 1)  # a GPU each
    advice = memory.advice(need, free, settings, can_4bit)
    memory.refuse_impossible(need, total, advice)
    return {
        "trainable": shape.adapter,
        "total": shape.linear + shape.other + shape.adapter,
        "layers": sum(1 for name, _ in model.named_modules() if name.endswith("lora_A")),
        "estimate": estimate.to_json(),
        "memory": {"available": free, "total": total},
        "advice": advice,
    }


def _train(
    job: Job,
    model: Any,
    train: list[Example],
    validation: list[Example],
    layout: tuple[Collate, str],
    team: Team | None,
) -> dict[str, Any] | None:
    """Run the Trainer to the end, from the newest verified checkpoint if there is one; None in a team's other ranks."""
    from lib.stages.finetune import out_of_memory
    from lib.stages.finetune.watch import LIVE, Watch, stop_by_signal

    folder, first = job.folder / "checkpoints", team is None or team.first
    _remove_unfinished(folder)
    trainer, steps = _trainer(job.settings, folder, model, train, validation, layout[0], team)
    good, messages = checkpoints.find(folder)
    start = good[-1] if good else None
    began = time.monotonic()
    with no_warnings(), Progress("fine-tuning (updates)", steps) as progress:
        log_file = job.folder / "training.log" if first else None
        drawing = job.draw(folder.with_name(LIVE)) if first else Drawing(folder)
        watch = Watch(trainer, log_file, progress, drawing, team.any_stops if team else bool)
        trainer.add_callback(watch)
        for message in messages:
            watch.write(f"{message}: passed over")
        watch.write(f"micro-batches {layout[1]}")
        watch.write(f"continuing from step {start.step} of {steps}" if start else f"starting; {steps} updates")
        with stop_by_signal(watch.stop), drawing, out_of_memory.memory_in_one_word():
            if start and start.eval_loss is None and (start.step % job.settings.save_steps == 0 or start.step == steps):
                start = trainer.judge(start)
            watch.start = start
            if not watch.stopped:
                trainer.train(resume_from_checkpoint=str(start.path) if start else None)
    if watch.stopped:  # by another process of the team
        raise KeyboardInterrupt("stopped with a checkpoint; run it again to continue")
    if team is not None:
        team.total(0.0)  # all have left the Trainer: at its end it lists a folder that the first removes now
    if not first:
        return None
    outcome = _outcome(trainer, watch, folder, steps, start, messages, time.monotonic() - began)
    return {**outcome, "layout": layout[1]}


def _trainer(
    settings: Settings,
    folder: Path,
    model: Any,
    train: list[Example],
    validation: list[Example],
    collate: Collate,
    team: Team | None,
) -> tuple[Any, int]:
    """The Trainer of this process, and the updates of the whole training."""
    from lib.stages.finetune.trainer import AnswerTrainer, training_arguments

    update = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * (team.size if team else 1)
    steps = math.ceil(settings.num_train_epochs * math.ceil(len(train) / update))
    arguments = training_arguments(
        folder,
        steps,
        machine.torch_device() == "cpu",
        **settings.pick(
            *("learning_rate", "num_train_epochs", "per_device_train_batch_size", "save_steps"),
            *("gradient_accumulation_steps", "gradient_checkpointing"),
        ),
        seed=settings.training_seed,
    )
    if team is None:
        return AnswerTrainer(model, arguments, train, validation, collate), steps
    from lib.stages.finetune.trainer import TeamTrainer

    return TeamTrainer(team, model, arguments, train, validation, collate), steps


def _remove_unfinished(folder: Path) -> None:
    for left in (checkpoints.STAGED, ".ranks"):
        shutil.rmtree(folder / left, ignore_errors=True)


def _outcome(
    trainer: Any, watch: Any, folder: Path, steps: int, start: Any, messages: list[str], seconds: float
) -> dict[str, Any]:
    from lib.stages.finetune.watch import LIVE

    _remove_unfinished(folder)
    (folder.parent / LIVE).unlink(missing_ok=True)
    history = [row for row in trainer.state.log_history if "loss" in row or "eval_loss" in row]
    write_jsonl(folder.parent / "history.jsonl", history)
    broken = [row["step"] for row in history if not math.isfinite(row.get("loss", row.get("eval_loss", 0.0)))]
    chosen = checkpoints.best(checkpoints.find(folder)[0])
    if broken or chosen is None:
        where = f" at step {broken[0]}" if broken else ""
        shutil.rmtree(folder)  # nothing to continue from: these weights are lost
        raise InputError(
            f"the loss is not a finite number{where}.", "a training that converges.", "lower learning_rate (by half)."
        )
    watch.write(f"chosen: step {chosen.step}, validation loss {chosen.eval_loss:.4f}")
    return {
        "chosen_step": chosen.step,
        "steps": steps,
        "throughput": round(watch.throughput, 1),
        "resumed_from": start.step if start else None,
        "messages": messages,
        "seconds": round(seconds, 2),
    }
