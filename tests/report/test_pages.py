"""Pages and indexes from a manifest made by hand: what is shown, what is escaped, what may be missing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from lib.report import display, html, index
from lib.report.html import problems_in
from lib.report.index import Stage, summarise
from lib.runs.files import write_json
from lib.runs.run import ProductDraft, Run, open_run

HOSTILE = "<script>alert(1)</script>"


def make(run: Run, product: str, files: dict[str, Any], notes: list[str] = (), **filled: dict[str, Any]) -> None:
    """Make a product with JSON files."""

    def build(work: ProductDraft) -> None:
        for name, value in files.items():
            write_json(work.folder / name, value)
        work.notes += notes
        work.facts |= filled.get("facts", {})
        work.metrics |= filled.get("metrics", {})

    run.produce(product, build, parameters={"seed": 1, "system_prompt": HOSTILE})


FACTS = {
    "source": "a folder",
    "base_model": "Qwen/Qwen3-0.6B",
    "base_revision": "c1899de289a04d12100db370",
}
EVALUATION = {
    "n": 100,
    "accuracy_linear_floor": 0.9,
    "accuracy_linear_floor_interval": [0.82, 0.95],
    "accuracy_base": 0.5,
    "accuracy_base_interval": [0.404, 0.596],
    "accuracy_finetuned": 0.93,
    "accuracy_finetuned_interval": [0.86, 0.97],
    "accuracy_finetuned_leak_free": 0.91,
    "accuracy_finetuned_leak_free_interval": [0.83, 0.96],
}
COMPARISON = {
    "files": [
        {
            "type": "F16",
            "bytes": 4_000_000,
            "bits_per_weight": 16.0,
            "accuracy": 0.93,
            "accuracy_interval": [0.86, 0.97],
            "n": 100,
        },
        {
            "type": "Q4_K_M",
            "bytes": 1_250_000,
            "bits_per_weight": 4.85,
            "accuracy": 0.92,
            "accuracy_interval": [0.85, 0.96],
            "flips": 3,
            "n": 100,
            "kld_mean": 0.0123,
            "verdict": "good enough",
            "loss": 1.0,
            "loss_interval": [-0.5, 1.9],
        },
    ],
    "recommendation": {
        "type": "Q4_K_M",
        "headline": "Take Q4_K_M: the smallest file that is good enough.",
        "text": "At most 0.90 points are lost.",
        "details": "All of it.",
        "warning": "",
        "margin": 1.0,
        "unit": "accuracy points",
    },
}


def test_an_empty_run_gives_an_index_that_says_so(home: Path) -> None:
    folder = home / "reports" / "empty"
    summary = summarise(open_run("empty"))
    page = index.write_run_index(folder, summary, [Stage("01_data", "01 · Data", "What?", False)], "It stopped.")
    text = page.read_text(encoding="utf-8")
    assert problems_in(text) == []
    assert "It stopped." in text and "not read yet" in text and "Which file?" not in text


@pytest.mark.parametrize(("leak_free", "shown"), [(90, True), (100, False)])
def test_leak_free_rows_are_told_apart_where_some_row_leaked(leak_free: int, shown: bool, home: Path) -> None:
    run = open_run("full")
    make(run, "data", {"floor.json": {"test": {"accuracy": 0.1}}}, facts=FACTS)
    told = {"models": {"base": {"leak_free": {"n": leak_free}}}}
    make(run, "evaluation", {"evaluation.json": told}, metrics=EVALUATION)
    text = index.write_run_index(home / "reports" / "full", summarise(run), []).read_text(encoding="utf-8")
    assert ("0.910 [0.830, 0.960]" in text.replace("\u00a0", " ")) == shown and "0.930" in text


def test_the_index_shows_headline_numbers(home: Path) -> None:
    run = open_run("full")
    make(run, "data", {"floor.json": {"test": {"accuracy": 0.1}}}, facts=FACTS, notes=["a fallback"])
    make(run, "evaluation", {"evaluation.json": {}}, metrics=EVALUATION)
    make(run, "comparison", {"comparison.json": COMPARISON})
    folder = home / "reports" / "full"
    text = index.write_run_index(folder, summarise(run), []).read_text(encoding="utf-8")
    assert problems_in(text) == []
    plain = re.sub(r"<[^>]+>", " ", text).replace("\u00a0", " ")
    for words in (
        *("0.930 [0.860, 0.970]", "0.910 [0.830, 0.960]", "0.500 [0.404, 0.596]", "0.900 [0.820, 0.950]"),
        *("Take Q4_K_M: the smallest", "At most 0.90 points", "All of it.", "Q4_K_M ★", "1.25", "4.85", "0.012"),
        *("Qwen/Qwen3-0.6B @ c1899de289a0", "a fallback", "good enough", "n = 100"),
    ):
        assert words in plain, words
    assert HOSTILE not in text and "&lt;script&gt;" in text
    assert 'aria-label="Loss by file size in accuracy points, margin 1. Q4_K_M' in text.replace("\u00a0", " ")
    overview = index.write_all_index(home / "reports", 7).read_text(encoding="utf-8")
    assert problems_in(overview) == []
    assert "0.930 [0.860,\u00a00.970]" in overview and "Q4_K_M, 1.25 MB" in overview and "0 of 7 pages" in overview


def test_the_time_of_an_adapter_names_what_the_offline_base_took(home: Path) -> None:
    """Its product makes the base where that is not there yet; a second run finds it."""
    from nbformat import v4

    for name, seconds, told in (("first", 73.2, True), ("second", 0.1, False), ("hub", None, False)):
        run = open_run(name)
        make(run, "adapter", {"training.json": {}}, facts={} if seconds is None else {"base_seconds": seconds})
        text = index.write_run_index(home / "reports" / name, summarise(run), []).read_text(encoding="utf-8")
        assert ("s were the pre-training of the offline base" in text and "; 73 s of the adapter" in text) == told
        assert ("pre-training" in text) == told
        path = home / "02_finetune.ipynb"
        nbformat.write(v4.new_notebook(cells=[v4.new_markdown_cell("# Title\n\n> What?")]), path)
        assert ("(73 s of them the pre-training" in html.render(path, summarise(run), [])) == told


def test_several_stamps_stand_in_one_line(home: Path) -> None:
    run = open_run("full")
    make(run, "data", {"floor.json": {}}, facts=FACTS, notes=["sample data", "half of it was left out", "a <fallback>"])
    text = index.write_run_index(home / "reports" / "full", summarise(run), []).read_text(encoding="utf-8")
    assert text.count('class="stamp" role="note"') == 1
    assert "sample data; half of it was left out; a &lt;fallback&gt;" in text


def test_speeds_of_other_programs_stand_in_no_column_of_llama_cpp(home: Path) -> None:
    run, speed = open_run("full"), {"generation_tokens_per_second": 4321.0}
    gguf, folder = COMPARISON["files"][1] | speed, COMPARISON["files"][1] | speed
    files = [COMPARISON["files"][0], gguf, folder | {"type": "nf4", "kind": "folder"}]
    make(run, "data", {"floor.json": {}}, facts=FACTS)
    make(run, "comparison", {"comparison.json": {**COMPARISON, "files": files}})
    text = index.write_run_index(home / "reports" / "full", summarise(run), []).read_text(encoding="utf-8")
    assert "tokens/s in llama.cpp" in text and text.count("4,321") == 1


def test_before_the_evaluation_the_floor_comes_from_the_data(home: Path) -> None:
    run = open_run("early")
    floor = {"accuracy": 0.8, "accuracy_interval": [0.49, 0.943], "n": 10}
    make(run, "data", {"floor.json": {"test": {"accuracy": 0.8, "all": floor}}}, facts=FACTS)
    quality, n = summarise(run).qualities["linear floor"]["all"]
    assert f"{quality:.3f}" == "0.800 [0.490,\u00a00.943]" and n == 10


def test_a_damaged_manifest_does_not_hide_the_other_runs(home: Path) -> None:
    for name in ("good", "bad"):
        index.write_run_index(home / "reports" / name, summarise(open_run(name)), [])
    (home / "runs" / "bad").mkdir(parents=True)
    (home / "runs" / "bad" / "manifest.json").write_text("{", encoding="utf-8")
    text = index.write_all_index(home / "reports", 7).read_text(encoding="utf-8")
    assert "good/index.html" in text and "its manifest cannot be read" in text


def test_a_page_is_complete_and_readable(home: Path, write_notebook: Callable[..., Path]) -> None:
    run = open_run("page")
    stamp = "sample data: not a result about ChnSentiCorp"
    make(run, "data", {"a.json": 1}, facts=FACTS, notes=[stamp])
    path = write_notebook("01_data", "# Load the rows\nx = 1", "2", prose=["| a | b |\n|---|---|\n| 1 | 2 |"])
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].metadata["tags"] = ["remove_cell"]
    figure = '<figure><img alt="it falls" src="data:image/png;base64,AA=="><figcaption>负面</figcaption></figure>'
    notebook.cells[-2].outputs = [
        nbformat.v4.new_output(
            "display_data", {"text/html": figure, "text/plain": "<IPython.core.display.HTML object>"}
        )
    ]
    nbformat.write(notebook, path)
    stages = [Stage("01_data", "01 · Data", "", True), Stage("02_finetune", "02 · Fine-tune", "", False)]
    text = html.render(path, summarise(run), stages)
    assert problems_in(text) == []
    assert '<html lang="en">' in text and "<title>01 · Data – run page</title>" in text
    assert "sample data: not a result about ChnSentiCorp" in text
    assert 'aria-current="page"' in text and "02_finetune.html" not in text
    assert "<figcaption>负面</figcaption>" in text and "IPython.core" not in text
    assert "<summary>Code: Load the rows</summary>" in text and '<pre><span></span><span class="mi">2' not in text
    assert re.search(r'<div class="scroll"[^>]*><table', text), "a table does not scroll"
    assert "SHA-256" in text and "torch" in text and HOSTILE not in text
    assert text.count("<h1") == 1


def test_the_comparison_opens_with_its_answer(home: Path, tmp_path: Path) -> None:
    """The cell of the answer stands directly below title and question, wherever the notebook has it; escaped."""
    v4, run, path = nbformat.v4, open_run("full"), tmp_path / "07_compare_quantized.ipynb"
    advice = {**COMPARISON["recommendation"], "headline": "Take <b>Q4_K_M</b>.", "text": HOSTILE}
    box = v4.new_output("display_data", {"text/html": display.markup("answer", advice, "more")})
    other = v4.new_output("display_data", {"text/markdown": "Later."})
    cells = [
        v4.new_markdown_cell("# Title\n\n> What?"),
        v4.new_markdown_cell("## Later"),
        v4.new_code_cell("2", outputs=[other]),
        v4.new_code_cell("1", outputs=[box], metadata={"tags": ["answer"]}),
    ]
    nbformat.write(v4.new_notebook(cells=cells), path)
    page = html.render(path, summarise(run), [])
    body = page.partition('<main id="content">')[2]
    assert (
        body.index("What?") < body.index('<div class="answer">') < body.index("Later</h2>") < body.index("Later.</p>")
    )
    assert page.count('<div class="answer">') == 1 and HOSTILE not in page and "<b>Q4_K_M" not in page
    assert problems_in(page) == []


@pytest.mark.parametrize(
    ("task", "parameters", "words"),
    [
        ("classification", {"equivalence_margin": 1.5}, ("a loss of 1.5 accuracy points or more is excluded", "flips")),
        ("dialogue", {"perplexity_margin": 2.0}, ("a loss of 2 % of answer perplexity or more is excluded",)),
    ],
)
def test_the_overview_explains_its_words(task: str, parameters: dict, words: tuple, home: Path, tmp_path: Path) -> None:
    run = open_run("full")
    content = {**COMPARISON, "recommendation": {**COMPARISON["recommendation"], "rule": "The smallest that …"}}
    make(run, "data", {"task.json": {}}, facts={**FACTS, "task": task})
    given = {**parameters, "seed": 43}
    run.produce("comparison", lambda work: write_json(work.folder / "comparison.json", content), given)
    text = index.write_run_index(tmp_path, summarise(run), []).read_text(encoding="utf-8")
    assert problems_in(text) == []
    reading = re.search(r"How to read this</summary>\s*<dl.*?</dl>", text, re.S)[0]
    common = (
        "good enough",
        "not shown",
        "no verdict",
        "KLD",
        "seed 43",
        "evidence of page 07",
    )
    assert all(word in reading for word in (*common, *words))
    assert "The smallest that" not in text, "the rule stands in 07 alone"


def test_perplexities_stand_where_there_are_no_accuracies(home: Path, tmp_path: Path) -> None:
    run = open_run("spoken")
    model = {"perplexity": 12.5, "perplexity_interval": [11.0, 14.0]}
    part = {"n": 40, "base": model, "finetuned": {**model, "perplexity": 12.0}}
    make(run, "data", {"task.json": {}}, facts={**FACTS, "task": "dialogue"})
    make(run, "evaluation", {"evaluation.json": {"parts": {"all": part}}}, metrics={"n": 40})
    file = {"type": "F16", "bytes": 4_000_000, "answer_ppl": 12.034, "answer_ppl_interval": [11.0, 13.5]}
    make(run, "comparison", {"comparison.json": {"files": [file], "recommendation": {}}})
    text = index.write_run_index(tmp_path, summarise(run), []).read_text(encoding="utf-8")
    assert "Perplexity of the reference answers" in text and "12.500 [11.000,\u00a014.000]" in text
    assert "answer perplexity ↓" in text and "12.034 [11.000,\u00a013.500]" in text and "Accuracy" not in text
