"""Hashes of large files are remembered for as long as the file stays as it is, and not longer."""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from lib.runs import files
from lib.runs.files import remembered_sha256, sha256_file


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that was written a minute ago."""
    monkeypatch.setenv("WORKBOOK_HOME", str(tmp_path / "home"))
    return written(tmp_path / "model.safetensors", b"weights")


def written(path: Path, content: bytes, ago: float = 60.0) -> Path:
    path.write_bytes(content)
    then = time.time() - ago
    os.utime(path, (then, then))
    return path


def memory(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "home" / "runs" / "_cache" / "sha256").glob("*"))


def test_the_second_hash_reads_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = remembered_sha256(file)
    assert first == sha256_file(file)
    monkeypatch.setattr(files, "sha256_file", lambda path: pytest.fail(f"{path} was read again"))
    assert remembered_sha256(file) == first
    link = file.with_name("link")
    link.symlink_to(file.name)
    assert remembered_sha256(link) == first, "the file is one, whatever leads to it"


def test_a_changed_file_is_read_again(file: Path) -> None:
    first = remembered_sha256(file)
    written(file, b"WEIGHTS", ago=50.0)
    assert remembered_sha256(file) == sha256_file(file) != first


def test_a_change_that_hides_its_time_is_seen(file: Path) -> None:
    remembered_sha256(file)
    times = file.stat()
    file.write_bytes(b"WEIGHTS")  # as many bytes
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert remembered_sha256(file) == sha256_file(file)


def test_another_file_in_its_place_is_read(file: Path) -> None:
    remembered_sha256(file)
    times, other = file.stat(), file.with_name("other")
    other.write_bytes(b"WEIGHTS")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(file)
    assert remembered_sha256(file) == sha256_file(file)


def test_a_file_of_this_moment_is_not_remembered(file: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    fresh.write_bytes(b"now")
    assert remembered_sha256(fresh) == sha256_file(fresh) and memory(tmp_path) == []


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "sha256_file", lambda path: (sha256_file(path), written(file, b"more weights"))[0])
    remembered_sha256(file)
    assert memory(tmp_path) == []


@pytest.mark.parametrize("content", ["", "{", "ab" * 31, "xy" * 32])
def test_a_damaged_memory_is_none(file: Path, tmp_path: Path, content: str) -> None:
    remembered_sha256(file)
    (place,) = memory(tmp_path)
    place.write_text(content)
    assert remembered_sha256(file) == sha256_file(file) == place.read_text()


def test_several_processes_remember_together(file: Path, tmp_path: Path) -> None:
    paths = [written(tmp_path / f"{i}.gguf", bytes([i])) for i in range(24)]
    with ProcessPoolExecutor(4) as pool:
        found = list(pool.map(remembered_sha256, paths))
    assert found == [sha256_file(path) for path in paths]
    assert sorted(path.read_text() for path in memory(tmp_path)) == sorted(found)


def test_a_folder_that_cannot_be_written_costs_only_the_memory(file: Path, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")
    assert remembered_sha256(file) == sha256_file(file)
