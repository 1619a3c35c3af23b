"""A run with the products data and adapter, made by hand on the tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lib.models.base_model import resolve_base
from lib.runs.files import write_json, write_jsonl
from lib.runs.run import ProductDraft, Run, open_run
from tests.scoring import tiny
from tests.scoring.conftest import (
    Tiny,
    small,  # noqa: F401
)

TRAIN = [{"id": f"train-{i:05d}", "text": t, "label": i % 2, "pattern": "seen"} for i, t in enumerate(tiny.texts(20))]


def test_rows() -> list[dict]:
    """40 test rows, a third of them of an unseen pattern."""
    return [{**row, "pattern": "unseen" if i % 3 == 0 else "seen"} for i, row in enumerate(tiny.rows(40))]


test_rows.__test__ = False


def conversations(count: int, thinking: bool = False) -> list[dict]:
    """Conversations of two exchanges."""
    thought = "<think>\n想一想\n</think>\n\n" if thinking else ""
    texts = tiny.texts(4 * count)
    made = []
    for i in range(count):
        q1, a1, q2, a2 = texts[4 * i : 4 * i + 4]
        turns = [("system", "你是助手。"), ("user", q1), ("assistant", a1), ("user", q2), ("assistant", thought + a2)]
        messages = [{"role": role, "content": text} for role, text in turns]
        made.append({"id": f"test-{i:05d}", "messages": messages, "group": i, "leaked": False})
    return made


def save_adapter(small: Tiny, folder: Path) -> None:  # noqa: F811
    """A random LoRA adapter of the tiny model."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(
        tiny.make_model(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    model.peft_config["default"].base_model_name_or_path = str(small.folder)
    model.save_pretrained(folder)


def _with_adapter(run: Run, small: Tiny, data: Callable[[ProductDraft], None]) -> Run:  # noqa: F811
    """The run with its products `data` and `adapter`."""

    def adapter(work: ProductDraft) -> None:
        save_adapter(small, work.folder)
        work.facts |= {"method": "LoRA"}

    run.produce("data", data, {})
    run.produce("adapter", adapter, {}, inputs=("data",))
    return run


@pytest.fixture
def run(small: Tiny, home: Path) -> Run:  # noqa: F811
    """A run whose base model is the tiny model's folder."""
    run = open_run("tiny")

    def data(work: ProductDraft) -> None:
        rows = test_rows()
        write_jsonl(work.folder / "train.jsonl", TRAIN)
        write_jsonl(work.folder / "test.jsonl", rows)
        write_json(work.folder / "task.json", small.task.to_json())
        predictions = [row["label"] if i % 4 else 1 - row["label"] for i, row in enumerate(rows)]
        write_json(work.folder / "floor.json", {"model": "words", "test": {"predictions": predictions}})
        small.tokenizer.save_pretrained(work.folder / "tokenizer")
        work.facts |= {
            "source": "made for this test",
            "sample_data": True,
            "base_model": str(small.folder),
            "base_revision": resolve_base(str(small.folder)).revision,
            "offline_base": False,
            "prompt_hash": "0",
        }

    return _with_adapter(run, small, data)


@pytest.fixture
def talk(small: Tiny, home: Path) -> Run:  # noqa: F811
    """The same with conversations, in a run of another name."""
    run = open_run("talk")

    def data(work: ProductDraft) -> None:
        task = {"task": "dialogue", "system_prompt": "你是助手。", "max_seq_length": 192, "thinking": False}
        write_json(work.folder / "task.json", task)
        write_jsonl(work.folder / "test.jsonl", conversations(12))
        write_jsonl(work.folder / "train.jsonl", conversations(3))
        small.tokenizer.save_pretrained(work.folder / "tokenizer")
        revision = resolve_base(str(small.folder)).revision
        work.facts |= {"task": "dialogue", "source": "made for this test", "sample_data": True, "offline_base": False}
        work.facts |= {"base_model": str(small.folder), "base_revision": revision, "prompt_hash": "0"}

    return _with_adapter(run, small, data)


@pytest.fixture(scope="session")
def labels() -> np.ndarray:
    """True labels of the test rows."""
    return np.array([row["label"] for row in test_rows()])
