"""Several types at once: equal files, shared progress, and an end that leaves nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lib import progress
from lib.errors import InputError
from lib.runs.child import StoppedError
from lib.runs.files import sha256_file
from lib.stages.quantize import files
from lib.stages.quantize.files import (
    Options,
    PlannedFile,
    at_once,
    make_files,
    predict_sizes,
    quantize_files,
)
from tests import tiny_gguf

PROJECT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("source") / "tiny-F16.gguf")


def planned(source: Path, *types: str) -> list[PlannedFile]:
    return [PlannedFile(found, Options()) for found in predict_sizes(source, types)]


@pytest.mark.parametrize(
    ("count", "n_threads", "cores", "gib", "wanted"),
    [
        (7, 0, 2, 8, (2, 2)),
        (7, 2, 16, 8, (2, 1)),
        (7, 0, 16, 64, (7, 3)),
        (1, 0, 8, 64, (1, 8)),
        (7, 0, 1, 64, (1, 1)),
        (7, 0, 8, 1, (2, 5)),
        (7, 0, 8, 0, (1, 8)),
        (7, 1, 8, 64, (1, 1)),
        (7, 3, 2, 64, (3, 1)),
    ],
)
def test_as_many_at_once_as_threads_and_memory_allow(
    count: int, n_threads: int, cores: int, gib: int, wanted: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "physical_cores", lambda: cores)
    monkeypatch.setattr(files, "available_memory", lambda: gib << 30)
    assert at_once(count, n_threads) == wanted


def test_files_of_a_ladder_equal_single_ones(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "physical_cores", lambda: 3)
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)  # or the first line would be the only one of work so short
    reports = quantize_files(source, tmp_path / "many", ["Q4_0", "Q8_0", "Q4_K_M"])
    assert [r.type for r in reports] == ["Q4_0", "Q8_0", "Q4_K_M"]
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == sorted(r.file for r in reports)
    assert "quantizing, types (3 at once): 3 done" in capsys.readouterr().err
    alone = tmp_path / "alone.gguf"
    tiny_gguf.quantize_file(source, alone, "Q4_K_M", n_threads=1)
    assert sha256_file(alone) == sha256_file(tmp_path / "many" / "tiny-Q4_K_M.gguf")


def test_longest_first_and_reports_in_order(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def made(_: Path, output: Path, file: PlannedFile, *__: Any) -> str:
        begun.append(file.type)
        return output.name

    monkeypatch.setattr(files, "quantize_planned", made)
    done: list[str] = []
    wanted = planned(source, "Q8_0", "Q4_0", "Q4_K_M", "Q3_K_M")
    names = make_files(source, tmp_path, wanted, 1, done.append)
    assert names == ["tiny-Q8_0.gguf", "tiny-Q4_0.gguf", "tiny-Q4_K_M.gguf", "tiny-Q3_K_M.gguf"]
    assert begun[0] == "Q4_K_M" and set(begun[2:]) == {"Q8_0", "Q4_0"}
    assert sorted(done) == sorted(names)


def test_one_that_fails_stops_the_others(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Q4_K_M waits until it is stopped; Q4_0 fails; Q8_0 is never begun; what was complete by then is reported."""
    begun, done, complete = [], [], threading.Event()

    def make(_: Path, output: Path, file: PlannedFile, __: int, stop: Any, ___: Any) -> str:
        name = file.type
        begun.append(name)
        if name == "Q4_K_M":
            complete.set()
            assert stop.wait(30)
            raise StoppedError(name)
        if name == "Q3_K_M":
            complete.wait(30)
            return output.name
        raise InputError("a stone.", "bread.", "ask again.")

    monkeypatch.setattr(files, "quantize_planned", make)
    wanted = planned(source, "Q8_0", "Q4_0", "Q4_K_M", "Q3_K_M")
    with pytest.raises(InputError, match="a stone"):
        make_files(source, tmp_path, wanted, 2, done.append)
    assert begun[:2] == ["Q4_K_M", "Q3_K_M"] and len(begun) == 3
    assert done == ["tiny-Q3_K_M.gguf"]
    assert not [t for t in threading.enumerate() if t.name.startswith("quantizing")]


def test_refusals_come_before_the_first_file(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "none"
    with pytest.raises(InputError, match="named twice"):
        quantize_files(source, folder, ["Q8_0", "Q4_0", "Q8_0"])
    with pytest.raises(InputError, match="unknown quantization type"):
        quantize_files(source, folder, ["Q8_0", "Q9_0"])
    with pytest.raises(InputError, match="IQ2_XS without an importance matrix"):
        quantize_files(source, folder, ["Q8_0", "IQ2_XS"])
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_ends_every_child_and_leaves_nothing(tmp_path: Path, number: int, code: int) -> None:
    source = tiny_gguf.write_shapes_of_qwen25_05b(tmp_path / "q-F16.gguf")
    folder = tmp_path / "out"
    arguments = [str(source), str(folder), "Q6_K", "Q4_K_M", "Q5_K_M", "--n-threads", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lib.cli", "quantize", *arguments], cwd=PROJECT, stderr=subprocess.PIPE, text=True
    )
    # A moment with two children and two files: one child may end, and the next begin, between two looks.
    deadline, children = time.monotonic() + 60, set[int]()
    while (
        (len(children) < 2 or len(list(folder.glob(".*.part"))) < 2)
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
        tasks = Path(f"/proc/{process.pid}/task").iterdir()
        children = {int(p) for task in tasks for p in (task / "children").read_text().split()}
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code, said
    assert "Interrupted: nothing half-written was left" in said and "Traceback" not in said
    assert len(children) == 2 and not [pid for pid in children if _alive(pid)]
    assert list(folder.iterdir()) == []


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
