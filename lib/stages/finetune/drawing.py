"""Who draws the losses while a training runs: a page may, this package does not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path


class Drawing(contextlib.AbstractContextManager):
    """Draws nothing; what does draw overrides `update`."""

    def __init__(self, losses: Path) -> None:
        self.path = losses

    def __exit__(self, *_: object) -> None:
        pass

    def update(self) -> None:
        """Rows have been added to the file."""


Draw = Callable[[Path], Drawing]
"""From the file of losses (JSON lines, growing) to what draws it."""
