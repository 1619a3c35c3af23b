"""Several processes that train one adapter together: each a share of every update's rows, gradients summed once.

Every process holds the whole model; only the adapter has gradients, a few MB. They are summed over the processes once
an update, in one buffer, and every loss term is divided by the loss tokens of the whole update, so the update is that
of one process with the same rows. (torch's DistributedDataParallel would average instead, over processes whose shares
hold different numbers of loss tokens, and wants every pass to go through its own forward method.)
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lib.training.batches import IGNORED, Collate, Example, GroupedOrder
from lib.training.trainer import AnswerTrainer

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
