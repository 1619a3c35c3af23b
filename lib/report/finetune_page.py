"""A loss plot that redraws itself below the running cell in JupyterLab; nothing of it stays in the page.
What the machine did while a stage ran: processor, GPU and memory over time.
What page 02 shows of a FinetuneResult, whether it was trained in this run or adopted.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.progress import shown_live
from lib.report import charts, rows
from lib.report.display import figure, key_values, say, table, use_style
from lib.runs.machine import physical_cores
from lib.stages.finetune.session import LossPlot

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown


# A loss plot that redraws itself below the running cell in JupyterLab; nothing of it stays in the page.

EVERY = 3.0
"""Seconds between two drawings, at least; ten times as long as the drawing took, if that is more."""


class LiveLosses(LossPlot):
    """Redraws the rows of a JSONL file of losses when `update` is called; silent outside of a notebook that is watched.

    Args:
        path: file with rows {"step", "loss"} and {"step", "eval_loss"}, which grows.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.handle, self.size = None, 0
        self.active, self.next = shown_live(), 0.0

    def __exit__(self, *_: object) -> None:
        if self.handle is not None:
            from IPython.display import HTML

            self.handle.update(HTML(""))

    def update(self) -> None:
        """Draw again if there is something new and the last drawing is old enough."""
        if not self.active or time.monotonic() < self.next or not self.path.is_file():
            return
        if (size := self.path.stat().st_size) == self.size:
            return
        import matplotlib.pyplot  # noqa: F401  (seconds, the first time: no part of what a drawing takes)
        from IPython.display import display

        began = time.monotonic()
        self.size = size
        content = losses(read_rows(self.path))
        if content is None:
            return
        if self.handle is None:
            self.handle = display(content, display_id=True)
        else:
            self.handle.update(content)
        took = time.monotonic() - began
        self.next = time.monotonic() + max(EVERY, 10 * took)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that is still being written."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def losses(rows: list[dict[str, Any]]) -> HTML | None:
    """Training and validation loss so far; None while there is nothing to draw."""
    import matplotlib.pyplot as plt

    from lib.report.display import figure, use_style

    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    valid = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    if not train:
        return None
    use_style()
    fig, ax = plt.subplots(figsize=(7.0, 2.6), layout="constrained")
    ax.plot(*zip(*train, strict=True), label="training", linewidth=1.0)
    if valid:
        ax.plot(*zip(*valid, strict=True), label="validation", marker="o", markersize=4)
    ax.set(xlabel="update (optimizer step)", ylabel="loss, nats a loss token", ylim=(0, None))
    ax.legend()
    step, loss = train[-1]
    last = f"; validation {valid[-1][1]:.4f} after update {valid[-1][0]}" if valid else ""
    words = f"Loss so far: training {loss:.4f} at update {step}{last}."
    return figure(fig, words, words)


# What the machine did while a stage ran: processor, GPU and memory over time.

ENOUGH = 3
"""Fewer samples are no curve."""

LONG = 180
"""Seconds from which on the axis counts minutes."""


def resources(samples: Sequence[Mapping[str, float]], summary: Mapping[str, float], cores: int) -> HTML | Markdown:
    """Two panels over time: use of processor and GPU, and memory.

    Args:
        samples: of `lib.runs.resources`; summary: medians and maxima of them; cores: of this machine.
    """
    if len(samples) < ENOUGH:
        return say("The work was over before there were enough samples of the machine for a curve.")
    import matplotlib.pyplot as plt

    use_style()
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.0), layout="constrained")
    unit, size = ("minutes", 60) if samples[-1]["seconds"] > LONG else ("seconds", 1)
    times = [sample["seconds"] / size for sample in samples]
    left.plot(times, [sample["cpu_percent"] / 100 for sample in samples], label="processor, cores")
    right.plot(times, [sample["rss_mib"] for sample in samples], label="resident memory")
    if "gpu_percent_median" in summary:
        busy = [sample.get("gpu_percent", float("nan")) / 100 for sample in samples]
        left.plot(times, busy, label="GPU, share of time")
    if "gpu_mib_max" in summary:
        right.plot(times, [sample.get("gpu_mib", float("nan")) for sample in samples], label="GPU memory")
    left.set(xlabel=unit, ylabel="busy")
    right.set(xlabel=unit, ylabel="MiB (2²⁰ bytes)")
    for ax in (left, right):
        ax.set_ylim(0, 1.2 * ax.dataLim.ymax)
        ax.legend(loc="lower right")
    words = _words(summary, cores)
    caption = (
        f"What the training took of the machine (this process and its children, {len(samples):,} samples). {words}"
    )
    return figure(fig, caption, f"Processor use and memory over {times[-1]:.1f} {unit}. {words}")


def _words(summary: Mapping[str, float], cores: int) -> str:
    parts = [
        f"Median {summary['cpu_percent_median'] / 100:.2f} of {cores} cores busy",
        f"{summary['rss_mib_max']:,.0f} MiB resident at most",
    ]
    if "gpu_percent_median" in summary:
        parts.append(f"GPU busy {summary['gpu_percent_median']:.0f} % of the time (median)")
    if "gpu_mib_max" in summary:
        parts.append(f"{summary['gpu_mib_max']:,.0f} MiB of GPU memory in use at most")
    return "; ".join(parts) + "."


# What page 02 shows of a FinetuneResult, whether it was trained in this run or adopted.


def card(result: Any) -> HTML:
    """What the adapter is and how it came about."""
    if not result.adopted:
        return key_values(rows.training_card(result), "What was trained, and how")
    given = result.adopted
    values = {
        "trained here": "no: the adapter was adopted",
        "adapter": f"{given['id']} ({str(given['revision'])[:23]})",
        "its own base model": given["base"] or "not named",
        "base model of this run": f"{result.base['id']} ({str(result.base['revision'])[:12]})",
        "method": result.method,
        "base in its training": given.get("trained_on", "not known"),
        "changed modules": given["targets"],
        "weights": f"{result.trainable:,} of {result.total:,} ({100 * result.trainable_share:.2f} %), {result.dtype}",
        "checked": "every tensor has its place and shape in the base model; no NaN, no infinity; safetensors",
    }
    return key_values(values, "What was adopted (nothing was trained in this run)")


def memory(result: Any) -> HTML | Markdown:
    """Estimated and measured memory of the training."""
    if result.adopted:
        return say("**Nothing was trained here**, so there is no memory to estimate.")
    caption = "Estimated need by purpose, memory that was free, and the measured peak (MiB = 2²⁰ bytes)."
    return table(rows.memory(result), caption)


def advice(result: Any) -> Markdown:
    """What to change when memory is scarce."""
    if result.adopted:
        return say("To train instead, leave the parameter `adapter` empty.")
    return say("\n".join(f"- {line}" for line in result.advice) or "Memory was not scarce: no advice is needed.")


def curves(result: Any) -> HTML | Markdown:
    """Losses and learning rate over the updates."""
    if result.adopted:
        return say("An adopted adapter brings no history: its losses are not known here.")
    return charts.learning_curves(result.history, result.chosen_step)


def chosen(result: Any) -> Markdown:
    """Which checkpoint is kept, and whether more training would help."""
    if result.adopted:
        return say(f"The adapter is taken as it came: {result.trainable:,} weights, {result.adopted['revision']}.")
    losses = _validation(result)
    best, last = losses[result.chosen_step], max(losses)
    then = (
        f"; training on to update {last} raised it to {losses[last]:.4f}."
        if last != result.chosen_step
        else ", and the last one: more updates might lower it further."
    )
    return say(
        f"The checkpoint after update **{result.chosen_step} of {result.steps}** is kept: its validation loss of "
        f"{best:.4f} nats a loss token is the lowest of {len(losses)}{then}"
    )


def speed(result: Any) -> Markdown:
    """Tokens a second and the time of the whole stage."""
    seconds = result.product.entry.seconds
    if result.adopted:
        return say(f"Checking and copying the adapter took {seconds:.1f} s.")
    return say(
        f"{result.throughput:,.0f} non-padding tokens a second (median); the whole stage, with the base model and "
        f"{len(_validation(result))} validation passes, took {seconds:.0f} s. Details, update by update, are in "
        f"`training.log`."
    )


def resource_use(result: Any) -> HTML | Markdown:
    """Processor, GPU and memory over time."""
    if result.adopted:
        return say("Nothing was trained here, so nothing was measured.")
    return resources(result.samples, result.product.entry.facts.get("resources", {}), physical_cores())


def learned(result: Any) -> Markdown:
    """The conclusions of the page."""
    if result.adopted:
        return say(
            f"- Nothing was trained in this run: {result.adopted['id']} was adopted ({result.method}).\n"
            f"- It fits the base model and holds {100 * result.trainable_share:.2f} % of all weights.\n"
            f"- Its training rows are not known. If it has seen the test rows, the accuracies of this run are too "
            f"high; the leak audit of 01 compares only with this run's own training rows."
        )
    losses = _validation(result)
    first = min(losses)
    return say(
        f"- {100 * result.trainable_share:.2f} % of the weights were trained ({result.method}).\n"
        f"- Validation loss went from {losses[first]:.3f} (update {first}) to {losses[result.chosen_step]:.3f} nats a "
        f"loss token.\n"
        f"- A low loss is not yet a good answer: that is measured next, on rows that were never trained on."
    )


def _validation(result: Any) -> dict[int, float]:
    """Validation loss by update."""
    return {row["step"]: row["eval_loss"] for row in result.history if "eval_loss" in row}
