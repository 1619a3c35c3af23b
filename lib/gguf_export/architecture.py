"""Which models can be converted, and their hyperparameters as GGUF keys.

The order and the types of the keys are those of the converter of llama.cpp (`conversion/base.py`, set_gguf_parameters),
so that the files are equal byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
"""Class in config.json → architecture in GGUF."""

_BLOCK = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
_EXTRA = {
    "qwen2": ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    "qwen3": ("attn_q_norm.weight", "attn_k_norm.weight"),
}


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


def read_architecture(folder: Path) -> Architecture:
    """Read config.json of a model folder.

    Raises:
        InputError: no config, an unsupported class, quantized weights, a rope type or a folder kind that the converter
            does not know.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise InputError(f"no config.json in {folder}.", "a model folder.", "give the folder of the whole model.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True).to_dict()
    except Exception as error:  # transformers validates values with exceptions of many kinds
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{folder / 'config.json'} cannot be read ({reason}).", "the configuration of a model.", "check the folder."
        ) from None
    known = ", ".join(ARCHITECTURES)
    classes = config.get("architectures") or ["none"]
    if classes[0] not in ARCHITECTURES:
        raise InputError(
            f"a {classes[0]} model in {folder}.",
            f"one of: {known}.",
            "convert it with convert_hf_to_gguf.py of llama.cpp.",
        )
    _refuse_special(folder, config)
    return Architecture(ARCHITECTURES[classes[0]], int(config["num_hidden_layers"]), config)


def _refuse_special(folder: Path, config: dict[str, Any]) -> None:
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
    if rope.get("rope_type") not in (None, "default", "linear", "yarn"):
        raise InputError(
            f"rope type {rope['rope_type']!r} in {folder / 'config.json'}.",
            "default, linear or yarn.",
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
