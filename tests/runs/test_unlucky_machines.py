"""A disk that is full, a run of another user, a clock that jumps: said in one sentence, and nothing half is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lib.errors import InputError, closed_to_reading
from lib.progress import Progress
from lib.report.index import write_all_index
from lib.runs import files
from lib.runs.run import ProductDraft, Run, open_run
from lib.scoring.backend import Work
from tests.support.small_disk import on_a_small_disk

FULL = """
import json, os, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from lib.errors import InputError
from lib.runs.files import write_json
from lib.runs.run import open_run
from lib.scoring.backend import Keep, keeping

home, weights, said = Path(os.environ["WORKBOOK_HOME"]), {"a": torch.ones(1 << 19)}, {}
def journal(path):
    with keeping(Keep(path, "m"), "", "", ["r"] * 9999, [], {}) as work:
        for first in range(9999):
            work.take([0], lambda: ["x" * 9000], lambda _, value: True)
writers = {
    "bytes": lambda path: path.write_bytes(bytes(1 << 21)),
    "JSON": lambda path: write_json(path, "x" * (1 << 21)),
    "torch": lambda path: torch.save(weights, path),
    "safetensors": lambda path: save_file(weights, path),
    "journal": journal,
}
run = open_run("t")
run.produce("data", lambda draft: (draft.folder / "a").write_text("old"), {"seed": 1})
(home / "filler").write_bytes(bytes(3 << 20))  # of four
for name, write in writers.items():
    try:
        run.produce("data", lambda draft, write=write: write(draft.folder / "a"), {"writer": name})
    except BaseException as error:
        said[name] = [type(error).__name__, str(error), (run.require("data").path / "a").read_text()]
left = sorted(path.name for path in run.folder.iterdir())
(home / "filler").unlink()
run.produce("data", lambda draft: writers["torch"](draft.folder / "a"), {"writer": "torch"})
print(json.dumps({"said": said, "left": left}))
"""


def write(text: str) -> Callable[[ProductDraft], None]:
    return lambda draft: (draft.folder / "a").write_text(text) and None


def test_a_full_disk_is_said_whoever_notices_it(tmp_path: Path) -> None:
    """ENOSPC of a real disk, by every library that writes: refused, the former product stays, later it is made."""
    ended = on_a_small_disk(tmp_path, 4, [sys.executable, "-c", FULL])
    assert ended.returncode == 0, ended.stderr[-2000:]
    result = json.loads(ended.stdout.splitlines()[-1])
    assert len(result["said"]) == 5
    for name, (kind, text, former) in result["said"].items():
        assert kind == "InputError" and "runs/t is full" in text and former == "old", (name, kind, text)
    assert result["left"] == [".lock", "data", "manifest.json"]


def test_a_journal_line_is_never_written_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is nearly full takes a part of what it is given, without an error."""
    path = tmp_path / "scores.jsonl"
    with path.open("ab", buffering=0) as file:
        written = file.write

        class Nearly:
            def write(self, data: bytes) -> int:
                return written(data[:7])

        work = Work(Progress(""), ["a", "b"], file=Nearly())
        assert work.take([0, 1], lambda: [1.5, 2.5], lambda _, value: True) == [1.5, 2.5]
    [line] = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["values"] == [1.5, 2.5]


AS_ANOTHER = """
import os, sys, tempfile
from pathlib import Path
from lib.errors import as_input_error, closed_to_reading, refusal
from lib.report.index import write_all_index
from lib.runs.run import open_run
home, group = Path(os.environ["WORKBOOK_HOME"]), int(sys.argv[1])
def change(name, text, seed):
    run = open_run(name)
    return run.produce("data", lambda draft: (draft.folder / "a").write_text(text) and None, {"seed": seed}).message
def read(path):
    try:
        return Path(path).read_text()
    except OSError as error:
        return as_input_error(error)
refusal("lib/closed", path="")
with tempfile.TemporaryDirectory() as own:  # what they import may be closed to others, too
    os.environ["WORKBOOK_HOME"] = own
    change("t", "x", 1), change("t", "x", 2), write_all_index(Path(own, "reports"))
os.environ["WORKBOOK_HOME"] = str(home)
os.setgroups([])
os.setgid(group)
os.setuid(65534)
try:
    print(eval(sys.argv[2]))
except BaseException as error:
    print(f"{type(error).__name__}: {error}")
"""


def as_another(call: str, group: int = 65534) -> str:
    """What `call` returns or says when another user makes it, in a process that root has begun."""
    command = [sys.executable, "-c", AS_ANOTHER, str(group), call]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.strip()


@pytest.fixture
def root_run(home: Path) -> Run:
    """A run of root's in a home that everybody can reach."""
    if os.getuid() != 0:
        pytest.skip("only root can be two users")
    for folder in (home, *home.parents[:-2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    run = open_run("t")
    run.produce("data", write("root"), {"seed": 1})
    return run


def test_a_run_of_another_user_is_refused(root_run: Run) -> None:
    change = "change('t', 'x', 2)"
    assert "InputError: Found: " in (said := as_another(change)) and "cannot be written (Permission denied)" in said
    root_run.folder.chmod(0o777)
    assert "InputError: Found: " in (said := as_another(change)) and "not open to this user" in said
    assert (root_run.require("data").path / "a").read_text() == "root"
    old = root_run.folder / ".data.old"
    old.mkdir()
    (old / "a").write_text("root's")
    (root_run.folder / ".lock").chmod(0o666)
    assert "InputError: Found: " in (said := as_another(change)) and "not open to this user" in said


def test_inputs_of_another_user_are_named_with_what_to_do(root_run: Run, home: Path) -> None:
    closed = home / "closed"
    closed.mkdir()
    file = closed / "rows.csv"
    file.write_text("text,label\n")
    for mode, of_file, named in ((0o755, 0o600, file), (0o700, 0o644, closed)):
        closed.chmod(mode)
        file.chmod(of_file)
        said = as_another(f"read({str(file)!r})")
        assert said.startswith(f"Found: {named} cannot be read (Permission denied). Expected: a file or folder that")
    closed.chmod(0o755)
    assert as_another(f"read({str(file)!r})") == "text,label"
    assert as_another(f"read({str(closed / 'absent')!r})") == "None"


def test_what_a_notebook_was_not_allowed_to_read_is_told_from_its_error(root_run: Run, home: Path) -> None:
    error = f"PermissionError: [Errno 13] Permission denied: '{home}/closed/rows.csv'"
    assert closed_to_reading(error) is None  # root may read all
    assert closed_to_reading("KeyError: 'a'") is None
    (home / "closed").mkdir(mode=0o700)
    assert as_another(f"closed_to_reading({error!r})").startswith(f"Found: {home}/closed cannot be read")


def test_users_of_one_group_share_a_run_where_the_umask_says_so(root_run: Run) -> None:
    before = os.umask(0o002)
    try:
        folder = root_run.folder.with_name("shared")
        folder.mkdir()
        os.chown(folder, 0, 100)
        folder.chmod(0o2775)
        run = open_run("shared")
        run.produce("data", write("root"), {"seed": 1})
        said = as_another("change('shared', 'theirs', 2)", group=100)
        assert "seed: 1 → 2" in said and (run.require("data").path / "a").read_text() == "theirs"
        assert "theirs" not in run.produce("data", write("root"), {"seed": 3}).message
    finally:
        os.umask(before)


def test_a_run_that_is_closed_to_others_does_not_break_their_index(root_run: Run, home: Path) -> None:
    reports = home / "reports"
    for name in ("t", "u"):
        (reports / name).mkdir(parents=True)
        (reports / name / "index.html").write_text("")
    write_all_index(reports)
    reports.chmod(0o777)
    for name in ("index.html", ".index.lock"):
        (reports / name).unlink(missing_ok=True)
    root_run.folder.chmod(0o700)
    assert as_another("write_all_index(home / 'reports')") == str(reports / "index.html")
    assert 'href="u/index.html"' in (reports / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("jump", [-86400.0, 86400.0])
def test_a_clock_that_jumps_changes_nothing(home: Path, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    """Files of tomorrow or of last year, and a clock that is set while a stage works."""
    run, clock, clock_ns = open_run("t"), time.time, time.time_ns

    def build(draft: ProductDraft) -> None:
        (draft.folder / "a").write_text("x")
        monkeypatch.setattr(time, "time", lambda: clock() + jump)
        monkeypatch.setattr(time, "time_ns", lambda: clock_ns() + int(jump * 1e9))

    made = run.produce("data", build, {})
    assert 0 <= made.entry.seconds < 60
    path = made.path / "a"
    os.utime(path, (clock() - jump, clock() - jump))
    assert not run.produce("data", build, {}).made and run.require("data").entry == made.entry
    hashes = []
    for text in ("x", "y"):  # of one size, at one time: what was hashed is never taken for the other
        path.write_text(text)
        os.utime(path, (clock() - jump, clock() - jump))
        hashes.append(files.remembered_sha256(path))
    assert hashes[0] != hashes[1] == files.sha256_file(path)
    with pytest.raises(InputError, match="SHA-256"):
        run.require("data")
