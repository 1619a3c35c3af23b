"""What watches a training: progress, training.log, throughput, and the tidy stop that a signal asks for."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from lib.errors import Terminated
from lib.progress import Progress
from lib.stages.finetune.checkpoints import Checkpoint
from lib.stages.finetune.drawing import Drawing
from lib.stages.finetune.trainer import AnswerTrainer

WARM_STEPS = 5
"""Updates not counted for the throughput (first allocations and caches)."""

LIVE = "losses.jsonl.live"
"""Beside training.log while a training runs: the rows of the history so far."""

INSISTENCE = 3.0
"""Seconds after a Ctrl-C from which on another one means: at once."""


class Watch(TrainerCallback):
    """Progress, training.log, throughput, the epoch of the row order, and a clean stop at SIGTERM.

    Args:
        log_file: training.log; None = none.
        drawing: draws the losses while it runs.
        agree: whether to stop, from whether this process was asked to (of a team: whether any was).

    Attributes:
        start: the checkpoint that the training goes on from, if any.
    """

    def __init__(
        self,
        trainer: AnswerTrainer,
        log_file: Path | None,
        progress: Progress,
        drawing: Drawing,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self.trainer, self.log_file, self.progress = trainer, log_file, progress
        self.drawing, self.agree = drawing, agree
        trainer.interrupted = self.asked
        self.start: Checkpoint | None = None
        self.rates: list[float] = []
        self.note, self.stopped, self.started = "", False, 0.0

    def write(self, line: str) -> None:
        """Append a line with a time stamp to training.log."""
        if self.log_file is None:
            return
        stamp = time.strftime("%Y-%m-%d %H:%M:%S%z")
        with self.log_file.open("a", encoding="utf-8") as stream:
            stream.write(f"{stamp} {line}\n")

    def stop(self) -> None:
        """End the training after the current update, with a checkpoint."""
        self.stopped, self.note = True, "stopping after this update, with a checkpoint"

    def asked(self) -> bool:
        """Whether to stop now; of a team all get the same answer."""
        self.stopped = self.agree(self.stopped)
        return self.stopped

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.done = state.global_step
        self.trainer.interval_started = time.monotonic()
        if self.log_file is not None:
            self.log_file.with_name(LIVE).unlink(missing_ok=True)
        if self.start and self.start.eval_loss is not None and not _judged(state.log_history, self.start.step):
            judgement = {"eval_loss": self.start.eval_loss, "epoch": state.epoch, "step": self.start.step}
            state.log_history.append(judgement)  # it was measured after this state was saved
        self._show(state.log_history)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        updates = -(-len(self.trainer.order) // self.trainer.order.rows_per_update)
        self.trainer.order.epoch = state.global_step // updates

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started, self.trainer.step_tokens = time.monotonic(), 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.rates.append(self.trainer.step_tokens / max(time.monotonic() - self.started, 1e-9))
        self.trainer.interval_tokens += self.trainer.step_tokens
        if control.should_save:
            control.should_log = True  # so that a resumed run continues with a fresh mean of the loss
        if self.asked():
            control.should_save = control.should_training_stop = True
        self.progress.advance(note=self.note)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            loss = f"loss {logs['loss']:.4f}"
            self.note = self.note if self.stopped else loss
            rate = f"{logs['tokens_per_second']:.0f} tokens/s"
            self.write(f"step {state.global_step} {loss} lr {logs['learning_rate']:.3e} {rate}")
        if "eval_loss" in logs:
            self.write(f"step {state.global_step} validation loss {logs['eval_loss']:.4f}")

        self._show(state.log_history[-1:])

    def _show(self, rows: list[dict[str, Any]]) -> None:
        """Give new rows of the history to whoever draws them, here or in a parent process."""
        if self.log_file is not None:
            with self.log_file.with_name(LIVE).open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in rows)
            self.drawing.update()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.write(f"step {state.global_step} checkpoint saved")

    @property
    def throughput(self) -> float:
        """Median non-padding tokens a second over the updates after the first few."""
        rates = self.rates[WARM_STEPS:] or self.rates
        return statistics.median(rates) if rates else 0.0


def _judged(history: list[dict[str, Any]], step: int) -> bool:
    return any("eval_loss" in row and row["step"] == step for row in history)


@contextlib.contextmanager
def stop_by_signal(ask: Callable[[], None]) -> Iterator[None]:
    """SIGTERM or Ctrl-C: `ask` for a stop after the current update, with a checkpoint; Ctrl-C again ends it at once.

    A batch system and a report runner may both signal this process: what comes within INSISTENCE seconds of the first
    signal, or after SIGTERM, is the same wish.

    Raises:
        Terminated: it was SIGTERM; uncaught, the process ends with exit code 143.
        KeyboardInterrupt: it was Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: dict[int, float] = {}

    def stop(number: int, frame: Any) -> None:
        if signal.SIGTERM not in came and time.monotonic() - came.get(number, math.inf) > INSISTENCE:
            raise KeyboardInterrupt
        came.setdefault(number, time.monotonic())
        ask()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except torch.OutOfMemoryError:  # whoever asked to stop does not want the next try
        if not came:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGTERM in came:
        raise Terminated("stopped by SIGTERM with a checkpoint; run it again to continue")
    if came:
        raise KeyboardInterrupt("stopped with a checkpoint; run it again to continue")
