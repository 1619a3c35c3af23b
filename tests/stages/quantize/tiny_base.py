"""The model folder that a tiny GGUF could have been converted from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def write_base(folder: Path, weights: dict[str, np.ndarray], model_type: str = "qwen2", heads: int = 4) -> Path:
    """Weights by their GGUF names as float16 safetensors with a config.json; rows stand as they are given."""
    folder.mkdir()
    made = {}
    for name, values in weights.items():
        *block, kind, part = name.split(".")
        place = f"model.layers.{block[1]}." if block else ""
        made[f"{place}{_NAMES[kind]}.{part}"] = np.ascontiguousarray(values, np.float16)
    save_file(made, folder / "model.safetensors")
    config = {"model_type": model_type, "num_attention_heads": heads, "num_key_value_heads": heads // 2}
    config |= {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
