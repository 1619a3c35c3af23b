"""Answers of a device: what is refused of a file, and what is said of a good one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.errors import InputError
from lib.scoring.log_probabilities import Scores
from lib.stages.compare.answers import is_answers, judge_answers, read_answers
from tests import tiny_run

ROWS = [{"id": f"test-{place}"} for place in range(6)]
GOOD = {
    "format": 1,
    "device": "a phone",
    "runtime": "MNN Chat",
    "file": "mnn-int4",
    "answers": [
        {"id": "test-0", "text": " 正面。", "seconds": 0.5},
        {"id": "test-1", "ids": [301, 9], "seconds": 1.5, "tokens_per_second": 20},
        {"id": "test-2", "text": "不知道"},
        {"id": "test-4", "ids": [300]},
    ],
}


def written(folder: Path, content: Any) -> Path:
    path = folder / "answers.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_answers_as_texts_and_ids_beside_those_of_the_file_here(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    assert is_answers(path) and not is_answers(written(tmp_path, {"format": 1})) and not is_answers(tmp_path / "none")
    told = read_answers(written(tmp_path, GOOD), ["F16.gguf", "mnn-int4"], ROWS)
    labels, said = np.array([1, 1, 0, 0, 1, 0]), np.array([1, 0, 0, 0, 0, 0])
    log_probs = np.log(np.where(np.arange(2) == said[:, None], 0.9, 0.1))
    Scores([row["id"] for row in ROWS], labels, log_probs, np.zeros(6, bool), 1.0).save(tmp_path / "scores.jsonl")
    found = judge_answers(told, tmp_path / "scores.jsonl", tiny_run.TASK, [[300], [301]])
    assert found["n"] == 4 and found["unread"] == 1
    assert found["agree"] == 2 and found["right"] == 2 and found["right_here"] == 2  # of test-0, 1, 2 and 4
    assert found["accuracy"] == 0.5 and found["accuracy_interval"][0] < 0.5 < found["accuracy_interval"][1]
    assert found["p"] == 1.0 and found["seconds"] == 1.0 and found["tokens_per_second"] == 20
    assert "first_token_seconds" not in found
    with pytest.raises(InputError, match="rows without labels"):
        judge_answers(told, tmp_path / "scores.jsonl", tiny_run.TASK, [])


def changed(**values: Any) -> dict[str, Any]:
    return {**GOOD, **values}


def one(**values: Any) -> dict[str, Any]:
    return changed(answers=[{"id": "test-0", "text": "x", **values}])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (changed(format=7), "format 7"),
        (changed(device=""), "no text as device"),
        (changed(runtime=["MNN"]), "no text as runtime"),
        (changed(file="other"), "file 'other'"),
        (changed(answers=[]), "no list of answers"),
        (changed(answers={"id": 1}), "no list of answers"),
        (changed(answers=["x"]), "answer 1 without an id"),
        (changed(answers=[*GOOD["answers"], {"id": "test-0", "text": ""}]), "two answers to 'test-0'"),
        (one(id="test-99"), "answer 1 to 'test-99'"),
        (one(ids=[1]), "both or none"),
        (changed(answers=[{"id": "test-0"}]), "both or none"),
        (one(text=5), "of another kind"),
        (changed(answers=[{"id": "test-0", "ids": [1.5]}]), "of another kind"),
        (changed(answers=[{"id": "test-0", "ids": "12"}]), "of another kind"),
        (one(seconds=-1), "seconds -1"),
        (one(seconds=float("nan")), "seconds nan"),
        (one(tokens_per_second="fast"), "tokens_per_second 'fast'"),
    ],
)
def test_bad_files(content: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        read_answers(written(tmp_path, content), ["mnn-int4"], ROWS)


def test_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    for data in (b'{"answers": [', b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(data)
        with pytest.raises(InputError, match="is damaged"):
            is_answers(path)
