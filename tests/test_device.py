"""Memory that a batch system or a container leaves to this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.runs import machine

MIB = 2**20


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of this process's groups, of a machine with 64 GiB, 32 of them free."""

    class Memory:
        total, available = 65536 * MIB, 32768 * MIB

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    given = machine.memory_limits
    monkeypatch.setattr(machine, "memory_limits", lambda: given(tmp_path, tmp_path / "own"))
    return tmp_path / "own"


def test_a_job_of_version_2_and_the_slice_around_it(own: Path) -> None:
    own.write_text("0::/slurm/job_7/step_0\n")
    root = own.parent
    group(root / "slurm", memory__max=9000 * MIB, memory__current=8500 * MIB)
    group(root / "slurm/job_7", memory__max=4096 * MIB, memory__current=1500 * MIB)
    (root / "slurm/job_7/memory.stat").write_text(f"anon 7\ninactive_file {500 * MIB}\n")
    group(root / "slurm/job_7/step_0", memory__max="max", memory__current=7)
    assert machine.memory_limits() == [(4096 * MIB, 1000 * MIB), (9000 * MIB, 8500 * MIB)]
    assert machine.total_memory() == 4096 * MIB and machine.available_memory() == 500 * MIB  # of the slice, others too


def test_a_job_of_version_1(own: Path) -> None:
    own.write_text("11:devices:/x\n4:cpu,memory:/job\n0::/\n")
    root = own.parent / "memory"
    group(root, memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=9 * MIB)
    group(root / "job", memory__limit_in_bytes=2048 * MIB, memory__usage_in_bytes=48 * MIB)
    assert machine.total_memory() == 2048 * MIB and machine.available_memory() == 2000 * MIB


def test_a_container_that_sees_the_names_outside(own: Path) -> None:
    own.write_text("0::/docker/0123\n")
    group(own.parent, memory__max=1024 * MIB, memory__current=2048 * MIB)
    assert machine.total_memory() == 1024 * MIB and machine.available_memory() == 0


def test_no_limits_and_no_control_groups(own: Path) -> None:
    assert machine.total_memory() == 65536 * MIB and machine.available_memory() == 32768 * MIB
    own.write_text("0::/\nodd\n")
    assert machine.available_memory() == 32768 * MIB


def test_every_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    import torch

    cards = [
        SimpleNamespace(name="Tesla T4", total_memory=15 * 2**30, major=7, minor=5),
        SimpleNamespace(name="NVIDIA H200", total_memory=140 * 2**30, major=9, minor=0),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    first, second = machine.gpus()
    assert first.startswith("Tesla T4, 15.0 GiB, compute capability 7.5")
    assert second.startswith("NVIDIA H200, 140.0 GiB, compute capability 9.0")
