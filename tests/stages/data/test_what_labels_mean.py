"""What the numbers and letters of labels mean where the file says it: in names of columns, lists of rows, verdicts."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from lib.errors import InputError
from lib.settings import Settings
from lib.stages.data.cleaning import UNASKED, clean_split
from lib.stages.data.reading import choose_data, read_table
from lib.stages.data.stage import divide

NAMES, LETTERS = ["负面", "正面"], ["A", "B", "C", "D"]


def _labels(rows: list[dict[str, Any]], column: str = "", names: list[str] = NAMES) -> tuple[list[int], dict[str, int]]:
    found, counts = clean_split(rows, "x", "", column, names)
    return [row.label for row in found], dict(+counts)


@pytest.mark.parametrize(
    ("column", "flipped"),
    [
        *((name, True) for name in ("情感(0正面 1负面)", "label_1neg_0pos", "标签(0-正面,1-负面)", "0正面1负面")),
        *((name, True) for name in ("negative_flag", "label_negative", "isNegative", "neg1pos0", "not_positive")),
        *(
            (name, False)
            for name in ("情感(0负面 1正面)", "label_0neg_1pos", "positive_flag", "pos1neg0", "non_negative")
        ),
        *((name, False) for name in ("pos_neg", "label2", "negpos", "top1", "label_v2_0neg_1pos")),
    ],
)
def test_the_name_of_a_column_says_what_its_numbers_mean(column: str, flipped: bool) -> None:
    rows = [{"text": f"第{i}间", column: str(i % 2)} for i in range(6)]
    assert _labels(rows, column)[0] == [(i % 2) ^ flipped for i in range(6)]


@pytest.mark.parametrize("column", ["options", "choices", "label_names", "answer_choices", "candidates", "label_list"])
@pytest.mark.parametrize("words", [["正面", "负面"], ["positive", "negative"]])
@pytest.mark.parametrize("text", [True, False])
def test_classes_that_every_row_lists_say_what_its_number_means(column: str, words: list[str], text: bool) -> None:
    lists = [words if i < 4 else words[::-1] for i in range(6)]
    rows = [{"text": f"第{i}间", "label": i % 2, column: json.dumps(lists[i]) if text else lists[i]} for i in range(6)]
    found, counts = _labels(rows)
    assert found == [1, 0, 1, 0, 0, 1] and counts == {f"numbers of label read by the names in {column}": 6}
    other = [{**row, "classes": words} for row in rows]
    with pytest.raises(InputError, match="contradict one another"):
        _labels(other)


def test_a_label_that_the_annotator_rejected_is_left_out() -> None:
    said = ["accept", "reject", "accept", "ignore"]
    rows = [{"text": f"第{i}间", "label": "POSITIVE" if i % 2 else "NEGATIVE", "answer": said[i]} for i in range(4)]
    found, counts = _labels(rows)
    assert found == [0, 0] and counts == {"dropped: an answer that its annotator did not accept": 2}
    assert _labels([{**row, "answer": "yes"} for row in rows])[0] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("columns", "refused"),
    [
        ({"label": "010101", "sentiment": "101010"}, True),
        ({"Label": "101010", "label": "010101"}, True),
        ({"label": "010101", "gold_label": "101010"}, True),
        ({"label": "010101", "gold_label": "010101"}, False),
        ({"label": "010101", "target": "101010"}, False),  # a column called label is that of the labels
    ],
)
def test_two_sure_columns_of_labels_contradict_one_another_also_in_numbers(
    columns: dict[str, str], refused: bool
) -> None:
    rows = [{"text": f"{i}", **{name: values[i] for name, values in columns.items()}} for i in range(6)]
    with pytest.raises(InputError, match="contradict one another") if refused else contextlib.nullcontext():
        _labels(rows)
    assert _labels(rows, "label")[0] == [0, 1] * 3


_OPTIONS = dict(zip(LETTERS, ["甲", "乙", "丙", "丁"], strict=True))


def _questions(**columns: Any) -> list[dict[str, Any]]:
    return [{"question": f"第{i}问？", **columns, "answer": LETTERS[i % 4]} for i in range(40)]


@pytest.mark.parametrize(
    "name",
    ["options.{}", "{}选项", "options_{}", "选项{}", "{})", "choices/{}", "{}_option", "options/{n}", "sol{m}", "{w}"],
)
def test_options_in_columns_of_any_name_are_asked(name: str) -> None:
    columns = {
        name.format(letter, n=i, m=i + 1, w=chr(0xFF21 + i)): said for i, (letter, said) in enumerate(_OPTIONS.items())
    }
    rows, counts = clean_split(_questions(**columns), "x", "", "", LETTERS)
    assert rows[1].text == "第1问？\nA. 甲\nB. 乙\nC. 丙\nD. 丁" and [row.label for row in rows[:4]] == [0, 1, 2, 3]
    assert UNASKED not in counts


def test_letters_without_options_are_said_on_every_page(tmp_path: Path) -> None:
    for text, named in (("{}", True), ("{}\nA. 甲 B. 乙 C. 丙 D. 丁", False)):
        rows = [{**row, "question": text.format(f"{row['question']}{'子丑寅卯辰巳午未'[i % 8] * i}")}
                for i, row in enumerate(_questions(distractor="戊"))]  # fmt: skip
        (tmp_path / "q.json").write_text(json.dumps(rows))
        settings = Settings(dataset=str(tmp_path / "q.json"), label_names=LETTERS)
        notes = divide(settings, choose_data(settings)).notes
        assert [note for note in notes if "can only guess" in note] == (
            ["40 questions have no options, and the labels are letters: a model can only guess them"] if named else []
        )


def test_labels_and_answers_that_contradict_beside_options_are_refused() -> None:
    rows = [{**row, "options": _OPTIONS, "label": (i + 1) % 4} for i, row in enumerate(_questions())]
    with pytest.raises(InputError, match="'label', 'answer' contradict"):
        _labels(rows, names=LETTERS)
    assert _labels(rows, "label", LETTERS)[0][:4] == [1, 2, 3, 0]
    same = [{**row, "label": i % 4} for i, row in enumerate(rows)]
    assert _labels(same, names=LETTERS)[0][:4] == [0, 1, 2, 3]


def test_cells_of_options_that_python_cannot_hold_are_left_out() -> None:
    odd = ["{{1}: 2}", "{[1]: 2}", "{{}: 1, 'b': 2}"]
    rows = [{**row, "options": odd[i] if i < 3 else '["甲", "乙", "丙", "丁"]'} for i, row in enumerate(_questions())]
    found, counts = clean_split(rows, "x", "", "", LETTERS)
    assert len(found) == 37 and sum(n for why, n in counts.items() if why.startswith("dropped")) == 3


@pytest.mark.parametrize(
    ("column", "values", "told"),
    [
        ("is_test", "f t", True),
        ("is_test", "N Y", True),
        ("split", "train_sft test_sft", True),
        ("Usage", "Training PublicTest", True),
        *((column, values, None) for column, values in (("is_test", "a b"), ("split", "A B"), ("是否测试", "甲 乙"))),
        *((column, values, False) for column, values in (("test", "a b"), ("subset", "A B"), ("usage", "day night"))),
    ],
)
def test_a_column_of_splits_is_followed_or_refused(tmp_path: Path, column: str, values: str, told: bool | None) -> None:
    first, second = values.split()
    lines = [f"第{i}间,{i % 2},{second if i % 5 == 0 else first}" for i in range(20)]
    (tmp_path / "x.csv").write_text("\n".join([f"text,label,{column}", *lines]))
    with pytest.raises(InputError, match="of every row") if told is None else contextlib.nullcontext():
        sizes = {name: len(rows) for name, rows in read_table(str(tmp_path / "x.csv")).splits.items()}
        assert sizes == ({"train": 16, "test": 4} if told else {"all": 20})
