"""The phone page in a browser of each language: every word that it shows before a model is loaded."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lib.language import CHINESE, PHONE, catalogue, words_of_phones
from tests.conftest import PROJECT
from tests.serve.test_phone import served

WEB = PROJECT / "lib" / "stages" / "package" / "web"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NOTE = "sample data: not a result about real text"


def packaged(folder: Path, labelled: bool) -> Path:
    """A package without a model: what the page asks for before one is loaded."""
    shutil.copytree(WEB, folder / "web")
    (folder / "web" / "wllama").mkdir()
    (folder / "web" / "wllama" / "index.min.js").write_text("export class Wllama {}", encoding="utf-8")
    labels = [{"name": name, "ids": [1]} for name in ("Take it", "Leave it")] if labelled else []
    content = {
        "model_info.json": {"labels": labels, "examples": ["Is the page green?"]},
        "web/page.json": {"title": "A", "file": "A.gguf", "run": "r", "bytes": 3e6, "notes": [NOTE]},
        "web/rows.json": {"rows": [{}, {}], "source": "the package's own sentences"},
        "web/words.json": words_of_phones([NOTE, "the package's own sentences"]),
    }
    for name, value in content.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("spoken", ["zh-CN", "en-US"])
def test_the_page_in_a_browser(spoken: str, labelled: bool, tmp_path: Path) -> None:
    folder = packaged(tmp_path / "package", labelled)
    with served(folder, tmp_path / "devices", print) as port:
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command += [f"--lang={spoken}", f"--accept-lang={spoken}", "--virtual-time-budget=8000", "--dump-dom"]
        address = f"http://127.0.0.1:{port}/token/web/"
        answer = subprocess.run([*command, address], capture_output=True, text=True, timeout=120)
    page = html.unescape(answer.stdout)
    assert "3.0 MB" in page and "Is the page green?" in page, answer.stderr[-2000:]
    seen = re.sub(r"<[^>]*>|A\.gguf|MB|Is the page green\?|workbook serve --phone", " ", page.partition("<main>")[2])
    if spoken == "zh-CN":
        assert 'lang="zh-CN"' in page and ("给文本分类" if labelled else "对话") in page
        assert "加载模型（3.0 MB）" in page and "示例数据" in page and ("自带的句子" in page) == labelled
        assert not re.search(r"[A-Za-z]+ [a-z]+", seen), seen
    else:
        assert 'lang="en"' in page and "Load the model (3.0 MB)" in page and NOTE in page
        assert not re.search("[\u4e00-\u9fff]", seen)


def test_every_word_of_the_page_is_marked_for_translation() -> None:
    known = {message.id for message in catalogue(CHINESE) if message.context == PHONE}
    page = (WEB / "index.html").read_text(encoding="utf-8").partition("<body>")[2]
    assert {text.strip() for text in re.findall(r">([^<]*[A-Za-z][^<]*)<", page)} <= known
    for path in WEB.glob("*.js"):
        source = re.sub(r"/\*\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.S)
        source = re.sub(r"//.*", "", source)
        said = re.findall(r"(\bt\()?(['`])((?:(?!\2).)*[A-Za-z]{2} [a-z]{2}(?:(?!\2).)*)\2", source)
        assert {text for mark, _, text in said if not mark} <= {"unknown device", "label best", "turn user"}, path.name
