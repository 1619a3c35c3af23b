"""Reports that are killed at several moments, run side by side, or meet a jumping clock or a full disk."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from lib.report import html, index, runner
from lib.report.runner import run_report
from lib.runs.files import read_json
from tests.report.test_runner import STAGE
from tests.support.pages import broken_links, problems
from tests.support.small_disk import on_a_small_disk

pytestmark = pytest.mark.usefixtures("unmeasured_children", "forked_children")

JUMPING = """
import itertools, random, time
_clock, _jump = time.time, random.Random(1)
time.time = lambda: _clock() + _jump.choice([-86400.0, 0.0, 86400.0])
"""
REPORT = """
import sys
from pathlib import Path
from lib.cli.console import guarded
from lib.report.runner import run_report
guarded(lambda: run_report(sys.argv[1], {"run_name": sys.argv[2]}, notebooks=Path(sys.argv[3])))()
"""


KILLED = """
import importlib, itertools, os, signal, sys
from pathlib import Path
from lib.report.runner import run_report
module, name, after, params, notebooks = sys.argv[1:]
owner, calls = importlib.import_module(module), itertools.count()
original = getattr(owner, name)
def deadly(*given, **named):
    if next(calls) >= int(after):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*given, **named)
setattr(owner, name, deadly)
run_report(Path(params), {"run_name": "cut"}, notebooks=Path(notebooks), say=lambda _: None)
"""


def killed(module: ModuleType, name: str, after: int, params: Path, notebooks: Path) -> None:
    """A report in a process of its own that SIGKILL ends when it calls that function once more than `after` times."""
    command = [sys.executable, "-c", KILLED, module.__name__, name, str(after), str(params), str(notebooks)]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def shown(folder: Path) -> dict[str, str]:
    """Every page without times and the folder's own name."""
    texts = {page.name: page.read_text(encoding="utf-8") for page in sorted(folder.glob("*.html"))}
    varying = r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d\S*)?|\d+(\.\d+)? ?(s|MiB)\b|<td[^>]*>[\d.,]+</td>"
    return {name: re.sub(varying, "–", text) for name, text in texts.items()}


def test_a_report_killed_at_any_moment_ends_as_if_it_had_not_been(
    home: Path, params: Path, write_notebook: Callable[..., Path]
) -> None:
    for name in ("01_first", "02_second"):
        write_notebook(name, STAGE)
    arguments = {"params_file": params, "notebooks": home / "notebooks"}
    undisturbed = run_report(say=lambda _: None, **arguments, overrides={"run_name": "whole"})
    moments = [
        (runner, "_stage", 0),  # before the first notebook
        (html, "render", 0),  # its product is there, no page yet
        (runner, "remember_page", 0),  # the page is there, its record is not
        (runner, "_stage", 0),  # between two notebooks
        (index, "write_run_index", 1),  # at the very end
        (index, "_summary", 0),  # while the list of all reports is locked
    ]
    for module, name, after in moments:
        killed(module, name, after, params, home / "notebooks")
        assert not [page for page in (home / "reports" / "cut").glob("0*.html") if problems(page)]
    result = run_report(say=lambda _: None, **arguments, overrides={"run_name": "cut"})
    expected = {name: text.replace("whole", "cut") for name, text in shown(undisturbed.folder).items()}
    assert shown(result.folder).keys() == expected.keys() and not broken_links(home / "reports")
    for name, text in shown(result.folder).items():
        assert name == "index.html" or text == expected[name] or "nothing to do" in text, name
    one, other = (read_json(home / "runs" / name / "manifest.json")["products"]["data"] for name in ("whole", "cut"))
    assert one["outputs"] == other["outputs"] and other["metrics"] == one["metrics"]
    assert not list((home / "reports").rglob(".work-*")) and not list((home / "reports").rglob("*.part"))


def test_two_reports_at_once_and_a_clock_that_jumps(
    home: Path, params: Path, write_notebook: Callable[..., Path]
) -> None:
    """Two names, one home; in one of them the clock jumps by days in every process."""
    write_notebook("01_first", STAGE)
    (home / "clock").mkdir()
    (home / "clock" / "sitecustomize.py").write_text(JUMPING, encoding="utf-8")
    paths = os.pathsep.join([str(home / "clock"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", REPORT, str(params)]
    both = [
        subprocess.Popen([*command, name, str(home / "notebooks")], env=environment, stderr=subprocess.PIPE, text=True)
        for name, environment in (("one", {**os.environ}), ("two", {**os.environ, "PYTHONPATH": paths}))
    ]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    overview = (home / "reports" / "index.html").read_text(encoding="utf-8")
    for name in ("one", "two"):
        assert not problems(home / "reports" / name / "01_first.html") and f'href="{name}/index.html"' in overview
    assert "incomplete" not in overview and not broken_links(home / "reports")


FULL_WHILE = """
from pathlib import Path
with open({filler!r}, "wb", buffering=0) as stream:
    for size in (1 << 16, 1 << 8, 1):
        try:
            while True: stream.write(bytes(size))
        except OSError: pass
{then}
"""
TWICE = """
import os, sys
from pathlib import Path
from lib.report.runner import ReportError, run_report
home = Path(os.environ["WORKBOOK_HOME"])
try:
    run_report(sys.argv[1], notebooks=Path(sys.argv[2]))
    print("no error")
except ReportError as error:
    print(error.exit_code, error)
(home / "filler").unlink()
print(sorted(path.name for path in (home / "reports" / "test").glob("0*.html")))
"""


@pytest.mark.parametrize("then", ["", "Path({half!r}).write_bytes(bytes(1 << 20))", "import os; os.abort()"])
def test_a_disk_that_fills_up_while_a_notebook_runs(
    then: str, home: Path, params: Path, write_notebook: Callable[..., Path]
) -> None:
    """By its own output, in a cell of no stage, or so that nobody can say why a kernel died: exit code 2, and why."""
    disk = home / "disk"
    disk.mkdir()
    source = FULL_WHILE.format(filler=str(disk / "filler"), then=then.format(half=str(disk / "half")))
    write_notebook("01_first", source, "'x' * 100_000")
    ended = on_a_small_disk(disk, 140, [sys.executable, "-c", TWICE, str(params), str(home / "notebooks")])
    first, pages = ended.stdout.splitlines()[-2:]
    assert first.startswith("2 01_first: Found: the disk of ") and "is full" in first, ended.stdout + ended.stderr
    assert pages == "[]"
