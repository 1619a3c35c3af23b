"""web/ of the package: what is copied, refused and split; the browser itself is in test_phone_page.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lib.cli.package import package as command
from lib.errors import InputError
from lib.models.gguf_file import read_metadata, read_tensors
from lib.runs.files import read_json, write_jsonl
from lib.runs.run import Run
from lib.stages.package.phone_page import (
    _FILES,
    Rows,
    _require_whole_characters,
    find_rows,
    fitting,
    read_rows,
    request_web,
    split_gguf,
)
from lib.stages.package.stage import PackageResult, package
from tests.stages.compare.conftest import Ladder


def make_library(project: Path) -> Path:
    """Stand-ins for the files of the npm packages, where make wllama puts them."""
    library = project / ".cache" / "wllama" / "node_modules" / "@wllama"
    for name in _FILES:
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(f"stand-in for {name}", encoding="utf-8")
    (library / "wllama" / "package.json").write_text('{"version": "3.8.1"}', encoding="utf-8")
    return library


@pytest.fixture(scope="module")
def made(runs: Callable[[str], Run], tmp_path_factory: pytest.TempPathFactory) -> PackageResult:
    project = tmp_path_factory.mktemp("project")
    make_library(project)
    rows = project / "rows.txt"
    rows.write_text(f"房间很干净\n\n{'好' * 9000}\n服务不好\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.stages.package.phone_page.PROJECT", project)
        return package(runs("t"), "Q8_0", output=project / "zip", n_threads=1, web=True, rows=rows)


def test_the_page_is_complete(made: PackageResult) -> None:
    web = made.product.path / "web"
    page, info = read_json(web / "page.json"), read_json(made.product.path / "model_info.json")
    assert {path.name for path in (web / "wllama").iterdir()} == set(_FILES.values())
    assert page["sha256"] == info["sha256"] and page["wllama"] == "3.8.1"
    (part,) = page["parts"]
    assert (web / part["url"]).resolve() == made.product.path / made.report["file"]["name"] and part["bytes"] == page[
        "bytes"
    ]
    kept = (web / "sw.js").read_text(encoding="utf-8")
    assert all(f"'{path.name}'" in kept for path in web.glob("*.[jc]s*") if path.name != "sw.js")
    assert "web/app.js" in (made.product.path / "SHA256SUMS").read_text(encoding="utf-8")


def test_nothing_is_fetched_from_elsewhere() -> None:
    for path in (Path(__file__).parents[3] / "lib" / "stages" / "package" / "web").iterdir():
        assert "://" not in path.read_text(encoding="utf-8"), path.name


def test_the_rows_are_the_named_ones_with_this_machines_answers(made: PackageResult) -> None:
    rows = read_json(made.product.path / "web" / "rows.json")
    assert [row["text"] for row in rows["rows"]] == ["房间很干净", "服务不好"]
    assert all(len(row["labels"]) == 2 and max(row["labels"]) < 0 for row in rows["rows"])
    card = (made.product.path / "README.md").read_text(encoding="utf-8")
    assert "web/rows.json holds rows of rows.txt, which the user named (1 of 3 left out" in card
    assert "holds no row" not in card and made.report["page_rows"] == rows["source"]


def test_the_guide_names_the_page(made: PackageResult) -> None:
    text = (made.product.path / "deployment_guide.md").read_text(encoding="utf-8")
    assert "### The page, on any phone" in text and "Cross-Origin-Embedder-Policy: require-corp" in text


def test_rows_need_the_page(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--rows without --web"):
        command("t", rows=tmp_path / "rows.txt")


def test_refusals(runs: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.stages.package.phone_page.PROJECT", tmp_path)
    with pytest.raises(InputError, match="make wllama"):
        request_web(runs("t"), None)
    make_library(tmp_path)
    assert request_web(runs("t"), None).texts == ()  # rows of unknown licence are not passed on
    with pytest.raises(InputError, match="no file"):
        request_web(runs("t"), tmp_path / "absent.txt")
    (tmp_path / "rows.jsonl").write_text('{"label": 1}\n', encoding="utf-8")
    with pytest.raises(InputError, match="holds no text"):
        request_web(runs("t"), tmp_path / "rows.jsonl")
    halves = SimpleNamespace(decode=lambda ids: "\ufffd")
    with pytest.raises(InputError, match="split a character"):
        _require_whole_characters(halves, [{"name": "好", "ids": [1, 2]}])


def test_rows_of_the_sample_corpus(tmp_path: Path) -> None:
    """Fifty of them, none that is known from training."""
    write_jsonl(tmp_path / "test.jsonl", [{"text": f"房间{i}", "leaked": i % 2 == 0} for i in range(120)])
    data = SimpleNamespace(path=tmp_path, entry=SimpleNamespace(facts={"sample_data": True}))
    rows = find_rows(SimpleNamespace(require=lambda name: data), None)
    assert rows.texts == tuple(f"房间{i}" for i in range(1, 100, 2)) and "sample corpus" in rows.source


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n[1, 2]\n', "line 3 holds no text"),
        ("a.jsonl", b'{"text": 5}\n', "line 1 holds no text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1 holds half of a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.JSONL", b'{"text": 1' + b"0" * 5000 + b"}", "line 1 is not JSON"),
        (
            "a.txt",
            "好\n房间很干净\n".encode("gb18030"),
            r"not UTF-8: line 1, byte \d+ \(it would be readable as GB18030",
        ),
        ("a.txt", b"good\n\xff bad", r"not UTF-8: line 2, byte 5\."),
        ("a.txt", b"\n \r\n", "holds no text"),
        ("a.csv", b"text,label\ngood,1\n", "as JSON or a table"),
        ("a.txt", b'{"text": "a"}\n', "as JSON or a table"),
    ],
)
def test_rows_that_cannot_be_read(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}.*{words}"):
        read_rows(tmp_path / name)


def test_rows_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(f"房间\u2028{i}" for i in range(60)).encode())
    rows = read_rows(path)
    assert rows.texts[0] == "房间\u20280" and len(rows.texts) == 50 and "(the first 50 of 60)" in rows.source
    assert rows.first == f"{path}, line 1"


def test_rows_longer_than_the_context_are_counted_or_refused() -> None:
    rows = Rows(("a", "b", "c"), "rows of x", "x, line 1")
    assert fitting(rows, [10, 99, 100], 100) == ([0, 1], "rows of x (1 of 3 left out, longer than the context)")
    assert fitting(rows, [1, 2, 3], 100) == ([0, 1, 2], "rows of x")
    with pytest.raises(InputError, match="x, line 1 has 100 tokens"):
        fitting(rows, [100, 200, 300], 100)


def test_a_split_file_is_the_same_model(ladder: Ladder, tmp_path: Path) -> None:
    import llama_cpp

    whole = ladder.reference
    starts = [tensor.start for tensor in read_tensors(whole)] + [whole.stat().st_size]
    largest = max(end - start for start, end in itertools.pairwise(sorted(starts)))
    parts = split_gguf(whole, tmp_path, 2 * largest)
    assert len(parts) > 2 and parts[0].name.endswith(f"-00001-of-{len(parts):05d}.gguf")
    assert [read_metadata(part)["split.no"] for part in parts] == list(range(len(parts)))
    assert sum(len(read_tensors(part)) for part in parts) == len(read_tensors(whole))
    logits = []
    for path in (whole, parts[0]):
        llm = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, verbose=False)
        llm.eval([5, 6, 7, 8])
        pointer = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
        logits.append(np.ctypeslib.as_array(pointer, shape=(llm.n_vocab(),)).copy())
        llm.close()
    assert np.array_equal(*logits)
    with pytest.raises(InputError, match="a part for a browser holds"):
        split_gguf(whole, tmp_path, 1000)
