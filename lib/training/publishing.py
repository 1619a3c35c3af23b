"""The chosen checkpoint becomes the product `adapter`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.models.loading import Base
from lib.run.files import read_json, write_json, write_text
from lib.training import checkpoints
from lib.training.adopting import write_config

if TYPE_CHECKING:
    from lib.run import Work


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
