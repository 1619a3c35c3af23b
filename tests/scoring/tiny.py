"""A tiny random Qwen2 with a real tokenizer, as a model and as a GGUF file written independently of lib."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from lib.scoring.perplexity import positions, table_of

LABELS = ("负面", "正面")
WORDS = [
    "房间",
    "很",
    "不",
    "干净",
    "服务",
    "好",
    "差",
    "早餐",
    "位置",
    "方便",
    "但是",
    "虽然",
    "，",
    "。",
    "一般",
    "贵",
]


def texts(n: int, seed: int = 0) -> list[str]:
    """Random reviews of 1 to 20 words."""
    draw = random.Random(seed)
    return ["".join(draw.choices(WORDS, k=draw.randint(1, 20))) for _ in range(n)]


def rows(n: int, seed: int = 1) -> list[dict]:
    """Rows of a test split; one group has two members, one row is leaked, half of them have an unseen pattern."""
    return [
        {"id": f"test-{i:05d}", "text": text, "label": i % 2, "group": max(0, i - 1), "leaked": i == 0}
        for i, text in enumerate(texts(n, seed))
    ]


def make_tokenizer(folder: Path) -> None:
    """Train and save a tokenizer of 512 tokens."""
    from lib.models.offline_base import TokenizerRecipe, train_tokenizer

    train_tokenizer(texts(200), list(LABELS), folder, TokenizerRecipe(vocabulary=512))


def make_model(vocab_size: int = 512, seed: int = 0, tied: bool = True):
    """A random Qwen2ForCausalLM, float32, with weights large enough that its predictions differ."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        attn_implementation="sdpa",
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
    return model


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(model, tokenizer, path: Path) -> None:
    """The model as F32 GGUF, with the tokenizer's vocabulary and template."""
    import json

    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["id"] for token in state["added_tokens"]}
    tokens = [tokenizer.convert_ids_to_tokens(i) or f"[PAD{i}]" for i in range(config.vocab_size)]
    kinds = [gguf.TokenType.CONTROL if i in added else gguf.TokenType.NORMAL for i in range(len(tokens))]
    kinds = [gguf.TokenType.UNUSED if t == f"[PAD{i}]" else kinds[i] for i, t in enumerate(tokens)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in model.state_dict().items():
        stem, kind = name.removeprefix("model.").rsplit(".", 1)
        if stem == "embed_tokens":
            target = "token_embd"
        elif stem == "norm":
            target = "output_norm"
        elif stem == "lm_head":
            if config.tie_word_embeddings:
                continue
            target = "output"
        else:
            _, layer, part = stem.split(".", 2)
            target = f"blk.{layer}.{NAMES[part]}"
        writer.add_tensor(f"{target}.{kind}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def golden_pair(first: Path, second: Path) -> list[int]:
    """Two models that are the same on every machine, the second a little off, and 520 token ids to judge them on."""
    from tests import tiny_gguf

    weights = tiny_gguf.tensors(256, 2, 1, 259, 512, 128)
    weights["token_embd.weight"] *= 0.25
    near = {
        name: values + 0.03 * tiny_gguf.noise(values.shape, 777 + i) if values.ndim > 1 else values
        for i, (name, values) in enumerate(weights.items())
    }
    tiny_gguf.write(first, weights=weights, outtype="f32", tokens=tiny_gguf.WITH_MERGE)
    tiny_gguf.write(second, weights=near, outtype="f32", tokens=tiny_gguf.WITH_MERGE)
    return [(i * i * 7 + i * 13 + (i >> 3) * 5) % 256 for i in range(520)]


def kl_table(reference: Any, other: Any, windows: list[list[int]]) -> dict[str, float]:
    """The numbers of a model beside another open one, or beside what is kept of it."""
    return table_of(positions(reference, other, windows, "KL divergence"))


def perplexity(backend: Any, windows: list[list[int]]) -> dict[str, float]:
    """The numbers of a model alone."""
    return table_of(positions(None, backend, windows, "perplexity"))
