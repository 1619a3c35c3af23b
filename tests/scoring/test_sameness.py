"""One answer to most questions is said, where the references differ."""

from __future__ import annotations

import pytest

from lib.language import CHINESE, retold, speaking
from lib.scoring.generation import sameness_notes

DIFFERENT = [str(i) for i in range(20)]


def test_one_answer_to_all_questions_is_said() -> None:
    (note,) = sameness_notes("fine-tuned", ["2003"] * 19 + ["x"], DIFFERENT)
    assert note.startswith("the fine-tuned model answers 19 of 20 questions with '2003'")
    (note,) = sameness_notes("base", ["很长的回答" * 9] * 20, DIFFERENT)
    assert "…" in note and len(note) < 140
    with speaking(CHINESE):
        assert retold(note).startswith("基座模型对 20 个问题中的 20 个都回答")


@pytest.mark.parametrize(
    ("texts", "references"),
    [
        (DIFFERENT, DIFFERENT),
        (["yes"] * 12 + ["no"] * 8, ["yes"] * 11 + ["no"] * 9),  # as the references are
        (["2003"] * 9, DIFFERENT[:9]),  # too few to say
        ([], []),
    ],
)
def test_other_answers_are_not(texts: list[str], references: list[str]) -> None:
    assert sameness_notes("fine-tuned", texts, references) == []
