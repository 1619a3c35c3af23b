"""Notebook 02: a LoRA or QLoRA on the run's base model; the product `adapter`."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from lib import device
from lib.errors import InputError
from lib.models.loading import Base, base_of, load_model, load_tokenizer
from lib.models.quiet import no_warnings, quiet
from lib.models.resolving import resolve_adapter
from lib.models.tasks import read_task
from lib.progress import Progress
from lib.run.files import read_json, read_jsonl, require_space, write_json, write_jsonl, write_text
from lib.run.memory import PeakMemory
from lib.training import checkpoints, memory
from lib.training.adopting import adopt, write_config
from lib.training.batches import Collator, Example, examples
from lib.training.result import FinetuneResult

if TYPE_CHECKING:
    from lib.run import Run, Work
    from lib.settings import Settings

PARAMETERS = (
    *("seed", "load_in_4bit", "lora_r", "lora_alpha", "lora_dropout", "target_modules", "learning_rate"),
    *("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "dtype"),
    *("gradient_checkpointing", "save_steps"),
)
"""Settings that the adapter depends on (those of the data come in through the data product)."""


def finetune(settings: Settings, run: Run) -> FinetuneResult:
    """Train the adapter, or find it unchanged; an interrupted training continues from its newest whole checkpoint.

    With the setting `adapter` nothing is trained: that adapter is checked against the base model and adopted.

    Raises:
        InputError: no data product, an unusable base model, no room in memory or on the disk, unknown target_modules.
    """
    if settings.adapter:
        given = resolve_adapter(settings.adapter)
        product = run.produce(
            "adapter",
            lambda work: adopt(given, run, work),
            parameters={"adapter": given.id, "adapter_revision": given.revision},
            inputs=("data",),
            force=settings.force,
        )
        return FinetuneResult.read(product)
    product = run.produce(
        "adapter",
        lambda work: _build(settings, run, work),
        parameters=settings.pick(*PARAMETERS),
        inputs=("data",),
        force=settings.force,
        keep_partial=True,
    )
    return FinetuneResult.read(product)


def _build(settings: Settings, run: Run, work: Work) -> None:
    quiet()
    data, base = run.require("data"), base_of(run)
    task, tokenizer = read_task(data.path), load_tokenizer(data.path / "tokenizer")
    train = examples(read_jsonl(data.path / "train.jsonl"), task, tokenizer, "training")
    validation = examples(read_jsonl(data.path / "validation.jsonl"), task, tokenizer, "validation")
    for name, rows in (("training", train), ("validation", validation)):
        if not rows:
            raise InputError(f"the data product holds no {name} row.", "at least one.", "run 01_data with more rows.")
    in_4bit = _four_bits(settings, work)
    dtype, reason = ("bfloat16", "QLoRA computes in it") if in_4bit else device.compute_dtype(settings.dtype)
    model = _new_model(base, settings, dtype, in_4bit)
    plan = _plan(model, settings, train, validation, in_4bit)
    require_space(work.folder, 5 * 12 * plan["trainable"] + (32 << 20), "checkpoints and the adapter")
    with PeakMemory() as peak:  # of the training alone: making the offline base needs more than a LoRA on it
        outcome = _train(model, settings, train, validation, tokenizer.pad_token_id, work)
    method = f"{'QLoRA (NF4)' if in_4bit else 'LoRA'} r={settings.lora_r}, alpha={settings.lora_alpha}"
    facts = {
        "method": f"{method} on {plan.pop('layers')} linear layers",
        **plan,
        **outcome,
        "peak_memory_mib": round(peak.bytes / 2**20, 1),
        "train_rows": len(train),
        "validation_rows": len(validation),
        "dtype": dtype,
        "dtype_reason": reason,
        "base": {"id": base.id, "revision": base.revision, "offline": base.offline},
    }
    _publish(work, base, facts, in_4bit)


def _four_bits(settings: Settings, work: Work) -> bool:
    problem = device.bitsandbytes_problem() if settings.load_in_4bit else None
    if problem:
        work.notes.append(
            f"QLoRA was asked for, but 4-bit layers do not work here ({problem}): plain LoRA was trained instead."
        )
    return settings.load_in_4bit and not problem


def _new_model(base: Base, settings: Settings, dtype: str, in_4bit: bool) -> Any:
    """The frozen base with a fresh adapter (float32), from the run's seed."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    targets: Any = settings.target_modules
    if targets != "all-linear":
        targets = [name.strip() for name in targets.split(",") if name.strip()]
        if bad := sorted({"lm_head", "embed_tokens"} & set(targets)):
            raise InputError(
                f"target_modules names {bad[0]}.",
                "linear layers of the blocks: small Qwen models tie their embeddings, and a merge would be wrong.",
                "set target_modules: all-linear.",
            )
    model = load_model(base.path, dtype=dtype, load_in_4bit=in_4bit)
    model.config.use_cache = False
    set_seed(settings.seed)
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        with no_warnings():
            return get_peft_model(model, config)
    except ValueError as error:
        raise InputError(
            f"target_modules {settings.target_modules!r} ({error}).", "names of linear layers.", "set it to all-linear."
        ) from None


def _plan(
    model: Any, settings: Settings, train: list[Example], validation: list[Example], in_4bit: bool
) -> dict[str, Any]:
    """Sizes, the memory estimate and the advice; refuses what cannot fit."""
    longest = max(map(len, train + validation))
    answer = max(example.loss_tokens for example in train + validation)
    shape = memory.shape_of(model, settings, longest, answer, in_4bit)
    if device.torch_device() == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info()
        estimate = memory.estimate(shape)
        free += torch.cuda.memory_allocated()
    else:
        total, process = psutil.virtual_memory().total, psutil.Process().memory_info().rss
        estimate = memory.estimate(shape, max(0, process - round(shape.weight_bytes * (shape.linear + shape.other))))
        free = device.available_memory() + process
    can_4bit = device.bitsandbytes_problem() is None
    advice = memory.advice(estimate.total, free, settings, can_4bit)
    memory.refuse_impossible(estimate.total, total, advice)
    return {
        "trainable": shape.adapter,
        "total": shape.linear + shape.other + shape.adapter,
        "layers": sum(1 for name, _ in model.named_modules() if name.endswith("lora_A")),
        "estimate": estimate.to_json(),
        "memory": {"available": free, "total": total},
        "advice": advice,
    }


def _train(
    model: Any, settings: Settings, train: list[Example], validation: list[Example], pad_id: int, work: Work
) -> dict[str, Any]:
    """Run the Trainer to the end, from the newest verified checkpoint if there is one."""
    import torch

    from lib.training.loss import check_loss
    from lib.training.trainer import AnswerTrainer, Watch, stop_at_sigterm, training_arguments

    kind = device.torch_device()
    work.device = device.device_name()
    check_loss(model, {k: v.to(kind) for k, v in Collator(pad_id)(train[:1]).items()})
    folder = work.folder / "checkpoints"
    shutil.rmtree(folder / ".staged", ignore_errors=True)
    rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    steps = math.ceil(settings.num_train_epochs * math.ceil(len(train) / rows))
    arguments = training_arguments(
        folder,
        steps,
        kind == "cpu",
        **settings.pick(
            *("seed", "learning_rate", "num_train_epochs", "per_device_train_batch_size", "save_steps"),
            *("gradient_accumulation_steps", "gradient_checkpointing"),
        ),
    )
    good, messages = checkpoints.find(folder)
    start = good[-1] if good else None
    began = time.monotonic()
    with no_warnings(), Progress("fine-tuning (updates)", steps) as progress:
        trainer = AnswerTrainer(model, arguments, train, validation, pad_id)
        watch = Watch(trainer, work.folder / "training.log", progress)
        trainer.add_callback(watch)
        for message in messages:
            watch.write(f"{message}: passed over")
        watch.write(f"continuing from step {start.step} of {steps}" if start else f"starting; {steps} updates")
        try:
            with stop_at_sigterm(watch):
                trainer.train(resume_from_checkpoint=str(start.path) if start else None)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"the device ran out of memory ({str(error).splitlines()[0]}).",
                "a training that fits.",
                "halve per_device_train_batch_size and double gradient_accumulation_steps.",
            ) from None
    return _outcome(trainer, watch, folder, steps, start, messages, time.monotonic() - began)


def _outcome(
    trainer: Any, watch: Any, folder: Path, steps: int, start: Any, messages: list[str], seconds: float
) -> dict[str, Any]:
    shutil.rmtree(folder / ".staged", ignore_errors=True)
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


def _publish(work: Work, base: Base, facts: dict[str, Any], in_4bit: bool) -> None:
    """The chosen checkpoint's adapter with its card beside the history; facts for the manifest."""
    chosen = work.folder / "checkpoints" / f"checkpoint-{facts['chosen_step']}"
    shutil.copyfile(chosen / "adapter_model.safetensors", work.folder / "adapter_model.safetensors")
    write_config(work.folder, read_json(chosen / "adapter_config.json"), base)
    write_json(work.folder / "training.json", facts)
    loss = read_json(chosen / checkpoints.RECORD)["eval_loss"]
    write_text(work.folder / "README.md", _readme(base, facts, loss))
    work.facts |= {
        "base_model": base.id,
        "base_revision": base.revision,
        "offline_base": base.offline,
        "method": "QLoRA" if in_4bit else "LoRA",
        **{key: facts[key] for key in ("chosen_step", "steps", "trainable", "total", "dtype", "resumed_from")},
    }
    work.metrics |= {"eval_loss": loss, "tokens_per_second": facts["throughput"]}


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
