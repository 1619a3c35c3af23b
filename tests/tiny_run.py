"""A run of a tiny real model: local base with a real tokenizer, products `data` and `adapter`, no training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from lib.prompts.tasks import ClassificationTask
from lib.runs.run import ProductDraft, Run, open_run

LABELS = ("负面", "正面")
WORDS = [*"很不好差，。！贵", "房间", "干净", "服务", "早餐", "虽然", "但是", "一般", "Wi-Fi", "24", "🙂"]
TASK = ClassificationTask(LABELS, "你是情感分析助手。", "判断这段评论的情感倾向。\n评论：{text}", 96)


def texts(n: int, seed: int = 0) -> list[str]:
    """Random reviews."""
    draw = random.Random(seed)
    return ["".join(draw.choices(WORDS, k=draw.randint(1, 20))) for _ in range(n)]


def rows(n: int, split: str, seed: int) -> list[dict[str, Any]]:
    """Rows of the data product."""
    return [
        {"id": f"{split}-{i:05d}", "text": text, "label": i % 2, "group": i, "leaked": False}
        for i, text in enumerate(texts(n, seed))
    ]


def make_tokenizer(folder: Path) -> None:
    """Train and save the project's tokenizer with 512 tokens."""
    from lib.models.offline_base import TokenizerRecipe, train_tokenizer

    train_tokenizer(texts(200), list(LABELS), folder, TokenizerRecipe(vocabulary=512))


def make_base(folder: Path, dtype: str = "float32", tied: bool = True, seed: int = 0) -> None:
    """A 2-layer Qwen2 with random weights, large enough that its predictions differ, and the tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0, 0.15)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    make_tokenizer(folder)


def make_adapter(base: Path, folder: Path) -> None:
    """A LoRA adapter with random weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)


def make_run(base: Path, method: str = "LoRA", name: str = "tiny") -> Run:
    """A run (under WORKBOOK_HOME) whose `data` and `adapter` products are finished."""
    from lib.models.base_model import resolve_base

    run = open_run(name)

    def data(work: ProductDraft) -> None:
        for split, n, seed in (("train", 24, 1), ("validation", 16, 2), ("test", 16, 3)):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(n, split, seed)]
            (work.folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        (work.folder / "task.json").write_text(json.dumps(TASK.to_json()), encoding="utf-8")
        make_tokenizer(work.folder / "tokenizer")
        found = resolve_base(str(base))
        work.facts = {"base_model": found.id, "base_revision": found.revision, "offline_base": False}
        work.notes = ["a tiny random model: not a result"]

    def adapter(work: ProductDraft) -> None:
        make_adapter(base, work.folder)
        work.facts = {"method": method}

    run.produce("data", data, {})
    run.produce("adapter", adapter, {}, inputs=("data",))
    return run
