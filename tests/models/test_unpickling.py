"""Pickled weights as safetensors: bit for bit what the pickle holds, and nothing of it run."""

from __future__ import annotations

import collections
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lib.errors import InputError
from lib.models.base_model import check_model_folder
from lib.models.unpickle import unpickle
from lib.models.weights import open_weights, read_file

CONFIG = {"model_type": "qwen2", "hidden_size": 8, "vocab_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(autouse=True)
def quick_children(forked_children: None) -> None:
    """Torch is imported once."""


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
        for name, tensor in tensors.items()
    }


def weights() -> dict[str, torch.Tensor]:
    """Many dtypes; views that are not contiguous, no elements, one number, NaN and infinity."""
    torch.manual_seed(0)
    wide = torch.randn(16, 24)
    return {
        EMBEDDING: torch.randn(16, 8).to(torch.bfloat16),
        "turned": wide.t(),
        "a slice": wide[3:7, ::2],
        "half": torch.tensor([float("nan"), float("inf"), -0.0], dtype=torch.float16),
        "double": torch.randn(3, dtype=torch.float64),
        "number": torch.tensor(7),
        "nothing": torch.empty(0, 4),
        "mask": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "given"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "tokenizer_config.json").write_text("{}")
    (path / "modeling_own.py").write_text("raise SystemExit('ran')")
    return path


def refused(folder: Path, words: str) -> str:
    output = folder.with_name("refused")
    with pytest.raises(InputError, match=words) as caught:
        unpickle(folder, output)
    assert [path.name for path in folder.parent.iterdir() if path.name.lstrip(".").startswith("refused")] == []
    return str(caught.value)


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "before torch 1.6"])
def test_every_bit_is_that_of_the_pickle(folder: Path, tmp_path: Path, archive: bool) -> None:
    torch.save(weights(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
    before = (folder / "pytorch_model.bin").read_bytes()
    report = unpickle(folder, tmp_path / "out")
    assert bits(load_file(tmp_path / "out" / "model.safetensors")) == bits(weights())
    assert read_file(tmp_path / "out" / "model.safetensors")[1] == {"format": "pt"}
    assert report["copied"] == ["config.json", "tokenizer_config.json"] and report["tensors"] == len(weights())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("config.json", "model.safetensors", "tokenizer_config.json"),
    ]
    assert (folder / "pytorch_model.bin").read_bytes() == before


def test_shards_stay_shards(folder: Path, tmp_path: Path) -> None:
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    parts: list[dict[str, torch.Tensor]] = [{EMBEDDING: torch.randn(16, 8)}, {"model.norm.weight": torch.ones(8)}]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, folder / name)
    index = {"metadata": {}, "weight_map": {key: name for name, part in zip(names, parts, strict=True) for key in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    unpickle(folder, tmp_path / "out")
    opened = open_weights(tmp_path / "out")
    assert [path.name for path in opened.files] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert bits({name: tensor.tensor() for name, tensor in opened.tensors.items()}) == bits(parts[0] | parts[1])
    assert not (tmp_path / "out" / "pytorch_model.bin.index.json").exists()
    index["weight_map"]["model.lost.weight"] = names[0]
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    refused(folder, "disagree on 1 tensors")
    (folder / names[1]).unlink()
    refused(folder, "missing: pytorch_model-00002")


@pytest.mark.parametrize("ties", [True, False])
def test_shared_tensors_as_transformers_saves_them(folder: Path, tmp_path: Path, ties: bool) -> None:
    """Left out where loading brings it back, and a copy where it would be drawn at random."""
    (folder / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": ties}))
    matrix = torch.randn(16, 8)
    given = {HEAD: matrix, EMBEDDING: matrix, "upper": matrix[:4]}
    torch.save(given, folder / "pytorch_model.bin")
    report = unpickle(folder, tmp_path / "out")
    assert report["left_out"] == ({HEAD: EMBEDDING} if ties else {}) and report["copies"] == (
        [] if ties else [EMBEDDING]
    )
    kept = {name: tensor for name, tensor in given.items() if not ties or name != HEAD}
    assert bits(load_file(tmp_path / "out" / "model.safetensors")) == bits(kept)


def test_a_model_loads_and_answers_as_before(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        **{key: value for key, value in CONFIG.items() if key != "model_type"}, num_key_value_heads=1,
        intermediate_size=8, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "given")
    torch.save(model.state_dict(), tmp_path / "given" / "pytorch_model.bin")
    (tmp_path / "given" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="workbook unpickle"):
        check_model_folder(tmp_path / "given")
    unpickle(tmp_path / "given", tmp_path / "out")
    check_model_folder(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_an_adapter(tmp_path: Path) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    given = {f"base_model.model.q_proj.lora_{side}.weight": torch.randn(2, 2) for side in "AB"}
    torch.save(given, folder / "adapter_model.bin")
    report = unpickle(folder, tmp_path / "out")
    assert bits(load_file(tmp_path / "out" / "adapter_model.safetensors")) == bits(given)
    assert report["copied"] == ["adapter_config.json"]


class Call:
    """A pickle of it calls a function when it is read."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def as_archive(content: bytes, path: Path) -> None:
    """A file of torch's kind around a pickle that somebody wrote by hand."""
    with zipfile.ZipFile(path, "w") as parts:
        for name, data in (("data.pkl", content), ("byteorder", b"little"), ("version", b"3\n")):
            parts.writestr(f"archive/{name}", data)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize(
    "function",
    [os.system, eval, exec, subprocess.run, shutil.rmtree, torch.load, torch.hub.load, getattr],
    ids=lambda function: f"{function.__module__}.{function.__name__}",
)
def test_what_a_pickle_asks_for_is_named_and_not_run(folder: Path, function: Callable, archive: bool) -> None:
    ran = folder.parent / "ran"
    evil = pickle.dumps({"weight": Call(function, f"touch {ran}")}, protocol=2)
    if archive:
        as_archive(evil, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(evil)
    said = refused(folder, "pytorch_model.bin")
    assert not ran.exists()
    if archive:
        assert function.__name__.split(".")[-1] in said


def test_a_reader_that_was_deceived_can_do_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a torch that would run it: the process reaches no file but the new folder's, no program, no network."""
    ran = folder.parent / "ran"
    for function in (os.system, os.mkdir):
        as_archive(pickle.dumps(Call(function, f"touch {ran}" if function is os.system else str(ran))), folder / "x")
        code = (
            "import sys, pickle, zipfile\nfrom pathlib import Path\nfrom lib.runs.confinement import confine\n"
            "confine([Path(sys.argv[1])], 1 << 30, 9)\n"
            "pickle.loads(zipfile.ZipFile(sys.argv[2]).read('archive/data.pkl'))"
        )
        command = [sys.executable, "-c", code, str(folder), str(folder / "x")]
        answer = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert answer.returncode == 1 and "PermissionError" in answer.stderr and not ran.exists()


def test_cut_changed_and_squeezed_files(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    torch.save({"weight": torch.arange(4096.0)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(folder, "pytorch_model.bin")
    at = whole.index(struct.pack("<f", 4000.0))
    path.write_bytes(whole[:at] + b"\1" + whole[at + 1 :])
    refused(folder, "data/0' is compressed or damaged|data/0 is compressed or damaged")
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as parts, zipfile.ZipFile(folder / "again", "w", zipfile.ZIP_DEFLATED) as squeezed:
        for name in parts.namelist():
            squeezed.writestr(name, parts.read(name))
    (folder / "again").replace(path)
    refused(folder, "compressed")
    path.write_bytes(b"<html>")
    refused(folder, "a web page")
    path.write_bytes(b"")
    refused(folder, "pytorch_model.bin")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(2)], "it holds a list"),
        ({}, "of nothing"),
        (torch.ones(2), "it holds a Tensor"),
        ({"step": 3, "weight": torch.ones(2)}, "'step' is a int"),
        ({"state_dict": {"weight": torch.ones(2)}}, "'state_dict' is a dict"),
        ({7: torch.ones(2)}, "'7' is a Tensor"),
        ({"weight": torch.eye(3).to_sparse()}, "'weight' is a Tensor"),
        ({"weight": torch.zeros(2, dtype=torch.complex64)}, "complex64"),
        ({"weight": torch.ones(1).expand(1 << 20)}, "bytes of tensors from a file of"),
        (collections.Counter(a=1), "is a int"),
    ],
)
def test_what_is_no_dictionary_of_tensors(folder: Path, content: Any, words: str) -> None:
    torch.save(content, folder / "pytorch_model.bin")
    refused(folder, words)


def test_the_wrong_folder(folder: Path, tmp_path: Path) -> None:
    refused(folder, "neither pytorch_model.bin nor adapter_model.bin")
    refused(tmp_path / "absent", "no folder")
    torch.save({"weight": torch.ones(2)}, folder / "pytorch_model.bin")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(InputError, match="already exists"):
        unpickle(folder, tmp_path / "out")
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../pytorch_model.bin"}}')
    (folder / "pytorch_model.bin").rename(tmp_path / "pytorch_model.bin")
    refused(folder, "index.json names")
    (folder / "model.safetensors").touch()
    refused(folder, "no pickle")
