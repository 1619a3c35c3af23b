"""The sampler of processor, memory and GPU."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib.run.resources import ResourceSampler, read_samples, summary


def test_samples_of_this_process_and_its_children(tmp_path: Path) -> None:
    path = tmp_path / "resources.jsonl"
    busy = "import time\nblock = bytearray(200 << 20)\nend = time.monotonic() + 1.5\nwhile time.monotonic() < end: pass"
    with ResourceSampler(path, every=0.1):
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
    with ResourceSampler(path, every=0.05):
        time.sleep(0.2)
    seconds = [sample["seconds"] for sample in read_samples(path)]
    assert seconds[0] == 50.0 and len(seconds) >= 2 and all(50 <= value < 60 for value in seconds)


def test_gpus_by_nvidias_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 4,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUtilizationRates=lambda index: SimpleNamespace(gpu=10 * index),
        nvmlDeviceGetMemoryInfo=lambda index: SimpleNamespace(used=(index + 1) << 30),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,0")
    with ResourceSampler(tmp_path / "resources.jsonl", every=9, gpus=2):
        pass
    (sample,) = read_samples(tmp_path / "resources.jsonl")
    assert sample["gpu_percent"] == 25.0 and sample["gpu_mib"] == 7 * 1024
    assert summary([sample])["gpu_percent_median"] == 25.0


def test_summary_of_nothing() -> None:
    assert summary([]) == {} and read_samples(Path("absent.jsonl")) == []
