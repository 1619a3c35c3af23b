"""The whole quick run, as a user types it: seven pages without faults, and a second run that changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from lib.runs.manifest import NOTEBOOK_OF
from lib.settings import Settings
from tests.support.browser import measured, needs_browser, printed, sheets
from tests.support.pages import broken_links, problems

pytestmark = pytest.mark.report
PROJECT = Path(__file__).resolve().parents[1]
NAMES = list(dict.fromkeys(NOTEBOOK_OF.values()))
STAMP = "offline base model, sample data: not a result about Qwen or ChnSentiCorp"


def report(home: Path, *options: str, measured: bool = True) -> subprocess.CompletedProcess:
    """`measured`: with coverage, where the tests run with it."""
    command = [sys.executable, "-m", "lib.cli", "report", "params/quick.yaml", *options]
    environment = {**os.environ, "WORKBOOK_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    if not measured:
        environment.pop("COVERAGE_PROCESS_CONFIG", None)
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=1200)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("home")
    ended = report(home, measured=False)  # a third faster; the second run measures the notebooks
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "Expected until the end of 07_compare_quantized, roughly: " in ended.stderr
    yield home


def manifest(home: Path) -> dict:
    return json.loads((home / "runs/quick/manifest.json").read_text(encoding="utf-8"))["products"]


def test_every_page_is_there_and_without_faults(finished: Path) -> None:
    folder = finished / "reports/quick"
    for name in NAMES:
        page = folder / f"{name}.html"
        assert problems(page) == []
        assert STAMP in page.read_text(encoding="utf-8")
        assert (folder / f"{name}.ipynb").is_file()
    for index in (folder / "index.html", finished / "reports/index.html"):
        assert problems(index) == []
        assert STAMP in index.read_text(encoding="utf-8")
    assert broken_links(folder) == []


PAGES = [*NAMES, "index"]
SHEETS = {"07_compare_quantized": 6}
"""Most sheets of A4 that a page prints on, where it may be more than four."""


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", PAGES)
def test_every_page_fits_a_desk_and_a_phone(name: str, width: int, finished: Path) -> None:
    found = measured(finished / f"reports/quick/{name}.html", width)
    assert found["width"] == width and found["boxes"] > 50
    assert found["problems"] == []


@needs_browser
@pytest.mark.parametrize("name", PAGES)
def test_every_page_prints_on_few_sheets(name: str, finished: Path, tmp_path: Path) -> None:
    assert 1 <= printed(finished / f"reports/quick/{name}.html", tmp_path) <= SHEETS.get(name, 4)


def test_the_comparison_opens_with_the_answer_that_the_terminal_ends_with(finished: Path) -> None:
    page = BeautifulSoup((finished / "reports/quick/07_compare_quantized.html").read_text("utf-8"), "html.parser")
    box = [line.get_text().replace("\u00a0", " ") for line in page.select("main div.answer > p")]
    ended = report(finished, measured=False)
    answer, opened = ended.stdout.splitlines()[-2:]
    assert answer == " ".join(box)
    assert opened == f"Open in a browser: {finished / 'reports/quick/index.html'}"
    found = json.loads((finished / "runs/quick/comparison/comparison.json").read_text("utf-8"))["recommendation"]
    assert box[:2] == [found["headline"], found["text"]]


@needs_browser
def test_the_whole_run_as_one_pdf(finished: Path) -> None:
    """Another title or more detail starts no kernel; the terminal names the file."""
    options = ("-p", "author=A. Student", "-p", "course=Seminar", "--pdf")
    made, counts = finished / "reports/quick/report.pdf", {}
    for detail in ("full", "short"):
        ended = report(finished, *options, "-p", f"detail={detail}", measured=False)
        assert ended.returncode == 0, ended.stderr[-4000:]
        assert ended.stderr.count("unchanged, no kernel started") == len(NAMES)
        assert ended.stdout.splitlines()[-1] == f"To hand in: {made}"
        counts[detail] = sheets(made)
    assert 12 <= counts["short"] <= 40 and counts["short"] < counts["full"] <= 80


def test_the_task_is_learnable_and_not_trivial(finished: Path) -> None:
    metrics = manifest(finished)["evaluation"]["metrics"]
    assert metrics["accuracy_finetuned"] > metrics["accuracy_base"] + 0.2
    assert metrics["accuracy_finetuned"] < 1.0


def test_the_ladder_keeps_its_promises(finished: Path) -> None:
    comparison = json.loads((finished / "runs/quick/comparison/comparison.json").read_text(encoding="utf-8"))
    files = {entry["type"]: entry for entry in comparison["files"]}
    ladder = {name for name, entry in files.items() if entry["kind"] == "gguf"}
    assert ladder == {"F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K"}
    assert files["F16"]["flips"] == 0 and files["F16"]["kld_mean"] < 1e-6
    assert files["Q8_0"]["flips"] <= 0.01 * files["Q8_0"]["n"]
    assert files["Q2_K"]["kld_mean"] > files["Q4_K_M"]["kld_mean"] > files["Q8_0"]["kld_mean"] > 0
    assert files["Q2_K"]["bytes"] < files["Q4_K_M"]["bytes"] < files["Q8_0"]["bytes"] < files["F16"]["bytes"]
    for entry in files.values():
        low, high = entry["accuracy_interval"]
        assert 0 <= low <= entry["accuracy"] <= high <= 1 and "no loss" not in entry["verdict"]


def test_every_export_is_scored_or_skipped_with_a_reason(finished: Path) -> None:
    folder = finished / "runs/quick"
    exports = json.loads((folder / "exports/exports.json").read_text(encoding="utf-8"))
    comparison = json.loads((folder / "comparison/comparison.json").read_text(encoding="utf-8"))
    made = [record["format"] for record in exports["made"]]
    skipped = {record["format"]: record["reason"] for record in exports["skipped"]}
    assert sorted([*made, *skipped]) == sorted(Settings().export_formats)
    assert [entry["type"] for entry in comparison["files"] if entry["kind"] == "folder"] == made
    for name in ("06_quantize", "07_compare_quantized"):
        page = (finished / f"reports/quick/{name}.html").read_text(encoding="utf-8")
        assert all(name in page for name in made) and all(reason in page for reason in skipped.values())
    assert comparison["recommendation"]["type"] not in made
    for record in exports["made"]:
        assert 0 <= record["check"]["mean_kld"] < 0.1 and record["bits_per_weight"] < 16.1


def test_memory_stays_small(finished: Path) -> None:
    assert max(entry["peak_memory_mib"] for entry in manifest(finished).values()) < 4096


def files_of_runs(home: Path) -> dict[Path, int]:
    """Time of the last change of every file of the products."""
    return {p: p.stat().st_mtime_ns for p in (home / "runs").rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_second_report_starts_no_kernel(finished: Path) -> None:
    """Nothing has changed: the pages stay as they are."""
    pages = {p: p.stat().st_mtime_ns for p in (finished / "reports/quick").glob("0*.*")}
    before = files_of_runs(finished)
    ended = report(finished, measured=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    said = [line for line in ended.stderr.splitlines() if "unchanged, no kernel started" in line]
    assert len(said) == len(NAMES) and all(name in line for name, line in zip(NAMES, said, strict=True))
    assert pages == {p: p.stat().st_mtime_ns for p in (finished / "reports/quick").glob("0*.*")}
    assert before == files_of_runs(finished)


def test_a_second_run_changes_no_product(finished: Path) -> None:
    """All cells run once more, and every stage finds its product."""
    before, entries = files_of_runs(finished), manifest(finished)
    ended = report(finished, "--rerun")
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert before == files_of_runs(finished)
    assert manifest(finished) == entries
    for name in NAMES:
        assert "nothing to do" in (finished / f"reports/quick/{name}.html").read_text(encoding="utf-8")
