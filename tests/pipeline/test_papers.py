"""The papers of an export tree in both languages, of a checkpoint with an odd name: whole Markdown, whole programs."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from bs4 import BeautifulSoup
from mistune import create_markdown

from lib.language import CHINESE, ENGLISH, speaking
from lib.pipeline.papers import PAPERS, write_papers
from lib.runs.render import render
from lib.stages.export.stage import FORMATS

NAME = 'my `model` | "a" <b>'
CHECKS = {
    "prompts": 3,
    "same_text": 2,
    "chrf": 91.5,
    "whole": 3,
    "terms": [1, 2],
    "thinking": None,
    "looping": 0,
}


def report() -> dict[str, Any]:
    files = f"gguf/{NAME}-Q8_0.gguf"
    formats = [
        {"format": "int8", "path": "int8", "title": FORMATS["int8"].title, "check": {"mean_kld": 0.01}},
        {"format": "gguf:Q8_0", "path": files, "title": "GGUF, Q8_0", "bits_per_weight": 8.5, "imatrix": True},
    ]
    told = {"tokens_per_second": 5.0, "first_token_seconds": 0.1, "peak_memory_mib": 100}
    return {
        "checkpoint": NAME,
        "kind": "adapter",
        "base_model": f"base/{NAME}",
        "merged_model": {"bytes": 2e6, "checks": CHECKS},
        "formats": [{**one, "bytes": 1e6, "checks": CHECKS} for one in formats],
        "skipped": [{"format": "gptq", "reason": "llmcompressor not installed"}],
        "notes": ["note: --base-model changes nothing: this is a full model"],
        "machine": {"processor": "a processor"},
        "evaluation": None,
        "answers": {
            "prompts": [{}] * 3,
            "decoding": {"max_new_tokens": 64},
            "models": [{"model": name, **told} for name in ("merged_model", "int8", files)],
        },
    }


@pytest.mark.parametrize("spoken", [ENGLISH, CHINESE])
def test_papers_of_an_odd_name(spoken: str, tmp_path: Path) -> None:
    with speaking(spoken):
        write_papers(tmp_path, report(), [{"prompt": 'say """'}])
    assert {path.name for path in tmp_path.iterdir()} == set(PAPERS)
    for path in tmp_path.glob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"))
    text = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.md")}
    pages = {
        name: BeautifulSoup(create_markdown(escape=False, plugins=["table"])(one), "html.parser")
        for name, one in text.items()
    }
    assert len(pages["README.md"].select("table")) == 2 and len(pages["README.md"].select("th")) == 11
    for page in pages.values():
        assert not page.select("b") and NAME in page.h1.get_text()
        for table in page.select("table"):
            assert len({len(row.select("td, th")) for row in table.select("tr")}) == 1
    assert f"gguf/{NAME}-Q8_0.gguf" in [code.get_text() for code in pages["README.md"].select("td code")]
    assert [code.get_text() for code in pages["README.md"].select("p code")][:2] == [NAME, f"base/{NAME}"]
    command = re.search(r"^llama-cli .*$", text["deployment_guide.md"], re.M)[0]
    assert shlex.split(command)[2] == f"gguf/{NAME}-Q8_0.gguf"
    read = pages["README.md"].get_text() + pages["deployment_guide.md"].get_text()
    found = re.findall("[\u4e00-\u9fff]", read + (tmp_path / "usage_examples.py").read_text(encoding="utf-8"))
    assert (len(found) > 500) == (spoken == CHINESE) and (spoken == CHINESE or not found)
    if spoken == CHINESE:
        assert "注意：--base-model 不起作用" in read and "没有安装 llmcompressor" in read and "LLM.int8()：" in read


def test_a_simulated_export_in_chinese() -> None:
    steps = ["Take the model m as it is.", "Download a/b from the hub."]
    row = {"format": "int8", "path": "int8", "bytes": 1e6, "exact": False, "memory_mib": 500, "time": "about a minute"}
    told = {"checkpoint": NAME, "steps": steps, "formats": [row], "weights": 1000}
    templates = Path(write_papers.__code__.co_filename).with_name("templates")
    with speaking(CHINESE):
        text = render(templates / "simulated.md.j2", report=told) + render(
            templates / "simulated_folder.md.j2", rows=[{**row, "title": FORMATS["int8"].title}]
        )
    assert "直接使用模型 m。" in text and "从 hub 下载 a/b。" in text and "约一分钟" in text and "离群列" in text
