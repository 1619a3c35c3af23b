"""Two processes on one output: what stands at the end is whole, and is of one of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from lib.errors import InputError
from lib.runs.files import atomic_path, new_folder, remove_abandoned, write_text


def _half(final: Path, begun: multiprocessing.Event, alone: bool) -> None:
    with atomic_path(final, alone) as temporary:
        temporary.write_text('{"half": "B')
        begun.set()
        signal.pause()


@pytest.mark.parametrize("alone", [False, True])
def test_a_writer_that_is_killed_takes_nothing_from_another(tmp_path: Path, alone: bool) -> None:
    final, context = tmp_path / "two[1].json", multiprocessing.get_context("fork")
    begun = context.Event()
    with atomic_path(final) as temporary:
        temporary.write_text('{"whole": "A"}')
        other = context.Process(target=_half, args=(final, begun, False))
        other.start()
        assert begun.wait(30)
    assert final.read_text() == '{"whole": "A"}'
    if alone:
        with pytest.raises(InputError, match="another command is writing"), atomic_path(final, alone=True):
            pytest.fail("two at once")
    os.kill(other.pid or 0, signal.SIGKILL)
    other.join()
    assert final.read_text() == '{"whole": "A"}'
    with atomic_path(final, alone=True) as temporary:  # what the killed one left is gone
        temporary.write_text("C")
    assert [path.name for path in tmp_path.iterdir()] == [final.name] and final.read_text() == "C"


def test_a_writer_that_fails_leaves_the_former_file(tmp_path: Path) -> None:
    final = tmp_path / "a.json"
    final.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(final) as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert final.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    for name in (".a.gguf.x1.part", ".b.json.x2.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    write_text(tmp_path / "a.gguf", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.json.x2.part", "a.gguf"]
    remove_abandoned(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("model.gguf", "model"),
        ("out.1", "out"),
        ("a.json", "a"),
        ("n" * 90 + "1", "n" * 90 + "2"),
        ("名" * 82, "名" * 83),
    ],
)
def test_two_outputs_whose_names_begin_alike_are_both_written(tmp_path: Path, one: str, other: str) -> None:
    with atomic_path(tmp_path / one, alone=True) as first:
        first.write_text("1")
        with new_folder(tmp_path / other) as second:
            (second / "x").write_text("2")
    assert (tmp_path / one).read_text() == "1" and (tmp_path / other / "x").read_text() == "2"


def _write_often(final: Path, failed: multiprocessing.queues.SimpleQueue) -> None:
    try:
        for number in range(150):
            write_text(final, f"{number} ")
    except OSError as error:
        failed.put(repr(error))


def test_many_short_writes_of_one_file_never_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBOOK_FSYNC", "0")
    context = multiprocessing.get_context("fork")
    failed = context.SimpleQueue()
    writers = [context.Process(target=_write_often, args=(tmp_path / "race.json", failed)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert failed.empty(), failed.get()
    assert [path.name for path in tmp_path.iterdir()] == ["race.json"]


def test_a_pipe_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is no file"), atomic_path(tmp_path / "pipe"):
        pytest.fail("written")
    assert (tmp_path / "pipe").is_fifo()
