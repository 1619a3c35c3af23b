"""A training from its newest verified checkpoint to its end, again with smaller micro-batches where memory is full."""

from __future__ import annotations

import contextlib
import gc
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from lib.errors import InputError, refusal
from lib.models.base_model import Base
from lib.models.loading import load_model, load_tokenizer
from lib.models.weights import open_weights
from lib.progress import Progress, track
from lib.prompts.conversations import Encoded
from lib.prompts.tasks import Task, read_task
from lib.runs import machine
from lib.runs.files import data_file, read_json, read_jsonl, require_space, write_json, write_jsonl
from lib.runs.machine import device_peak, no_warnings, peak_memory, quiet
from lib.settings import FULL, LOFTQ, OF_ADAPTERS, Settings, yaml_value
from lib.stages.finetune import checkpoints, memory, tracking
from lib.stages.finetune.memory import with_adapter
from lib.stages.finetune.teacher import Imitating

if TYPE_CHECKING:
    from lib.stages.finetune.batches import Collate


@dataclass(frozen=True)
class TrainingInputs:
    """What a training depends on beside its settings.

    Attributes:
        settings: with what is to be used: the sizes of the micro-batches (`until_it_fits` makes them smaller), and
            `load_in_4bit` only where 4-bit layers work.
        data: folder of the data product. base: the base model.
        folder: where checkpoints, history and log go.
        redraw: called when there are new losses in the file `checkpoints.LIVE`.
        stop_file: who wants the training to stop makes it; None where a signal alone stops it.
        tracking: folder of the files of the tracker that `report_to` names.
    """

    settings: Settings
    data: Path
    base: Base
    folder: Path
    redraw: Callable[[], None] | None = None
    stop_file: Path | None = None
    tracking: Path = Path(tracking.FOLDER)


def train(inputs: TrainingInputs) -> dict[str, Any]:
    """Train to the end and choose a checkpoint; returns the facts of training.json (JSON values).

    Of several processes that torchrun has started each calls this, and only the first returns facts.

    Raises:
        InputError: no rows, no room in memory or on the disk, unknown target_modules, a loss that is not finite.
        torch.OutOfMemoryError: the device has no room for a micro-batch.
    """
    quiet()
    from lib.stages.finetune.layout import choose_layout, refuse_overflow

    settings = inputs.settings
    task, tokenizer = read_task(inputs.data), load_tokenizer(inputs.data / "tokenizer")
    train, validation = (_rows(inputs.data, task, tokenizer, name) for name in ("train", "validation"))
    dtype, reason = machine.compute_dtype(settings.dtype)
    if settings.sharded and dtype == "float16":
        raise refusal("finetune/float16-in-shares")
    with base_fits():
        model = _new_model(inputs.base, settings, dtype)
    filler = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    noise = data_file("stages/finetune/notes.yaml")["noise"] if settings.neftune_noise_alpha else None
    collate, layout = choose_layout(model, [*train, *validation], filler or 0, noise)
    if settings.teacher:
        collate = Imitating(collate, train, inputs.folder, settings.distillation_weight)
    if dtype == "float16":
        refuse_overflow(model, collate(train[:1]))
    plan = _plan(model, settings, train + validation, getattr(collate, "prefix", 0))
    require_space(inputs.folder, 5 * 12 * plan["trainable"] + (32 << 20), "checkpoints and the adapter")
    reported = tracking.reporting(settings.report_to, inputs.tracking)
    # measured is the training alone: making the offline base needs more
    with reported, peak_memory() as peak, device_peak() as on_gpu:
        trainer, outcome = _run_trainer(inputs, model, train, validation, collate, layout)
    from lib.stages.finetune.trainer import from_every_process

    largest = from_every_process(on_gpu.bytes).max().item()
    if not trainer.args.should_save:
        return {}
    return {
        "method": _method(model, settings),
        **plan,
        **outcome,
        "layout": layout,
        "peak_memory_mib": round(peak.bytes / 2**20, 1),
        "peak_device_mib": round(largest / 2**20, 1) if largest else None,
        "train_rows": len(train),
        "validation_rows": len(validation),
        "dtype": dtype,
        "dtype_reason": reason,
        "device": machine.device_name(),
    }


VARIANTS = (*OF_ADAPTERS, "neftune_noise_alpha", "qat", "teacher", "distillation_weight")
"""Settings that are named beside the method where they are not the default."""


def _method(model: Any, settings: Settings) -> str:
    """How it was trained, in words."""
    usual = Settings()
    own = {key: value for key, value in settings.pick(*VARIANTS).items() if value != getattr(usual, key)}
    more = f" ({', '.join(f'{key}: {yaml_value(value)}' for key, value in own.items())})" if own else ""
    if settings.finetuning_type == FULL:
        return f"{FULL}{more}"
    layers = sum(1 for name, _ in model.named_modules() if name.endswith("lora_A"))
    kind = "QLoRA (NF4)" if settings.load_in_4bit else "LoRA"
    return f"{kind} r={settings.lora_r}, alpha={settings.lora_alpha} on {layers} linear layers{more}"


def _rows(data: Path, task: Task, tokenizer: Any, name: str) -> list[Encoded]:
    what = {"train": "training"}.get(name, name)
    rows = track(read_jsonl(data / f"{name}.jsonl"), f"tokenizing {what} rows")
    encoded = [task.encode(tokenizer, row) for row in rows]
    if not encoded:
        raise InputError(f"the data product holds no {what} row.", "at least one.", "run 01_data with more rows.")
    return encoded


def _new_model(base: Base, settings: Settings, dtype: str) -> Any:
    """The frozen base with a fresh adapter (float32), from the run's seed; or the base in float32, to be trained."""
    from transformers import set_seed

    from lib.stages.finetune.layout import train_whole
    from lib.stages.finetune.lora_init import make_up_for_rounding

    whole = settings.finetuning_type == FULL
    device = "cpu" if settings.sharded else None  # no single GPU may have room for it
    model = load_model(base.path, "float32" if whole else dtype, settings.load_in_4bit, device=device)
    model.config.use_cache = False
    set_seed(settings.training_seed)
    if whole:
        return train_whole(model, settings, dtype)
    adapted = with_adapter(model, settings)
    if settings.init_lora_weights == LOFTQ:
        make_up_for_rounding(adapted, open_weights(base.path))
    return adapted


def _plan(model: Any, settings: Settings, rows: list[Encoded], prefix: int) -> dict[str, Any]:
    """Sizes, the memory estimate and the advice; refuses what cannot fit."""
    answer = max(len(row.loss) for row in rows)
    estimate = memory.estimate(model, settings, max(map(len, rows)), answer, prefix)
    if machine.torch_device() == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info()
        free, processes = free + torch.cuda.memory_allocated(), 1  # a GPU each
    else:
        total, process = machine.total_memory(), psutil.Process().memory_info().rss
        estimate["process"] = max(0, process - estimate["weights"])
        free = machine.available_memory() + process
        processes = settings.num_processes if machine.torch_device() == "cpu" else 1
    need = sum(estimate.values())
    advice = memory.advice(need * processes, free, settings, machine.bitsandbytes_problem() is None)
    memory.refuse_impossible(need * processes, total, advice)
    sizes = memory.weights_of(model)
    return {
        "trainable": sizes[-1] or sum(sizes),
        "total": sum(sizes),
        "estimate": {**estimate, "total": need},
        "memory": {"available": free, "total": total},
        "advice": advice,
    }


def _run_trainer(
    inputs: TrainingInputs, model: Any, train: list[Encoded], validation: list[Encoded], collate: Collate, layout: str
) -> tuple[Any, dict[str, Any]]:
    """Run the Trainer to its end, from the newest verified checkpoint if there is one; what came of it."""
    from lib.stages.finetune import trainer as trainers
    from lib.stages.finetune.watch import Watch, stop_by_signal

    settings, folder = inputs.settings, inputs.folder / "checkpoints"
    shutil.rmtree(folder / checkpoints.STAGED, ignore_errors=True)
    passes = settings.gradient_accumulation_steps * settings.num_processes
    update = settings.per_device_train_batch_size * passes
    steps = math.ceil(settings.num_train_epochs * math.ceil(len(train) / update))
    if trainers.warm_up(steps, settings) > steps:
        raise refusal("finetune/long-warm-up", settings=settings, steps=steps)
    arguments = trainers.training_arguments(folder, steps, settings)
    more = (settings.loraplus_lr_ratio, settings.sharded)
    trainer = trainers.AnswerTrainer(model, arguments, train, validation, collate, *more)
    good, messages = checkpoints.find(folder)
    if good and not trainer.goes_on_from(good[-1].path):
        messages.append(data_file("stages/finetune/notes.yaml")["other-pair"])
        shutil.rmtree(folder)
        good = []
    start = good[-1] if good else None
    began = time.monotonic()
    with no_warnings(), Progress("fine-tuning (updates)", steps) as progress:
        watch = Watch(trainer, inputs.folder, progress, inputs.redraw, inputs.stop_file)
        trainer.add_callback(watch)
        for message in messages:
            watch.write(f"{message}: passed over")
        watch.write(f"micro-batches {layout}")
        watch.write(f"continuing from step {start.step} of {steps}" if start else f"starting; {steps} updates")
        with stop_by_signal(watch.stop), full_memory():
            if start and start.eval_loss is None and (start.step % settings.save_steps == 0 or start.step == steps):
                start = trainer.evaluate_checkpoint(start)
            watch.start = start
            if not watch.stopped:
                trainer.train(resume_from_checkpoint=str(start.path) if start else None)
    if watch.stopped:  # by another process, or by the file
        raise KeyboardInterrupt("stopped with a checkpoint; run it again to continue")
    trainer.accelerator.wait_for_everyone()  # the Trainer lists a folder at its end that the first process removes now
    if not trainer.args.should_save:
        return trainer, {}
    shutil.rmtree(folder / checkpoints.STAGED, ignore_errors=True)
    (inputs.folder / checkpoints.LIVE).unlink(missing_ok=True)
    history = trainer.state.log_history
    chosen = _choose(history, folder)
    watch.write(f"chosen: step {chosen.step}, validation loss {chosen.eval_loss:.4f}")
    return trainer, {
        "chosen_step": chosen.step,
        "steps": steps,
        "throughput": statistics.median(row["tokens_per_second"] for row in history if "loss" in row),
        "resumed_from": start.step if start else None,
        "messages": [*messages, *_skipped(trainer, steps)],
        "seconds": round(time.monotonic() - began, 2),
    }


def _skipped(trainer: Any, steps: int) -> list[str]:
    """What float16 cost, in words."""
    words = data_file("stages/finetune/notes.yaml")["skipped"]
    return [words.format(skipped=trainer.skipped, steps=steps)] if trainer.skipped else []


def _choose(log: list[dict[str, Any]], folder: Path) -> checkpoints.Checkpoint:
    """Write history.jsonl; the checkpoint with the lowest validation loss."""
    history = [row for row in log if "loss" in row or "eval_loss" in row]
    write_jsonl(folder.parent / "history.jsonl", history)
    broken = [row["step"] for row in history if not math.isfinite(row.get("loss", row.get("eval_loss", 0.0)))]
    chosen = checkpoints.best(checkpoints.find(folder)[0])
    if broken or chosen is None:
        where = f" at step {broken[0]}" if broken else ""
        shutil.rmtree(folder)  # nothing to continue from: these weights are lost
        raise refusal("finetune/diverged", where=where)
    return chosen


# Where the device has no room for a micro-batch: halve it, make more of them an update, and go on.

MEMORY_RECORD = "out_of_memory.json"
"""Beside the checkpoints: the sizes that did not fit. A continued training begins with those that did."""

NO_MEMORY: list[str] = data_file("stages/finetune/names.yaml")["no_memory"]
"""In a RuntimeError that is no torch.OutOfMemoryError: cuBLAS, cuDNN, Apple's GPU, the processor's memory."""


@contextlib.contextmanager
def full_memory() -> Iterator[None]:
    """Whatever a library says when memory is full becomes a torch.OutOfMemoryError."""
    import torch

    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and any(words in str(error) for words in NO_MEMORY):
            raise torch.OutOfMemoryError(str(error)) from None
        raise


@contextlib.contextmanager
def base_fits() -> Iterator[None]:
    """While the base is loaded; no smaller micro-batch would help where it does not fit.

    Raises:
        InputError: it does not fit.
    """
    import torch

    try:
        with full_memory():
            yield
    except torch.OutOfMemoryError as error:
        raise refusal("finetune/no-room-for-base", said=_first_line(error)) from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


def smaller(rows: int, passes: int) -> tuple[int, int] | None:
    """At most half the rows a forward pass, and as many more passes that an update keeps its rows; None for one row."""
    update = rows * passes
    fitting = [size for size in range(1, rows // 2 + 1) if update % size == 0]
    return (fitting[-1], update // fitting[-1]) if fitting else None


def until_it_fits(
    inputs: TrainingInputs, attempt: Callable[[TrainingInputs], dict[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """Call `attempt` with smaller and smaller micro-batches until the device has room for one.

    The rows of every update, their order and the weight of each loss token stay the same, and each attempt goes on
    from the newest verified checkpoint, so only rounding differs from a training that began with the smaller size.

    Returns:
        The attempt's facts with "micro_batch" (rows and passes asked for and used, what did not fit), and a note for
        the pages for each size that did not fit.

    Raises:
        InputError: a single row does not fit.
    """
    asked = _sizes(inputs)
    record = inputs.folder / MEMORY_RECORD
    failures: list[dict[str, Any]] = read_json(record) if record.is_file() else []
    while True:
        if failures:
            rows, passes = failures[-1]["next"]["rows"], failures[-1]["next"]["passes"]
            changes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": passes}
            inputs = replace(inputs, settings=inputs.settings.model_copy(update=changes))
        try:
            facts = attempt(inputs)
            break
        except Exception as error:
            torch = sys.modules.get("torch")  # loaded by now if it can have raised this
            if torch is None or not isinstance(error, torch.OutOfMemoryError):
                raise
            message = _first_line(error)
        gc.collect()  # here, where no traceback holds the model any more
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        failures.append(_failure(inputs, message))
        write_json(record, failures)
    micro_batch = {"asked": asked, "used": _sizes(inputs), "out_of_memory": failures}
    return {**facts, "micro_batch": micro_batch}, [_note(failure) for failure in failures]


def _sizes(inputs: TrainingInputs) -> dict[str, int]:
    settings = inputs.settings
    return {"rows": settings.per_device_train_batch_size, "passes": settings.gradient_accumulation_steps}


def _failure(inputs: TrainingInputs, message: str) -> dict[str, Any]:
    """What did not fit, and what is tried next."""
    sizes = _sizes(inputs)
    following = smaller(sizes["rows"], sizes["passes"])
    if following is None:
        (inputs.folder / MEMORY_RECORD).unlink(missing_ok=True)  # another start may find more room
        raise refusal("finetune/no-room-for-a-row", message=message)
    rows, passes = following
    good, _ = checkpoints.find(inputs.folder / "checkpoints")
    line = f"out of memory with {sizes['rows']} rows a forward pass: {rows} from now on"
    checkpoints.write_log(inputs.folder, line)
    step = good[-1].step if good else 0
    return {**sizes, "from_step": step, "message": message, "next": {"rows": rows, "passes": passes}}


def _note(failure: dict[str, Any]) -> str:
    rows, passes = failure["next"]["rows"], failure["next"]["passes"]
    again = f"went on from update {failure['from_step']}" if failure["from_step"] else "started again"
    return data_file("stages/finetune/notes.yaml")["memory"].format(
        failure=failure, again=again, rows=rows, passes=passes
    )
