"""The sampler of processor, memory and GPU."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib.runs.machine import device_peak, read_samples, resources_recorded, summary


def test_samples_of_this_process_and_its_children(tmp_path: Path) -> None:
    path = tmp_path / "resources.jsonl"
    busy = (
        "import time\ntime.sleep(0.5)\nblock = bytearray(200 << 20)\n"  # samples without the block come first
        "end = time.monotonic() + 1.0\nwhile time.monotonic() < end: pass"
    )
    with resources_recorded(path, every=0.1):
        subprocess.run([sys.executable, "-c", busy], check=True)
    samples = read_samples(path)
    assert len(samples) >= 5 and all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(samples))
    most = max(sample["rss_mib"] for sample in samples)
    assert most >= min(sample["rss_mib"] for sample in samples) + 150  # the child's block
    found = summary(samples)
    assert found["rss_mib_max"] == most and found["samples"] == len(samples)
    assert 0 < found["cpu_percent_median"] < 100 * 64


def test_a_continued_stage_goes_on_counting_behind_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "resources.jsonl"
    path.write_text('{"seconds": 50.0, "cpu_percent": 100, "rss_mib": 10}\n3\n{}\n{"seconds": 5\n')
    with resources_recorded(path, every=0.05):
        time.sleep(0.2)
    seconds = [sample["seconds"] for sample in read_samples(path)]
    assert seconds[0] == 50.0 and len(seconds) >= 2 and all(50 <= value < 60 for value in seconds)


@pytest.mark.parametrize(("seen", "expected"), [(4, [3, 0]), (1, [3]), (0, [])])
def test_gpus_by_nvidias_library(seen: int, expected: list[int], tmp_path: Path, monkeypatch) -> None:
    """NVIDIA's library counts by bus; for torch the fastest, number 3 there, is the first."""
    fake = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda name: int(name.decode().removeprefix("GPU-")),
        nvmlDeviceGetUtilizationRates=lambda index: SimpleNamespace(gpu=10 * index),
        nvmlDeviceGetMemoryInfo=lambda index: SimpleNamespace(used=(index + 1) << 30),
    )
    cuda = SimpleNamespace(
        device_count=lambda: seen,
        get_device_properties=lambda index: SimpleNamespace(uuid=str((3 + index) % 4)),
        is_available=lambda: False,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))

    with resources_recorded(tmp_path / "resources.jsonl", every=9, gpus=2):
        pass
    (sample,) = read_samples(tmp_path / "resources.jsonl")
    if expected:
        assert sample["gpu_percent"] == 10 * sum(expected) / len(expected)
        assert sample["gpu_mib"] == sum(index + 1 for index in expected) * 1024
        assert summary([sample])["gpu_percent_median"] == sample["gpu_percent"]
    else:
        assert "gpu_percent" not in sample and "gpu_mib" not in sample


@pytest.mark.parametrize("there", [True, False])
def test_peak_of_the_tensors_on_a_gpu(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    peak = [9 << 30]
    cuda = SimpleNamespace(
        is_available=lambda: there,
        reset_peak_memory_stats=lambda: peak.__setitem__(0, 1 << 30),
        max_memory_allocated=lambda: peak[0],
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    with device_peak() as found:
        peak[0] += 5
    assert found.bytes == ((1 << 30) + 5 if there else 0)


def test_summary_of_nothing() -> None:
    assert summary([]) == {} and read_samples(Path("absent.jsonl")) == []
