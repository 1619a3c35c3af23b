"""Tiny real Qwen2 models with peft adapters, made once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_base(dtype="bfloat16", tied=True, shards=1) → folder of a 2-layer Qwen2 model with random weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    made: dict[tuple, Path] = {}

    def make(dtype: str = "bfloat16", tied: bool = True, shards: int = 1) -> Path:
        key = (dtype, tied, shards)
        if key not in made:
            torch.manual_seed(3)
            config = Qwen2Config(
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=320,
                max_position_embeddings=256,
                tie_word_embeddings=tied,
            )
            model = Qwen2ForCausalLM(config).to(getattr(torch, dtype))
            for parameter in model.parameters():
                parameter.data.normal_(0, 0.2)
            folder = tmp_path_factory.mktemp("base")
            size = sum(p.numel() * p.element_size() for p in model.parameters())
            model.save_pretrained(folder, max_shard_size=f"{size // shards // 1000 + 1}KB" if shards > 1 else "1GB")
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_adapter(base, **LoraConfig options) → folder of an adapter with every tensor random; not to be changed."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made: dict[str, Path] = {}

    def make(base: Path, dtype: str = "float32", **options: object) -> Path:
        key = json.dumps([str(base), dtype, options], sort_keys=True)
        if key in made:
            return made[key]
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
        torch.manual_seed(5)
        model = get_peft_model(model, LoraConfig(**options))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        folder = tmp_path_factory.mktemp("adapter")
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        made[key] = folder
        return folder

    return make
