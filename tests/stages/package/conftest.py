"""Runs of a tiny random model that were compared, one with labels and one of conversations, and a bare Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lib.prompts.tasks import ConversationTask
from lib.runs.files import HOME_VARIABLE, write_json, write_jsonl
from lib.runs.machine import llama_cpp_problem
from lib.runs.run import ProductDraft, Run, open_run
from lib.settings import Settings
from lib.stages.compare.stage import compare
from lib.stages.quantize.stage import quantize
from tests.stages.compare.conftest import Ladder, ladder
from tests.stages.compare.test_compare_stage import make_run

__all__ = ["ladder"]

if llama_cpp_problem() is not None:
    pytest.skip("llama-cpp-python does not work here", allow_module_level=True)


def conversations(n: int) -> list[dict]:
    return [
        {
            "id": f"test-{i:05d}",
            "group": i,
            "leaked": False,
            "messages": [
                {"role": "system", "content": "你是助手。"},
                {"role": "user", "content": f"房间{i}怎么样？"},
                {"role": "assistant", "content": f"房间{i}不干净，位置方便。"},
            ],
        }
        for i in range(n)
    ]


def make_talking_run(ladder: Ladder) -> Run:
    run = open_run("talk")

    def data(work: ProductDraft) -> None:
        shutil.copytree(ladder.tokenizer_folder, work.folder / "tokenizer")
        for split in ("train", "test"):
            write_jsonl(work.folder / f"{split}.jsonl", conversations(12))
        write_json(work.folder / "task.json", ConversationTask("dialogue", "你是助手。", 192).to_json())
        work.facts |= {"source": "made here", "base_model": "Qwen/Qwen2.5-0.5B-Instruct", "base_revision": "a" * 40}

    run.produce("data", data, parameters={})
    run.produce("gguf", lambda w: shutil.copyfile(ladder.reference, w.folder / "m-F16.gguf"), {}, inputs=("data",))
    return run


def compared(run: Run, **keys: object) -> Run:
    settings = Settings(run_name=run.name, ladder=["Q8_0"], n_ctx=64, perplexity_tokens=512, n_threads=1, **keys)
    quantize(settings, run)
    if "exports" not in run.manifest.entries():
        run.produce("exports", lambda w: write_json(w.folder / "exports.json", {"made": [], "skipped": []}), {})
    compare(settings, run)
    return run


@pytest.fixture(scope="session")
def packaging_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packaging")


@pytest.fixture(scope="session")
def runs(packaging_home: Path, ladder: Ladder) -> Callable[[str], Run]:
    """runs("t") has labels, runs("talk") conversations; made once, never changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOME_VARIABLE, str(packaging_home))
        found = {
            "t": compared(make_run(ladder)),
            "talk": compared(
                make_talking_run(ladder), task="dialogue", dataset="x", system_prompt="你是助手。", generated_rows=0
            ),
        }
    return found.__getitem__


@pytest.fixture
def at_home(packaging_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(HOME_VARIABLE, str(packaging_home))
    yield


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the installed packages, but nothing of this project."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    installed = next(path for path in sys.path if path.endswith("site-packages"))
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "packages.pth").write_text(installed + "\n", encoding="utf-8")  # its own .pth files are not followed
    python = folder / "bin" / "python"
    answer = subprocess.run([python, "-I", "-c", "import lib.errors"], cwd=folder, capture_output=True, text=True)
    assert "No module named 'lib.errors'" in answer.stderr  # some package brings an empty folder lib
    return python


def unpack(archive: Path, folder: Path) -> Path:
    """The one folder of a zip, unpacked."""
    with zipfile.ZipFile(archive) as content:
        assert content.testzip() is None
        content.extractall(folder)
    (root,) = folder.iterdir()
    return root


def python_in(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script of the package, alone with its folder."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "WORKBOOK"))}
    return subprocess.run(
        [python, "-I", "-B", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
