"""Configurations through a schema: what is computed with has a value of its kind; anything else is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lib.errors import InputError
from lib.models.configurations import ACTIVATIONS, as_peft_reads, check_adapter_configuration, check_configuration

FILE = Path("m/config.json")
GOOD = {"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000"),
        ({"intermediate_size": -1}, "intermediate_size is -1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 7}, "a divisor of hidden_size (64)"),
        ({"num_key_value_heads": 3}, "a divisor of num_attention_heads (4)"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6'"),
        ({"rope_scaling": [1]}, "rope_scaling is [1]"),
        ({"hidden_act": "xyz"}, "hidden_act is 'xyz'"),
        ({"model_type": ["qwen2"]}, "model_type is ['qwen2']"),
        ({"model_type": {"a": 1}}, "model_type is {'a': 1}"),
        ({"architectures": "Qwen2ForCausalLM"}, "architectures is 'Qwen2ForCausalLM'"),
        ({"attn_implementation": "kernels-community/evil"}, "attn_implementation is 'kernels-community/evil'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"num_nextn_predict_layers": "x"}, "num_nextn_predict_layers is 'x'"),
        *(({"_attn_implementation": own}, "_attn_implementation is") for own in ("a/b", "flash_attention_2", 5)),
        ({"pad_token_id": 100, "vocab_size": 100}, "pad_token_id is 100"),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding_window is None"),
        *(({key: value}, f"{key} is") for key in ("dtype", "torch_dtype") for value in ("torch.bfloat16", "foo", 5)),
        *(({key: value}, f"{key} is") for key in ("use_cache", "use_sliding_window") for value in (0, 1, "false")),
        *(({key: "x"}, f"{key} is 'x'") for key in ("max_window_layers", "num_labels", "attention_dropout")),
        *(({"id2label": value}, "id2label") for value in (["a"], {"a": "b"}, {"0": 1})),
        *(({key: value}, f"{key} is") for key, value in (("initializer_range", 0), ("layer_types", []))),
        *(({key: value}, f"{key} is") for key, value in (("return_dict", False), ("output_attentions", True))),
    ],
)
def test_odd_values_of_a_model(odd: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as refused:
        check_configuration(FILE, GOOD | odd)
    assert said in str(refused.value) and len(str(refused.value)) < 600


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": None}, "r is None"),
        ({"r": "8"}, "r is '8'"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj is 0"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern.q_proj is '4'"),
        ({"rank_pattern": {"q_proj(": 4}}, "rank_pattern is 'q_proj('"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern.q_proj is None"),
        ({"target_modules": "([a-z._0-9]+)+X"}, "a regular expression that ends"),
        ({"target_modules": {"a": 1}}, "target_modules is {'a': 1}"),
        ({"modules_to_save": "score"}, "modules_to_save is 'score'"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path is ['a']"),
        ({"init_lora_weights": {"a": 1}}, "init_lora_weights is {'a': 1}"),
        ({"trainable_token_indices": ["a"]}, "trainable_token_indices.0 is 'a'"),
        ({"bias": "some"}, "bias is 'some'"),
        *(({"lora_dropout": value}, "lora_dropout is") for value in ("x", 5, -1, True)),
    ],
)
def test_odd_values_of_an_adapter(odd: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as refused:
        check_adapter_configuration(FILE, {"peft_type": "LORA", "r": 8, "lora_alpha": 16} | odd)
    assert said in str(refused.value) and len(str(refused.value)) < 600


def test_right_values_are_kept_as_they_are() -> None:
    config = GOOD | {"rope_theta": 1000000, "rms_norm_eps": 1e-06, "sliding_window": None, "other": [1, {"a": 2}]}
    assert check_configuration(FILE, config) is config
    adapter = {"r": 8, "lora_alpha": 16.0, "rank_pattern": {r"^model\.layers\.1\..*q_proj": 4}, "target_modules": ["q"]}
    assert check_adapter_configuration(FILE, adapter) is adapter


def test_real_configurations_pass(shared_data: Path) -> None:
    checked = 0
    for path in sorted(shared_data.rglob("*config.json")):
        check = {"config.json": check_configuration, "adapter_config.json": check_adapter_configuration}.get(path.name)
        if check:
            check(path, json.loads(path.read_text(encoding="utf-8")))
            checked += 1
    assert checked > 3


def test_the_activations_are_those_of_transformers() -> None:
    from transformers.activations import ACT2FN

    assert set(ACTIVATIONS) <= set(ACT2FN)


def test_common_values_of_a_model_are_left_alone() -> None:
    common = {
        "initializer_range": 0.02,
        "use_cache": True,
        "attention_dropout": 0,
        "pad_token_id": 99,
        "vocab_size": 100,
    }
    common |= {"id2label": {"0": "LABEL_0"}, "return_dict": True, "output_attentions": False, "torch_dtype": "bfloat16"}
    common |= {"layer_types": ["full_attention"] * 2, "sliding_window": None, "_attn_implementation": "sdpa"}
    assert check_configuration(FILE, GOOD | common) == GOOD | common


@pytest.mark.parametrize("key", ["lora_dropout", "rank_pattern", "alpha_pattern", "bias", "trainable_token_indices"])
def test_what_merging_takes_for_nothing_is_not_handed_to_peft(key: str) -> None:
    from peft import LoraConfig

    given = {"peft_type": "LORA", "r": 8, key: [] if key == "trainable_token_indices" else None}
    handed = as_peft_reads(check_adapter_configuration(FILE, {**given, "layers_pattern": "layers"}))
    assert handed == {"peft_type": "LORA", "r": 8}
    LoraConfig(**handed)
    both = {"layers_pattern": "layers", "layers_to_transform": [0]}
    assert as_peft_reads(both) == both
