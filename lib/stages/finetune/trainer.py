"""The Trainer of transformers with this project's loss, row order, validation and checkpoints.
Several processes that train one adapter together: each a share of every update's rows, gradients summed once.
"""

from __future__ import annotations

import functools
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from lib.stages.finetune import checkpoints, out_of_memory
from lib.stages.finetune.batches import IGNORED, Collate, Example, GroupedOrder
from lib.stages.finetune.layout import answer_loss

# The Trainer of transformers with this project's loss, row order, validation and checkpoints.


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
        collate: makes a batch of rows, padded or packed (`lib.stages.finetune.layout`).
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
        self.interrupted: Callable[[], bool] = lambda: (
            False
        )  # whether a stop is asked for (`lib.stages.finetune.watch`)
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
        with out_of_memory.writing(folder):
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


# Several processes that train one adapter together: each a share of every update's rows, gradients summed once.
#
# Every process holds the whole model; only the adapter has gradients, a few MB. They are summed over the processes once
# an update, in one buffer, and every loss term is divided by the loss tokens of the whole update, so the update is that
# of one process with the same rows. (torch's DistributedDataParallel would average instead, over processes whose shares
# hold different numbers of loss tokens, and wants every pass to go through its own forward method.)

NOTHING = "nothing"
"""Key of a batch for a process whose share of a short update is empty: it takes part in the sums with zeros."""


@dataclass(frozen=True)
class Team:
    """This process's place among those that train together; `stop_file` is made by whoever wants them to stop."""

    rank: int
    size: int
    stop_file: Path

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def any_stops(self, this_one: bool) -> bool:
        """Whether some process is asked to stop: the same answer in all of them, so they stop at the same update."""
        flag = torch.tensor([float(this_one or self.stop_file.exists())], device=_device())
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    def most(self, value: float) -> float:
        """The largest of all processes."""
        largest = torch.tensor([value], dtype=torch.float64, device=_device())
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.item()

    def total(self, *values: float) -> list[float]:
        """Sums over all processes (float64 where the device has it)."""
        sums = torch.tensor(values, dtype=torch.float64, device=_device())
        dist.all_reduce(sums)
        return sums.tolist()


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


class Share:
    """One process's rows of every update, in the order of `GroupedOrder`.

    Every process gets the same number of updates an epoch, each with at least one entry: where the epoch's last update
    has fewer rows than there are processes, the others get the index behind the last row, which stands for no row.
    """

    def __init__(self, whole: GroupedOrder, rank: int, size: int) -> None:
        self.whole, self.rank, self.size = whole, rank, size
        self.rows_per_update = whole.rows_per_update // size

    @property
    def epoch(self) -> int:
        """The epoch whose order is drawn."""
        return self.whole.epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self.whole.epoch = value

    def _own(self, update: list[int]) -> list[int]:
        return update[self.rank :: self.size] or [len(self.whole)]

    def __len__(self) -> int:
        updates, rest = divmod(len(self.whole), self.whole.rows_per_update)
        return updates * self.rows_per_update + (len(self._own(list(range(rest)))) if rest else 0)

    def __iter__(self) -> Iterator[int]:
        order, step = list(self.whole), self.whole.rows_per_update
        for start in range(0, len(order), step):
            yield from self._own(order[start : start + step])


class TeamTrainer(AnswerTrainer):
    """The AnswerTrainer of one process of a team."""

    def __init__(
        self,
        team: Team,
        model: Any,
        arguments: Any,
        train: list[Example],
        validation: list[Example],
        collate: Collate,
    ) -> None:
        super().__init__(model, arguments, train, validation, collate)
        self.team = team
        whole = GroupedOrder([len(e) for e in train], self.order.rows_per_update * team.size, arguments.seed)
        self.order = Share(whole, team.rank, team.size)
        self.train_dataset = [*train, None]
        self.data_collator = self._collate_share
        self.unsummed: torch.Tensor | float = 0.0
        torch.manual_seed(arguments.seed + team.rank)  # dropout of its own in every process

    def _collate_share(self, batch: list[Example | None]) -> dict[str, torch.Tensor]:
        if batch == [None]:
            return {NOTHING: torch.zeros(1), "labels": torch.full((1, 2), IGNORED)}
        return self.collate(batch)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Loss tokens of the update in all processes."""
        own = super()._get_num_items_in_batch(batch_samples, device)
        return torch.tensor(self.team.total(float(own))[0], device=device)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        """As for one process; zero, with zero gradients, for the batch that stands for no row."""
        if NOTHING in inputs:
            return sum((0.0 * parameter.sum() for parameter in self._trainable()), torch.zeros((), device=model.device))
        return super().compute_loss(model, inputs, *arguments, **options)

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        """One pass; behind an update's last one, gradients, loss and token count are summed over all processes."""
        loss = super().training_step(*arguments, **options)
        self.unsummed = self.unsummed + loss
        if not self.accelerator.sync_gradients:
            return torch.zeros_like(loss)
        gradients = [parameter.grad for parameter in self._trainable()]
        tail = torch.stack([self.unsummed.float(), torch.tensor(float(self.step_tokens), device=loss.device)])
        buffer = torch.cat([*(gradient.flatten() for gradient in gradients), tail])
        dist.all_reduce(buffer)
        parts = buffer.split([*(gradient.numel() for gradient in gradients), 1, 1])
        for gradient, part in zip(gradients, parts[:-2], strict=True):
            gradient.copy_(part.view_as(gradient))
        self.unsummed, self.step_tokens = 0.0, int(parts[-1].item())
        return parts[-2][0].to(loss.dtype)

    def _trainable(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def validation_loss(self, rows: list[Example], passes: int | None = None) -> tuple[float, int] | None:
        """Every process measures its share of the rows; all get the sums, or None together."""
        own = sorted(rows, key=len, reverse=True)[self.team.rank :: self.team.size]
        size = 2 * self.args.per_device_train_batch_size
        found = super().validation_loss(own, math.ceil(math.ceil(len(rows) / self.team.size) / size))
        if found is None:
            return None
        total, tokens = self.team.total(*found)
        return total, round(tokens)

    def _keep_judgement(self, step: int, loss: float) -> None:
        if self.team.first:
            super()._keep_judgement(step, loss)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The first process writes; each brings the state of its random numbers."""
        self._refuse_drift()
        folder = Path(self.args.output_dir) / ".ranks" / str(self.team.rank)
        if not self.team.first:
            folder.mkdir(parents=True, exist_ok=True)
            super()._save_rng_state(str(folder))
        dist.barrier()
        if self.team.first:
            super()._save_checkpoint(model, trial)
        dist.barrier()

    def _refuse_drift(self) -> None:
        own = sum(float(parameter.detach().double().sum()) for parameter in self._trainable())
        values = torch.tensor([own, -own], dtype=torch.float64, device=_device())
        dist.all_reduce(values, dist.ReduceOp.MAX)
        if values[0].item() != -values[1].item():
            raise RuntimeError("the processes hold different weights: their updates were not the same")

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        for rank in range(1, self.team.size):
            state = Path(self.args.output_dir) / ".ranks" / str(rank) / "rng_state.pth"
            state.rename(Path(output_dir) / f"rng_state_{rank}.pth")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.team.first:
            super()._load_rng_state(checkpoint)
            return
        with tempfile.TemporaryDirectory() as name:
            shutil.copyfile(Path(checkpoint) / f"rng_state_{self.team.rank}.pth", Path(name) / "rng_state.pth")
            super()._load_rng_state(name)
