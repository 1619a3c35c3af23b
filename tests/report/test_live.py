"""What page 02 shows of the machine, and the plot that redraws itself while a training runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import IPython.display
import pytest

from lib.progress import PROGRESS_FILE_VARIABLE
from lib.report import finetune_page
from lib.report.finetune_page import resources
from lib.runs.machine import summary


def samples(count: int, gpu: bool) -> list[dict[str, float]]:
    rows = [{"seconds": 2.0 * i, "cpu_percent": 150.0, "rss_mib": 900.0 + i} for i in range(count)]
    return [{**row, "gpu_percent": 80.0, "gpu_mib": 2048.0} if gpu else row for row in rows]


@pytest.mark.parametrize("gpu", [False, True])
def test_the_machine_over_time(gpu: bool) -> None:
    rows = samples(31, gpu)
    text = resources(rows, summary(rows), cores=2).data
    assert "Median 1.50 of 2 cores busy; 930 MiB resident at most" in text and "31 samples" in text
    assert ("GPU busy 80 % of the time" in text) == gpu and ("2,048 MiB of GPU memory" in text) == gpu
    assert 'alt="Processor use and memory over 60.0 seconds.' in text
    longer = [{**row, "seconds": 10 * row["seconds"]} for row in rows]
    assert "over 10.0 minutes" in resources(longer, summary(longer), cores=2).data


def test_too_few_samples_are_said() -> None:
    assert "enough samples" in resources(samples(2, False), summary(samples(2, False)), 2).data


class Handle:
    def __init__(self) -> None:
        self.shown: list[str] = []

    def update(self, content) -> None:
        self.shown.append(content.data)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Handle:
    """A notebook that somebody looks at."""
    handle = Handle()

    def display(content, display_id: bool) -> Handle:
        handle.update(content)
        return handle

    monkeypatch.delenv(PROGRESS_FILE_VARIABLE, raising=False)
    monkeypatch.setattr("lib.progress._in_notebook", lambda: True)
    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(finetune_page, "EVERY", 0.0)
    return handle


def test_the_plot_follows_the_file_and_leaves_nothing(watched: Handle, tmp_path: Path) -> None:
    path = tmp_path / "losses"
    with finetune_page.LiveLosses(path) as drawing:
        drawing.update()
        assert watched.shown == []
        path.write_text(json.dumps({"step": 1, "loss": 0.75}) + "\n")
        drawing.update()
        drawing.next = 0.0
        drawing.update()  # nothing new
        assert len(watched.shown) == 1 and "training 0.7500 at update 1." in watched.shown[0]
        with path.open("a") as stream:
            stream.write(json.dumps({"step": 2, "eval_loss": 0.5}) + '\n{"step": 3, "lo')
        drawing.update()
        assert "validation 0.5000 after update 2" in watched.shown[1] and "alt=" in watched.shown[1]
        path.write_text(path.read_text() + " ")
        drawing.update()  # too soon after the last drawing
        assert len(watched.shown) == 2
    assert watched.shown[-1] == "" and len(watched.shown) == 3


def test_headless_there_is_no_plot(watched: Handle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROGRESS_FILE_VARIABLE, str(tmp_path / "progress"))
    (tmp_path / "losses").write_text(json.dumps({"step": 1, "loss": 0.75}) + "\n")
    with finetune_page.LiveLosses(tmp_path / "losses") as drawing:
        drawing.update()
    assert watched.shown == []


@pytest.mark.parametrize(("processes", "device"), [(1, None), (2, None), (1, 700.0), (2, 700.0)])
def test_memory_is_compared_with_memory_of_the_same_kind(processes: int, device: float | None) -> None:
    result = SimpleNamespace(
        estimate={"weights": 100 << 20, "total": 600 << 20},
        memory={"available": 4096 << 20},
        peak_memory_mib=2500.0,
        peak_device_mib=device,
        product=SimpleNamespace(entry=SimpleNamespace(parameters={"num_processes": processes})),
    )
    found = {row["part"]: row["mib"] for row in finetune_page.memory_rows(result)}
    own = [part for part, size in found.items() if size == 2500.0]
    assert ("total of 2 processes" in found) == (processes == 2 and device is None)
    assert own == ["measured peak of the processor's memory"] if device else "measured peak while training" in own[0]
    assert device is None or [part for part, size in found.items() if size in (device, 4096)] == [
        part for part in found if "GPU" in part
    ]
