"""Folders that were saved otherwise: named for what they are, by every command, as transformers takes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lib.cli.models import examine
from lib.errors import InputError
from lib.models.base_model import check_model_folder
from lib.models.weights import INDEX
from tests import tiny_run

pytestmark = pytest.mark.usefixtures("unmeasured_children", "forked_children")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_run.make_base(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_saved_without_its_head_is_named(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    AutoModel.from_pretrained(model).save_pretrained(tmp_path / "headless")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "headless")
    with pytest.raises(InputError, match="AutoModel saved them, without the output layer"):
        check_model_folder(tmp_path / "headless")
    AutoModelForCausalLM.from_pretrained(tmp_path / "headless").save_pretrained(tmp_path / "whole")  # the advice
    assert check_model_folder(tmp_path / "whole").parameters == check_model_folder(model).parameters


def test_an_index_without_metadata_is_refused_as_transformers_fails_on_it(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "shards"
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder, max_shard_size="100KB")
    content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    del content["metadata"]
    for odd in ({}, {"metadata": None}, {"metadata": []}, {"metadata": "x"}):
        (folder / INDEX).write_text(json.dumps(content | odd), encoding="utf-8")
        with pytest.raises((KeyError, TypeError)):
            AutoModelForCausalLM.from_pretrained(folder)
        with pytest.raises(InputError, match='has no "metadata"'):
            check_model_folder(folder)
    (folder / INDEX).write_text(json.dumps({**content, "metadata": {}}), encoding="utf-8")
    check_model_folder(folder)


def test_inspect_asks_whether_the_base_has_a_row_for_every_token_of_an_adapter(model: Path, tmp_path: Path) -> None:
    tiny_run.make_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(model)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert examine(tmp_path / "adapter")["problems"] == []
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    token = {**tokenizer["added_tokens"][-1], "id": 100_000, "content": "<|new|>"}
    tokenizer["added_tokens"].append(token)
    (tmp_path / "adapter" / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (problem,) = examine(tmp_path / "adapter")["problems"]
    assert "workbook merge" in problem and "has a token 100,000" in problem
