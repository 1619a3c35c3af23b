"""The architectures that are turned into GGUF and back: classes, names of tensors, rotary frequencies.

Names and rules are those of llama.cpp (`gguf-py/gguf/tensor_mapping.py`, `conversion/llama.py`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama"}
"""Class in config.json → architecture in GGUF."""

ROPE_TYPES = {"qwen2": ("linear", "yarn"), "qwen3": ("linear", "yarn"), "llama": ("linear", "yarn", "llama3")}
"""Architecture → kinds of rope scaling that can be said in both formats."""

OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
"""Name in GGUF → name in transformers, of the tensors outside the blocks; the last one is absent in tied models."""

BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
"""The same of a block's tensors, behind `blk.N.` and `model.layers.N.`."""

EXTRA: dict[str, dict[str, str]] = {
    "qwen2": {f"attn_{p}.bias": f"self_attn.{p}_proj.bias" for p in "qkv"},
    "qwen3": {f"attn_{p}_norm.weight": f"self_attn.{p}_norm.weight" for p in "qk"},
    "llama": {},
}
"""Architecture → further tensors of every block."""

ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3 = (("factor", 8.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0))


def block_names(architecture: str, block: int) -> dict[str, str]:
    """Name in GGUF → name in transformers, of all tensors that a block must have."""
    parts = {**BLOCK, **EXTRA[architecture]}
    return {f"blk.{block}.{ours}": f"model.layers.{block}.{theirs}" for ours, theirs in parts.items()}


def tensor_names(architecture: str, blocks: int, tied: bool) -> dict[str, str]:
    """Name in GGUF → name in transformers, of all tensors that a model must have."""
    names = {ours: theirs for ours, theirs in OUTSIDE.items() if not (tied and ours == "output.weight")}
    for block in range(blocks):
        names |= block_names(architecture, block)
    return names


def rotary_heads(architecture: str, name: str, config: dict[str, Any]) -> int:
    """Heads whose rows llama.cpp wants in another order: query and key of Llama; 0 for all other tensors.

    Args:
        name: of the tensor in transformers.
    """
    if architecture == "llama" and name.endswith(("q_proj.weight", "q_proj.bias")):
        return int(config["num_attention_heads"])
    if architecture == "llama" and name.endswith(("k_proj.weight", "k_proj.bias")):
        return int(config["num_key_value_heads"])
    return 0


def pair_rows(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head reordered from halves (transformers) to neighbours (llama.cpp's rotary order for Llama)."""
    rows = values.shape[0] // heads // 2
    return values.reshape(heads, 2, rows, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def unpair_rows(values: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `pair_rows`."""
    rows = values.shape[0] // heads // 2
    return values.reshape(heads, rows, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """Rope parameters of the full-attention layers, in the layout of transformers 5."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope = dict(rope.get("full_attention", rope))
    if "rope_theta" not in rope and config.get("rope_theta") is not None:
        rope["rope_theta"] = config["rope_theta"]
    rope.setdefault("rope_type", rope.get("type"))
    return rope


def head_size(config: dict[str, Any]) -> int:
    """Values of one attention head."""
    if config.get("head_dim") is not None:
        return int(config["head_dim"])
    return int(config["hidden_size"]) // int(config["num_attention_heads"])


def rope_factors(config: dict[str, Any]) -> np.ndarray | None:
    """Divisors of the rotary frequencies of Llama 3.1 and later (rope type llama3), float32; None for other models.

    Wavelengths below the high-frequency bound stay, those above the low-frequency bound are stretched by `factor`, and
    those between are blended (llama.cpp, conversion/llama.py, generate_extra_tensors).
    """
    rope = rope_of(config)
    if str(rope.get("rope_type")).lower() != "llama3":
        return None
    size = head_size(config)
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    frequencies = (1.0 / np.power(np.float32(rope.get("rope_theta", 10000.0)), exponents)).astype(np.float32)
    factor, low, high = (rope.get(key, default) for key, default in _LLAMA3)
    trained = rope.get("original_max_position_embeddings", 8192)
    factors = []
    for frequency in frequencies:
        length = np.float32(2 * math.pi) / frequency
        if length < trained / high:
            factors.append(1.0)
        elif length > trained / low:
            factors.append(factor)
        else:
            smooth = (trained / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)
