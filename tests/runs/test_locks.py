"""Locks on disks that several machines share: markers that name host and process, a system's lock that lies."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from lib.errors import InputError
from lib.runs import locks
from lib.runs.files import PROJECT, new_folder
from lib.runs.run import Run

LYING = "import fcntl; fcntl.flock = lambda *given: None"
ON = "import socket; socket.gethostname = lambda: {host!r}"


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_reasons", {})
    monkeypatch.delenv(locks.VARIABLE, raising=False)


def start(code: str, *words: object, first: str = "", environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Python that runs `first`, then `code`, with these words as its arguments."""
    program = f"{first}\n{textwrap.dedent(code)}"
    command = [sys.executable, "-c", program, *map(str, words)]
    given = {**os.environ, "PYTHONPATH": str(PROJECT), **(environment or {})}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=given)


def end(process: subprocess.Popen) -> str:
    """What it said; it must have succeeded."""
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return said


HOLDS = """
    import sys, time
    from pathlib import Path
    from lib.runs.locks import lock_file
    with lock_file(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(600)
"""


def held_by(path: Path, first: str = "") -> subprocess.Popen:
    """Another process that holds the lock with a marker."""
    process = start(HOLDS, path, first=first, environment={locks.VARIABLE: "soft"})
    assert process.stdout and process.stdout.readline() == "held\n", process.communicate()
    return process


def test_local_disks_need_no_marker(tmp_path: Path) -> None:
    assert locks.marker_reason(tmp_path) == "" and not list(tmp_path.iterdir())
    with locks.lock_file(tmp_path / ".lock"):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("kind", "options", "shared"),
    [
        *((kind, "rw", True) for kind in ("nfs4", "9p", "cifs", "lustre", "fuse.sshfs", "virtiofs")),
        ("lustre", "rw,localflock", True),
        *(("lustre", "rw,flock", False), ("ext4", "rw", False), ("fuseblk", "rw", False), ("ceph", "rw", False)),
    ],
)
def test_the_file_system_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: str, shared: bool
) -> None:
    mounts = [("/", "ext4", "rw"), (str(tmp_path), "ext4", "rw"), (str(tmp_path), kind, options), ("/proc", "9p", "")]
    found = [SimpleNamespace(mountpoint=place, fstype=fs, opts=opts) for place, fs, opts in mounts]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: found)
    assert locks.marker_reason(tmp_path) == (kind if shared else "")


@pytest.mark.parametrize("error", [None, OSError(38, "Function not implemented"), OSError(37, "No locks available")])
def test_a_lock_of_the_system_that_lies_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError | None
) -> None:
    def flock(*_: object) -> None:
        if error:
            raise error

    monkeypatch.setattr("fcntl.flock", flock)
    assert locks.marker_reason(tmp_path) == "no flock"
    busy = pytest.raises(InputError, match="busy")
    with locks.lock_file(tmp_path / ".lock"), busy, locks.locked(tmp_path / ".lock", "busy", "", ""):
        pytest.fail("two at once")
    with locks.lock_file(tmp_path / ".lock", wait=False):
        pass


def test_words_other_than_soft_and_system_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(locks.VARIABLE, "hard")
    with pytest.raises(InputError, match="WORKBOOK_LOCK=hard"):
        locks.marker_reason(tmp_path)


def test_the_marker_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    other = held_by(tmp_path / ".lock")
    marker = (tmp_path / ".lock.soft").read_text().split()
    assert marker[0] == str(other.pid) and marker[1].startswith(socket.gethostname()) and len(marker) == 3
    with pytest.raises(InputError, match="busy"), locks.locked(tmp_path / ".lock", "busy", "", ""):
        pytest.fail("two at once")
    other.kill()
    other.communicate()
    assert (tmp_path / ".lock.soft").exists()
    with locks.locked(tmp_path / ".lock", "busy", "", ""):
        pass
    assert not (tmp_path / ".lock.soft").exists()


def test_a_process_of_the_same_number_that_started_later_does_not_hold_it(tmp_path: Path) -> None:
    other = held_by(tmp_path / ".lock")
    _, host, started = (tmp_path / ".lock.soft").read_text().split()
    other.kill()
    other.communicate()
    (tmp_path / ".lock.soft").write_text(f"{os.getpid()}\n{host}\n{started}\n")
    with locks.locked(tmp_path / ".lock", "busy", "", ""):
        pass


def test_the_marker_of_another_machine_is_never_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = held_by(tmp_path / ".lock", first=ON.format(host="node17"))
    marker = tmp_path / ".lock.soft"
    other.kill()  # nobody here can know
    other.communicate()
    hours_ago = time.time() - 3 * 3600
    os.utime(marker, (hours_ago, hours_ago))
    with pytest.raises(InputError) as refused, locks.locked(tmp_path / ".lock", "busy", "", ""):
        pytest.fail("stolen")
    assert f"pid {other.pid} on node17" in refused.value.found and "3.0 h" in refused.value.found
    assert f"delete {marker}" in refused.value.do and marker.exists()
    waiting = start(HOLDS, tmp_path / ".lock", first="from lib.runs import locks; locks.PATIENCE = 0.2")
    time.sleep(3)
    assert waiting.poll() is None
    marker.unlink()  # the cure
    assert waiting.stdout and waiting.stdout.readline() == "held\n"
    waiting.kill()
    assert waiting.communicate()[1].count("node17") == 1  # it said once what it waited for


MAKES = """
    import sys, time
    from pathlib import Path
    from lib.errors import InputError
    from lib.runs.run import Run
    def build(draft):
        with open(sys.argv[2], "a") as log:
            log.write("begin\\n"); log.flush(); time.sleep(0.3)
            (draft.folder / "a").write_text("x"); log.write("end\\n")
    refused = 0
    for number in range(4):
        try:
            Run("shared", Path(sys.argv[1])).produce("data", build, {"by": sys.argv[3], "number": number}, force=True)
        except InputError as error:
            refused += "another" in error.found
            time.sleep(0.2)
    print(refused)
"""


def _never_both(here: tuple[Path, Path], first: str, environment: dict[str, str]) -> int:
    """Let two hosts make the same product of one run again and again; the number of refusals.

    Args:
        here: the folder of the run as each of them sees it.
    """
    log = here[0].parent / "log"
    hosts = zip("ab", here, strict=True)
    jobs = [
        start(MAKES, place, log, host, first=f"{first}\n{ON.format(host=host)}", environment=environment)
        for host, place in hosts
    ]
    refused = sum(int(end(job)) for job in jobs)
    lines = log.read_text().split()
    assert lines == ["begin", "end"] * (len(lines) // 2) and len(lines) == 2 * (8 - refused)
    return refused


def test_two_hosts_never_both_write_a_run_where_the_lock_lies(tmp_path: Path) -> None:
    assert _never_both((tmp_path / "run", tmp_path / "run"), LYING, {}) > 0


def test_without_markers_they_would(tmp_path: Path) -> None:
    """The test above can fail."""
    with pytest.raises(AssertionError):
        _never_both((tmp_path / "run", tmp_path / "run"), LYING, {locks.VARIABLE: "system"})


@pytest.mark.skipif(not Path("/dev/fuse").exists() or not shutil.which("bindfs"), reason="needs bindfs and /dev/fuse")
def test_two_mounts_of_one_disk_never_both_write(tmp_path: Path) -> None:
    """Each mount keeps its own flocks, as two machines do: found out by the kind of file system alone."""
    (tmp_path / "disk").mkdir()
    places = [tmp_path / "a", tmp_path / "b"]
    try:
        for place in places:
            place.mkdir()
            subprocess.run(["bindfs", tmp_path / "disk", place], check=True)
        assert "fuse" in locks.marker_reason(places[0])
        runs = (places[0] / "run", places[1] / "run")
        assert _never_both(runs, "", {}) > 0
    finally:
        for place in places:
            subprocess.run(["umount", place], check=False)


def test_an_output_that_another_machine_writes_is_refused_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
        import sys, time
        from pathlib import Path
        from lib.runs.files import new_folder
        with new_folder(Path(sys.argv[1])) as folder:
            (folder / "half").write_text("x")
            print("held", flush=True)
            while not Path(sys.argv[2]).exists():
                time.sleep(0.05)
    """
    go = tmp_path / "go"
    other = start(code, tmp_path / "out", go, first=f"{LYING}\n{ON.format(host='node17')}")
    assert other.stdout and other.stdout.readline() == "held\n"
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    with pytest.raises(InputError, match="on node17"), new_folder(tmp_path / "out"):
        pytest.fail("two at once")
    go.touch()
    end(other)
    go.unlink()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["half"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_under_markers_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(locks.VARIABLE, "soft")
    made = Run("r", tmp_path / "r").produce("data", lambda draft: _write(draft.folder), {})
    assert made.path.is_dir() and not list(tmp_path.rglob("*.soft"))


def _write(folder: Path) -> None:
    (folder / "a").write_text("x")
