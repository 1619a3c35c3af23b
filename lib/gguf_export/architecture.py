"""Which models can be converted, and their hyperparameters as GGUF keys.

The order and the types of the keys are those of the converter of llama.cpp (`conversion/base.py`, set_gguf_parameters;
`conversion/llama.py`), so that the files are equal byte for byte.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama"}
"""Class in config.json → architecture in GGUF."""

_BLOCK = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
_EXTRA = {
    "qwen2": ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    "qwen3": ("attn_q_norm.weight", "attn_k_norm.weight"),
    "llama": (),
}
_ROPE_TYPES = {"qwen2": ("linear", "yarn"), "qwen3": ("linear", "yarn"), "llama": ("linear", "yarn", "llama3")}
_NUMBERS = ("num_hidden_layers", "max_position_embeddings", "hidden_size", "intermediate_size", "num_attention_heads")
_NUMBERS += ("num_key_value_heads", "vocab_size")
_MODEL_TYPES = {"qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama"}


@dataclass(frozen=True)
class Architecture:
    """A convertible model: GGUF architecture, number of blocks and the values of config.json with its defaults."""

    name: str
    blocks: int
    config: dict[str, Any]

    def expected_tensors(self) -> set[str]:
        """GGUF names that llama.cpp needs to load the model."""
        names = {"token_embd.weight", "output_norm.weight"}
        if not self.config.get("tie_word_embeddings"):
            names.add("output.weight")
        for block in range(self.blocks):
            names |= {f"blk.{block}.{part}.weight" for part in _BLOCK}
            names |= {f"blk.{block}.{part}" for part in _EXTRA[self.name]}
        return names

    def heads_of(self, name: str) -> int:
        """Heads whose rows llama.cpp wants in another order: query and key of Llama; 0 for all other tensors."""
        if self.name == "llama" and name.endswith(("q_proj.weight", "q_proj.bias")):
            return int(self.config["num_attention_heads"])
        if self.name == "llama" and name.endswith(("k_proj.weight", "k_proj.bias")):
            return int(self.config["num_key_value_heads"])
        return 0


def read_architecture(folder: Path) -> Architecture:
    """Read config.json of a model folder.

    Raises:
        InputError: no config, an unsupported class, quantized weights, a rope type or a folder kind that the converter
            does not know.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"no config.json in {folder}.", "a model folder.", "give the folder of the whole model.")
    config = _plain_config(folder) or _full_config(folder)
    known = ", ".join(ARCHITECTURES)
    classes = config.get("architectures") or ["none"]
    if classes[0] not in ARCHITECTURES:
        raise InputError(
            f"a {classes[0]} model in {folder}.",
            f"one of: {known}.",
            "give --llama-cpp DIR, a checkout of llama.cpp, to convert it with the official script.",
        )
    name = ARCHITECTURES[classes[0]]
    _refuse_special(folder, config, name)
    return Architecture(name, int(config["num_hidden_layers"]), config)


def _plain_config(folder: Path) -> dict[str, Any] | None:
    """config.json as it is, when it leaves nothing that matters to a default; None when transformers must fill it in.

    Importing transformers takes longer than converting a small model.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = ARCHITECTURES[config["architectures"][0]]
        whole = all(type(config[key]) is int and config[key] > 0 for key in _NUMBERS)
        rope = config.get("rope_parameters") or config
        whole &= type(config["tie_word_embeddings"]) is bool and type(config["rms_norm_eps"]) is float
        whole &= type(rope["rope_theta"]) in (int, float) and config["model_type"] == _MODEL_TYPES[name]
        head = config.get("head_dim")
        whole &= type(head) is int or (head is None and name == "qwen2")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OSError):
        return None
    return config if whole else None


def _full_config(folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True).to_dict()
    except Exception as error:  # transformers validates values with exceptions of many kinds
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{folder / 'config.json'} cannot be read ({reason}).", "the configuration of a model.", "check the folder."
        ) from None


def _refuse_special(folder: Path, config: dict[str, Any], name: str) -> None:
    if config.get("quantization_config"):
        raise InputError(
            f"quantized weights in {folder} (quantization_config).",
            "float32, float16 or bfloat16 weights.",
            "convert the original model; quantize the GGUF afterwards.",
        )
    if (folder / "modules.json").is_file() or config.get("is_causal") is False:
        raise InputError(f"an embedding model in {folder}.", "a causal language model.", "use llama.cpp's converter.")
    card = folder / "README.md"
    if card.is_file() and "# qwen3-reranker" in card.read_text(encoding="utf-8", errors="replace").lower():
        raise InputError(f"a reranker in {folder}.", "a causal language model.", "use llama.cpp's converter.")
    rope = _rope(config)
    if rope.get("rope_type") not in (None, "default", *_ROPE_TYPES[name]):
        raise InputError(
            f"rope type {rope['rope_type']!r} in {folder / 'config.json'}.",
            f"default, {', '.join(_ROPE_TYPES[name])}.",
            "use llama.cpp's converter.",
        )
    if rope.get("rope_type") == "yarn" and "original_max_position_embeddings" not in rope:
        raise InputError(
            f"YaRN without original_max_position_embeddings in {folder / 'config.json'}.",
            "the context length the model was trained with.",
            "add it to rope_scaling.",
        )


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rope parameters of the full-attention layers, in the layout of transformers 5."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope = dict(rope.get("full_attention", rope))
    if "rope_theta" not in rope and config.get("rope_theta") is not None:
        rope["rope_theta"] = config["rope_theta"]
    rope.setdefault("rope_type", rope.get("type"))
    return rope


def _head_size(config: dict[str, Any]) -> int:
    if config.get("head_dim") is not None:
        return int(config["head_dim"])
    return int(config["hidden_size"]) // int(config["num_attention_heads"])


def rope_factors(config: dict[str, Any]) -> np.ndarray | None:
    """Divisors of the rotary frequencies of Llama 3.1 and later (rope type llama3), float32; None for other models.

    Wavelengths below the high-frequency bound stay, those above the low-frequency bound are stretched by `factor`, and
    those between are blended (llama.cpp, conversion/llama.py, generate_extra_tensors).
    """
    rope = _rope(config)
    if str(rope.get("rope_type")).lower() != "llama3":
        return None
    size = _head_size(config)
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


_LLAMA3 = (("factor", 8.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0))


def write_parameters(writer: GGUFWriter, model: Architecture, file_type: int) -> None:
    """Add the hyperparameters to `writer`, in the official order."""
    config = model.config
    writer.add_block_count(model.blocks)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    _write_rope(writer, _rope(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_file_type(file_type)
    if model.name == "llama":
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(_head_size(config))


def _write_rope(writer: GGUFWriter, rope: dict[str, Any]) -> None:
    import gguf

    factor = rope.get("factor")
    if rope["rope_type"] in ("linear", "yarn") and factor is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(factor)
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            optional = (
                ("extrapolation_factor", writer.add_rope_scaling_yarn_ext_factor),
                ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
                ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
                ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
            )
            for key, add in optional:
                if rope.get(key) is not None:
                    add(rope[key])
    if rope.get("rope_theta") is not None:
        writer.add_rope_freq_base(rope["rope_theta"])
