"""JSON layouts: what pandas, datasets and exports write gives the same rows; other shapes are named."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lib.errors import InputError
from lib.stages.data.json_layouts import other_layout
from lib.stages.data.reading import read_table

FILE = Path("rows.json")
ROWS = [{"text": f"第{i}间房", "label": i % 2} for i in range(12)]
FRAME = pd.DataFrame(ROWS)


@pytest.mark.parametrize("orient", ["columns", "index", "split", "table"])
@pytest.mark.parametrize("indent", [None, 2])
def test_every_layout_of_pandas_is_read(orient: Any, indent: int | None) -> None:
    found = other_layout(FILE, FRAME.to_json(orient=orient, indent=indent, force_ascii=False))
    assert found is not None and found[0] == ROWS and orient in found[1]


@pytest.mark.parametrize("orient", ["columns", "index"])
@pytest.mark.parametrize("names", ["r", "id_", ""])
def test_rows_with_names_are_told_by_the_names_of_columns(orient: Any, names: str) -> None:
    frame = FRAME.set_axis([f"{names}{3 * i}" for i in range(12)])
    found = other_layout(FILE, frame.to_json(orient=orient), {"text", "label"})
    assert found is not None and orient in found[1]
    assert [row.pop("(index) 1", "") for row in found[0]] == ([*frame.index] if names else [""] * 12)
    assert found[0] == ROWS


@pytest.mark.parametrize(
    "text",
    [
        FRAME.to_json(orient="records", force_ascii=False),
        FRAME.to_json(orient="records", lines=True, force_ascii=False),
        json.dumps(ROWS, indent=2),
        json.dumps(ROWS[0]),
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        json.dumps({"conversations": [{"from": "human", "value": "a"}], "tools": []}),
        json.dumps({"dialogue": ["a", "b"], "topic": ["x"]}),
        "[]",
        '{"text": "a", "label": 1',
        "no json",
    ],
)
def test_rows_need_nothing_and_faults_are_left_to_the_reader(text: str) -> None:
    assert other_layout(FILE, text) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps({"text": [r["text"] for r in ROWS], "label": [r["label"] for r in ROWS]}), "columns as lists"),
        (json.dumps({"keywords": "demo", "example": ROWS}, indent=1), "rows under the key 'example'"),
        (json.dumps({"data": ROWS, "total": 12}), "rows under the key 'data'"),
        ("\n".join(json.dumps(row, indent=2) for row in ROWS), "one behind another"),
    ],
)
def test_layouts_of_other_programs(text: str, words: str) -> None:
    found = other_layout(FILE, text)
    assert found is not None and found[0] == ROWS and words in found[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[1, 2]]", "a list of lists"),
        ('["a", "b"]', "a list of texts"),
        ("3", "a single number"),
        ('"a"', "a single text"),
        (json.dumps({"train": ROWS, "test": ROWS[:3]}), "lists of objects under 'train' (12), 'test' (3)"),
        (json.dumps({"columns": ["a", "b"], "data": [[1]]}), "columns and rows of different lengths"),
        ("[" * 100_000, None),
    ],
)
def test_other_shapes_are_named(text: str, said: str | None) -> None:
    if said is None:  # not JSON that Python can read: left to the reader of rows
        assert other_layout(FILE, text) is None
        return
    with pytest.raises(InputError) as refused:
        other_layout(FILE, text)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        '[{"text": "a", "text": "b", "label": 1}]',
        '{"text": "a", "label": 1}\n{"label": 0, "text": "b", "label": 1}\n',
        '[{"messages": [{"role": "user", "content": "a", "content": "b"}]}]',
        '{"data": [\n{"text": "a", "text": "b"}]}',
        '{\n"text": "a", "label": 1, "label": 0}\n{\n"text": "b", "label": 1}\n',
    ],
)
def test_a_key_twice_in_one_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"the key '(text|label|content)' twice in one object"):
        read_table(str(tmp_path / "a.json"))


def test_many_indented_objects_are_read_at_once(tmp_path: Path) -> None:
    """Not in a time that grows with the square of the file: ten times the objects take about ten times as long."""

    def seconds(count: int) -> float:
        objects = [json.dumps({"text": "好" * 200, "label": i % 2}, indent=1) for i in range(count)]
        (tmp_path / "a.json").write_text("\n".join(objects))
        started = time.process_time()
        assert len(read_table(str(tmp_path / "a.json")).splits["all"]) == count
        return time.process_time() - started

    assert seconds(20_000) < 30 * max(seconds(2_000), 0.02)


@pytest.mark.parametrize("names", [["text", "label", "label"], ["label", "text", "label"], [1, "1", "text"]])
def test_columns_of_one_name_are_refused(names: list[Any]) -> None:
    with pytest.raises(InputError, match="names that differ"):
        other_layout(FILE, json.dumps({"columns": names, "data": [["a", 0, 1]]}))


def test_an_answer_of_the_viewer_is_named() -> None:
    said = {"features": [], "rows": [{"row_idx": 0, "row": ROWS[0], "truncated_cells": []}], "num_rows_total": 900}
    with pytest.raises(InputError, match=r"viewer.*set dataset to its hub id"):
        other_layout(FILE, json.dumps(said))


@pytest.mark.parametrize(
    "told",
    [
        {"features": {"label": {"names": ["positive", "negative"], "_type": "ClassLabel"}}},
        {"info": {"labels": ["positive", "negative"]}},
        {"categories": [{"id": 0, "name": "positive"}, {"id": 1, "name": "negative"}]},
    ],
    ids=lambda told: next(iter(told)),
)
def test_what_an_object_says_of_classes_beside_its_rows_is_heeded(tmp_path: Path, told: dict[str, Any]) -> None:
    """The advice to write the rows into a file of their own would turn every label round."""
    from lib.stages.data.stage import rows_from_file

    rows = [{"text": f"text number {i} is here", "label": i % 2} for i in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps({**told, "data": rows}), encoding="utf-8")
    found, _ = rows_from_file(str(tmp_path / "rows.json"), ["negative", "positive"], "", "")
    assert [row["label"] for row in found] == [1, 0] * 4


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"code": 0, "msg": "ok", "data": {"total": 12, "items": ROWS}}, "data.items"),
        ({"hits": {"total": {"value": 12}, "hits": [{"_source": row} for row in ROWS]}}, "hits.hits"),
        ({"data": {"example": ROWS}}, "data.example"),
    ],
)
def test_rows_inside_objects_are_found_and_the_advice_reads_them(value: Any, where: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"12 objects lie under {where}") as caught:
        other_layout(FILE, json.dumps(value))
    inside = caught.value.do.partition('open("rows.json"))')[2].partition(",")[0]
    assert len(eval(f"value{inside}", {"value": value})) == 12


def test_a_single_conversation_or_row_is_no_nested_list() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for value in ({"id": 1, "meta": {"turns": turns}, "text": "a"}, {"text": "a", "label": 1, "info": {"by": "me"}}):
        assert other_layout(FILE, json.dumps(value)) is None
