"""What has to be known to believe a number later: versions, machine, commit."""

from __future__ import annotations

import functools
import platform
import subprocess
from importlib import metadata
from typing import Any

from lib.run.folders import PROJECT

PACKAGES = (
    *("torch", "transformers", "peft", "bitsandbytes", "datasets", "evaluate", "gguf", "llama-cpp-python"),
    *("tokenizers", "safetensors", "scikit-learn", "scipy", "statsmodels", "numpy", "papermill", "nbconvert"),
)


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions of the packages that decide numbers; absent ones are named so."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


@functools.cache
def commit() -> dict[str, Any]:
    """The project's git commit and whether the working tree differs from it."""

    def git(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(
                ["git", "-C", str(PROJECT), *arguments], capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return answer.stdout.strip()

    head = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": head or "unknown", "dirty": bool(changed) if changed is not None else None}
