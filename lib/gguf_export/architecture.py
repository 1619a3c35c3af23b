"""Which models can be converted, and their hyperparameters as GGUF keys.

The order and the types of the keys are those of the converter of llama.cpp (`conversion/base.py`, set_gguf_parameters;
`conversion/llama.py`), so that the files are equal byte for byte.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.models.gguf_architecture import ARCHITECTURES, ROPE_TYPES, head_size, rope_of, rotary_heads, tensor_names

if TYPE_CHECKING:
    from gguf import GGUFWriter

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
        tied = bool(self.config.get("tie_word_embeddings"))
        return set(tensor_names(self.name, self.blocks, tied))

    def heads_of(self, name: str) -> int:
        """Heads whose rows llama.cpp wants in another order: query and key of Llama; 0 for all other tensors."""
        return rotary_heads(self.name, name, self.config)


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
    rope = rope_of(config)
    if rope.get("rope_type") not in (None, "default", *ROPE_TYPES[name]):
        raise InputError(
            f"rope type {rope['rope_type']!r} in {folder / 'config.json'}.",
            f"default, {', '.join(ROPE_TYPES[name])}.",
            "use llama.cpp's converter.",
        )
    if rope.get("rope_type") == "yarn" and "original_max_position_embeddings" not in rope:
        raise InputError(
            f"YaRN without original_max_position_embeddings in {folder / 'config.json'}.",
            "the context length the model was trained with.",
            "add it to rope_scaling.",
        )


def write_parameters(writer: GGUFWriter, model: Architecture, file_type: int) -> None:
    """Add the hyperparameters to `writer`, in the official order."""
    config = model.config
    writer.add_block_count(model.blocks)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    _write_rope(writer, rope_of(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_file_type(file_type)
    if model.name == "llama":
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(head_size(config))


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
