"""A command whose WORKBOOK_HOME is a small file system of its own, which is gone when the command ends."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
MOUNT = 'mount -t tmpfs -o "size=$1m" tmpfs "$2" && shift 2 && exec "$@"'


def on_a_small_disk(
    folder: Path, mib: int, command: Sequence[str], timeout: float = 120
) -> subprocess.CompletedProcess:
    """Run `command` with a disk of `mib` MiB mounted on `folder`; skips where users may not mount anything."""
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNT, "sh", str(mib), str(folder)]
    try:
        subprocess.run([*inside, "true"], capture_output=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("no mounts in a user namespace here")
    environment = {**os.environ, "WORKBOOK_HOME": str(folder), "PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*inside, *command], cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=timeout
    )
