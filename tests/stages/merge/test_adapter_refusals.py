"""Every adapter that peft would merge silently wrong, or not at all, is refused with its reason."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.cli.models import examine
from lib.errors import InputError
from lib.models.merge_plan import _TABLES
from lib.stages.merge.weights import merge_folders


@pytest.fixture
def adapter(make_base: Callable, make_adapter: Callable, tmp_path: Path) -> Path:
    """A private copy of a good adapter, to be damaged."""
    return Path(shutil.copytree(make_adapter(make_base()), tmp_path / "adapter"))


def reconfigure(adapter: Path, **changes: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit(adapter: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(base: Path, adapter: Path, match: str) -> None:
    output, before = adapter.parent / "out", sorted(adapter.parent.iterdir())
    with pytest.raises(InputError, match=match):
        merge_folders(base, adapter, output)
    assert sorted(adapter.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"peft_type": None}, "peft_type None"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 2]]}, "replicated layers"),
        ({"trainable_token_indices": [1, 2]}, "no trained tokens of embed_tokens"),
        ({"init_lora_weights": "pissa"}, "changed the base during training"),
        ({"r": 5}, r"rank 5"),
        ({"use_dora": True}, "use_dora"),
        ({"target_modules": ["q_proj", "v_proj"]}, "target_modules does not name"),
        ({"target_modules": ["q_proj", "v_proj", "down_proj", "o_proj"]}, "no tensors for .*o_proj"),
    ],
)
def test_configuration(changes: dict, match: str, make_base: Callable, adapter: Path) -> None:
    reconfigure(adapter, **changes)
    refused(make_base(), adapter, match)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_infinite_values(value: float, part: str, make_base: Callable, adapter: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        next(tensor for name, tensor in tensors.items() if part in name).view(-1)[3] = value

    edit(adapter, spoil)
    refused(make_base(), adapter, "NaN or infinity in .*" + part)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_infinite_base(value: float, make_base: Callable, adapter: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(make_base(), tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][7, 7] = value
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    refused(base, adapter, "NaN or infinity in model.embed_tokens.weight")


def test_overflow_of_the_result(make_base: Callable, adapter: Path) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor.fill_(1e20 if "down_proj" in name else 0.0)

    edit(adapter, enlarge)
    refused(make_base(), adapter, "NaN or infinity in model.layers.0.mlp.down_proj.weight")


def test_missing_partner(make_base: Callable, adapter: Path) -> None:
    edit(adapter, lambda tensors: tensors.pop(next(name for name in tensors if "lora_B" in name)))
    refused(make_base(), adapter, "lacks lora_B")


ITS = r"(q_proj|v_proj|down_proj)"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_modules": rf".*\.{ITS}"},
        {"target_modules": rf"model\.layers\.[\d]{{1,}}\.(?:self_attn|mlp)\.{ITS}"},
        {"exclude_modules": ["o_proj"]},
        {"layers_to_transform": [0, 1]},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
    ],
    ids=str,
)
def test_truncated_adapter(changes: dict, make_base: Callable, adapter: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.1" in name]:
            del tensors[name]

    reconfigure(adapter, **changes)
    merge_folders(make_base(), adapter, adapter.parent / "whole")
    edit(adapter, drop)
    refused(make_base(), adapter, "no tensors for model.layers.1")


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*proj"},
        {"layers_to_transform": 0},
        {"layers_to_transform": [0, 1], "layers_pattern": ["h"]},
        {"exclude_modules": r".*1\.self_attn\.q_proj"},
        {"modules_to_save": ["q_proj"]},
    ],
    ids=str,
)
def test_modules_are_those_that_peft_would_choose(changes: dict, make_base: Callable, adapter: Path) -> None:
    reconfigure(adapter, **changes)
    refused(make_base(), adapter, r"no tensors for|does not name|which nothing in the configuration")


@pytest.mark.parametrize(
    ("options", "lost", "match"),
    [
        ({"bias": "all"}, "k_proj", "k_proj.bias: bias is 'all'"),
        ({"bias": "all"}, "layers.1", "layers.1.*bias is 'all'"),
        ({"bias": "lora_only"}, "layers.1.self_attn.q_proj.b", "q_proj.bias: bias is 'lora_only'"),
        ({"modules_to_save": ["input_layernorm"]}, "1.input_layernorm", "layers.1.input_layernorm.*modules_to_save"),
        ({"modules_to_save": ["norm"]}, "post_attention", "layers.0.post_attention_layernorm.weight: modules_to_save"),
        ({"modules_to_save": ["k_proj"]}, "k_proj.bias", "k_proj.bias: modules_to_save"),
        ({"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}, "1.mlp.up", "mlp.up_proj.*modules_to_save"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "1.self_attn.q_proj.lora_B.bias", "no bias of B"),
    ],
)
def test_half_of_what_was_trained(
    options: dict, lost: str, match: str, make_base: Callable, make_adapter: Callable, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(make_adapter(make_base(), **options), tmp_path / "adapter"))
    whole = [".lora_A.", ".lora_B.weight"]

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        gone = [name for name in tensors if lost in name and not any(part in name for part in whole)]
        assert gone
        for name in gone:
            del tensors[name]

    edit(adapter, drop)
    refused(make_base(), adapter, match)


@pytest.mark.parametrize(
    ("changes", "factor", "words"),
    [
        ({"use_superlora": True, "lora_super_scale": 3.0}, 1, "use_superlora.*lora_super_scale"),
        ({"lora_alpha": 0}, 1, "changes no weight"),
        ({}, 0, "changes no weight"),
        ({"peft_version": "9.9", "use_superlora": False, "super": None}, 1, None),
    ],
)
def test_what_an_adapter_says_in_vain(
    changes: dict, factor: int, words: str | None, make_base: Callable, adapter: Path, tmp_path: Path
) -> None:
    reconfigure(adapter, base_model_name_or_path=str(make_base()), **changes)
    edit(adapter, lambda t: t.update({name: value * factor for name, value in t.items() if "lora_B" in name}))
    found = merge_folders(make_base(), adapter, tmp_path / "out").remarks
    assert len(found) == bool(words) and re.search(words or "", " ".join(found))
    assert set(found) <= set(examine(adapter)["notes"])


def test_known_keys_are_those_of_peft() -> None:
    from dataclasses import fields

    from peft import LoraConfig

    assert {key.name for key in fields(LoraConfig)} == set(_TABLES["known"])


def test_orphan(make_base: Callable, adapter: Path) -> None:
    edit(adapter, lambda tensors: tensors.update({"base_model.model.model.extra.weight": torch.ones(2, 2)}))
    refused(make_base(), adapter, "nothing in the configuration or the base explains")


def test_copy_of_the_base_is_no_orphan(make_base: Callable, adapter: Path, tmp_path: Path) -> None:
    base = make_base()
    copy = load_file(base / "model.safetensors")["model.embed_tokens.weight"].clone()
    name = "base_model.model.model.embed_tokens.weight"
    edit(adapter, lambda tensors: tensors.update({name: copy}))
    merge_folders(base, adapter, tmp_path / "fine")
    copy[0, 0] += 1
    edit(adapter, lambda tensors: tensors.update({name: copy}))
    refused(base, adapter, "nothing in the configuration")


def test_other_base_shape(make_base: Callable, adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, Qwen2ForCausalLM

    config = AutoConfig.from_pretrained(make_base())
    config.hidden_size, config.intermediate_size = 128, 96
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
    refused(tmp_path / "base", adapter, r"base weight \(128, 128\)|base weight \(128, 96\)")


def test_fewer_layers(make_base: Callable, adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, Qwen2ForCausalLM

    config = AutoConfig.from_pretrained(make_base())
    config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
    refused(tmp_path / "base", adapter, "the base does not have")


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_embeddings(target: str, make_base: Callable, make_adapter: Callable, tmp_path: Path) -> None:
    base = make_base("bfloat16", tied=True)
    adapter = make_adapter(base, target_modules=["q_proj", target])
    with pytest.raises(InputError, match="shares one matrix"):
        merge_folders(base, adapter, tmp_path / "out")


def test_pickle(make_base: Callable, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"PK")
    refused(make_base(), adapter, "pickle")


def test_pointer_web_page_and_truncation(make_base: Callable, adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for content, match in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (b"<!doctype html><html></html>", "web page"),
        (whole[:-1], "damaged"),
        (whole[:40], "damaged"),
        (b"", "damaged"),
    ):
        weights.write_bytes(content)
        refused(make_base(), adapter, match)


def test_name_twice_in_a_header(make_base: Callable, adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    entry = '"{}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.format("x")
    header = ("{" + entry + "," + entry + "}").encode()
    header += b" " * (-len(header) % 8)
    weights.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refused(make_base(), adapter, "names a tensor twice|damaged")


def test_quantized_base(make_base: Callable, adapter: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(make_base(), tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    refused(base, adapter, "quantized")


def test_index_and_shards_disagree(make_base: Callable, adapter: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(make_base("bfloat16", shards=3), tmp_path / "base"))
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.ghost.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    refused(base, adapter, "index and shards disagree")
    next(iter(base.glob("model-00002*"))).unlink()
    refused(base, adapter, "1 of the index's files are missing")


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        ([1, 1], "trained tokens of model.embed_tokens"),
        ([1, 320], "for 320 rows of 64"),
        ([1, 2, 3], "3 trained tokens"),
        ({"lm_head": [1, 2]}, "which the configuration or the base does not have"),
        (None, "which the configuration or the base does not have"),
    ],
)
def test_trained_tokens(
    tokens: object, match: str, make_base: Callable, make_adapter: Callable, tmp_path: Path
) -> None:
    adapter = shutil.copytree(make_adapter(make_base(), trainable_token_indices=[4, 2]), tmp_path / "adapter")
    reconfigure(adapter, trainable_token_indices=tokens)
    refused(make_base(), adapter, match)


def test_trained_tokens_of_a_tied_head(make_base: Callable, make_adapter: Callable, tmp_path: Path) -> None:
    adapter = make_adapter(make_base(), trainable_token_indices={"embed_tokens": [4], "lm_head": [5]})
    refused(make_base(), shutil.copytree(adapter, tmp_path / "adapter"), "shares one matrix")


def test_trained_tokens_of_a_head_that_is_trained_whole(make_base: Callable, make_adapter: Callable) -> None:
    adapter = make_adapter(make_base(), trainable_token_indices=[5], modules_to_save=["lm_head"])
    refused(make_base(), adapter, "trained tokens of lm_head, of which modules_to_save trains a whole copy")


def test_unequal_copies_of_one_matrix(make_base: Callable, make_adapter: Callable, tmp_path: Path) -> None:
    adapter = make_adapter(make_base(), modules_to_save=["lm_head", "embed_tokens"])
    adapter = shutil.copytree(adapter, tmp_path / "adapter")
    reconfigure(adapter, ensure_weight_tying=True)
    refused(make_base(), adapter, "different copies of lm_head and embed_tokens")
