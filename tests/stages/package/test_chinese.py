"""A package in Chinese: papers say it, and nothing but papers changes."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lib.cli.package import package as command
from lib.errors import InputError
from lib.language import CHINESE, VARIABLE
from lib.runs.files import read_json
from lib.runs.run import Run
from lib.stages.compare.recommend import reworded
from lib.stages.package.stage import package

pytestmark = pytest.mark.usefixtures("forked_children")

PAPERS = ("README.md", "deployment_guide.md", "test_model.py", "usage_examples.py")


def papers(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir() if path.suffix != ".gguf"}


def prose(text: str) -> str:
    """What people read: without front matter, code and addresses."""
    text = re.sub(r"\A---\n.*?\n---\n|^```.*?^```|`[^`]*`", " ", text, flags=re.S | re.M)
    return re.sub(r"\S+\.\w+\S*", " ", text)


def commands(text: str) -> list[str]:
    """Lines of the blocks of code, without comments."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
    lines = (re.sub(r"(^|\s+)(#|//) .*", "", line).rstrip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line]


def program(source: str) -> str:
    """A program without what is for readers alone: docstrings, comments, messages (their values stay)."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "said":
            node.args = [ast.Constant(sorted(set(re.findall(r"\{(\w+)", node.args[0].value))))]
        body = getattr(node, "body", [])
        if isinstance(body, list):
            kept = [each for each in body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
            node.body = kept
    return ast.dump(tree)


@pytest.mark.parametrize("name", ["t", "talk"])
def test_papers_are_chinese_and_code_is_the_same(
    name: str, runs: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs(name)
    english = papers(package(run, "Q8_0", output=tmp_path, n_threads=1, force=True, reworded=reworded).product.path)
    monkeypatch.setenv(VARIABLE, CHINESE)
    made = package(run, "Q8_0", output=tmp_path, n_threads=1, reworded=reworded)
    assert "language" in made.product.message  # made again
    chinese = papers(made.product.path)
    for paper in PAPERS:
        assert chinese[paper] != english[paper]
        assert not re.search(r"(?:\b[A-Za-z][a-z]+ ){3,}[a-z]+", prose(chinese[paper])) or paper.endswith(".py")
    for paper in PAPERS[:2]:
        assert commands(chinese[paper]) == commands(english[paper]) and not re.search(r"\{[{%]", chinese[paper])
        assert chinese[paper].count("\n| ") == english[paper].count("\n| ")
        assert len(re.findall(r"^#", chinese[paper], re.M)) > 3
    for paper in PAPERS[2:]:
        assert program(chinese[paper]) == program(english[paper])
        said = re.findall(r'said\("([^"]+)"', re.sub(r"\{[^}]*\}", "", chinese[paper]))
        assert len(said) > 5 and all(re.search("[\u4e00-\u9fff]", message) for message in said)
    assert chinese["README.md"].split("---\n")[1] == english["README.md"].split("---\n")[1]
    assert {"README.md"} | {"export_report.json", "model_info.json"} <= english.keys()
    same = [paper for paper in ("export_report.json", "model_info.json") if english[paper] != chinese[paper]]
    assert same == [] and read_json(made.product.path / "export_report.json")["choice"] == made.report["choice"]
    monkeypatch.setenv(VARIABLE, "en")
    assert papers(package(run, "Q8_0", output=tmp_path, n_threads=1).product.path)["README.md"] == english["README.md"]


def test_the_language_can_be_asked_for(runs: Callable[[str], Run]) -> None:
    with pytest.raises(InputError, match="--language 'fr'"):
        command(runs("t").name, language="fr")
