"""The Trainer of transformers with this project's loss, row order, validation and checkpoints.

Several processes (`processes.train_in_processes`) train one adapter together: each takes its share of every update's
rows, DistributedDataParallel sums the gradients, and every loss term is divided by the loss tokens of the whole
update. So the update is that of one process with the same rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from peft.optimizers import create_loraplus_optimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_callback import PrinterCallback

from lib.errors import refusal
from lib.prompts.conversations import Encoded
from lib.runs.files import data_file, writing
from lib.runs.machine import torch_device
from lib.settings import Settings
from lib.stages.finetune import checkpoints
from lib.stages.finetune.batches import IGNORED, Collate, GroupedOrder, MicroBatches
from lib.stages.finetune.layout import answer_loss, arithmetic
from lib.stages.finetune.lora_init import TakenOut
from lib.stages.finetune.shares import shard

_SCALER: dict[str, Any] = {"init_scale": 2.0**12, "growth_interval": 100}
"""The loss scale of float16 begins below torch's (2¹⁶, 2000), so that a short training loses no updates to finding it;
it halves when a gradient overflows, and doubles after so many updates without."""

LEAST_SCALE = 2.0**-4
"""Below it no gradient can have been too large: the model itself overflows."""

_ALWAYS = data_file("stages/finetune/training_arguments.yaml")
"""Arguments that do not depend on settings."""


def from_every_process(*values: float) -> torch.Tensor:
    """The values of all processes, float64 (processes, values)."""
    state = PartialState()
    device = state.device if state.use_distributed else "cpu"
    return gather(torch.tensor([values], dtype=torch.float64, device=device)).cpu()


class AnswerTrainer(Trainer):
    """Trains on the answer tokens of `train` and measures the same loss on `validation`.

    Args:
        model: a PeftModel, or a model whose weights are all trained.
        arguments: from `training_arguments`.
        train, validation: encoded rows.
        collate: makes a batch of rows, padded or packed (`lib.stages.finetune.layout`).
        loraplus_lr_ratio: how many times as fast B learns as A (LoRA+); 0 = they learn alike.
        sharded: each process keeps its share of the frozen layers alone (`shares.shard`).
    """

    def __init__(
        self,
        model: Any,
        arguments: TrainingArguments,
        train: list[Encoded],
        validation: list[Encoded],
        collate: Collate,
        loraplus_lr_ratio: float = 0.0,
        sharded: bool = False,
    ) -> None:
        passes = arguments.gradient_accumulation_steps * arguments.world_size
        rows_per_update = arguments.per_device_train_batch_size * passes
        self.order = GroupedOrder([len(example) for example in train], rows_per_update, arguments.seed)
        self.validation, self.collate, self.loraplus_lr_ratio = validation, collate, loraplus_lr_ratio
        self.interval_tokens, self.interval_started, self.eval_seconds = 0, time.monotonic(), 0.0
        self.stop_is_asked: Callable[[], bool] = bool
        self.taken_out, self.sharded = TakenOut.of(model), sharded
        if sharded:
            shard(model, arguments.device, arguments.world_size)
        super().__init__(
            model=model, args=arguments, train_dataset=train, eval_dataset=validation, data_collator=collate
        )
        self.remove_callback(PrinterCallback)  # it prints to stdout
        self.skipped = 0
        if arithmetic(self.model) == torch.float16:
            self.accelerator.scaler = torch.amp.GradScaler(arguments.device.type, **_SCALER)
        if arguments.world_size > 1:
            torch.manual_seed(arguments.seed + arguments.process_index)  # dropout of its own in every process

    def get_train_dataloader(self) -> DataLoader:
        """This process's micro-batches; accelerate, left to share them out, would repeat rows in a short update."""
        arguments = self.args
        own = MicroBatches(
            self.order, arguments.per_device_train_batch_size, arguments.process_index, arguments.world_size
        )
        pinned = arguments.dataloader_pin_memory  # such memory is copied to a GPU directly
        return DataLoader(self.train_dataset, batch_sampler=own, collate_fn=self._collate_share, pin_memory=pinned)

    def _collate_share(self, share: list[Encoded]) -> dict[str, torch.Tensor]:
        """A batch; of a share without rows one that stands for none, so that its process takes part in the sums.

        Where the layers are shared out, it takes part in their forward pass too, at no loss position.
        """
        if share:
            return self.collate(share)
        if self.sharded:
            idle = self.collate(self.validation[:1])
            return {**idle, "labels": torch.full_like(idle["labels"], IGNORED), "row_tokens": torch.tensor(0)}
        return {"labels": torch.zeros((1, 0), dtype=torch.int64), "row_tokens": torch.tensor(0)}

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if not self.sharded:  # else every part is where it belongs
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: Any, *arguments: Any, **options: Any) -> Any:
        """Where the layers are shared out, DistributedDataParallel for the adapter alone; accelerate refuses that."""
        if self.sharded and model is self.model:
            return DistributedDataParallel(model, broadcast_buffers=False)
        return super()._wrap_model(model, *arguments, **options)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """That of transformers, or peft's of LoRA+ (Hayou et al. 2024, arXiv 2402.12354)."""
        if self.optimizer is None and self.loraplus_lr_ratio:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            options |= {"loraplus_lr_ratio": self.loraplus_lr_ratio, "loraplus_weight_decay": self.args.weight_decay}
            self.optimizer = create_loraplus_optimizer(self.model, kind, **options)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The schedule of transformers but for its first step, whose rate is 0 (`rates`)."""
        if self.lr_scheduler is None:
            warm = self.args.get_warmup_steps(num_training_steps)
            shape = rates(self.args.lr_scheduler_type, warm, num_training_steps)
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, shape)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of one forward pass divided by the loss tokens of the whole update, so accumulation changes nothing."""
        total, count = self._forward(model, inputs)
        self.interval_tokens += int(inputs["row_tokens"])
        loss = total / (count if num_items_in_batch is None else num_items_in_batch)
        if self.args.world_size > 1:
            loss = loss * self.args.world_size  # gradients and logged losses are means over the processes
        return (loss, None) if return_outputs else loss

    def _forward(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, int]:
        """Summed loss and loss tokens of a batch; of several processes through DistributedDataParallel's forward.

        Only a pass that goes through it has its gradients summed, and it calls the forward of the module inside.
        """
        if model is self.model:
            return answer_loss(model, inputs)

        def own_loss() -> tuple[torch.Tensor, int]:
            if inputs["row_tokens"] or self.sharded:
                return answer_loss(self.model, inputs)
            return sum((0.0 * weights.sum() for weights in self._trained()), torch.zeros((), device=model.device)), 0

        original, self.model.forward = self.model.forward, own_loss
        try:
            return model()
        finally:
            self.model.forward = original

    def _clip_grad_norm(self, model: Any) -> Any:
        """In float16 the gradients are turned back first; an update in which one overflowed is then skipped.

        Raises:
            InputError: no scale makes them fit: it is the model itself that overflows.
        """
        scaler = self.accelerator.scaler
        if scaler is not None:
            if scaler.get_scale() < LEAST_SCALE:
                raise refusal("finetune/float16-overflows")
            scaler.unscale_(self.optimizer.optimizer)
        norm = super()._clip_grad_norm(model)
        self.skipped += int(scaler is not None and not torch.isfinite(torch.as_tensor(norm)))
        return norm

    def _trained(self) -> list[torch.nn.Parameter]:
        return [weights for weights in self.model.parameters() if weights.requires_grad]

    def _maybe_log_save_evaluate(self, *arguments: Any, **options: Any) -> None:
        """As transformers does it, but the checkpoint first: a batch system does not wait for a validation."""
        due, self.control.should_evaluate = self.control.should_evaluate, False
        super()._maybe_log_save_evaluate(*arguments, **options)
        if due:
            self.evaluate()

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean cross-entropy (nats) over the answer tokens of the validation rows, as "eval_loss".

        It is added to the record of this update's checkpoint. When a stop is asked for meanwhile, there is none, and
        the training ends; `evaluate_checkpoint` makes up for it.
        """
        started = time.monotonic()
        loss = self._validation_loss()
        if loss is None:
            self.control.should_training_stop = True
            return {}
        metrics = {"eval_loss": loss}
        self._record_loss(self.state.global_step, loss)
        self.eval_seconds += time.monotonic() - started
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.stop_is_asked():
            self.control.should_training_stop = True
        return metrics

    def evaluate_checkpoint(self, checkpoint: checkpoints.Checkpoint) -> checkpoints.Checkpoint:
        """The checkpoint with the validation loss that its own training did not come to; unchanged on a stop."""
        self._load_from_checkpoint(str(checkpoint.path))
        loss = self._validation_loss()
        if loss is None:
            return checkpoint
        self._record_loss(checkpoint.step, loss)
        return replace(checkpoint, eval_loss=loss)

    def _record_loss(self, step: int, loss: float) -> None:
        if self.args.should_save:
            folder = Path(self.args.output_dir)
            checkpoints.add_loss(folder / f"checkpoint-{step}", loss)
            checkpoints.prune(folder)

    def _validation_loss(self) -> float | None:
        """Mean cross-entropy (nats) over the answer tokens of the validation rows; None when asked to stop.

        Every process measures its share, and all make as many passes, before each of which they agree to go on.
        """
        self.model.eval()
        size, processes = 2 * self.args.per_device_train_batch_size, self.args.world_size
        rows = sorted(self.validation, key=len, reverse=True)
        own = rows[self.args.process_index :: processes]
        total, tokens, stopped = 0.0, 0, False
        with torch.no_grad():
            for start in range(0, math.ceil(len(rows) / processes), size):
                if stopped := self.stop_is_asked():
                    break
                part = own[start : start + size]
                if part or self.sharded:  # the others wait for its shares of the layers
                    batch = self.collate(part or rows[:1])
                    batch = {key: value.to(self.args.device) for key, value in batch.items()}
                    loss, count = answer_loss(self.model, batch)
                    total, tokens = (total + loss.item(), tokens + count) if part else (total, tokens)
        self.model.train()
        if stopped:
            return None
        total, tokens = from_every_process(total, tokens).sum(0).tolist()
        return total / tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Keep a row of the history, with the throughput since the last one."""
        if self.accelerator.scaler is not None and not math.isfinite(logs.get("grad_norm", 0.0)):
            del logs["grad_norm"]  # of an update that was skipped
        if "loss" in logs:
            seconds = time.monotonic() - self.interval_started - self.eval_seconds
            tokens = from_every_process(self.interval_tokens).sum().item()
            logs["tokens_per_second"] = round(tokens / max(seconds, 1e-9), 1)
            self.interval_tokens, self.interval_started, self.eval_seconds = 0, time.monotonic(), 0.0
        super().log(logs, None)

    def goes_on_from(self, checkpoint: Path) -> bool:
        """Whether this training, begun anew, would be the one that a checkpoint is of."""
        return self.taken_out is None or self.taken_out.same(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.taken_out is not None:
            self.taken_out.load(Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(self.args.output_dir) / checkpoints.STAGED)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As transformers writes it, but staged, sealed with a record and renamed.

        Raises:
            InputError: the disk is full.
            RuntimeError: the processes hold different weights.
        """
        started = time.monotonic()
        if self.args.world_size > 1:
            sums = from_every_process(sum(float(weights.detach().double().sum()) for weights in self._trained()))
            if (sums != sums[0]).any():
                raise RuntimeError("the processes hold different weights: their updates were not the same")
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        with writing(folder):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process has written the state of its random numbers
            if self.args.should_save:
                staged = folder / checkpoints.STAGED / name
                if self.taken_out is not None:
                    self.taken_out.store(staged)
                for unneeded in ("training_args.bin", "README.md"):  # a pickle that resuming does not need; empty card
                    (staged / unneeded).unlink(missing_ok=True)
                checkpoints.publish(staged, folder / name, self.state.global_step)
                checkpoints.prune(folder)
        self.accelerator.wait_for_everyone()
        self.eval_seconds += time.monotonic() - started


def rates(name: str, warm: int, total: int) -> Callable[[int], float]:
    """From the updates done to the share of the learning rate that the next one has.

    It is transformers' schedule of one more step before the peak and in all, without its first step: that has the rate
    0, and here every update, also the only one of a short training, changes the weights.

    Args:
        name: as transformers calls the schedule. warm: updates before the peak. total: updates in all.
    """
    nobodys = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    (shape,) = get_scheduler(name, nobodys, warm + 1, total + 1).lr_lambdas
    return lambda done: shape(done + 1)


def warm_up(steps: int, settings: Settings) -> int:
    """Updates before the peak, of `steps`: a share below 1 is rounded, to one update at least."""
    asked = settings.warmup_steps
    return int(asked) if asked >= 1 or not asked else max(1, round(asked * steps))


class _Arguments(TrainingArguments):
    @property
    def device(self) -> torch.device:
        """As transformers finds it, without accelerate's cpu:0 of several processes, which torch.load does not know."""
        found = super().device
        return torch.device("cpu") if found.type == "cpu" else found


def training_arguments(folder: Path, steps: int, settings: Settings) -> TrainingArguments:
    """Arguments of the Trainer: AdamW, the schedule of `rates`, and what the settings say.

    Args:
        folder: of the checkpoints.
        steps: updates in all.
    """
    arguments = _Arguments(
        output_dir=str(folder),
        warmup_steps=warm_up(steps, settings),
        logging_steps=max(1, steps // 100),
        eval_steps=settings.save_steps,
        use_cpu=torch_device() == "cpu",
        dataloader_pin_memory=torch_device() == "cuda",
        seed=settings.training_seed,
        **settings.pick(
            *("learning_rate", "lr_scheduler_type", "num_train_epochs", "per_device_train_batch_size", "save_steps"),
            *("gradient_accumulation_steps", "gradient_checkpointing", "weight_decay"),
        ),
        report_to=settings.report_to,
        run_name=settings.run_name,
        project="quantization-workbook",  # of trackio
        neftune_noise_alpha=settings.neftune_noise_alpha or None,
        max_grad_norm=settings.max_grad_norm or math.inf,  # with 0 transformers passes `_clip_grad_norm` by
        **_ALWAYS,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one device: DataParallel would split the small batches
    return arguments
