"""Whole processes measured in turn: wall clock and memory of ours and of a peer, medians, ratios, JSON and a chart.

    ours = Side("workbook", [workbook("merge", "--base-model", …)], outputs=[folder])
    peer = Side("peft 0.21.2", [[sys.executable, "-c", SCRIPT]], outputs=[other])
    write(Path("merge.json"), compare("merge", ours, peer, runs=5, inputs=[model]))

Neither side flushes to the disk while it is measured: the workbook is told to leave that to the caller
(WORKBOOK_FSYNC=0), and after each run `compare` flushes what was written, for either side alike, and notes the time on
a line of its own. So a run never waits for what the other one left in the page cache.

Memory: the ratio "memory" compares what the processes allocate (RssAnon), the measure of the goals; pages of mapped
files belong to the page cache and can be dropped at any time. "memory_with_mapped_files" compares VmRSS, which
tools such as `time -v` show: peft's merge has 1,210 MiB of the one and 1,620 MiB of the other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.runs.files import FSYNC_VARIABLE, PROJECT, write_json
from lib.runs.machine import cpu_name, physical_cores

_INTERVAL = 0.01
MEMORY = "largest sum of RssAnon over the processes of a side, sampled every 10 ms (mapped files not counted), MiB"


@dataclass
class Side:
    """One side of a comparison.

    Attributes:
        name: what runs, with its version.
        commands: run one after another; the wall clock is their sum, the memory the largest of them.
        outputs: files and folders that it makes: removed before each run, flushed after it.
        environment: further environment variables.
    """

    name: str
    commands: list[list[str]]
    outputs: list[Path] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


def workbook(*arguments: object) -> list[str]:
    """The workbook's own command line as a command."""
    return [sys.executable, "-m", "lib.cli", *map(str, arguments)]


def measure(command: Sequence[str], environment: dict[str, str] | None = None) -> dict[str, float]:
    """Run one whole process and measure it; a variable set to nothing is left out of its environment.

    Returns:
        "wall_seconds"; "cpu_seconds" (user and system, children included); "peak_anonymous_mib": largest sum of
        RssAnon over the process and its descendants; "peak_resident_mib": the same of VmRSS, so with mapped files;
        "largest_process_mib": ru_maxrss, the most that one of the processes had resident.

    Raises:
        InputError: the process failed; the message ends with its last words.
    """
    variables = {**os.environ, FSYNC_VARIABLE: "0", **(environment or {})}
    variables = {name: value for name, value in variables.items() if value}
    path = [str(PROJECT), variables.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables)
        watch = _Watch(process.pid)
        try:
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - started
        except BaseException:
            process.kill()
            raise
        finally:
            watch.stop()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            log.seek(0)
            last = " | ".join(log.read().decode("utf-8", "replace").strip().splitlines()[-4:])
            raise InputError(f"{' '.join(command)[:200]} ended with {process.returncode}: {last}", "0.", "see there.")
    return {
        "wall_seconds": wall,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_anonymous_mib": watch.anonymous / 1024,
        "peak_resident_mib": watch.resident / 1024,
        "largest_process_mib": usage.ru_maxrss / 1024,
    }


class _Watch:
    """Samples the memory of a process and of all its descendants until stopped; KiB."""

    def __init__(self, pid: int) -> None:
        self.anonymous = self.resident = 0
        self._pid = pid
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample_often, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    def _sample_often(self) -> None:
        while not self._end.wait(_INTERVAL):
            sums = {"RssAnon": 0, "VmRSS": 0}
            for pid in _family(self._pid):
                with contextlib.suppress(OSError):
                    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                        key, _, value = line.partition(":")
                        if key in sums:
                            sums[key] += int(value.split()[0])
            self.anonymous = max(self.anonymous, sums["RssAnon"])
            self.resident = max(self.resident, sums["VmRSS"])


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for member in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{member}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _files(paths: Sequence[Path]) -> list[Path]:
    return [p for path in paths for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file()]


def _flush(paths: Sequence[Path]) -> float:
    """Flush files to the disk; seconds."""
    started = time.perf_counter()
    for path in _files(paths):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - started


def _one_run(side: Side, inputs: Sequence[Path]) -> dict[str, float]:
    """Outputs removed, inputs read into the page cache, every command measured, outputs flushed."""
    for path in side.outputs:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in _files(inputs):
        with path.open("rb") as stream:
            while stream.read(1 << 24):
                pass
    parts = [measure(command, side.environment) for command in side.commands]
    missing = [str(path) for path in side.outputs if not path.exists()]
    if missing:
        raise InputError(f"{side.name} made no {', '.join(missing)}.", "its output.", "correct the command.")
    total = {key: sum(p[key] for p in parts) for key in ("wall_seconds", "cpu_seconds")}
    kinds = ("peak_anonymous_mib", "peak_resident_mib", "largest_process_mib")
    largest = {key: max(p[key] for p in parts) for key in kinds}
    return {**total, **largest, "flush_seconds": _flush(side.outputs)}


def compare(name: str, ours: Side, peer: Side, runs: int, inputs: Sequence[Path] = ()) -> dict[str, Any]:
    """Run both sides in turn (first one, then the other, `runs` times) and sum up.

    Args:
        name: of the benchmark.
        runs: measured runs a side; which side begins alternates.
        inputs: files and folders that are read into the page cache before each run.

    Returns:
        The result as JSON values; ratios are ours over peer's, of medians.
    """
    collected: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    sides = [("ours", ours), ("peer", peer)]
    for number in range(runs):
        for key, side in sides if number % 2 == 0 else reversed(sides):
            result = _one_run(side, inputs)
            collected[key].append(result)
            wall, memory = result["wall_seconds"], result["peak_anonymous_mib"]
            text = f"{name}, run {number + 1} of {runs}, {side.name}: {wall:.2f} s, {memory:.0f} MiB"
            print(text, file=sys.stderr, flush=True)
    mine, theirs = _summary(ours, collected["ours"]), _summary(peer, collected["peer"])
    ratios = {"wall": "wall_seconds", "memory": "peak_anonymous_mib", "cpu": "cpu_seconds"}
    ratios["memory_with_mapped_files"] = "peak_resident_mib"
    return {
        "name": name,
        "machine": machine_line(),
        "peer": peer.name,
        "runs": runs,
        "memory_measure": MEMORY,
        "ours": mine,
        "peer_figures": theirs,
        "ratios": {key: round(mine[figure] / theirs[figure], 3) for key, figure in ratios.items()},
    }


def _summary(side: Side, results: list[dict[str, float]]) -> dict[str, Any]:
    """Medians, and every wall clock."""
    medians = {key: round(statistics.median(r[key] for r in results), 3) for key in results[0]}
    return {"name": side.name, **medians, "wall_seconds_of_runs": [round(r["wall_seconds"], 3) for r in results]}


def machine_line() -> str:
    """Processor, cores, memory, system and the versions that matter, in one line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    names = ("torch", "transformers", "peft", "llama_cpp_python", "safetensors")
    versions = [f"{name} {metadata.version(name)}" for name in names]
    parts = [cpu_name(), f"{physical_cores()} cores", f"{memory:.0f} GiB", platform.platform()]
    return ", ".join([*parts, f"Python {platform.python_version()}", *versions])


def arguments(description: str | None, runs: int = 5) -> argparse.Namespace:
    """The command line that every benchmark has: --json OUT.json [--runs N]."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, required=True, metavar="OUT.json", help="file to write; the chart beside")
    parser.add_argument("--runs", type=int, default=runs, metavar="N", help="runs a side [default: %(default)s]")
    chosen = parser.parse_args()
    if chosen.runs < 1:
        parser.error("--runs must be at least 1")
    return chosen


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result of `compare` and, beside it, a chart (.svg); print the ratios."""
    ratios = result["ratios"]
    title = f"{result['name']}: {ratios['wall']:.2f} × the time, {ratios['memory']:.2f} × the memory"
    sides = [result["ours"], result["peer_figures"]]
    _write(path, result, sides, "wall_seconds", "wall clock, s", title)


def write_rates(path: Path, result: dict[str, Any]) -> None:
    """Write a result whose sides have rates, and a chart of them beside; print the ratios.

    Args:
        result: with "sides": {key: {"name", "samples_per_second", "samples_per_second_of_runs", "peak_anonymous_mib"}},
            the workbook first, "ratios", and where one was measured the "limit" of the machine.
    """
    sides = list(result["sides"].values())
    _write(path, result, sides, "samples_per_second", "samples/s (more is better)", result["name"])


def _write(path: Path, result: dict[str, Any], sides: list[dict[str, Any]], key: str, unit: str, title: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    chart(path.with_suffix(".svg"), sides, key, unit, title)
    limit = {"limit": result["limit"]} if "limit" in result else {}
    print(json.dumps({"name": result["name"], **result["ratios"], **limit}))


def chart(path: Path, sides: Sequence[dict[str, Any]], key: str, unit: str, title: str) -> None:
    """A bar a side, the first one (ours) on top: `key` with every run as a dot, and memory."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    from lib.report.looks import BLUE, GREY, use_style

    use_style()
    sides = list(sides)[::-1]
    colors = [GREY] * (len(sides) - 1) + [BLUE]
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 1.2 + 0.5 * len(sides)), layout="constrained")
    for axis, name, words, form in (
        (axes[0], key, unit, "%.2f"),
        (axes[1], "peak_anonymous_mib", "memory, MiB (less is better)", "%.0f"),
    ):
        bars = axis.barh([side["name"] for side in sides], [side[name] for side in sides], color=colors, height=0.6)
        axis.bar_label(bars, fmt=form, padding=6)
        axis.set_xlabel(words)
        axis.margins(x=0.2)
    for place, side in enumerate(sides):
        dots = side[f"{key}_of_runs"]
        axes[0].plot(dots, [place] * len(dots), "o", color="black", markersize=3)
    axes[1].set_yticklabels([])
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)
    plt.close(figure)
