"""One side of benchmarks/training.py: a few updates on given rows, timed from the first to the last of them.

    python benchmarks/training_sides.py SIDE JOB.json OUT.json

SIDE: workbook, trainer (plain transformers Trainer) or trl (SFTTrainer). JOB.json: {"base", "rows", "batch", "dropout",
"ordered"}; a row is {"ids", "prompt"} (token ids, how many of them are prompt). OUT.json: {"samples_per_second",
"losses" (of each update)}. All sides have the same base in bfloat16, the same adapter and optimizer, and lose only at
the answers' tokens. Each takes the rows as it usually does; with "ordered" all take them in the workbook's order.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments, set_seed

from lib.models.loading import load_model
from lib.prompts.conversations import Encoded
from lib.stages.finetune.batches import IGNORED, GroupedOrder


class Clock(TrainerCallback):
    """Time of the updates, and their losses."""

    def __init__(self) -> None:
        self.begin = self.end = 0.0
        self.losses: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begin = self.begin or time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.end = time.perf_counter()

    def on_log(self, *arguments: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def padded(pad_id: int) -> Any:
    """The usual collator: every row padded to the longest of its batch, prompt labels ignored."""

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["ids"]) for row in batch)
        ids = torch.full((len(batch), longest), pad_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for i, row in enumerate(batch):
            size = len(row["ids"])
            ids[i, :size], mask[i, :size] = torch.tensor(row["ids"]), 1
            labels[i, row["prompt"] : size] = ids[i, row["prompt"] : size]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return collate


def common(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Arguments that every side has."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": job["batch"],
        "max_steps": -(-len(job["rows"]) // job["batch"]),
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        "seed": 0,
    }


def order(job: dict[str, Any]) -> list[int]:
    """The workbook's order of the first epoch."""
    return list(GroupedOrder([len(row["ids"]) for row in job["rows"]], job["batch"], 0))


class InOrder(Trainer):
    """A plain Trainer that takes its rows one after another."""

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def plain_trainer(model: Any, job: dict[str, Any], pad_id: int, folder: Path) -> Trainer:
    """transformers alone."""
    rows = [job["rows"][i] for i in order(job)] if job["ordered"] else job["rows"]
    arguments = TrainingArguments(**common(job, folder), bf16=True, remove_unused_columns=False)
    kind = InOrder if job["ordered"] else Trainer
    return kind(model=model, args=arguments, train_dataset=rows, data_collator=padded(pad_id))


def trl_trainer(model: Any, job: dict[str, Any], tokenizer: Any, folder: Path) -> Trainer:
    """TRL's SFTTrainer on rows that are tokens already, loss on the completion alone (its default)."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"input_ids": row["ids"], "completion_mask": [int(i >= row["prompt"]) for i in range(len(row["ids"]))]}
        for row in job["rows"]
    ]
    arguments = SFTConfig(**common(job, folder), bf16=True, max_length=None, completion_only_loss=True, packing=False)
    return SFTTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def our_trainer(model: Any, job: dict[str, Any], pad_id: int, folder: Path) -> Trainer:
    """The Trainer of `workbook report`, without checkpoints and validation."""
    from lib.stages.finetune.layout import choose_layout
    from lib.stages.finetune.trainer import AnswerTrainer

    rows = [Encoded(row["ids"], [(row["prompt"], len(row["ids"]))]) for row in job["rows"]]
    collate, words = choose_layout(model, rows, pad_id)
    print(words, file=sys.stderr)
    arguments = TrainingArguments(**common(job, folder), remove_unused_columns=False)
    return AnswerTrainer(model, arguments, rows, rows[:1], collate)


def main() -> None:
    """Train, write the figures."""
    side, job_file, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    job = json.loads(job_file.read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    model = load_model(Path(job["base"]), dtype="bfloat16", load_in_4bit=False)
    model.config.use_cache = False
    set_seed(0)
    lora = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=job["dropout"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model, folder, clock = get_peft_model(model, lora), out.with_suffix(".folder"), Clock()
    if side == "trl":
        trainer = trl_trainer(model, job, tokenizer, folder)
    else:
        make = our_trainer if side == "workbook" else plain_trainer
        trainer = make(model, job, tokenizer.pad_token_id, folder)
    trainer.add_callback(clock)
    trainer.train()
    figures = {"samples_per_second": len(job["rows"]) / (clock.end - clock.begin), "losses": clock.losses}
    out.write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
