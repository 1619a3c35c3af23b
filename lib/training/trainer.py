"""The Trainer of transformers with this project's loss, row order, validation and checkpoints."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from lib.training import checkpoints, full
from lib.training.batches import Collate, Example, GroupedOrder
from lib.training.loss import answer_loss


class _Order(Sampler):
    """GroupedOrder as torch's DataLoader wants it."""

    def __init__(self, order: GroupedOrder) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)


class AnswerTrainer(Trainer):
    """Trains on the answer tokens of `train` and measures the same loss on `validation`.

    Args:
        model: a PeftModel.
        arguments: from `training_arguments`.
        train, validation: encoded rows.
        collate: makes a batch of rows, padded or packed (`lib.training.layout`).
    """

    def __init__(
        self,
        model: Any,
        arguments: TrainingArguments,
        train: list[Example],
        validation: list[Example],
        collate: Collate,
    ) -> None:
        self.order = GroupedOrder(
            [len(example) for example in train],
            arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps,
            arguments.seed,
        )
        self.validation, self.collate = validation, collate
        self.step_tokens, self.interval_tokens, self.interval_started = 0, 0, time.monotonic()
        self.eval_seconds = 0.0
        self.interrupted: Callable[[], bool] = lambda: False  # whether a stop is asked for (`lib.training.watch`)
        super().__init__(
            model=model, args=arguments, train_dataset=train, eval_dataset=validation, data_collator=self.collate
        )
        self.remove_callback(PrinterCallback)  # it prints to stdout

    def _get_train_sampler(self, *_: Any) -> Sampler:
        return _Order(self.order)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Linear warm-up and cosine decay (`rate`) in place of transformers', whose first update has the rate 0."""
        if self.lr_scheduler is None:
            shape = functools.partial(
                rate, warm=self.args.get_warmup_steps(num_training_steps), total=num_training_steps
            )
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, shape)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of one forward pass divided by the loss tokens of the whole update, so accumulation changes nothing."""
        total, count = answer_loss(model, inputs)
        self.step_tokens += int(inputs["row_tokens"])
        loss = total / (count if num_items_in_batch is None else num_items_in_batch)
        return (loss, None) if return_outputs else loss

    def _maybe_log_save_evaluate(self, *arguments: Any, **options: Any) -> None:
        """As transformers does it, but the checkpoint first: a batch system does not wait for a validation."""
        judging, self.control.should_evaluate = self.control.should_evaluate, False
        super()._maybe_log_save_evaluate(*arguments, **options)
        if judging:
            self.evaluate()

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean cross-entropy (nats) over the answer tokens of the validation rows, as "eval_loss".

        It is added to the record of this update's checkpoint. When a stop is asked for meanwhile, there is none, and
        the training ends; `judge` makes up for it.
        """
        started = time.monotonic()
        found = self.validation_loss(self.validation)
        if found is None:
            self.control.should_training_stop = True
            return {}
        metrics = {"eval_loss": found[0] / found[1]}
        self._keep_judgement(self.state.global_step, metrics["eval_loss"])
        self.eval_seconds += time.monotonic() - started
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.interrupted():
            self.control.should_training_stop = True
        return metrics

    def judge(self, checkpoint: checkpoints.Checkpoint) -> checkpoints.Checkpoint:
        """The checkpoint with the validation loss that its own training did not come to; unchanged on a stop."""
        self._load_from_checkpoint(str(checkpoint.path))
        found = self.validation_loss(self.validation)
        if found is None:
            return checkpoint
        self._keep_judgement(checkpoint.step, found[0] / found[1])
        return replace(checkpoint, eval_loss=found[0] / found[1])

    def _keep_judgement(self, step: int, loss: float) -> None:
        folder = Path(self.args.output_dir)
        checkpoints.judge(folder / f"checkpoint-{step}", loss)
        checkpoints.prune(folder)

    def validation_loss(self, rows: list[Example], passes: int | None = None) -> tuple[float, int] | None:
        """Summed cross-entropy (nats) over the answer tokens of `rows`, and their number; None when asked to stop.

        Args:
            passes: how often to ask whether to stop; by default once a forward pass.
        """
        self.model.eval()
        total, tokens, size = 0.0, 0, 2 * self.args.per_device_train_batch_size
        rows, stopped = sorted(rows, key=len, reverse=True), False
        with torch.no_grad():
            for i in range(math.ceil(len(rows) / size) if passes is None else passes):
                if stopped := self.interrupted():
                    break
                if part := rows[i * size : (i + 1) * size]:
                    batch = {key: value.to(self.args.device) for key, value in self.collate(part).items()}
                    loss, count = answer_loss(self.model, batch)
                    total, tokens = total + loss.item(), tokens + count
        self.model.train()
        return None if stopped else (total, tokens)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Keep a row of the history, with the throughput since the last one."""
        if "loss" in logs:
            seconds = time.monotonic() - self.interval_started - self.eval_seconds
            logs["tokens_per_second"] = round(self.interval_tokens / max(seconds, 1e-9), 1)
            self.interval_tokens, self.interval_started, self.eval_seconds = 0, time.monotonic(), 0.0
        super().log(logs, None)

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(self.args.output_dir) / checkpoints.STAGED)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As transformers writes it, but staged, sealed with a record and renamed."""
        started = time.monotonic()
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        with full.writing(folder):
            super()._save_checkpoint(model, trial)
            staged = folder / checkpoints.STAGED / name
            for unneeded in ("training_args.bin", "README.md"):  # a pickle that resuming does not need; an empty card
                (staged / unneeded).unlink(missing_ok=True)
            checkpoints.publish(staged, folder / name, self.state.global_step)
        checkpoints.prune(folder)
        self.eval_seconds += time.monotonic() - started


def rate(done: int, warm: int, total: int) -> float:
    """Share of the learning rate that the update after `done` ones has, of `total` with `warm` before the peak.

    It rises evenly from 1 / (warm + 1) to 1 and falls as half a cosine towards 0 behind the last update, so that every
    update, also the only one of a short training, changes the weights.
    """
    if done < warm:
        return (done + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warm) / max(1, total - warm))))


def training_arguments(folder: Path, steps: int, on_cpu: bool, **settings: Any) -> TrainingArguments:
    """Arguments shared by all runs: AdamW, 4 % warm-up before the cosine (`rate`), gradients clipped to norm 1.

    Args:
        folder: of the checkpoints.
        steps: updates in all.
        settings: learning_rate, num_train_epochs, batch size and so on, by their transformers names.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        warmup_steps=max(1, round(0.04 * steps)),
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=max(1, steps // 100),
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=settings["save_steps"],
        save_strategy="steps",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        use_cpu=on_cpu,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        **settings,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one device: DataParallel would split the small batches
    return arguments
