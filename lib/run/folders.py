"""Where a run lives: the project root, runs/<run>/, reports/<run>/."""

from __future__ import annotations

import os
from pathlib import Path

from lib.errors import InputError

HOME_VARIABLE = "WORKBOOK_HOME"
"""Environment variable: the folder that holds runs/ and reports/ (default: the project's root)."""

PROJECT = Path(__file__).resolve().parents[2]


def home() -> Path:
    """The folder that holds runs/ and reports/; never the current directory."""
    return Path(os.environ.get(HOME_VARIABLE) or PROJECT).expanduser().resolve()


def runs_folder() -> Path:
    """The folder of all runs."""
    return home() / "runs"


def reports_folder() -> Path:
    """The folder of all reports."""
    return home() / "reports"


def user_path(text: str) -> Path:
    """A path the user wrote: absolute, or found from the current directory, or from the project's root."""
    path = Path(text).expanduser()
    if path.is_absolute() or path.exists():
        return path.resolve()
    return (PROJECT / path).resolve()


def writable(folder: Path) -> Path:
    """Create `folder` and prove that it can be written, or say why not."""
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}).",
            "a folder this user may write to.",
            f"correct its permissions, or set {HOME_VARIABLE}.",
        ) from None
    return folder
