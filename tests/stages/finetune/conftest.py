"""A run with a small data product, an offline base small enough to train in a second, and one training made once."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lib.models import offline_base
from lib.prompts.conversations import Encoded
from lib.prompts.tasks import ClassificationTask
from lib.runs.files import HOME_VARIABLE, write_json, write_jsonl
from lib.runs.run import Run, open_run
from lib.settings import Settings
from lib.stages.finetune.stage import finetune
from lib.stages.finetune.trainer import AnswerTrainer

TASK = ClassificationTask(
    ("负面", "正面"), "你是情感分析助手。", "判断这段评论的情感，只回答负面或正面。\n评论：{text}", 96
)
TINY = offline_base.BaseRecipe(
    layers=1, hidden=64, intermediate=64, heads=2, kv_heads=1, window=64, batch=4, min_tokens=2048, max_tokens=2048
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
        offline_base.train_tokenizer(
            [row["text"] for row in splits["train"]],
            words,
            work.folder / "tokenizer",
            offline_base.TokenizerRecipe(512),
        )
        work.facts |= {"base_model": "offline", "base_revision": "", "offline_base": True}

    run.produce("data", build, {})


def encoded(ids: list[int], prompt: int) -> Encoded:
    """A row whose one answer stands behind so many tokens."""
    return Encoded(ids, [(prompt, len(ids))])


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


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with three runs of the same data: "fresh", "straight" (trained) and "broken" (died in update 8)."""
    home = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOME_VARIABLE, str(home))
        patch.setattr(offline_base, "BaseRecipe", lambda **changes: replace(TINY, **changes))
        make_data(open_run("fresh"))
        for name in ("straight", "broken"):
            shutil.copytree(home / "runs" / "fresh", home / "runs" / name)
        finetune(tiny_settings(), open_run("straight"))
        die_after(7, patch)
        with pytest.raises(KeyboardInterrupt):
            finetune(tiny_settings(), open_run("broken"))
    yield home


@pytest.fixture
def runs(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Run]:
    """Runs of a private copy of `prepared`, by name."""
    shutil.copytree(prepared, tmp_path / "home", symlinks=True)
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    monkeypatch.setattr(offline_base, "BaseRecipe", lambda **changes: replace(TINY, **changes))
    return open_run


def die_after(updates: int, patch: pytest.MonkeyPatch) -> None:
    """Training dies, as by Ctrl-C, when it computes the loss of the update after that many."""
    original, done = AnswerTrainer.compute_loss, [0]

    def compute(self, *arguments, **options):
        done[0] += 1
        if done[0] > updates:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    patch.setattr(AnswerTrainer, "compute_loss", compute)


def interrupted(settings: Settings, run: Run) -> None:
    """Begin a training of eight updates or more, and let it die in the eighth."""
    with pytest.MonkeyPatch.context() as patch:
        die_after(7, patch)
        with pytest.raises(KeyboardInterrupt):
            finetune(settings, run)
