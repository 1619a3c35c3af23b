"""Page 02: the losses while a training runs, and what is shown of it, whether it was trained in this run or adopted."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from lib.models.loading import load_tokenizer
from lib.progress import show_live, shown_live
from lib.prompts.tasks import read_task
from lib.report import charts, display
from lib.report.display import absent, figure, table, tell
from lib.report.index import pretraining
from lib.report.sentences import sentence, word_rows
from lib.runs.files import read_jsonl
from lib.runs.machine import physical_cores, whole_lines

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown

    from lib.stages.finetune.stage import FinetuneResult

EVERY = 3.0
"""Seconds between two drawings, at least; ten times as long as the drawing took, if that is more."""

ENOUGH = 3
"""Fewer samples of the machine are no curve."""

LONG = 180
"""Seconds from which on the axis counts minutes."""


class LiveLosses(contextlib.AbstractContextManager):
    """Redraws the rows of a JSONL file of losses below the running cell when `update` is called.

    Silent outside of a notebook that is watched; nothing of it stays in the page.

    Args:
        path: file with rows {"step", "loss"} and {"step", "eval_loss"}, which grows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle, self.size = None, 0
        self.active, self.next = shown_live(), 0.0

    def __exit__(self, *_: object) -> None:
        if self.handle is not None:
            show_live("", self.handle)

    def update(self) -> None:
        """Draw again if there is something new and the last drawing is old enough."""
        if not self.active or time.monotonic() < self.next or not self.path.is_file():
            return
        if (size := self.path.stat().st_size) == self.size:
            return
        import matplotlib.pyplot  # noqa: F401  (seconds, the first time: no part of what a drawing takes)

        began = time.monotonic()
        self.size = size
        content = losses(whole_lines(self.path))
        if content is None:
            return
        self.handle = show_live(content, self.handle)
        took = time.monotonic() - began
        self.next = time.monotonic() + max(EVERY, 10 * took)


def losses(rows: list[dict[str, Any]]) -> HTML | None:
    """Training and validation loss so far; None while there is nothing to draw."""
    train, valid = charts.series(rows, "loss"), charts.series(rows, "eval_loss")
    if not train:
        return None
    fig, ax = charts.panels(height=2.6)
    charts.plot_losses(ax, train, valid)
    step, loss = train[-1]
    words = sentence("finetune.live", loss=loss, step=step, valid=valid[-1] if valid else None)
    return figure(fig, words, words)


def resources(samples: Sequence[Mapping[str, float]], summary: Mapping[str, float], cores: int) -> HTML | Markdown:
    """Two panels over time: use of processor and GPU, and memory.

    Args:
        samples: of `lib.runs.machine`; summary: medians and maxima of them; cores: of this machine.
    """
    if len(samples) < ENOUGH:
        return tell("finetune.few_samples")
    fig, (upper, lower) = charts.panels(height=4.2, rows=2)
    unit, size = ("minutes", 60) if samples[-1]["seconds"] > LONG else ("seconds", 1)
    times = [sample["seconds"] / size for sample in samples]
    upper.plot(times, [sample["cpu_percent"] / 100 for sample in samples], label="processor, cores")
    lower.plot(times, [sample["rss_mib"] for sample in samples], label="resident memory")
    if "gpu_percent_median" in summary:
        busy = [sample.get("gpu_percent", float("nan")) / 100 for sample in samples]
        upper.plot(times, busy, label="GPU, share of time")
    if "gpu_mib_max" in summary:
        lower.plot(times, [sample.get("gpu_mib", float("nan")) for sample in samples], label="GPU memory")
    upper.set(ylabel="busy")
    lower.set(xlabel=unit, ylabel="MiB (2²⁰ bytes)")
    for ax in (upper, lower):
        ax.set_ylim(0, 1.2 * ax.dataLim.ymax)
        ax.legend(loc="lower right")
    use = {"use": summary, "cores": cores}
    caption = sentence("finetune.machine_caption", samples=len(samples), **use)
    return figure(fig, caption, sentence("finetune.machine_alt", duration=times[-1], unit=unit, **use))


def card(result: FinetuneResult) -> HTML:
    """What the adapter is and how it came about; or that there is none."""
    if result.untrained:
        return display.card("finetune.untrained_card", result=result)
    if result.adopted:
        return display.card("finetune.adopted_card", result=result, given={"trained_on": "", **result.adopted})
    entry = result.product.entry
    processes = entry.parameters["num_processes"]
    return display.card("finetune.trained_card", result=result, device=entry.device, processes=processes)


def _of_a_training(show: Callable[[FinetuneResult], Any]) -> Callable[[FinetuneResult], Any]:
    """What needs an adapter. A report leaves out cells that have none to show; this is for notebooks run by hand."""

    @functools.wraps(show)
    def shown(result: FinetuneResult) -> Any:
        return tell("finetune.untrained") if result.untrained else show(result)

    return shown


@_of_a_training
def memory(result: FinetuneResult) -> HTML | Markdown:
    """Estimated and measured memory of the training."""
    if result.adopted:
        return absent("finetune.no_memory")
    return table(memory_rows(result), sentence("finetune.memory_caption"))


def memory_rows(result: FinetuneResult) -> list[dict[str, Any]]:
    """Memory by purpose as it was estimated, what was free, what was measured."""
    processes = result.product.entry.parameters.get("num_processes", 1)
    rows = word_rows("finetune.memory_rows", result=result, processes=processes)
    return [{"part": part, "mib": float(size)} for part, size in rows]


@_of_a_training
def advice(result: FinetuneResult) -> Markdown:
    """What to change when memory is scarce."""
    return tell("finetune.advice", lines=result.advice, adopted=bool(result.adopted))


@_of_a_training
def curves(result: FinetuneResult) -> HTML | Markdown:
    """Losses and learning rate over the updates."""
    if result.adopted:
        return absent("finetune.no_history")
    return charts.learning_curves(result.history, result.chosen_step, _guessing(result.product.path.parent / "data"))


def _guessing(data: Path) -> float | None:
    """The loss, nats a loss token, of whoever gives every label the same probability and knows how an answer ends: ln K
    over the tokens of an answer (the mean over some validation rows); None without labels."""
    task = read_task(data)
    if not task.label_names:
        return None
    tokenizer, rows = load_tokenizer(data / "tokenizer"), read_jsonl(data / "validation.jsonl")[:_ROWS]
    return math.log(len(task.label_names)) / mean(len(task.encode(tokenizer, row).loss) for row in rows)


_ROWS = 50


@_of_a_training
def chosen(result: FinetuneResult) -> Markdown:
    """Which checkpoint is kept, and whether more training would help."""
    return tell("finetune.chosen", result=result, losses=_validation(result))


@_of_a_training
def speed(result: FinetuneResult) -> Markdown:
    """Tokens a second and the time of the whole stage."""
    base = pretraining(result.product.entry)
    return tell("finetune.speed", result=result, losses=_validation(result), base_seconds=base)


@_of_a_training
def resource_use(result: FinetuneResult) -> HTML | Markdown:
    """Processor, GPU and memory over time."""
    if result.adopted:
        return tell("finetune.not_measured")
    return resources(result.samples, result.product.entry.facts.get("resources", {}), physical_cores())


def learned(result: FinetuneResult) -> Markdown:
    """The conclusions of the page."""
    return tell("finetune.learned", result=result, losses=_validation(result))


def _validation(result: FinetuneResult) -> dict[int, float]:
    """Validation loss by update."""
    return {row["step"]: row["eval_loss"] for row in result.history if "eval_loss" in row}
