"""A run with a small data product, and an offline base small enough to train in a second."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lib.models import offline, offline_base
from lib.models.prompting import Task
from lib.run import Run, open_run
from lib.run.files import write_json, write_jsonl
from lib.settings import Settings

TASK = Task(("负面", "正面"), "你是情感分析助手。", "判断这段评论的情感，只回答负面或正面。\n评论：{text}", 96)
TINY = offline_base.BaseRecipe(
    layers=1, hidden=64, intermediate=64, heads=2, kv_heads=1, window=64, batch=4, min_tokens=4096, max_tokens=4096
)


def rows(count: int, seed: int, split: str) -> list[dict]:
    """Reviews of one good or bad word among neutral ones, of different lengths."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        label = rng.randrange(2)
        words = [rng.choice(["房间", "早餐", "服务", "价格", "位置"]) for _ in range(rng.randrange(1, 9))]
        words.insert(rng.randrange(len(words) + 1), rng.choice([["糟糕", "失望"], ["满意", "喜欢"]][label]))
        text = "，".join(words) + "。"
        made.append({"id": f"{split}-{i:05}", "text": text, "label": label, "group": i, "leaked": False})
    return made


def make_data(run: Run, train: int = 60, validation: int = 20) -> None:
    """The data product that notebook 01 would make."""
    splits = {"train": rows(train, 1, "train"), "validation": rows(validation, 2, "validation")}
    splits["test"] = rows(20, 3, "test")

    def build(work) -> None:
        for name, content in splits.items():
            write_jsonl(work.folder / f"{name}.jsonl", content)
        write_json(work.folder / "task.json", TASK.to_json())
        words = [*TASK.label_names, TASK.system_prompt]
        (work.folder / "tokenizer").mkdir()
        offline.train_tokenizer(
            [row["text"] for row in splits["train"]], words, work.folder / "tokenizer", offline.TokenizerRecipe(512)
        )
        work.facts |= {"base_model": "offline", "base_revision": "", "offline_base": True}

    run.produce("data", build, {})


def tiny_settings(**changes) -> Settings:
    """Two epochs in eight updates."""
    values = {
        "run_name": "tiny",
        "dtype": "float32",
        "per_device_train_batch_size": 16,
        "num_train_epochs": 2.0,
        "save_steps": 2,
        "learning_rate": 5.0e-3,
        "lora_r": 4,
        "lora_dropout": 0.1,
    }
    return Settings(**{**values, **changes})


@pytest.fixture
def small_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ensure_base` makes a model of one narrow layer."""
    monkeypatch.setattr(offline_base, "BaseRecipe", lambda: TINY)


@pytest.fixture
def run(home: Path, small_base: None) -> Run:
    """A run with its data product."""
    made = open_run("tiny")
    make_data(made)
    return made
