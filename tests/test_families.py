"""Small models of the families that llama.cpp's own script converts, from 01 to 07, with random weights.

Tokenizers are Qwen2.5's, or a SentencePiece model trained here with the settings of Gemma's and Llama's.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lib import settings
from lib.runs.machine import llama_cpp_problem
from lib.runs.run import open_run
from lib.stages.compare import stage as compare_stage
from lib.stages.convert import official
from lib.stages.convert import stage as convert_stage
from lib.stages.data import stage as data_stage
from lib.stages.evaluate import stage as evaluate_stage
from lib.stages.export import stage as export_stage
from lib.stages.finetune import stage as finetune_stage
from lib.stages.merge import stage as merge_stage
from lib.stages.quantize import stage as quantize_stage
from tests.models.test_language_model import TEXT, write_qwen35
from tests.test_settings import PROJECT

pytestmark = pytest.mark.slow
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
QWEN = {"vocab_size": 151936, "pad_token_id": 151643, "eos_token_id": 151645, "bos_token_id": None}
GEMMA = {"vocab_size": 4000, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "head_dim": 32}
LLAMA = {"vocab_size": 4000, "pad_token_id": 2, "eos_token_id": 2, "bos_token_id": 1}
MLA = {"q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Family → model_type, tokenizer, what differs from SIZES.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama 3.2": (
        "llama",
        "qwen",
        {**QWEN, "tie_word_embeddings": True, "rope_parameters": {**ROPE, "original_max_position_embeddings": 1024}},
    ),
    "SmolLM3": ("smollm3", "qwen", {**QWEN, "tie_word_embeddings": True}),
    "Granite": ("granite", "qwen", {**QWEN, "tie_word_embeddings": True, "logits_scaling": 4.0}),
    "Gemma 3": ("gemma3_text", "gemma", {**GEMMA, "sliding_window": 128, "query_pre_attn_scalar": 32}),
    "MiniCPM3": (
        "minicpm3",
        "llama",
        {**LLAMA, **MLA, "num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
}
TEMPLATE = (
    "{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)


def write_sentence_pieces(folder: Path, kind: str, shared: Path) -> None:
    """tokenizer.model, and what transformers makes of it, as a hub folder has them side by side."""
    import sentencepiece
    from transformers import AutoTokenizer

    with (shared / "chnsenticorp" / "train.tsv").open(encoding="utf-8", newline="") as stream:
        texts = [row[-1] for row in csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)][1:2500]
    gemma = kind == "gemma"
    ids = dict(
        zip(
            ("pad_id", "eos_id", "bos_id", "unk_id") if gemma else ("unk_id", "bos_id", "eos_id"),
            range(4),
            strict=False,
        )
    )
    pieces = {"bos_piece": "<bos>", "eos_piece": "<eos>"} if gemma else {}
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([*texts, *["system user assistant"] * 3]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=4000,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=not gemma,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>"],
        minloglevel=2,
        **ids,
        **pieces,
    )
    names = ("<bos>", "<eos>") if gemma else ("<s>", "</s>")
    own = {"tokenizer_class": f"{'Gemma' if gemma else 'Llama'}Tokenizer", "unk_token": "<unk>", "add_bos_token": True}
    own |= {"bos_token": names[0], "eos_token": names[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if not gemma:  # as Llama 2's file has it, which transformers 5 would not write anew
        space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        stored |= {
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]},
            "pre_tokenizer": None,
        }
        (folder / "tokenizer.json").write_text(json.dumps(stored, ensure_ascii=False), encoding="utf-8")
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["added_tokens_decoder"] = {str(t["id"]): {key: t[key] for key in keys} for t in stored["added_tokens"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_family(name: str, folder: Path, shared: Path) -> Path:
    """A random model of the family with its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    qwen = shared / "qwen2.5-0.5b-instruct"
    if name == "Qwen3.5":
        write_qwen35(folder, **{**TEXT, "vocab_size": 151936, "eos_token_id": 151645, "max_position_embeddings": 2048})
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    kind, tokenizer, changes = FAMILIES.get(name, ("", "qwen", {}))
    folder.mkdir(exist_ok=True)
    if kind:
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**SIZES, **changes})
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    if tokenizer == "qwen":
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(qwen / file, folder / file)
    else:
        write_sentence_pieces(folder, tokenizer, shared)
    return folder


@pytest.mark.parametrize("name", ["Qwen3.5", *FAMILIES])
def test_a_family_from_01_to_07(name: str, home: Path, tmp_path: Path, shared_data: Path) -> None:
    if (problem := llama_cpp_problem()) or official.kept_sources() is None:
        pytest.skip(problem or "the set-up has kept no converter of llama.cpp")
    overrides = {
        "base_model": str(write_family(name, tmp_path / "model", shared_data)),
        "dataset": str(shared_data / "chnsenticorp"),
        "fallbacks": [],
        "max_train_rows": 24,
        "max_eval_rows": 8,
        "max_seq_length": 384,
        "perplexity_tokens": 1024,
        "n_ctx": 512,
        "num_train_epochs": 1.0,
        "dtype": "float32",
        "imatrix": "auto",
        "ladder": ["Q8_0", "Q4_K_M"],
        "export_formats": [],
    }
    chosen = settings.load(PROJECT / "params" / "chnsenticorp-qwen3-0.6b.yaml", overrides)
    run = open_run(chosen.run_name)
    data_stage.prepare(chosen, run)
    assert finetune_stage.finetune(chosen, run).train_rows == 24
    evaluate_stage.evaluate(chosen, run)
    merge_stage.merge(chosen, run)
    gguf = convert_stage.export(chosen, run)
    assert gguf.gate.mean_kld < chosen.gate_max_kld
    assert [file.type for file in quantize_stage.quantize(chosen, run).files] == ["Q8_0", "Q4_K_M"]
    export_stage.export(chosen, run)
    assert {file["type"] for file in compare_stage.compare(chosen, run).files} == {"F16", "Q8_0", "Q4_K_M"}
