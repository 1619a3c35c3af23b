"""A run's own GGUF is prompted with the run's tokenizer; another model's file with its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.cli.evaluate import RowOptions
from lib.errors import InputError
from lib.runs.files import write_json
from lib.runs.run import ProductDraft, open_run
from lib.stages.evaluate.standalone import _tokenizer_for
from tests.scoring.conftest import small  # noqa: F401


def unknown_rules(source: Path, target: Path) -> Path:
    """A copy whose tokenizer rules this version cannot rebuild."""
    data = source.read_bytes()
    key = data.index(b"tokenizer.ggml.pre")
    at = data.index(b"qwen2", key)
    target.write_bytes(data[:at] + b"qwenX" + data[at + 5 :])
    return target


def test_the_runs_tokenizer_serves_the_runs_file(small, tmp_path):  # noqa: F811
    path = unknown_rules(small.gguf, tmp_path / "own.gguf")
    with pytest.raises(InputError, match="rules 'qwenX'"):
        _tokenizer_for(path, None)
    own = _tokenizer_for(path, str(small.folder))
    assert own.get_vocab() == small.tokenizer.get_vocab() and own.chat_template == small.tokenizer.chat_template


def test_another_vocabulary_is_the_files_own(small, tmp_path):  # noqa: F811
    from tests.stages.convert.convertible import write_model

    other = write_model(tmp_path / "other")
    assert _tokenizer_for(small.gguf, str(other)).get_vocab() == small.tokenizer.get_vocab()


def test_the_option_run_names_its_folder(home):
    def build(work: ProductDraft) -> None:
        write_json(work.folder / "task.json", {})

    product = open_run("r").produce("data", build, {})
    assert (
        RowOptions(None, "r").part("tokenizer") == product.path / "tokenizer"
        and RowOptions("f.csv", None).part("tokenizer") is None
    )
