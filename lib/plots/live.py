"""A loss plot that redraws itself below the running cell in JupyterLab; nothing of it stays in the page."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.progress import shown_live
from lib.training.drawing import Drawing

if TYPE_CHECKING:
    from IPython.display import HTML

EVERY = 3.0
"""Seconds between two drawings, at least; ten times as long as the drawing took, if that is more."""


class LiveLosses(Drawing):
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

    from lib.plots.display import figure
    from lib.plots.style import use_style

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
