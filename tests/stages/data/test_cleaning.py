"""Columns, labels, and what is dropped."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.errors import InputError
from lib.prompts.tasks import task_of
from lib.settings import Settings
from lib.stages.data.cleaning import (
    LabelledRows,
    Row,
    clean_split,
    find_column,
    require_labels,
    unlabelled,
)
from lib.stages.data.labels import label_reader
from lib.stages.data.reading import Table
from lib.stages.data.stage import _clean

NAMES = ["负面", "正面"]


def clean(rows: list[dict], names: list[str] = NAMES, **columns: str):
    return clean_split(rows, "train", columns.get("text", ""), columns.get("label", ""), names)


def labels(values: list, names: list[str] = NAMES) -> list[int]:
    return [row.label for row in clean([{"text": "好", "label": value} for value in values], names)[0]]


def test_ways_to_write_a_label():
    assert labels([0, 1]) == labels(["0", "1"]) == labels([0.0, 1.0]) == labels([False, True]) == [0, 1]
    assert labels(["负面", "正面"]) == labels(["negative", " Positive "]) == labels(["neg", "POS"]) == [0, 1]
    assert labels(["消极", "积极"]) == labels(["差评", "好评"]) == [0, 1]
    assert labels(["负面", "正面", "neg"], ["正面", "负面"]) == [1, 0, 1]
    assert labels(["体育", "财经", "2"], ["体育", "财经", "娱乐"]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("names", "zero", "one"),
    [
        (["true", "false"], False, True),
        (["yes", "no"], False, True),
        (["是", "否"], "False", "True"),
        (["正面", "负面"], False, True),
        (["1", "0"], 0, 1),
        (["1", "0"], "0.0", "1.0"),
        (["1", "0"], False, True),
        (["好", "no"], Decimal("1"), Decimal("0")),
        (["ham", "spam"], "True", "False"),
        (["caf\u00e9", "no"], "no", "cafe\u0301"),
        (["ＰＯＳ", "ＮＥＧ"], "NEG", "pos"),
    ],
)
def test_a_value_is_a_name_first_in_every_format(names: list[str], zero: object, one: object):
    assert labels([zero, one], names) == [1, 0]


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (["negative", "neutral"], ["negative", "positive"]),
        (["差评", "中评"], ["差评", "好评"]),
        (["mixed", "positive"], ["positive", "neg"]),
        (["no", "unsure"], [False, True]),
        (["1", "2", "3"], [0, 1, 2]),
        (["a", "b", "c"], [False, True]),
    ],
)
def test_a_word_of_another_label_is_not_read_as_one_of_these(names: list[str], values: list):
    with pytest.raises(InputError, match="besides those understood"):
        labels(values * 5, names)


@pytest.mark.parametrize("names", [["Ja", "JA"], ["ß", "ss"], ["1", "b", "1.0"], ["ａ", "A"]])
def test_names_that_are_one_when_labels_are_read_are_refused(names: list[str]):
    with pytest.raises(ValueError, match=f"{names[0]!r} and {names[-1]!r} do not"):
        Settings(label_names=names)


def test_the_column_of_labels_is_no_text():
    with pytest.raises(InputError, match="'label' as text and as label"):
        clean([{"text": "a", "label": "1"}], text="label")


def test_sentiment_words_mean_nothing_for_other_tasks():
    with pytest.raises(InputError, match="'negative'"):
        labels(["negative", "positive"] * 3, ["体育", "财经"])


@pytest.mark.parametrize(
    ("values", "foreign"),
    [([0, 1, 2], "2"), (["负面", "正面", "中性"] * 2, "中性"), ([-1, 1, 0], "-1"), ([0.5, 1.0, 0.0], "0.5")],
)
def test_three_labels_where_two_are_named(values: list, foreign: str):
    with pytest.raises(InputError, match="2 labels: 0 to 1, or 负面, 正面") as caught:
        labels(values)
    assert f"labels {foreign!r} (" in caught.value.found


def test_a_slip_is_dropped_and_counted():
    rows, counts = clean([{"text": "好", "label": "正面"}] * 150 + [{"text": "差", "label": "负f"}])
    assert len(rows) == 150 and counts["dropped: label not understood"] == 1


def test_empty_texts_and_labels_are_counted():
    table = [("a", "1"), ("", "1"), (" \u3000\n", "0"), (None, "0"), ("b", ""), ("c", None), ("d", "0")]
    rows, counts = clean([{"text": text, "label": label} for text, label in table])
    assert [(row.index, row.text) for row in rows] == [(0, "a"), (6, "d")]
    assert counts == {"dropped: empty text": 3, "dropped: no label": 2}


def test_columns_are_found_or_named():
    assert find_column(["qid", "label", "text_a"], "", "text") == "text_a"
    assert find_column(["Review "], "", "text") == "Review "
    assert find_column(["x", "y"], "y", "text") == "y"
    with pytest.raises(InputError, match="'x', 'y'"):
        find_column(["x", "y"], "", "text")
    with pytest.raises(InputError, match="text_column 'z'"):
        find_column(["x", "y"], "z", "text")


def test_unlabelled_splits():
    assert unlabelled([{"text": "a"}], "")
    assert unlabelled([{"text": "a", "label": -1}, {"text": "b", "label": -1}], "")
    assert not unlabelled([{"text": "a", "label": -1}, {"text": "b", "label": 0}], "")


def test_one_label_only_is_refused():
    with pytest.raises(InputError, match=r"only the label '正面' \(2 rows\)"):
        require_labels([Row(0, "a", 1), Row(1, "b", 1)], NAMES, "train")
    with pytest.raises(InputError, match="no usable row"):
        require_labels([], NAMES, "test")
    with pytest.raises(InputError, match="rows of every label: a, b, c"):
        require_labels([Row(0, "a", 1), Row(1, "b", 0)], ["a", "b", "c"], "train")
    require_labels([Row(0, "a", 1), Row(1, "b", 0)], ["a", "b", "c"], "test")


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()), st.integers(2, 5))
def test_a_label_is_a_number_in_range_or_not_understood(value, count: int):
    number = label_reader([f"name{i}" for i in range(count)])(value)
    assert number is None or number in range(count)


@pytest.mark.parametrize("other", ["content", "review", "sentence"])
def test_labels_that_went_with_dropped_rows_are_explained(other: str) -> None:
    rows = [{"text": "好", other: None, "label": 0}, *({"text": None, other: "坏", "label": 1} for _ in range(5))]
    kind = LabelledRows(Settings(dataset="x.json"), task_of(Settings(dataset="x.json")))
    with pytest.raises(InputError, match=r"5 rows dropped: empty text.*only the label"):
        _clean(Table({"all": rows}, "x"), kind)


@pytest.mark.parametrize("names", [["text", "label", "Label"], ["text", "Label", "label"], ["label", "LABEL", "text"]])
def test_a_name_in_small_letters_wins(names: list[str]) -> None:
    assert find_column(names, "", "label") == "label"
