"""`inspect` finds a problem where the step that takes a folder or file would refuse it, and no step fails."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.cli.__main__ import app
from lib.cli.models import as_text, examine
from lib.errors import InputError
from lib.models.loading import load_model, load_tokenizer
from lib.models.weights import SINGLE
from lib.runs.machine import llama_cpp_problem
from lib.stages.convert.convert import convert
from lib.stages.merge.weights import merge_folders
from tests import tiny_gguf, tiny_run
from tests.stages.convert.convertible import write_model

Q, K, DOWN = (f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))
ADAPTER = "adapter_model.safetensors"
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and an adapter of it."""
    place = tmp_path_factory.mktemp("questions")
    base = write_model(place / "base")
    tiny_run.make_adapter(base, place / "adapter")
    return base, place / "adapter"


@pytest.fixture
def no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversion without opening the result by llama.cpp: what is refused is refused before."""
    monkeypatch.setattr("lib.stages.convert.convert.load_check", lambda path, stop=None: "not tried")


def edited(file: str, **changes: Any) -> Change:
    """Keys of a JSON file; None takes one out."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def config(**changes: Any) -> Change:
    return edited("config.json", **changes)


def lora(**changes: Any) -> Change:
    return edited("adapter_config.json", **changes)


def weights(change: Callable[[dict[str, torch.Tensor]], Any], file: str = SINGLE) -> Change:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})

    return changed


def without(name: str) -> Change:
    return weights(lambda tensors: tensors.pop(name))


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return weights(lambda tensors: tensors.update({name: make(tensors[name])}))


def write(file: str, text: str) -> Change:
    return lambda folder: (folder / file).write_text(text)


def vocabulary_without_merges(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (folder / "tokenizer.json").unlink()


def pieces_alone(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


MODELS: dict[str, tuple[Change, str]] = {
    "vocabulary without merges": (vocabulary_without_merges, "tokenizer"),
    "sentencepiece alone": (pieces_alone, "tokenizer"),
    "empty tokenizer": (write("tokenizer.json", "{}"), "tokenizer"),
    "no norm": (without("model.norm.weight"), "load"),
    "no query": (without(Q), "load"),
    "no bias": (without(Q.replace("weight", "bias")), "load"),
    "more tensors": (weights(lambda tensors: tensors.update({"foo.weight": torch.ones(3)})), "convert"),
    "whole numbers": (put(Q, lambda tensor: tensor.to(torch.int8)), "merge"),
    "eight bits": (put(Q, lambda tensor: tensor.to(torch.float8_e4m3fn)), "convert"),
    "fewer key heads": (put(K, lambda tensor: tensor[:-2].clone()), "merge"),
    "other heads": (config(head_dim=24), "load"),
    "class of another type": (config(model_type="gpt2"), "convert"),
    "state space": (config(model_type="mamba"), "load"),
    "another class": (config(model_type="xglm", architectures=["XGLMForCausalLM"]), "convert"),
    "unknown type": (config(model_type="foo"), "load"),
    "quantized": (config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), "merge"),
    "another activation": (config(hidden_act="gelu"), "convert"),
    "a sliding window": (config(use_sliding_window=True, sliding_window=32, max_window_layers=0), "convert"),
    "layers of another kind": (config(layer_types=["chunked_attention", "full_attention"]), "convert"),
    "an adapter beside it": (write("adapter_config.json", "{}"), "merge"),
    "half rotated": (config(partial_rotary_factor=0.5), "convert"),
    "another rope": (config(rope_scaling={"rope_type": "dynamic", "factor": 4.0}), "convert"),
    "no hidden size": (config(hidden_size=None), "load"),
    "no layers": (config(num_hidden_layers=None), "load"),
    "no vocabulary": (config(vocab_size=None), "load"),
    "generation in words": (write("generation_config.json", "[]"), "load"),
    "generation in pieces": (write("generation_config.json", "{"), "convert"),
    "no front matter": (write("README.md", "---\na: [\n---\n"), "convert"),
    "no template": (lambda folder: (folder / "chat_template.jinja").unlink(), "tokenizer"),
}
"""What is wrong with a model's folder, and a step that refuses it."""


@pytest.mark.parametrize("name", MODELS)
def test_no_model_is_fine_that_a_step_refuses(
    name: str, folders: tuple[Path, Path], tmp_path: Path, no_load: None
) -> None:
    base, adapter = folders
    model = Path(shutil.copytree(base, tmp_path / "model"))
    change, step = MODELS[name]
    change(model)
    assert examine(model)["problems"]
    steps: dict[str, Callable[[], Any]] = {
        "convert": lambda: convert(model, tmp_path / "out.gguf"),
        "merge": lambda: merge_folders(model, adapter, tmp_path / "merged"),
        "load": lambda: load_model(model, device="cpu"),
        "tokenizer": lambda: load_tokenizer(model),
    }
    with pytest.raises(InputError):
        steps[step]()
    assert not (tmp_path / "out.gguf").exists() and not (tmp_path / "merged").exists()


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


def one(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    return weights(change, ADAPTER)


def renamed(old: str, new: str) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return one(change)


ADAPTERS: dict[str, Change] = {
    "half a pair": one(lambda tensors: tensors.pop(FIRST)),
    "fewer targets": lora(target_modules=["q_proj"]),
    "more targets": lora(target_modules=["q_proj", "v_proj", "down_proj", "k_proj"]),
    "another layer": renamed("layers.1.", "layers.9."),
    "another module": renamed("q_proj", "x_proj"),
    "rank of one module": lora(rank_pattern={"q_proj": 2}),
    "directions": lora(use_dora=True),
    "biases": lora(bias="all"),
    "biases of targets": lora(bias="lora_only"),
    "biases of B": lora(lora_bias=True),
    "transposed": lora(fan_in_fan_out=True),
    "a changed base": lora(init_lora_weights="pissa"),
    "parameters": lora(target_parameters=["x"]),
    "a head that is not there": lora(modules_to_save=["lm_head"]),
    "some layers": lora(layers_to_transform=[0]),
    "one layer": lora(layers_to_transform=1),
    "copied layers": lora(layer_replication=[[0, 1]]),
    "Megatron": lora(megatron_config={"a": 1}),
    "tokens that are not there": lora(trainable_token_indices=[1]),
    "not a number": one(lambda tensors: tensors[FIRST].fill_(float("nan"))),
    "whole numbers": one(lambda tensors: tensors.update({FIRST: tensors[FIRST].to(torch.int8)})),
    "more tensors": one(lambda tensors: tensors.update({"base_model.model.foo.weight": torch.ones(2)})),
    "another width": one(lambda tensors: tensors.update({FIRST: tensors[FIRST][:, :-1].clone()})),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_no_adapter_is_fine_that_a_merge_refuses(name: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, whole = folders
    adapter = Path(shutil.copytree(whole, tmp_path / "adapter"))
    lora(base_model_name_or_path=str(base))(adapter)
    assert not examine(adapter)["problems"]
    ADAPTERS[name](adapter)
    assert examine(adapter)["problems"]
    with pytest.raises(InputError):
        merge_folders(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with contextlib.suppress(InputError):  # some kinds peft knows, and merging does not
        load_model(base, adapter=adapter, device="cpu")


def test_an_adapter_whose_base_is_elsewhere(folders: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(folders[1], tmp_path / "adapter"))
    lora(base_model_name_or_path="org/elsewhere")(adapter)
    assert "whether it fits was not checked" in as_text(examine(adapter))
    lora(fan_in_fan_out=True)(adapter)
    assert any("fan_in_fan_out" in problem for problem in examine(adapter)["problems"])


@pytest.mark.skipif(llama_cpp_problem() is not None, reason="llama-cpp-python does not work here")
def test_no_gguf_is_fine_that_llama_cpp_or_serve_refuses(folders: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    learned = "{% for m in messages %}{{ m.content }}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}"
    model = Path(shutil.copytree(folders[0], tmp_path / "model"))
    (model / "chat_template.jinja").write_text(learned)
    convert(model, file)
    assert not examine(file)["problems"]
    whole = file.read_bytes()
    place = whole.index(b"qwen2.block_count") + len(b"qwen2.block_count") + 4
    file.write_bytes(whole[:place] + struct.pack("<I", 0) + whole[place + 4 :])
    assert any("GGML_ASSERT" in problem for problem in examine(file)["problems"])
    tiny_gguf.write(file, layers=1, tokens=tiny_gguf.WITH_MERGE)
    assert any("no chat template" in problem for problem in examine(file)["problems"])


ROWS = "text,label\n" + "".join(f"第{i}间房,{i % 2}\n" for i in range(20))
RUNS: dict[str, tuple[dict[str, str], Change, str]] = {
    "an adapter as base": ({"base_model": "adapter"}, lambda place: None, "LoRA adapter"),
    "a quantized base": ({}, lambda place: MODELS["quantized"][0](place / "base"), "is quantized"),
    "a template without system turn": (
        {},
        lambda place: write("chat_template.jinja", "{{ messages[-1].content }}")(place / "base"),
        "leaves the turn of the system out",
    ),
    "a base without template": ({}, lambda place: MODELS["no template"][0](place / "base"), "no chat template"),
    "an adapter of another base": (
        {"adapter": "adapter"},
        lambda place: ADAPTERS["another layer"](place / "adapter"),
        "fit",
    ),
    "an adapter that cannot be merged": (
        {"adapter": "adapter"},
        lambda place: ADAPTERS["a changed base"](place / "adapter"),
        "which changed the base",
    ),
    "a base that llama.cpp computes otherwise": (
        {},
        lambda place: config(hidden_act="gelu")(place / "base"),
        "hidden_act 'gelu'",
    ),
    "a base whose cuts llama.cpp does not know": (
        {},
        lambda place: edited("tokenizer_config.json", eos_token="<|gone|>")(place / "base"),
        "for transformers",
    ),
    "no data": ({"dataset": "./nothing.csv"}, lambda place: None, "nothing.csv"),
    "an open mark": ({}, lambda place: write("rows.csv", ROWS + '"差,0\n')(place), "never closed"),
    "a cell too many": ({}, lambda place: write("rows.csv", ROWS + "好,1,1\n")(place), "3 cells"),
}
"""Parameters, what is broken, and what `workbook doctor PARAMS.yaml` says of it."""


@pytest.mark.parametrize("name", RUNS)
def test_the_doctor_asks_what_the_run_would(
    name: str, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters, change, words = RUNS[name]
    for folder in folders:
        shutil.copytree(folder, tmp_path / folder.name)
    (tmp_path / "rows.csv").write_text(ROWS, encoding="utf-8")
    change(tmp_path)
    places = {"base_model": "base", "dataset": "rows.csv", **parameters}
    lines = [f"{key}: {tmp_path / value}" for key, value in places.items()]
    (tmp_path / "p.yaml").write_text("\n".join(lines), encoding="utf-8")
    assert app(["doctor", str(tmp_path / "p.yaml")], standalone_mode=False) == 2
    assert words in capsys.readouterr().err
