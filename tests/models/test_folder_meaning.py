"""What a folder is: one meaning for everything that can stand there twice, equal to transformers'; heads, sizes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from lib.cli.models import examine
from lib.errors import InputError
from lib.models.base_model import check_base_folder, check_model_folder
from lib.models.gguf_file import read_metadata
from lib.models.inspect import inspect
from lib.models.loading import load_model
from lib.models.tokenizer_files import chat_templates, reader, vocabulary
from lib.models.weights import INDEX, SINGLE, open_weights, read_object
from lib.prompts.templates import describe_template
from lib.stages.convert.convert import convert
from tests.stages.convert.convertible import write_model

NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("meaning") / "model")


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def shards(folder: Path, factor: float = 1.0, index: bool = True, keep: int = 2) -> None:
    """Two shards of the folder's weights times a factor."""
    tensors = {name: tensor * factor for name, tensor in load_file(folder / SINGLE).items()}
    names = sorted(tensors)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in list(parts.items())[:keep]:
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    if index:
        listed = {name: file for file, part in parts.items() for name in part}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def q_proj(folder: Path) -> np.ndarray:
    return open_weights(folder).tensors[NAME].tensor().float().numpy()


def as_transformers(folder: Path) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()[NAME].detach().float().numpy()


def old_shards(folder: Path) -> None:
    shards(folder, 0.5)


def stale_index(folder: Path) -> None:
    shards(folder, keep=0)


def foreign_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"other": "model-00001-of-00009.safetensors"}}')


def shards_alone(folder: Path) -> None:
    shards(folder, 0.5)
    (folder / SINGLE).unlink()


@pytest.mark.parametrize("change", [old_shards, stale_index, foreign_index, shards_alone])
def test_weights_that_stand_twice_are_those_of_transformers(change: Callable[[Path], Any], model: Path) -> None:
    change(model)
    assert np.array_equal(q_proj(model), as_transformers(model))
    check_model_folder(model)
    report = inspect(model)
    assert not report["problems"]
    assert any(f"both {SINGLE} and {INDEX}" in note for note in report["notes"]) == (change is not shards_alone)


def test_old_shards_do_not_reach_the_gguf(model: Path, tmp_path: Path, no_load: None) -> None:
    convert(model, tmp_path / "one.gguf")
    old_shards(model)
    convert(model, tmp_path / "two.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


@pytest.fixture(autouse=True)
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders are described without trying their templates out, which takes a process each."""
    usable = {"own_system_turn": False, "no_system_turn": None, "problem": None}
    monkeypatch.setattr("lib.models.inspect.describe_template", lambda text: {"text": text, **usable})


@pytest.fixture
def no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversion without opening the result by llama.cpp."""
    monkeypatch.setattr("lib.stages.convert.convert.load_check", lambda path: "not tried")


@pytest.mark.parametrize(
    ("keep", "index", "words"),
    [(2, False, "2 of 2 shards"), (1, False, "1 of 2 shards"), (1, True, "missing: model-00002-of-00002.safetensors")],
)
def test_shards_are_named_for_what_they_are(keep: int, index: bool, words: str, model: Path) -> None:
    shards(model, index=index, keep=keep)
    (model / SINGLE).unlink()
    assert any(words in problem for problem in inspect(model)["problems"])
    with pytest.raises(InputError, match=words) as raised:
        open_weights(model)
    assert "pickle" not in str(raised.value)


def moved(*names: str) -> Callable[[Path], Any]:
    """The weights under other names."""

    def change(folder: Path) -> None:
        for name in names:
            shutil.copy(folder / SINGLE, folder / name)
        (folder / SINGLE).unlink()

    return change


def adapter_beside(folder: Path) -> None:
    from tests.tiny_run import make_adapter

    made = folder.parent / "made"
    make_adapter(folder, made)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(made / name, folder)


def pipe(folder: Path) -> None:
    (folder / SINGLE).unlink()
    os.mkfifo(folder / SINGLE)


OTHERWISE: list[tuple[Callable[[Path], Any], str]] = [
    (moved("pytorch_model.safetensors"), r"but pytorch_model.safetensors(?s:.)*rename"),
    (moved("consolidated.safetensors"), r"but consolidated.safetensors(?s:.)*transformers' format"),
    (moved("consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors"), "but consolidated-0"),
    (adapter_beside, r"a whole model and an adapter(?s:.)*workbook merge"),
    (lambda folder: (folder / "adapter_config.json").write_text("{}"), "a whole model and an adapter"),
    (pipe, "neither a file nor a folder"),
]


@pytest.mark.parametrize(("change", "words"), OTHERWISE)
def test_other_weights_are_named_alike(change: Callable[[Path], Any], words: str, model: Path, tmp_path: Path) -> None:
    change(model)
    found = words.partition("(?s")[0]
    assert any(re.search(found, problem) for problem in inspect(model)["problems"])
    for read in (check_model_folder, lambda folder: convert(folder, tmp_path / "m.gguf"), check_base_folder):
        with pytest.raises(InputError, match=words) as raised:
            read(model)
        assert "pickle" not in str(raised.value)


def settings(folder: Path, **changes: Any) -> None:
    content = read_object(folder / "tokenizer_config.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({**content, **changes}))


def by_id(tokens: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in tokens}


def two_templates(folder: Path) -> None:
    settings(folder, chat_template="IN THE CONFIGURATION")


def named_templates(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    settings(folder, chat_template=[{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}])


def template_for_processors(folder: Path) -> None:
    (folder / "chat_template.json").write_text('{"chat_template": "OF A PROCESSOR"}')


def more_templates(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("R")
    two_templates(folder)


@pytest.mark.parametrize("change", [two_templates, named_templates, template_for_processors, more_templates])
def test_templates_that_stand_twice_are_those_of_transformers(
    change: Callable[[Path], Any], model: Path, tmp_path: Path, no_load: None
) -> None:
    from transformers import AutoTokenizer

    from lib.models.gguf_file import read_metadata

    change(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = chat_templates(model, read_object(model / "tokenizer_config.json"))
    assert found["default"] == tokenizer.get_chat_template()
    convert(model, tmp_path / "m.gguf")
    assert read_metadata(tmp_path / "m.gguf")["tokenizer.chat_template"] == tokenizer.get_chat_template()


def test_a_template_of_processors_alone_is_none(model: Path) -> None:
    from transformers import AutoTokenizer

    (model / "chat_template.jinja").rename(model / "chat_template.json")
    (model / "chat_template.json").write_text('{"chat_template": "X"}')
    assert AutoTokenizer.from_pretrained(model).chat_template is None
    report = inspect(model)
    assert report["template"] is None and any("images and sound" in note for note in report["notes"])


def test_vocabularies_that_stand_twice_are_those_of_transformers(model: Path) -> None:
    from transformers import AutoTokenizer

    plain, added = vocabulary(reader(model))
    (model / "vocab.json").write_text(json.dumps({token: len(plain) - 1 - i for token, i in plain.items()}))
    (model / "merges.txt").write_text("#version: 0.2\nh e\n")
    assert {**plain, **added} == AutoTokenizer.from_pretrained(model).get_vocab()
    assert vocabulary(reader(model)) == (plain, added)
    assert any("tokenizer.json is read" in note for note in inspect(model)["notes"])


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_added_tokens_that_stand_twice_are_those_of_transformers(kind: str, model: Path) -> None:
    from transformers import AutoTokenizer

    content = read_object(model / "tokenizer.json")
    content["added_tokens"].append({**content["added_tokens"][0], "id": 268, "content": "<in one file only>"})
    (model / "tokenizer.json").write_text(json.dumps(content))
    settings(model, tokenizer_class=kind)
    plain, added = vocabulary(reader(model))
    assert {**plain, **added} == AutoTokenizer.from_pretrained(model).get_vocab()
    assert any("list other added tokens" in note for note in inspect(model)["notes"])


def configured(folder: Path, **changes: Any) -> None:
    content = read_object(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**content, **changes}))


def biases(*names: str) -> Callable[[dict[str, Any]], None]:
    """Biases of modules of every block."""

    def add(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.removesuffix(".weight").endswith(names)]:
            tensors[name.replace(".weight", ".bias")] = tensors[name][..., 0].clone().reshape(-1)

    return add


PLACES: list[tuple[str, Callable[[dict[str, Any]], Any], dict[str, Any], str]] = [
    ("llama", biases("q_proj", "k_proj", "v_proj"), {}, "does not have .first .*k_proj.bias"),
    ("llama", biases("gate_proj", "up_proj", "down_proj"), {}, "does not have .first .*down_proj.bias"),
    ("qwen3", biases("q_proj", "k_proj", "v_proj"), {}, "does not have .first .*k_proj.bias"),
    ("qwen2", biases("o_proj"), {}, "does not have .first .*o_proj.bias"),
    ("qwen2", biases("model.norm"), {}, "does not have .first model.norm.bias"),
    ("qwen2", biases("lm_head"), {"tied": False}, "does not have .first lm_head.bias"),
    ("llama", lambda t: t.update({NAME.replace("proj", "norm"): t[NAME][0, :16].clone()}), {}, "does not.*q_norm"),
    ("llama", lambda t: None, {"attention_bias": True}, "lacks 8 tensors"),
    ("llama", biases("gate_proj"), {"mlp_bias": True}, "lacks 4 tensors"),
    ("qwen2", lambda t: t.pop("model.norm.weight"), {}, "lacks 1 tensors .*model.norm.weight"),
]


@pytest.mark.parametrize(("kind", "change", "options", "words"), PLACES)
def test_tensors_that_loading_would_drop_or_miss(
    kind: str, change: Callable[[dict[str, Any]], Any], options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "model", kind=kind, **options)
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    assert any(re.search(words, problem) for problem in inspect(folder)["problems"])
    for read in (check_model_folder, lambda folder: convert(folder, tmp_path / "m.gguf")):
        with pytest.raises(InputError, match=words):
            read(folder)


@pytest.mark.parametrize(
    ("kind", "change", "options"),
    [
        ("llama", biases("q_proj", "k_proj", "v_proj", "o_proj"), {"attention_bias": True}),
        ("llama", biases("gate_proj", "up_proj", "down_proj"), {"mlp_bias": True}),
        ("qwen2", lambda t: t.update({NAME.replace("q_proj.weight", "rotary_emb.inv_freq"): t[NAME][0].clone()}), {}),
        ("qwen2", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}), {}),
    ],
)
def test_tensors_that_have_their_place(
    kind: str, change: Callable[[dict[str, Any]], Any], options: dict[str, Any], tmp_path: Path, no_load: None
) -> None:
    folder = write_model(tmp_path / "model", kind=kind, **options)
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    assert not inspect(folder)["problems"]
    load_model(folder, "float32", device="cpu")
    convert(folder, tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("kind", "changes", "loads"),
    [
        ("qwen2", {"max_window_layers": None}, False),
        ("qwen2", {"layer_types": ["full_attention"]}, False),
        ("qwen2", {"text_config": {"hidden_size": 32}}, False),
        ("qwen2", {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 32}}, False),
        ("qwen2", {"rope_scaling": {"rope_type": "linear"}}, False),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, False),
        ("qwen2", {"sliding_window": None, "rope_scaling": None, "layer_types": ["full_attention"] * 2}, True),
    ],
    ids=str,
)
def test_what_loading_refuses_is_no_good_folder(
    kind: str, changes: dict[str, Any], loads: bool, tmp_path: Path, no_load: None
) -> None:
    folder = write_model(tmp_path / "model", kind=kind, **changes)
    assert bool(examine(folder)["problems"]) != loads
    for read in (load_model, lambda folder: convert(folder, tmp_path / "m.gguf")):
        with contextlib.nullcontext() if loads else pytest.raises(InputError):
            read(folder)


def test_biases_that_llama_cpp_does_not_read_are_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", kind="qwen3", attention_bias=True)
    tensors = load_file(folder / SINGLE)
    biases("q_proj", "k_proj", "v_proj", "o_proj")(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    check_model_folder(folder)
    assert any("attention_bias True" in problem for problem in examine(folder)["problems"])


@pytest.mark.parametrize("old", [{"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 2.0}])
def test_rope_that_stands_twice_is_that_of_transformers(
    old: dict[str, Any], model: Path, tmp_path: Path, no_load: None
) -> None:
    configured(model, rope_scaling=old, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    convert(model, tmp_path / "m.gguf")
    assert read_metadata(tmp_path / "m.gguf")["qwen2.rope.scaling.factor"] == old["factor"]
    assert any("rope_scaling is read" in note for note in inspect(model)["notes"])


def test_no_theta_of_the_rope_is_no_default(model: Path) -> None:
    configured(model, rope_theta=1e4, rope_parameters={"rope_type": "default", "rope_theta": None})
    with pytest.raises(InputError, match="rope_theta is None"):
        check_model_folder(model)
    configured(model, rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    assert as_transformers(model).size and check_model_folder(model)


SIZES: dict[str, tuple[Any, ...]] = {
    "num_hidden_layers": (1, 3, 9_999, 10**9, 0, "2", [2], 10**21),
    "hidden_size": (128, 10**9, -1, True, 64.0),
    "intermediate_size": (95, 10**12, {}),
    "vocab_size": (299, 301, "x"),
    "max_position_embeddings": (10**15,),
    "num_attention_heads": (0, 7),
    "hidden_act": ("xyz", ["silu"]),
    "model_type": (["qwen2"], {"a": 1}),
    "attn_implementation": ("someone/evil",),
    "eos_token_id": (10**12, "x", [1, "x"]),
    "rope_scaling": ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 10**12}, [1], "linear"),
    "rope_parameters": ({"rope_type": "linear", "factor": 0}, {"rope_theta": -1.0, "rope_type": "default"}),
    "rope_theta": (None, -1),
    "head_dim": (None, 0),
    "quantization_config": ({}, {"quant_method": None, "bits": 4}),
    "transformers_weights": ("other.safetensors",),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in SIZES.items() for value in values])
def test_sizes_are_compared_before_anything_is_built(key: str, value: Any, model: Path, tmp_path: Path) -> None:
    text = json.dumps({**read_object(model / "config.json"), key: "HERE"})
    shown = json.dumps(value) if not isinstance(value, int) or value < 10**20 else "9" * 5_000
    (model / "config.json").write_text(text.replace('"HERE"', shown))
    assert inspect(model)["problems"]
    for read in (check_model_folder, lambda folder: convert(folder, tmp_path / "m.gguf")):
        with pytest.raises(InputError, match=rf"{key}|config.json is damaged"):
            read(model)
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 50_000, b'{"a": "\xff"}', b"\x00" * 9, b"NaN", b""])
def test_damaged_json(content: bytes, model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_bytes(content)
    for read in (check_model_folder, lambda folder: convert(folder, tmp_path / "m.gguf")):
        with pytest.raises(InputError, match=r"is damaged|holds no object"):
            read(model)


@pytest.mark.parametrize(
    "kind",
    ["Qwen2ForSequenceClassification", "Qwen2ForTokenClassification", "LlamaForQuestionAnswering", "QwenRewardModel"],
)
def test_a_classifier_is_said_to_be_one(kind: str, model: Path, tmp_path: Path) -> None:
    configured(model, architectures=[kind])
    assert any(kind in problem for problem in inspect(model)["problems"])
    for read in (check_model_folder, lambda folder: convert(folder, tmp_path / "m.gguf")):
        with pytest.raises(InputError, match=f"classifier or scorer .{kind}(?s:.)*task: classification"):
            read(model)


@pytest.mark.parametrize("head", ["score", "classifier", "v_head.summary"])
def test_a_head_that_does_not_speak(head: str, model: Path, tmp_path: Path) -> None:
    import torch

    save_file({**load_file(model / SINGLE), f"{head}.weight": torch.ones(2, 64)}, model / SINGLE, {"format": "pt"})
    assert any(f"head `{head}` with 2 outputs" in problem for problem in inspect(model)["problems"])
    with pytest.raises(InputError, match="with 2 outputs"):
        convert(model, tmp_path / "m.gguf")


def test_more_tokens_than_rows_are_a_problem(model: Path, tmp_path: Path) -> None:
    content = read_object(model / "tokenizer.json")
    first = content["added_tokens"][0]
    content["added_tokens"] += [{**first, "id": i, "content": f"<new{i}>"} for i in range(268, 301)]
    (model / "tokenizer.json").write_text(json.dumps(content))
    settings(model, added_tokens_decoder=by_id(content["added_tokens"]))
    assert any("largest id is 300" in problem for problem in inspect(model)["problems"])
    with pytest.raises(InputError, match="embedding has 300 rows"):
        convert(model, tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "tags", [("{% generation %}", "{% endgeneration %}"), ("{%- generation -%}", "{%- endgeneration -%}"), ("", "")]
)
def test_marks_of_what_is_learned_render(tags: tuple[str, str]) -> None:
    turn = "{{ m.role }}: " + tags[0] + "{% set said = m.content %}{{ said }}" + tags[1] + "\n"
    found = describe_template("{% for m in messages %}" + turn + "{% endfor %}")
    assert found["problem"] is None and found["own_system_turn"] is False


@pytest.mark.parametrize(
    "options", ["ensure_ascii=False", "indent=2", "false, 4, (',', ':'), true", "separators=(',', ':'), sort_keys=true"]
)
def test_json_of_a_template_is_written_as_transformers_does(options: str) -> None:
    turn = "{{ m.role }}: {{ m.content | tojson(" + options + ") }}\n"
    assert describe_template("{% for m in messages %}" + turn + "{% endfor %}")["problem"] is None


@pytest.mark.parametrize("length", [0x280, 0x480, 0x4B50])
def test_lengths_of_headers_that_look_like_a_pickle(length: int, model: Path) -> None:
    tensors = load_file(model / SINGLE)
    save_file(tensors, model / SINGLE, metadata={"format": "pt"})
    stored = (model / SINGLE).read_bytes()
    size = int.from_bytes(stored[:8], "little")
    header = stored[8 : 8 + size].rstrip().ljust(length + (1 << 16) * (size > length))
    (model / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + stored[8 + size :])
    assert open_weights(model).tensors.keys() == tensors.keys()


@pytest.mark.parametrize("classes", [None, [], ["Qwen2Model"]])
def test_a_model_is_what_its_type_says(classes: list[str] | None, tmp_path: Path) -> None:
    """As for transformers, where config.json names no class, or that of the model without its head."""
    convert(write_model(tmp_path / "named"), tmp_path / "named.gguf", "f16")
    convert(write_model(tmp_path / "else" / "named", architectures=classes), tmp_path / "else.gguf", "f16")
    assert (tmp_path / "named.gguf").read_bytes() == (tmp_path / "else.gguf").read_bytes()
