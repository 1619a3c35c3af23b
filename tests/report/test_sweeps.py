"""The list of all runs: recipes with the spread of their seeds, and several processes that write it at once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from lib.report import index
from lib.report.html import problems_in
from lib.report.index import summarise, sweep_tables, write_all_index
from lib.runs.files import PROJECT, write_json, write_jsonl
from lib.runs.run import ProductDraft, Run, open_run


def trained(name: str, accuracy: float, rows: str = "one", **parameters: Any) -> Run:
    """A run with 01 to 03; `parameters` are of its training."""
    run = open_run(name)

    def data(work: ProductDraft) -> None:
        write_jsonl(work.folder / "test.jsonl", [{"text": rows}])
        work.facts |= {"source": "a folder", "base_model": "offline", "base_revision": "one", "offline_base": True}

    def evaluation(work: ProductDraft) -> None:
        write_json(work.folder / "evaluation.json", {})
        work.metrics |= {"n": 200, "accuracy_finetuned": accuracy, "accuracy_finetuned_interval": [0.0, 1.0]}

    def adapter(work: ProductDraft) -> None:
        write_json(work.folder / "training.json", {})

    run.produce("data", data, {"seed": 42, "base_model": "offline"})
    run.produce("adapter", adapter, parameters, ("data",))
    run.produce("evaluation", evaluation, {}, ("data", "adapter"))
    index.write_run_index(run.folder.parents[1] / "reports" / name, summarise(run), [])
    return run


def test_a_sweep_is_one_table_of_recipes(home: Path) -> None:
    for rank, seed, accuracy in ((8, 1, 0.70), (8, 2, 0.74), (16, 1, 0.80), (16, 2, 0.90)):
        trained(f"mine-lora_r{rank}-s{seed}", accuracy, seed=seed, lora_r=rank)
    trained("wide", 0.60, seed=1, lora_r=8, use_dora=True)
    trained("alone", 0.99, rows="other", seed=1)
    found = [summarise(open_run(name.parent.name)) for name in (home / "runs").glob("*/manifest.json")]
    [table] = sweep_tables(found)
    assert "the same 200 test rows (a folder): accuracy over the seeds" in table.caption
    assert [row[:5] for row in table.rows] == [
        ["use_dora False, lora_r 16", "mine-lora_r16-s1, mine-lora_r16-s2", "2", "0.8500", "0.0707"],
        ["use_dora False, lora_r 8", "mine-lora_r8-s1, mine-lora_r8-s2", "2", "0.7200", "0.0283"],
        ["use_dora True, lora_r 8", "wide", "1", "0.6000", "–"],
    ]
    assert table.rows[0][5].replace("\u00a0", " ") == "[0.8000, 0.9000]"
    text = write_all_index(home / "reports").read_text(encoding="utf-8")
    assert problems_in(text) == [] and text.count("<caption>Recipes on the same") == 1


def test_two_runs_with_one_seed_are_no_spread(home: Path) -> None:
    trained("first", 0.7, seed=1)
    trained("second", 0.9, seed=1)
    adopted = [trained(name, 0.8, adapter="given", adapter_revision="a") for name in ("third", "fourth")]
    [table] = sweep_tables([summarise(run) for run in (open_run("first"), open_run("second"), *adopted)])
    assert [row[2:5] for row in table.rows if row[1] in ("third", "fourth")] == [["1", "0.8000", "–"]] * 2
    assert [row[2:5] for row in table.rows if row[1] in ("first", "second")] in (
        [["1", "0.7000", "–"]],
        [["1", "0.9000", "–"]],
    )


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.report.test_sweeps import trained
from lib.report.index import write_all_index
from lib.runs.files import reports_folder
for number in range(5):
    trained(f"run-{sys.argv[2]}-{number}", 0.5, seed=number, lora_r=int(sys.argv[2]) + 1)
    write_all_index(reports_folder())
"""


def test_the_list_is_whole_after_and_while_several_reports_write_it(home: Path) -> None:
    """Each process adds five runs; whoever reads meanwhile sees a whole page, and at the end no run is missing."""
    command = [sys.executable, "-c", WRITER, str(PROJECT)]
    writers = [subprocess.Popen([*command, str(number)], cwd=PROJECT) for number in range(3)]
    path, seen = home / "reports" / "index.html", 0
    while any(writer.poll() is None for writer in writers):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert text.rstrip().endswith("</html>")
            seen += 1
    assert [writer.returncode for writer in writers] == [0, 0, 0] and seen
    listed = set(re.findall(r'href="(run-\d-\d)/index\.html"', path.read_text(encoding="utf-8")))
    assert len(listed) == 15 and len(re.findall(r"lora_r \d+</td>", path.read_text(encoding="utf-8"))) == 3
    assert [entry.name for entry in path.parent.iterdir() if entry.is_dir() and entry.name.startswith(".")] == []
