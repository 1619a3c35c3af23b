"""Small model folders, equal bytes on every machine: weights by integer arithmetic, files written by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny_gguf import byte_tokens, noise

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ADDED = (("<|endoftext|>", True), ("<|im_start|>", True), ("<|im_end|>", True), ("<tool_call>", False))
CARD = """---
base_model: Qwen/Qwen2.5-0.5B-Instruct
language:
- zh
license: apache-2.0
tags:
- lora
datasets:
- seamew/ChnSentiCorp
---
# A small model
"""
OFFICIAL = """
import runpy, sys
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"  # the vocabulary is too small for the check text
runpy.run_path("convert_hf_to_gguf.py", run_name="__main__")
"""
"""How the official converter is made to accept the small vocabulary; everything else is its own."""


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def write_tokenizer(folder: Path, start: str = "") -> None:
    """Byte-level BPE of Qwen2's structure with 256 byte tokens, 8 merges and 4 added tokens.

    Args:
        start: token that is put before every text, as Llama 3's tokenizer does.
    """
    tokens = byte_tokens()
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "t"), ("1", "2"), ("ä", "½"), ("å", "¥"), ("!", "!")]
    vocabulary = {token: i for i, token in enumerate([*tokens, *("".join(pair) for pair in merges)])}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    switches = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": len(vocabulary) + i, "content": token, "special": special, **switches}
        for i, (token, special) in enumerate(ADDED)
    ]
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": start, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            {"SpecialToken": {"id": start, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": start, "type_id": 1}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {start: {"id": start, "ids": [264], "tokens": [start]}},
    }
    _json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
            "post_processor": {"type": "Sequence", "processors": [level, template]} if start else level,
            "decoder": level,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": [list(pair) for pair in merges]},
        },
    )
    decoder = {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in added}
    _json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast" if start else "Qwen2Tokenizer",
            "added_tokens_decoder": decoder,
            "bos_token": start or None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            **({} if start else {"add_bos_token": False}),
            "model_max_length": 4096,
        },
    )
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")


def _tensors(kind: str, tied: bool, width: int, vocabulary: int) -> dict[str, np.ndarray]:
    heads, hidden = 4, 96
    head = 32 if kind == "qwen3" else width // heads
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, width)
    for layer in range(2):
        p = f"model.layers.{layer}."
        for name, rows in (("q", heads * head), ("k", 2 * head), ("v", 2 * head)):
            shapes[f"{p}self_attn.{name}_proj.weight"] = (rows, width)
            if kind == "qwen2":
                shapes[f"{p}self_attn.{name}_proj.bias"] = (rows,)
            elif kind == "qwen3" and name != "v":
                shapes[f"{p}self_attn.{name}_norm.weight"] = (head,)
        shapes[f"{p}self_attn.o_proj.weight"] = (width, heads * head)
        shapes |= {f"{p}mlp.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
        shapes[f"{p}mlp.down_proj.weight"] = (width, hidden)
        shapes |= {f"{p}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return {name: noise(shape, i, 0.3) for i, (name, shape) in enumerate(sorted(shapes.items()))}


def write_model(
    folder: Path,
    kind: str = "qwen2",
    tied: bool = True,
    shards: int = 1,
    width: int = 64,
    dtype: str = "bfloat16",
    card: bool = False,
    start: str = "",
    vocabulary: int = 300,
    **config: Any,
) -> Path:
    """A whole model folder; `start`: see `write_tokenizer`; `config` replaces keys of config.json."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tensors = {
        name: torch.from_numpy(array).to(getattr(torch, dtype))
        for name, array in _tensors(kind, tied, width, vocabulary).items()
    }
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        weight_map = {name: files[i * shards // len(names)] for i, name in enumerate(names)}
        for file in files:
            part = {name: tensors[name] for name in names if weight_map[name] == file}
            save_file(part, folder / file, metadata={"format": "pt"})
        _json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    own = {"head_dim": 32} if kind == "qwen3" else {}
    _json(
        folder / "config.json",
        {
            "architectures": [f"{kind.capitalize()}ForCausalLM"],
            "model_type": kind,
            "hidden_size": width,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": vocabulary,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": tied,
            "bos_token_id": 264,
            "eos_token_id": 266,
            "torch_dtype": dtype,
            **own,
            **config,
        },
    )
    _json(
        folder / "generation_config.json",
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1, "do_sample": True},
    )
    write_tokenizer(folder, start)
    if card:
        (folder / "README.md").write_text(CARD)
    return folder


def official(checkout: Path, model: Path, output: Path, outtype: str, patched: bool = True) -> None:
    """Run convert_hf_to_gguf.py of a llama.cpp checkout with this Python (sentencepiece must be importable)."""
    arguments = [str(model.resolve()), "--outtype", outtype, "--outfile", str(output.resolve())]
    start = ["-c", OFFICIAL] if patched else ["convert_hf_to_gguf.py"]
    subprocess.run([sys.executable, *start, *arguments], cwd=checkout, check=True, capture_output=True, timeout=300)
