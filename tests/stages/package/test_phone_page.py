"""The phone page in headless Chromium: tokens and labels as from llama-cpp-python on the same file, also offline."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lib.runs.files import read_json
from lib.runs.run import Run
from lib.stages.package.stage import package

PROJECT = Path(__file__).resolve().parents[3]
MODULES = PROJECT / ".cache" / "wllama" / "node_modules"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="no node here"),
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here"),
    pytest.mark.skipif(
        not (MODULES / "playwright-core").is_dir() or not (MODULES / "@wllama" / "wllama-compat").is_dir(),
        reason="the npm packages are not in .cache/wllama (make wllama)",
    ),
]
GAP_NATS = 0.2
"""By how much margins may differ: the package's own tolerance for another processor's kernels."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[[Path], tuple[str, int]]]:
    """served(package folder) → the address of a copy of it, and the process of `workbook serve --phone`."""
    processes = []

    def start(folder: Path) -> tuple[str, int]:
        shutil.copytree(folder, tmp_path / "package")
        command = [sys.executable, "-m", "lib.cli", "serve", str(tmp_path / "package"), "--phone", "--port", "0"]
        process = subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        for line in process.stderr:
            if found := re.search(r"served at (http://\S+)", line):
                return found[1], process.pid
        raise AssertionError("no address")

    yield start
    for process in processes:
        process.terminate()
        process.wait(30)
        process.stderr.close()


def drive(address: str, *arguments: str) -> dict:
    """What phone_page.cjs did and saw."""
    command = ["node", str(Path(__file__).with_name("phone_page.cjs")), str(MODULES), BROWSER, address, *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, "CI": "1"})
    assert answer.returncode == 0, answer.stderr + answer.stdout
    return json.loads(answer.stdout)


def test_labels(runs: Callable[[str], Run], served: Callable, tmp_path: Path) -> None:
    folder = package(runs("t"), "Q8_0", output=tmp_path / "zip", n_threads=1, web=True).product.path
    info = read_json(folder / "model_info.json")
    address, process = served(folder)
    seen = drive(address, info["checks"][0]["text"], "measure", f"without={process}")
    result, stored = seen["result"], info["checks"]
    assert seen["errors"] == [] and seen["hosts"] == ["127.0.0.1"]
    assert result["sha256"] == info["sha256"] and result["runtime"]["isolated"] is True
    assert result["checks"]["exact"] == result["checks"]["n"] == result["checks"]["prompts_as_stored"] == len(stored)
    assert result["rows"]["n"] == result["rows"]["agree"] == len(stored)
    assert 0 < result["rows"]["largest_gap_nats"] < GAP_NATS
    assert len(result["load"]["seconds"]) == 3 and len(result["generation"]["tokens_per_second"]) == 5
    margin = stored[0]["labels"][1] - stored[0]["labels"][0]
    assert seen["shares"][1] == pytest.approx(100 / (1 + 2.718281828**-margin), abs=100 * GAP_NATS / 4)
    (saved,) = (tmp_path / "package-devices").iterdir()  # posted back, and checked on arrival
    assert read_json(saved)["rows"] == result["rows"] and "Sent" in seen["sent"]
    assert seen["offline"]["shares"] == seen["shares"] and seen["wide"] is False


def test_conversation_in_parts_and_in_the_slower_build(
    runs: Callable[[str], Run], served: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.stages.package.phone_page.LARGEST_PART", 1_000_000)
    folder = package(runs("talk"), "F16", output=tmp_path / "zip", n_threads=1, web=True, force=True).product.path
    assert len(read_json(folder / "web" / "page.json")["parts"]) > 1
    seen = drive(served(folder)[0], "房间怎么样？", "measure", "compat")
    checks = seen["result"]["checks"]
    assert seen["errors"] == [] and seen["result"]["runtime"]["compat"] is True
    assert checks["exact"] == checks["n"] == 5 and checks["same_tokens"] == checks["tokens"] > 0
    assert seen["written"] and seen["result"]["rows"]["largest_gap_nats"] is None
