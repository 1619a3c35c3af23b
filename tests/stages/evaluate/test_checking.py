"""A wrong model is named before the others are scored; what was scored is said to be kept where one fails later."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lib.cli.evaluate import OpeningOptions, RowOptions, evaluate
from lib.errors import InputError
from lib.scoring.backend import journal_path
from lib.stages.evaluate.standalone import ModelOptions, evaluate_models, find_model, tokenizer_of
from lib.stages.merge.weights import merge_folders
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


OWN = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_an_adapter_is_asked_by_the_template_that_merging_takes(where: str, small: Tiny, tmp_path: Path) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    save_adapter(small, adapter)
    if where == "chat_template.jinja":
        (adapter / where).write_text(OWN)
    else:
        settings = json.loads((small.folder / where).read_text())
        (adapter / where).write_text(json.dumps(settings | {"chat_template": OWN}))
    merge_folders(small.folder, adapter, merged)
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    prompts = []
    for model in (adapter, merged):
        found = find_model(str(model), ModelOptions())
        prompts.append(tokenizer_of(found.tokenizer, found.template).apply_chat_template(turns, tokenize=False))
    assert prompts == ["[system] a\n[user] b\n"] * 2


def test_an_adapter_with_the_tokenizer_alone_is_asked_by_the_bases_template(small: Tiny, tmp_path: Path) -> None:
    save_adapter(small, tmp_path / "adapter")
    shutil.copy(small.folder / "tokenizer.json", tmp_path / "adapter")
    found = find_model(str(tmp_path / "adapter"), ModelOptions())
    assert (found.tokenizer, found.template) == (small.folder, small.folder)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"load_in_4bit": True}, "--load-in-4bit"), ({"dtype": "float32"}, "--dtype"), ({"base_model": "x"}, "--base")],
)
def test_an_option_that_no_model_heeds_is_refused(options: dict, word: str, small: Tiny, scored: list[str]) -> None:
    with pytest.raises(InputError, match=f"{word}.* for models that it changes nothing of"):
        evaluate_models([small.gguf], test_rows()[:2], small.task, options=ModelOptions(**options))
    assert scored == []


@pytest.mark.parametrize("dtype", ["bogus", "int8", "float16", "float64"])
def test_a_number_format_that_is_not_computed_with(dtype: str) -> None:
    with pytest.raises(InputError, match=f"--dtype '{dtype}'.*auto, float32 or bfloat16"):
        evaluate(["m"], opening=OpeningOptions(dtype=dtype))


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


def test_what_every_label_gets_is_printed(small: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n很好,1\n很差,0\n房间不错,1\n", encoding="utf-8")
    data = RowOptions(str(rows))
    evaluate([str(small.gguf)], data, OpeningOptions(n_threads=1), tmp_path / "out.json")
    first, second = capsys.readouterr().out.split("\n\n")
    (told,) = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["models"]
    assert "seconds_per_sample  seconds  " in first and told["seconds"] == pytest.approx(3 * told["seconds_per_sample"])
    head, *lines = [line.split() for line in second.strip().splitlines()]
    assert head == ["model", "label", "precision", "recall", "f1", "support", "answered", "负面", "answered", "正面"]
    counts = [[int(count) for count in line[-2:]] for line in lines]
    assert counts == told["confusion"] and [sum(row) for row in counts] == [1, 2]
    assert [float(line[3]) for line in lines] == pytest.approx(
        [scores["recall"] for scores in told["per_class"].values()], abs=1e-3
    )
