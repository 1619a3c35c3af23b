"""Every kind of LoRA that peft stores for a base fits that base if it can be merged; it does not fit another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lib.errors import InputError
from lib.models.merge_plan import check_fit

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank by module": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"q_proj": 7}},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "bias of B": {"lora_bias": True},
    "norm saved": {"modules_to_save": ["norm"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [1, 5]},
}


def save(folder: Path, hidden: int, tied: bool, lora: dict[str, Any] | None) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 48, "hidden_size": hidden, "intermediate_size": 32, "num_hidden_layers": 2}
    config = Qwen2Config(**shape, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied)
    model: Any = Qwen2ForCausalLM(config)
    if lora is not None:
        model = get_peft_model(model, LoraConfig(**{"r": 3, "target_modules": ["q_proj", "v_proj"], **lora}))
    model.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_stores_fits(tmp_path: Path, kind: str, tied: bool) -> None:
    base, adapter = save(tmp_path / "base", 32, tied, None), save(tmp_path / "adapter", 32, tied, KINDS[kind])
    if kind == "embedding" and tied:
        with pytest.raises(InputError, match="shares one matrix between input and output"):
            check_fit(adapter, base)
        return
    shape = check_fit(adapter, base)
    assert shape.modules == (3 if kind == "embedding" else 4)
    assert shape.variant == {"DoRA": "DoRA", "rsLoRA": "rsLoRA"}.get(kind, "LoRA")
    other = save(tmp_path / "other", 16, tied, None)
    with pytest.raises(InputError, match="does not fit the base model"):
        check_fit(adapter, other)
