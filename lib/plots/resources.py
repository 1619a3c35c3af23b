"""What the machine did while a stage ran: processor, GPU and memory over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lib.plots.display import figure, say
from lib.plots.style import use_style

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown

ENOUGH = 3
"""Fewer samples are no curve."""

LONG = 180
"""Seconds from which on the axis counts minutes."""


def resources(samples: Sequence[Mapping[str, float]], summary: Mapping[str, float], cores: int) -> HTML | Markdown:
    """Two panels over time: use of processor and GPU, and memory.

    Args:
        samples: of `lib.run.resources`; summary: medians and maxima of them; cores: of this machine.
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
