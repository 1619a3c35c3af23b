"""Comparison: the reference and every quantized file on the same rows with the same scorer, and what may be said of it.

- `compare` is the stage (product `comparison`), `compare_files` the same for files named by hand.

Each file runs in a process of its own, so that memory is its own and a crash of native code names the file.
"""

from __future__ import annotations

from typing import Any

__all__ = ["ComparisonResult", "compare", "compare_files"]


def __getattr__(name: str) -> Any:
    """The public names, imported when used: the child processes import this package and must start fast."""
    if name == "compare_files":
        from lib.comparison.files import compare_files

        return compare_files
    if name in ("ComparisonResult", "compare"):
        from lib.comparison import stage

        return getattr(stage, name)
    raise AttributeError(name)
