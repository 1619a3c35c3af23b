"""What watches a training: progress, log, rows of the history as they come, and a clean stop by a signal."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from lib.errors import Terminated, on_signals
from lib.progress import Progress
from lib.stages.finetune import checkpoints
from lib.stages.finetune.trainer import AnswerTrainer, from_every_process

INSISTENCE = 3.0
"""Seconds after a Ctrl-C from which on another one means: at once."""


class Watch(TrainerCallback):
    """Progress, training.log, the epoch of the row order, and a clean stop.

    Args:
        folder: of training.log.
        redraw: called when there are new rows of the history.
        stop_file: who wants the training to stop makes it; None = only a signal stops it.

    Attributes:
        start: the checkpoint that the training goes on from, if any.
    """

    def __init__(
        self,
        trainer: AnswerTrainer,
        folder: Path,
        progress: Progress,
        redraw: Callable[[], None] | None,
        stop_file: Path | None = None,
    ) -> None:
        self.trainer, self.folder, self.progress = trainer, folder, progress
        self.redraw, self.stop_file = redraw, stop_file
        self.writes = trainer.args.should_save  # of several processes the first one
        trainer.stop_is_asked = self.stop_is_asked
        self.start: checkpoints.Checkpoint | None = None
        self.note, self.stopped = "", False

    def write(self, line: str) -> None:
        """Append a line with a time stamp to training.log."""
        if self.writes:
            checkpoints.write_log(self.folder, line)

    def stop(self) -> None:
        """End the training after the current update, with a checkpoint."""
        self.stopped, self.note = True, "stopping after this update, with a checkpoint"

    def stop_is_asked(self) -> bool:
        """Whether some process is asked to stop: the same answer in all of them, so they stop at the same update."""
        wanted = self.stopped or (self.stop_file is not None and self.stop_file.exists())
        self.stopped = bool(from_every_process(wanted).any())
        return self.stopped

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.done = state.global_step
        self.trainer.interval_started = time.monotonic()
        if self.writes:
            (self.folder / checkpoints.LIVE).unlink(missing_ok=True)
        measured = {row["step"] for row in state.log_history if "eval_loss" in row}
        if self.start and self.start.eval_loss is not None and self.start.step not in measured:
            row = {"eval_loss": self.start.eval_loss, "epoch": state.epoch, "step": self.start.step}
            state.log_history.append(row)  # it was measured after this state was saved
        self._show(state.log_history)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        order = self.trainer.order
        order.epoch = state.global_step // math.ceil(len(order) / order.rows_per_update)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_save:
            control.should_log = True  # so that a resumed run continues with a fresh mean of the loss
        if self.stop_is_asked():
            control.should_save = control.should_training_stop = True
        self.progress.advance(note=self.note)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            loss = f"loss {logs['loss']:.4f}"
            self.note = self.note if self.stopped else loss
            speed = f"{logs['tokens_per_second']:.0f} tokens/s"
            self.write(f"step {state.global_step} {loss} lr {logs['learning_rate']:.3e} {speed}")
        if "eval_loss" in logs:
            self.write(f"step {state.global_step} validation loss {logs['eval_loss']:.4f}")
        self._show(state.log_history[-1:])

    def _show(self, rows: list[dict[str, Any]]) -> None:
        """Give new rows of the history to whoever draws them, here or in a parent process."""
        if self.writes:
            with (self.folder / checkpoints.LIVE).open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in rows)
            if self.redraw:
                self.redraw()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.write(f"step {state.global_step} checkpoint saved")


@contextlib.contextmanager
def stop_by_signal(ask: Callable[[], None]) -> Iterator[None]:
    """SIGTERM or Ctrl-C: `ask` for a stop after the current update, with a checkpoint; Ctrl-C again ends it at once.

    A batch system and a report runner may both signal this process: what comes within INSISTENCE seconds of the first
    signal, or after SIGTERM, is the same wish.

    Raises:
        Terminated: it was SIGTERM; uncaught, the process ends with exit code 143.
        KeyboardInterrupt: it was Ctrl-C.
    """
    came: dict[int, float] = {}

    def stop(number: int, frame: Any) -> None:
        if signal.SIGTERM not in came and time.monotonic() - came.get(number, math.inf) > INSISTENCE:
            raise KeyboardInterrupt
        came.setdefault(number, time.monotonic())
        ask()

    try:
        with on_signals(stop, signal.SIGTERM, signal.SIGINT):
            yield
    except torch.OutOfMemoryError:  # whoever asked to stop does not want the next try
        if not came:
            raise
    if signal.SIGTERM in came:
        raise Terminated("stopped by SIGTERM with a checkpoint; run it again to continue")
    if came:
        raise KeyboardInterrupt("stopped with a checkpoint; run it again to continue")
