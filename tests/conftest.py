"""Shared fixtures: the real data beside the project, a home of its own for every test that makes runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data (WORKBOOK_SHARED, or ../shared beside the project); skips when absent."""
    folder = Path(os.environ.get("WORKBOOK_SHARED", PROJECT.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the project (set WORKBOOK_SHARED)")
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for runs/ and reports/."""
    monkeypatch.setenv("WORKBOOK_HOME", str(tmp_path))
    return tmp_path
