"""Shared fixtures: the real data beside the project, a home of its own for every test that makes runs."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

import lib  # noqa: F401 - before libraries that it makes quick
from lib import language, progress
from tests.support import forking

PROJECT = Path(__file__).resolve().parents[1]

# CI and every machine draw the same examples: a red test is of the change. New ones: --hypothesis-profile=default
settings.load_profile("ci")

os.environ[language.VARIABLE] = language.ENGLISH  # the tests read English sentences, whatever the locale
# A shell that runs the tests in the background ignores Ctrl-C for them and for all their children.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # of `make test`: an inner make would talk about its folder
    os.environ.pop(_name, None)


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The whole report first: it takes minutes, and the other worker has all other files for them.

    Then the whole runs beside it, so that no long file is begun at the end, when the other worker has none left.
    """
    items.sort(key=lambda item: (item.get_closest_marker("report") is None, len(item.path.parts)))


def pytest_runtest_setup() -> None:
    """What was there before a test is no garbage of it, and no line of progress of it.

    A collection, which stages ask for often, would walk through all of torch and transformers: a third of a second.
    A line of another test, a moment ago, would keep the first one of this test back.
    """
    progress._told.clear()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def unmeasured_children() -> Iterator[None]:
    """Child processes of a module's tests run without coverage, which makes them a third slower.

    For long runs of code whose lines other tests measure.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        yield


@pytest.fixture(scope="session")
def fork_server() -> Iterator[None]:
    """Imports torch and transformers once for the children of many tests, where it can."""
    with forking.started() if forking.possible() else contextlib.nullcontext():
        yield


@pytest.fixture(scope="module")
def forked_children(fork_server: None) -> Iterator[None]:
    """Children of a module's tests are forked from a process that has the libraries (`tests.support.forking`)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", forking.Popen)
        yield
