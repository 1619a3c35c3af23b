"""What the evaluation benchmarks check and compute; one side of each kind on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import evaluating, evaluation_sides
from lib.errors import InputError
from tests.scoring import tiny
from tests.scoring.conftest import (
    Tiny,
    small,  # noqa: F401
)

JOB = {"rows": [{"id": str(i), "label": i % 2} for i in range(4)]}


def made(answers: str, margins: list[float] | None = None) -> dict:
    return {
        "answers": {str(i): int(a) for i, a in enumerate(answers)},
        "margins": {str(i): m for i, m in enumerate(margins or [])},
    }


def test_other_answers_must_be_near_ties() -> None:
    ours = made("0101", [-2.0, 0.05, -1.0, 3.0])
    assert evaluating.same_answers(JOB, ours, made("0001"), 0.1) == ["1"]
    with pytest.raises(InputError, match=r"other answers at margins \{'0': -2.0\}"):
        evaluating.same_answers(JOB, ours, made("1101"), 0.1)
    assert evaluating.accuracy(JOB, made("0111"), []) == 0.75
    assert evaluating.accuracy(JOB, made("0111"), ["2"]) == 1.0


def test_ratios_are_ours_over_the_first_peer() -> None:
    def side(rate: float, memory: float) -> dict:
        return {"samples_per_second": rate, "peak_anonymous_mib": memory, "samples_per_cpu_second": rate / 2}

    figures = {"ours": side(3.0, 100.0), "a": side(1.0, 400.0), "b": side(2.0, 50.0)}
    alone = evaluating.ratios(figures, "ours", ["a"])
    assert alone == {"samples_per_second": 3.0, "memory": 0.25, "samples_per_cpu_second": 3.0}
    both = evaluating.ratios(figures, "ours", ["a", "b"])
    assert both["samples_per_second"] == 3.0 and both["samples_per_second_over_b"] == 1.5
    assert both["memory_over_b"] == 2.0 and both["memory_over_a"] == 0.25


def test_sides_of_llama_cpp_agree(small: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """The workbook, one decode a row and chat completion on a tiny file answer alike."""

    rows = tiny.rows(6)
    job = {"model": str(small.gguf), "rows": rows, "task": small.task.to_json(), "batch": 8, "threads": 1}
    job |= {"prompts": [small.task.prompt(small.tokenizer, {"text": row["text"]}) for row in rows], "max_tokens": 2}
    (tmp_path / "job").write_text(json.dumps(job), encoding="utf-8")
    found = {}
    for side in ("workbook-gguf", "one-by-one", "chat"):
        evaluation_sides.run(side, str(tmp_path / "job"), str(tmp_path / "out"))
        found[side] = json.loads((tmp_path / "out").read_text())
        assert found[side]["seconds"] > 0 and found[side]["scoring_cpu_seconds"] > 0
    for side in ("one-by-one", "chat"):
        evaluating.same_answers({"rows": rows}, found["workbook-gguf"], found[side], 0.1)
    margins = found["one-by-one"]["margins"]
    assert margins == pytest.approx(found["workbook-gguf"]["margins"], abs=0.1)
