"""A wrong model is named before the others are scored; what was scored is said to be kept where one fails later."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lib.errors import InputError
from lib.scoring.backend import journal_path
from lib.stages.evaluate.standalone import evaluate_models
from tests.scoring.conftest import Tiny
from tests.stages.evaluate.conftest import save_adapter, test_rows


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was scored; the second model fails while it runs."""
    done: list[str] = []

    def child(function: str, argument: dict, what: str) -> dict:
        done.append(what)
        if argument["keep"]:
            Path(argument["keep"]).parent.mkdir(exist_ok=True)
            Path(argument["keep"]).write_text("kept")
        raise InputError("a child that failed.", "an answer.", "try again.")

    monkeypatch.setattr("lib.stages.evaluate.standalone.run_child", child)
    return done


def _wrong(kind: str, small: Tiny, folder: Path) -> Path | str:
    path = folder / kind
    if kind == "cut.gguf":
        path.write_bytes(small.gguf.read_bytes()[:-10])
    elif kind == "page.gguf":
        path.write_text("<html>")
    elif kind == "no tokenizer":
        shutil.copytree(small.folder, path, ignore=shutil.ignore_patterns("token*", "*.gguf"))
    elif kind == "cut adapter":
        save_adapter(small, path)
        (path / "adapter_model.safetensors").write_bytes(b"short")
    elif kind == "baseless adapter":
        save_adapter(small, path)
        config = (path / "adapter_config.json").read_text().replace(str(small.folder), str(folder / "gone"))
        (path / "adapter_config.json").write_text(config)
    else:
        return kind
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("cut.gguf", "ends at byte"),
        ("page.gguf", "HTML"),
        ("no tokenizer", "no tokenizer in"),
        ("cut adapter", "no readable adapter_model.safetensors"),
        ("baseless adapter", "no folder"),
        ("nosuchmodel", "no file or folder of that name here, and no model in the cache"),
    ],
)
def test_nothing_is_scored_where_a_later_model_is_wrong(
    kind: str, words: str, small: Tiny, tmp_path: Path, scored: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=words):
        evaluate_models([small.gguf, _wrong(kind, small, tmp_path)], test_rows()[:2], small.task)
    assert scored == []


def test_where_the_scores_are_kept_is_said(
    small: Tiny, tmp_path: Path, scored: list[str], capsys: pytest.CaptureFixture
) -> None:
    keep = tmp_path / ".out.scores"
    with pytest.raises(InputError, match="child that failed"):
        evaluate_models([small.gguf, small.folder], test_rows()[:2], small.task, keep=keep)
    assert f"kept in {keep}" in capsys.readouterr().err and journal_path(keep, small.gguf).is_file()
    with pytest.raises(InputError, match="child that failed"):
        evaluate_models([small.gguf], test_rows()[:2], small.task)
    assert "kept" not in capsys.readouterr().err and len(scored) == 2
