"""Runs whose products are written by hand, so that who is better is known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.prompts.tasks import ClassificationTask, ConversationTask
from lib.runs.files import write_json, write_jsonl
from lib.runs.run import Run, open_run
from lib.scoring.log_probabilities import AnswerScores, Scores

LABELS = ClassificationTask(("负面", "正面"), "你是情感分析助手。", "评论：{text}", 96)
TALK = ConversationTask("dialogue", "你是心理咨询师。", 256, False)
Make = Callable[..., Run]


def test_rows(n: int, talk: bool = False, split: str = "test") -> list[dict[str, Any]]:
    """Rows of one split; every row a group of its own."""
    rows = []
    for i in range(n):
        said = f"{split} {i}"
        turns = [{"role": "system", "content": "-"}, {"role": "user", "content": said}]
        content = {"messages": [*turns, {"role": "assistant", "content": "好。"}]} if talk else {"text": said}
        rows.append(
            {"id": f"{split}-{i}", **content, **({} if talk else {"label": i % 2}), "group": i, "leaked": False}
        )
    return rows


test_rows.__test__ = False


@pytest.fixture
def make(home: Path) -> Make:
    """Make a run with data, adapter and evaluation (and, where a file is given, comparison)."""

    def build(
        name: str,
        values: Sequence[float],
        *,
        rows: list[dict[str, Any]] | None = None,
        task: Any = LABELS,
        seed: int = 42,
        rank: int = 8,
        adapter_bytes: int = 1000,
        seconds: float = 60.0,
        file: int | None = None,
        tokens: int = 4,
        train: int = 30,
        device: str = "cpu",
        loss: float = 0.5,
        resumed: int | None = None,
    ) -> Run:
        talk = task is TALK
        run, rows = open_run(name), test_rows(len(values), talk) if rows is None else rows

        def data(work: Any) -> None:
            write_jsonl(work.folder / "train.jsonl", test_rows(train, talk, "train"))
            write_jsonl(work.folder / "validation.jsonl", test_rows(10, talk, "validation"))
            write_jsonl(work.folder / "test.jsonl", rows)
            write_json(work.folder / "task.json", task.to_json())
            work.facts |= {"base_model": "offline", "base_revision": "one", "prompt_hash": "p"}

        def adapter(work: Any) -> None:
            (work.folder / "adapter_model.safetensors").write_bytes(bytes([seed]) * adapter_bytes)
            facts = {"train_rows": train, "seconds": seconds, "resumed_from": resumed, "throughput": 100.0}
            facts |= {"steps": 10, "chosen_step": 8, "total": 5000, "trainable": 1000}
            write_json(work.folder / "training.json", facts)
            losses = [{"step": step, "loss": 1 / step} for step in (4, 8, 10)]
            write_jsonl(work.folder / "history.jsonl", [*losses, {"step": 8, "eval_loss": loss}])
            work.facts |= {"method": "LoRA"}
            work.metrics |= {"eval_loss": loss}
            work.device = device

        def evaluation(work: Any) -> None:
            ids, found = [row["id"] for row in rows], np.array(values, dtype=np.float64)
            if talk:
                scores: Any = AnswerScores(ids, -found * tokens, np.full(len(ids), tokens), 1.0)
            else:
                labels = np.array([row["label"] for row in rows])
                said = np.where(found > 0, labels, 1 - labels)
                logs = np.where(np.arange(2) == said[:, None], -0.1, -3.0)
                scores = Scores(ids, labels, logs, np.zeros(len(ids), dtype=bool), 1.0)
            scores.save(work.folder / "scores-finetuned.jsonl")

        def comparison(work: Any) -> None:
            content = {"recommendation": {"type": "Q4_K_M"}, "files": [{"type": "Q4_K_M", "bytes": file}]}
            write_json(work.folder / "comparison.json", content)

        run.produce("data", data, {"rows": [row["id"] for row in rows]})
        run.produce("adapter", adapter, {"seed": seed, "lora_r": rank, "num_train_epochs": 2.0}, inputs=("data",))
        run.produce("evaluation", evaluation, {}, inputs=("data", "adapter"))
        if file is not None:
            run.produce("comparison", comparison, {})
        return run

    return build


def right(n: int, wrong: Sequence[int] = ()) -> list[float]:
    """All right but these."""
    return [0.0 if i in set(wrong) else 1.0 for i in range(n)]
