"""Every profile from 01 to 06 at the real configuration of its model, cut to two layers with random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lib import settings
from lib.models.base_model import SHIPPED
from lib.runs.machine import bitsandbytes_problem, llama_cpp_problem
from lib.runs.run import open_run
from lib.stages.convert import stage as convert_stage
from lib.stages.data import stage as data_stage
from lib.stages.evaluate import stage as evaluate_stage
from lib.stages.export import stage as export_stage
from lib.stages.finetune import stage as finetune_stage
from lib.stages.merge import stage as merge_stage
from lib.stages.quantize import stage as quantize_stage
from tests.test_settings import PROJECT

LAYERS = 2
QWEN2 = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
QWEN3_06B = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "model_type": "qwen3",
}
QWEN35_08B = {  # three of four layers keep a state; here one of two
    **SHIPPED["Qwen/Qwen3.5-0.8B"],
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    },
}
# Folder of shared/data with configuration and tokenizer, and what differs from it (as published with the model).
PROFILES: dict[str, tuple[str, dict[str, Any]]] = {
    "chnsenticorp-qwen2.5-0.5b": ("qwen2.5-0.5b-instruct", {}),
    "chnsenticorp-qwen3-0.6b": ("qwen3-4b-thinking-2507", QWEN3_06B),
    "chnsenticorp-qwen3.5-0.8b": ("qwen3-4b-thinking-2507", QWEN35_08B),
    "counselling-mindchat-qwen2-0.5b": ("qwen1.5-0.5b-chat", {**QWEN2, "tie_word_embeddings": False}),
    "counselling-qwen1.5-0.5b": ("qwen1.5-0.5b-chat", {}),
    "counselling-qwen2.5-0.5b": ("qwen2.5-0.5b-instruct", {}),
    "crypto-qwen3-4b-thinking": ("qwen3-4b-thinking-2507", {}),
}
TERMS = ("对称加密", "数字签名", "哈希函数", "公钥基础设施", "密钥交换", "椭圆曲线", "零知识证明", "随机数生成器")


def cut_model(folder: Path, shared: Path, changes: dict[str, Any]) -> Path:
    """The real configuration with two layers; random weights, real tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(shared, folder, ignore=shutil.ignore_patterns("PROVENANCE.md", "LICENSE"))
    for path in folder.iterdir():
        path.chmod(0o644)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    config |= {"num_hidden_layers": LAYERS, "max_window_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def rows_for(profile: str, folder: Path, shared: Path) -> Path:
    """Real rows for the task of the profile; for the cryptography profile, rows with thinking made here."""
    if profile.startswith("chnsenticorp"):
        return shared / "chnsenticorp"
    if profile.startswith("counselling"):
        return shared / "smile_chat"
    path = folder / "crypto.json"
    answers = [
        {
            "instruction": f"什么是{term}？请举第 {i} 个例子。",
            "input": "",
            "output": f"<thinking>\n先回忆{term}的定义，再想第 {i} 个例子。\n</thinking>\n\n{term}用于保护信息。",
            "system": "你是密码学助教。",
            "difficulty": "easy",
        }
        for term in TERMS
        for i in range(8)
    ]
    path.write_text(json.dumps(answers, ensure_ascii=False), encoding="utf-8")
    return path


def test_every_profile_is_run() -> None:
    shipped = {path.stem for path in (PROJECT / "params").glob("*.yaml")}
    whole = {
        "quick",
        "chnsenticorp-offline",
        "smollm2-movies",
        "smollm2-amazon",
        "ner-offline",
        "qa-offline",
    }  # need no random weights
    assert shipped == {*PROFILES, *whole}


@pytest.mark.slow
@pytest.mark.parametrize("profile", PROFILES)
def test_profile_from_01_to_06(profile: str, home: Path, tmp_path: Path, shared_data: Path) -> None:
    if problem := llama_cpp_problem():
        pytest.skip(problem)
    name, changes = PROFILES[profile]
    overrides = {
        "base_model": str(cut_model(tmp_path / "model", shared_data / name, changes)),
        "dataset": str(rows_for(profile, tmp_path, shared_data)),
        "fallbacks": [],
        "max_train_rows": 12,
        "max_eval_rows": 4,
        "max_seq_length": 384,
        "generated_rows": 1,
        "max_new_tokens": 8,
        "perplexity_tokens": 2048,
        "n_ctx": 512,
        "num_train_epochs": 1.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "ladder": ["Q8_0", "Q4_K_M"],
        "export_formats": ["fp16"],
    }
    chosen = settings.load(PROJECT / "params" / f"{profile}.yaml", overrides)
    if chosen.load_in_4bit and (problem := bitsandbytes_problem()):
        pytest.skip(problem)
    run = open_run(chosen.run_name)
    used = data_stage.prepare(chosen, run).rows("train")  # a first exchange over max_seq_length is left out
    adapter = finetune_stage.finetune(chosen, run)
    assert adapter.train_rows == len(used) >= 10
    evaluate_stage.evaluate(chosen, run)
    merged = merge_stage.merge(chosen, run)
    assert (merged.nf4 is not None) is chosen.load_in_4bit
    gguf = convert_stage.export(chosen, run)
    assert gguf.gate.mean_kld < chosen.gate_max_kld
    ladder = quantize_stage.quantize(chosen, run)
    assert [file.type for file in ladder.files] == ["Q8_0", "Q4_K_M"]
    assert export_stage.export(chosen, run).made
