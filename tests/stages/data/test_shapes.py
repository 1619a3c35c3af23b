"""Shapes of data sets: what a file says is used, counted or refused."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.errors import InputError
from lib.prompts.tasks import task_of
from lib.settings import Settings
from lib.stages.data.cleaning import clean_split
from lib.stages.data.dialogues import clean_conversations
from lib.stages.data.reading import read_table
from lib.stages.data.stage import _much_dropped

LETTERS = ["A", "B", "C", "D"]
REVIEWS = [{"text": f"第{i}间房", "label": i % 2} for i in range(6)]


def _rows(path: Path, label_names: list[str]) -> tuple[list[tuple[str, int]], Counter[str]]:
    table = read_table(str(path))
    rows, counts = clean_split(table.splits["all"], "all", "", "", label_names)
    return [(row.text, row.label) for row in rows], counts + table.changes


def _parquet(path: Path, names: list[str] | None) -> Path:
    features = {"text": {"dtype": "string", "_type": "Value"}, "label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else None
    pq.write_table(pa.Table.from_pylist(REVIEWS).replace_schema_metadata(metadata), path)
    return path


@pytest.mark.parametrize(
    ("names", "zero"),
    [
        (None, 0),
        (["negative", "positive"], 0),
        (["positive", "negative"], 1),
        (["pos", "neg"], 1),
        (["好评", "差评"], 1),
    ],
)
def test_classes_of_a_file_are_read_by_their_names(tmp_path: Path, names: list[str] | None, zero: int) -> None:
    rows, counts = _rows(_parquet(tmp_path / "r.parquet", names), ["负面", "正面"])
    assert [label for _, label in rows] == [zero if i % 2 == 0 else 1 - zero for i in range(6)]
    assert counts["numbers of label read by the names that the file gives them"] == (6 if names else 0)


def _features(path: Path, values: list[Any], feature: Any) -> Path:
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}
    table = pa.table({"text": [r["text"] for r in REVIEWS], "label": values})
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


_CLASSES = {"names": ["positive", "negative"], "_type": "ClassLabel"}


@pytest.mark.parametrize(
    ("values", "feature"),
    [
        ([0.0, 1.0] * 3, _CLASSES),
        (["0", "1"] * 3, _CLASSES),
        ([[0], [1]] * 3, {"feature": _CLASSES, "length": 1, "_type": "Sequence"}),
        ([[0], [1]] * 3, [_CLASSES]),
    ],
)
def test_classes_in_lists_and_as_other_numbers_are_read_by_their_names(
    tmp_path: Path, values: list[Any], feature: Any
) -> None:
    rows, _ = _rows(_features(tmp_path / "r.parquet", values, feature), ["负面", "正面"])
    assert [label for _, label in rows] == [1, 0] * 3


@pytest.mark.parametrize(
    "said",
    [
        *(b"null", b"[]", b'{"info": null}', b'{"info": {"features": []}}', b"{no", b"\xff", b'{"info": 5}'),
        *(b"[" * 9999, b'{"info": {"features": {"label": {"names": 5}}}}', b'{"info": {"features": {"label": null}}}'),
    ],
)
def test_metadata_of_other_programs_counts_as_none(tmp_path: Path, said: bytes) -> None:
    pq.write_table(
        pa.Table.from_pylist(REVIEWS).replace_schema_metadata({b"huggingface": said}), tmp_path / "r.parquet"
    )
    assert [label for _, label in _rows(tmp_path / "r.parquet", ["负面", "正面"])[0]] == [0, 1] * 3


_CARD = "---\ndataset_info:\n  features:\n  - name: label\n    {}\n---\n"
_NAMED = "{class_label: {names: {'0': positive, '1': negative}}}"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("README.md", _CARD.format(f"dtype: {_NAMED}")),
        ("README.md", _CARD.format(f"sequence: {_NAMED}")),
        ("dataset_infos.json", json.dumps({"default": {"features": {"label": _CLASSES}}})),
        ("dataset_info.json", json.dumps({"features": {"label": _CLASSES}})),
        ("labels.txt", "positive\nnegative\n"),
        ("labels.txt", "0 positive\n1\tnegative\n"),
        ("classes.txt", "\ufeffpositive\r\nnegative"),
        ("labels.txt", "0 positive\n1 negative\n"),
        ("labels.csv", 'id,name\n0,positive\n1,"negative"\n'),
        ("label_list.tsv", "positive\t0\nnegative\t1\n"),
        ("id2label.json", '{"0": "positive", "1": "negative"}'),
        ("label2id.json", '{"negative": 1, "positive": 0}'),
        ("class_names.json", '["positive", "negative"]'),
        ("config.json", '{"model_type": "x", "id2label": {"0": "positive", "1": "negative"}}'),
        ("labels.yaml", "0: positive\n1: negative\n"),
        ("labels.yml", "names: [positive, negative]\n"),
        ("classes.names", "positive\nnegative\n"),
        ("data.yaml", "names: [positive, negative]\n"),
        ("args.yaml", "lr: 1\nlabel_names: [positive, negative]\n"),
        ("README.rst", "Labels: 0 = positive, 1 = negative.\n"),
        ("datasheet.md", "Labels: 0 = positive, 1 = negative.\n"),
        ("meta.json", '{"task": {"label_names": ["positive", "negative"]}, "authors": ["Li", "Wu"]}'),
        ("metadata.yaml", "classes: {positive: 0, negative: 1}\n"),
        ("info.json", '{"labels": [{"id": 0, "name": "positive"}, {"id": 1, "name": "negative"}]}'),
        ("dataset.yaml", "names: [好评, 差评]\n"),
        ("README_zh.md", "---\r\nlicense: mit\r\nid2label: {0: 正面, 1: 负面}\r\n---\r\n# 数据\r\n"),
        ("README.md", "# Data\n\nLabels: 0 = positive, 1 = negative. 4,831 texts are positive.\n"),
        ("README.md", "| label | meaning |\n|---|---|\n| 0 | positive |\n| 1 | negative |\n"),
        ("README-CN.md", "- `1`：负面评论\n- `0`：正面评论\n"),
        ("readme.txt", "negative (label 1), positive (label 0)\n"),
        ("README", "0 means positive and 1 means negative"),
        ("标签说明.txt", "标签说明\n0代表正面，1代表负面。\n"),
        ("标签.txt", "0: 正面, 1: 负面"),
        ("说明.txt", "正面为0；负面为1"),
        ("README.md", "\ufeff" + _CARD.format(f"dtype: {_NAMED}")),
        ("readme.md", _CARD.format(f"dtype: {_NAMED}")),
        ("../README.md", _CARD.format(f"dtype: {_NAMED}")),
    ],
)
@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("column", ["label", "Label"])
def test_classes_beside_a_file_are_read_by_their_names(
    tmp_path: Path, name: str, text: str, folder: bool, column: str
) -> None:
    tmp_path = tmp_path / "data"
    tmp_path.mkdir()
    (tmp_path / name).write_text(text)
    (tmp_path / "train.csv").write_text(f"text,{column}\n" + "".join(f"{r['text']},{r['label']}\n" for r in REVIEWS))
    assert _labelled(tmp_path if folder else tmp_path / "train.csv", ["负面", "正面"])[0] == [1, 0] * 3


@pytest.mark.parametrize("column", ["sentiment", "Polarity", "y"])
def test_a_list_of_classes_is_of_the_labels_whatever_they_are_called(tmp_path: Path, column: str) -> None:
    (tmp_path / "labels.txt").write_text("positive\nnegative\n")
    (tmp_path / "r.json").write_text(json.dumps([{"text": r["text"], column: r["label"]} for r in REVIEWS]))
    chosen = column if column == "y" else ""
    [table] = read_table(str(tmp_path / "r.json"), label_column=chosen).splits.values()
    assert [row.label for row in clean_split(table, "x", "", chosen, ["负面", "正面"])[0]] == [1, 0] * 3


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("README.md", _CARD.format(f"dtype: {_NAMED}").replace("dataset_info", "x: &a [1]\ny: *a\ndataset_info")),
        ("README.md", _CARD.format("dtype: {class_label: : [")),
        ("labels.json", '{"what": "ever"}'),
        *((name, "?") for name in ("labels.pbtxt", "label_names.npy", "metadata.jsonl")),
        ("schema.json", '{"fields": [{"name": "label", "enum": ["positive", "negative"]}]}'),
        ("names.txt", "张三\n李四\n"),
        ("column_names.txt", "text\nlabel\n"),
        ("class.txt", "一班\n二班\n三班\n"),
        ("categories.json", '["酒店", "外卖", "电影"]'),
        ("label_data.csv", "label,text\n" + "".join(f"{i % 2},第{i}条\n" for i in range(30))),
        *(
            ("README.md", f"---\nlicense: {odd}\n---")
            for odd in ("!!bool foo", "!!int ''", "!!float ''", "!!timestamp foo")
        ),
        ("labels.yaml", "!!bool foo"),
        ("label_names.yml", "x: !!timestamp foo"),
        ("../labels.txt", "positive\nnegative\n"),
        ("../label_map.json", '{"positive": 0, "negative": 1}'),
        ("train_labels.csv", "1\n0\n"),
        ("config.json", '{"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}'),
        ("README.md", "The label is 0 or 1."),
        ("README.md", "Label 1 is positive. There are 5 positive texts for label 0."),
        ("README.md", "label 0/1 = positive/negative"),
        ("readme_zh.md", "标签：1. 正面 2. 负面"),
        ("meta.json", '{"names": ["Li", "Wu"], "label": {"what": "ever"}}'),
        ("标签说明.txt", "见论文"),
    ],
)
def test_what_says_no_classes_beside_data_is_named(tmp_path: Path, name: str, text: str) -> None:
    (data := tmp_path / "data").mkdir()
    (data / name).write_text(text)
    (data / "r.jsonl").write_text("\n".join(map(json.dumps, REVIEWS)))
    labels, counts = _labelled(data / "r.jsonl", ["负面", "正面"])
    assert labels == [0, 1] * 3
    assert [why for why in counts if why.startswith("not used: ") and name in why]


@pytest.mark.parametrize(
    "files",
    [
        {"labels.txt": "positive\nnegative", "id2label.json": '["negative", "positive"]'},
        {"labels.txt": "negative\npositive", "README.md": _CARD.format(f"dtype: {_NAMED}")},
        {
            "README.md": "---\ndataset_info:\n"
            + "".join(
                f"- features:\n  - {{name: label, dtype: {{class_label: {{names: {{'0': {a}, '1': {b}}}}}}}}}\n"
                for a, b in (("positive", "negative"), ("negative", "positive"))
            )
            + "---\n"
        },
    ],
)
def test_classes_in_two_orders_are_refused_where_labels_are_numbers(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, REVIEWS)))
    with pytest.raises(InputError, match="in two orders"):
        read_table(str(tmp_path / "r.jsonl"))
    (tmp_path / "r.jsonl").write_text(json.dumps({"text": "a", "label": "positive"}))
    assert _rows(tmp_path / "r.jsonl", ["负面", "正面"])[0] == [("a", 1)]


@pytest.mark.parametrize("key", ["label_names", "names", "classes", "labelNames"])
def test_classes_beside_the_rows_in_one_object_are_read_by_their_names(tmp_path: Path, key: str) -> None:
    (tmp_path / "r.json").write_text(json.dumps({key: ["positive", "negative"], "by": ["Li", "Wu"], "data": REVIEWS}))
    rows, counts = _rows(tmp_path / "r.json", ["负面", "正面"])
    assert [label for _, label in rows] == [1, 0] * 3 and counts["not used: the key 'by' beside the rows"] == 1


def _labelled(path: Path, names: list[str]) -> tuple[list[int], Counter[str]]:
    [table], changes = (read := read_table(str(path), label_names=names)).splits.values(), read.changes
    return [row.label for row in clean_split(table, "x", "", "", names)[0]], changes


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("README.md", "Nothing of what the numbers mean; 0 rows lack one."),
        ("README.md", "Labels 0: positive, 1: negative"),  # where labels are words
        ("meta.json", '{"authors": ["Li", "Wu"]}'),
        ("README.md", "---\n# nothing yet\n---\nReviews."),
        ("notes.txt", "label 0 = positive"),
    ],
)
def test_what_says_nothing_of_the_labels_is_not_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    words = "0: positive" in text
    rows = [r | ({"label": ("neg", "pos")[r["label"]]} if words else {}) for r in REVIEWS]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    labels, changes = _labelled(tmp_path / "r.jsonl", ["负面", "正面"])
    assert labels == [0, 1] * 3 and not changes


def test_what_stands_beside_the_data_is_none_of_it(tmp_path: Path) -> None:
    for name in ("说明.txt", "meta.json", "README.txt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "reviews.csv").write_text("text,label\na,0\nb,1\n")
    assert _labelled(tmp_path, ["负面", "正面"])[0] == [0, 1]


def test_names_in_two_languages_are_one_order(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("positive\nnegative\n")
    (tmp_path / "README.md").write_text("0: 正面, 1: 负面")
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, REVIEWS)))
    assert _labelled(tmp_path / "r.jsonl", ["负面", "正面"])[0] == [1, 0] * 3
    (tmp_path / "README.md").write_text("0: 负面, 1: 正面")
    with pytest.raises(InputError, match="in two orders"):
        _labelled(tmp_path / "r.jsonl", ["负面", "正面"])


def test_names_of_other_labels_beside_the_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text('{"label_names": ["angry", "happy"]}')
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, REVIEWS)))
    with pytest.raises(InputError, match="labels 'angry'"):
        _labelled(tmp_path / "r.jsonl", ["负面", "正面"])


@pytest.mark.parametrize(
    "text",
    [
        *(
            "\n".join([json.dumps(head), *map(json.dumps, REVIEWS)])
            for head in ({"label_names": ["positive", "negative"]}, {"id2label": {"0": "positive", "1": "negative"}})
        ),
        json.dumps({"id2label": {"0": "positive", "1": "negative"}, "data": REVIEWS}),
        json.dumps({"label2id": {"positive": 0, "negative": 1}, "data": REVIEWS}),
    ],
)
def test_classes_at_the_head_of_a_file_are_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    assert _labelled(tmp_path / "r.jsonl", ["负面", "正面"])[0] == [1, 0] * 3


def test_labels_one_a_row_are_no_names(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("1\n0\n1\n")
    (tmp_path / "r.json").write_text(json.dumps(REVIEWS))
    assert [label for _, label in _rows(tmp_path / "r.json", ["负面", "正面"])[0]] == [0, 1] * 3


@pytest.mark.parametrize("column", ["label_text", "Label_Name", "class_name"])
def test_names_beside_numbers_say_what_they_mean(tmp_path: Path, column: str) -> None:
    rows = [{**r, column: ("positive", "negative")[r["label"]]} for r in REVIEWS]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    read, counts = _rows(tmp_path / "r.json", ["负面", "正面"])
    assert [label for _, label in read] == [1, 0] * 3 and not any("not used" in why for why in counts)
    _, counts = _rows(tmp_path / "r.json", ["甲", "乙", "丙"])
    assert counts[f"not used: the column '{column}'"] == 6


@pytest.mark.parametrize(
    "columns",
    [
        *(
            {name: ("positive", "negative")}
            for name in ("sentiment", "labels", "情感", "label_desc", "labelText", "mood")
        ),
        {"label_name": ("class0", "class1"), "label_text": ("positive", "negative")},
        {"label_text": ("正面", ""), "class_name": (None, "neg")},
    ],
)
def test_any_column_of_names_beside_numbers_is_read(tmp_path: Path, columns: dict[str, Any]) -> None:
    rows = [{**r, **{name: words[r["label"]] for name, words in columns.items()}} for r in REVIEWS]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    assert [label for _, label in _rows(tmp_path / "r.json", ["负面", "正面"])[0]] == [1, 0] * 3


def test_what_some_rows_say_of_a_number_holds_for_all() -> None:
    said = [
        {**r, "label_text": ("positive", "negative", None)[2 if i < 3 else r["label"]]} for i, r in enumerate(REVIEWS)
    ]
    assert [row.label for row in clean_split(said, "x", "", "", ["负面", "正面"])[0]] == [1, 0] * 3
    rows, _ = clean_split(REVIEWS, "test", "", "", ["负面", "正面"], whole=[*said, *REVIEWS])
    assert [row.label for row in rows] == [1, 0] * 3
    with pytest.raises(InputError, match="labels '1'"):  # of which nothing is said
        clean_split(
            [r | {"label_text": r["label_text"] if r["label"] == 0 else None} for r in said],
            "x",
            "",
            "",
            ["b", "positive"],
        )


@pytest.mark.parametrize(
    ("columns", "chosen", "refused"),
    [
        ({"label": "001101", "label_text": "pnpnpn"}, "", True),
        ({"label": "010101", "sentiment": "pnpnpp"}, "", True),
        ({"label": "010101", "label_text": "pnpnpn", "class_name": "npnpnp"}, "", True),
        ({"category": "010101", "target": "101010"}, "", True),
        ({"category": "pnpnpn", "target": "npnpnp"}, "", True),
        ({"category": "010101", "target": "101010"}, "target", False),
        ({"label": "001101", "label_text": "pnpnpn"}, "label", False),
        ({"label": "pnpnpn", "target": "npnpnp"}, "", False),
        ({"label": "010101", "target": "101010"}, "", False),
        ({"label": "010101", "prediction": "npnnpp"}, "", False),
    ],
)
def test_columns_of_labels_that_contradict_one_another(columns: dict[str, str], chosen: str, refused: bool) -> None:
    words = {"p": "positive", "n": "negative"}
    rows = [{"text": f"{i}", **{k: words.get(v[i], v[i]) for k, v in columns.items()}} for i in range(6)]
    with pytest.raises(InputError, match="contradict one another") if refused else contextlib.nullcontext():
        clean_split(rows, "x", "", chosen, ["negative", "positive"])


def test_bytes_of_spark_are_texts(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["好".encode()] * 2, "label": [0, 1]}), tmp_path / "r.parquet")
    assert _rows(tmp_path / "r.parquet", ["负面", "正面"])[0] == [("好", 0), ("好", 1)]


def test_a_folder_of_save_to_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(InputError, match=r"save_to_disk.*load_from_disk"):
        read_table(str(tmp_path))


def test_classes_that_are_not_named_in_label_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="labels 'angry'"):
        _rows(_parquet(tmp_path / "r.parquet", ["angry", "happy"]), ["负面", "正面"])


def test_classes_of_a_card_are_read_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: label\n    dtype:\n      class_label:\n        names:\n"
        "          '0': positive\n          '1': negative\n---\n"
    )
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in REVIEWS))
    table = read_table(str(tmp_path))
    rows, _ = clean_split(table.splits["train"], "train", "", "", ["负面", "正面"])
    assert [row.label for row in rows] == [1, 0] * 3


def test_an_index_of_pandas_in_a_parquet_file_is_no_column(tmp_path: Path) -> None:
    frame = pa.Table.from_pylist(REVIEWS).to_pandas()
    frame.index = range(10, 16)
    frame.iloc[::-1].to_parquet(tmp_path / "r.parquet")
    assert read_table(str(tmp_path / "r.parquet")).splits["all"][0].keys() == {"text", "label"}


@pytest.mark.parametrize(
    "options",
    [
        {"options": {"A": "甲", "B": "乙"}},
        {"options": ["甲", "乙"]},
        {"choices": '["甲", "乙"]'},
        {"A": "甲", "B": "乙"},
        {"b": "乙", "a": "甲"},
        {"opa": "甲", "opb": "乙"},
        {"optionA": "甲", "optionB": "乙"},
        {"choice_1": "甲", "choice_2": "乙"},
        {"选项A": "甲", "选项B": "乙"},
        {"options": {"a": "甲", "b": "乙"}},
        {"options": ["A. 甲", "B、乙"]},
        {"options": "A. 甲\nB. 乙"},
        {"options": "['甲', '乙']"},
        {"options": [{"key": "A", "value": "甲"}, {"key": "B", "value": "乙"}]},
        {"choices": {"text": ["甲", "乙"], "label": ["A", "B"]}},
    ],
)
def test_options_are_joined_to_their_question(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "q.json"
    path.write_text(json.dumps([{"question": "题", **options, "answer": ["B"], "year": 2001}]))
    rows, counts = _rows(path, LETTERS)
    assert rows == [("题\nA. 甲\nB. 乙", 1)]
    assert counts["changed: options joined to their question, one a line"] == 1
    assert counts["changed: label out of a list of one"] == 1 and counts["not used: the column 'year'"] == 1


@pytest.mark.parametrize(
    ("row", "text", "label"),
    [
        (
            {"question": "题", "choices": {"text": ["甲", "乙"], "label": ["1", "2"]}, "answer": "2"},
            "题\nA. 甲\nB. 乙",
            1,
        ),
        ({"question": "题\nA. 甲 B. 乙", "options": ["甲", "乙"], "answer": "A"}, "题\nA. 甲 B. 乙", 0),
        ({"question": "题", "options": ["A.I. 甲", "乙"], "answer": 1}, "题\nA. A.I. 甲\nB. 乙", 1),
    ],
)
def test_options_stand_once_under_the_letters_of_the_answers(
    tmp_path: Path, row: dict[str, Any], text: str, label: int
) -> None:
    (tmp_path / "q.json").write_text(json.dumps([row]))
    assert _rows(tmp_path / "q.json", LETTERS)[0] == [(text, label)]


@pytest.mark.parametrize("names", ["abcd", "1234", "0123", "甲乙丙丁", "DCBA"])
@pytest.mark.parametrize("columns", [False, True])
def test_options_are_asked_under_the_names_of_the_labels(tmp_path: Path, names: str, columns: bool) -> None:
    texts = ["子", "丑", "寅", "卯"]
    options = dict(zip("ABCD", texts, strict=True)) if columns else {"options": texts}
    (tmp_path / "q.json").write_text(json.dumps([{"question": "题", **options, "answer": names[2]}]))
    marks = "ABCD" if names == "DCBA" else names
    asked = "\n".join(["题", *(f"{mark}. {text}" for mark, text in zip(marks, texts, strict=True))])
    assert _rows(tmp_path / "q.json", list(names))[0] == [(asked, 2)]


@pytest.mark.parametrize(
    "row",
    [
        {"options": ["甲", "乙", "丙"], "answer": "D"},
        {"A": "甲", "B": "乙", "C": None, "D": "丁", "answer": "C"},
        {"choices": {"text": ["甲", "乙"], "label": ["1", "2"]}, "answer": 3},
    ],
)
def test_an_answer_that_is_none_of_the_options_is_left_out(tmp_path: Path, row: dict[str, Any]) -> None:
    (tmp_path / "q.json").write_text(json.dumps([{"question": "题", **row}]))
    rows, counts = _rows(tmp_path / "q.json", LETTERS)
    assert rows == [] and counts["dropped: an answer that is none of its question's options"] == 1


_FOUR = ["甲", "乙", "丙", "丁"]


@pytest.mark.parametrize(
    ("options", "answers", "label_of"),
    [
        *(  # out of order
            (options, ["A", "B"], [0, 1])
            for options in (
                {"options": {"B": "乙", "A": "甲"}},
                {"options": {"optionB": "乙", "optionA": "甲"}},
                {"B": "乙", "A": "甲"},
                {"choice_2": "乙", "choice_1": "甲"},
                {"options": ["B. 乙", "A. 甲"]},
                {"options": "(b) 乙\n(a) 甲"},
                {"options": {"2": "乙", "1": "甲"}},
                {"choices": {"text": ["乙", "甲"], "label": ["B", "A"]}},
                {"options": [{"key": "B", "value": "乙"}, {"key": "A", "value": "甲"}]},
            )
        ),
        ({"options": _FOUR}, ["甲", "丁", "丙"], [0, 3, 2]),
        ({"options": ["3", "2", "1", "7"]}, ["7", "2", "3"], [3, 1, 0]),
        ({"options": [3, 2, 1, 7]}, [7, 2.0, 3], [3, 1, 0]),
        ({"A": "3", "B": "2", "C": "1", "D": "7"}, ["7", "2", "3"], [3, 1, 0]),
        ({"options": _FOUR}, [0, 3, 2], [0, 3, 2]),
        ({"choice1": "甲", "choice2": "乙"}, [0, 1, 1], [0, 1, 1]),
        ({"choice1": "甲", "choice2": "乙", "choice3": "丙", "choice4": "丁"}, [1, 4, 3], [0, 3, 2]),
        ({"choices": {"text": _FOUR, "label": ["1", "2", "3", "4"]}}, ["1", "2", "3"], [0, 1, 2]),
        ({"A": "甲", "B": "", "C": float("nan"), "D": "丁"}, ["A", "D"], [0, 3]),
        ({"choice1": "甲", "choice2": " ", "choice3": "丙"}, ["A", "C"], [0, 2]),
        ({"options": {"A": "甲", "B": None, "C": "丙"}}, ["A", "C"], [0, 2]),
        ({"options": ["甲", "", "丙"]}, [0, 2], [0, 2]),
    ],
)
def test_answers_name_the_options_that_they_mean(options: dict, answers: list, label_of: list) -> None:
    rows, _ = clean_split([{"question": "题", **options, "answer": a} for a in answers], "x", "", "", LETTERS)
    assert [row.label for row in rows] == label_of
    lines = rows[0].text.splitlines()[1:]
    assert lines == sorted(lines) and not any(line.endswith((". ", "nan", "None")) for line in lines)
    assert len(lines) < 4 or lines[0].startswith("A. ")
    if "甲" in str(options):
        assert lines[0] == "A. 甲"


@pytest.mark.parametrize(
    ("options", "answers", "names", "found"),
    [
        ({"options": ["2", "0", "1", "3"]}, ["2", "0", "1"], LETTERS, "may mean option A or option C"),
        ({"options": ["B", "A", "D", "C"]}, ["A", "B"], LETTERS, "may mean option A or option B"),
        ({"options": {"B": "乙", "A": "甲"}}, [0, 1], LETTERS, "may mean option A or option B"),
        ({"choice1": "甲", "choice2": "乙", "choice3": "丙"}, [1, 2], LETTERS, "may mean option A or option B"),
        ({"options": _FOUR}, [0, 1], ["D", "C", "B", "A"], "may mean option A or option D"),
        ({"options": _FOUR}, [1, 2, 3, 4], [*LETTERS, "E"], r"answers '4' \(3 rows\)"),
        ({"options": _FOUR}, [1, 2, 3, 4], LETTERS, "labels '4'|answers '4'"),
        ({"options": _FOUR}, [1.5, 2, 7], LETTERS, "labels|answers"),
    ],
)
def test_answers_that_may_mean_two_options_are_refused(options: dict, answers: list, names: list, found: str) -> None:
    with pytest.raises(InputError, match=found):
        clean_split([{"question": "题", **options, "answer": a} for a in answers * 3], "x", "", "", names)


def test_a_few_questions_of_numbers_change_no_answer() -> None:
    rows = [{"question": f"{i}", "options": _FOUR, "answer": i % 4} for i in range(60)]
    rows.append({"question": "1+1", "options": ["4", "3", "0", "2"], "answer": 3})
    assert [row.label for row in clean_split(rows, "x", "", "", LETTERS)[0]] == [*(i % 4 for i in range(60)), 3]
    words = [{"question": f"{i}", "options": _FOUR, "answer": _FOUR[i % 4]} for i in range(60)]
    words.append(rows[-1] | {"answer": "2"})
    assert [row.label for row in clean_split(words, "x", "", "", LETTERS)[0]] == [*(i % 4 for i in range(60)), 3]


@pytest.mark.parametrize("options", ["甲", ["甲"], "['甲' '乙']", None, 5, [{"odd": "甲"}, {"odd": "乙"}]])
def test_a_question_without_its_options_is_not_asked(tmp_path: Path, options: Any) -> None:
    (tmp_path / "q.json").write_text(json.dumps([{"question": "题", "options": options, "answer": "A"}]))
    rows, counts = _rows(tmp_path / "q.json", LETTERS)
    assert rows == [] and any("dropped: fewer than two options" in why for why in counts)


def test_labels_that_are_lists_of_several_are_refused(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps([{"text": "题", "label": ["A", "B"]}] * 5))
    with pytest.raises(InputError, match="labels "):
        _rows(tmp_path / "q.json", LETTERS)


def test_other_placeholders_of_a_prompt_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\{A\} would reach the model as it is"):
        Settings(user_prompt="{text}\nA. {A}\nB. {B}")
    assert Settings(user_prompt='Answer as {"label": 1}.\n{text}').user_prompt.endswith("{text}")


def test_files_of_one_folder_are_one_table_or_refused(tmp_path: Path) -> None:
    for name, part in (("a", REVIEWS[:4]), ("b", REVIEWS[4:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    assert read_table(str(tmp_path)).splits["all"] == REVIEWS
    (tmp_path / "c.json").write_text(json.dumps([{"question": "q"}]))
    with pytest.raises(InputError, match="json has question"):
        read_table(str(tmp_path))


@pytest.mark.parametrize(
    ("train", "test", "told"),
    [
        ("text,label", "sentence,target", ["'sentence' of test read as 'text'", "'target' of test read as 'label'"]),
        ("review,label", "text,review,label", ["not used: the column 'text'"]),
        ("text,label", "Text,label", ["'Text' of test read as 'text'"]),
        ("text,label", "text,label", []),
        ("text,review,label", "review,label", None),
        ("text,label,category", "text,category", None),
    ],
)
def test_splits_of_other_columns(tmp_path: Path, train: str, test: str, told: list[str] | None) -> None:
    for name, header in (("train", train), ("test", test)):
        cells = [[str(i % 2) if n in ("label", "target", "category") else f"{n} {i}" for n in header.split(",")]
                 for i in range(6)]  # fmt: skip
        (tmp_path / f"{name}.csv").write_text("\n".join([header, *map(",".join, cells)]))
    table = read_table(str(tmp_path))
    whole = [*table.splits["train"], *table.splits["test"]]
    refused = pytest.raises(InputError, match="the same column of every split")
    with refused if told is None else contextlib.nullcontext():
        rows, counts = clean_split(table.splits["test"], "test", "", "", ["负面", "正面"], whole=whole)
        assert [row.text.split()[0] for row in rows] == [next(n for n in ("review", "sentence", "Text", "text")
                                                               if n in test.split(","))] * 6  # fmt: skip
        assert [why for why in told or () if not any(why in have for have in counts)] == []
        assert bool(told) == bool(+counts)


# Conversations.


def _conversations(rows: list[dict[str, Any]], thinking: bool = False) -> tuple[list[list[Any]], Counter[str]]:
    """Roles with their marks, and what was counted."""
    task = task_of(Settings(task="dialogue", dataset="x.json", system_prompt="s", thinking=thinking))
    columns = dict.fromkeys(key for row in rows for key in row)
    found, counts = clean_conversations([columns | row for row in rows], "all", task)
    return [[message.get("learn", True) for message in row.messages[2::2]] for row in found], counts


def _two(first: dict[str, Any] | None = None, **columns: Any) -> dict[str, Any]:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": text} for role, text in turns]
    messages[1] |= first or {}
    return {"messages": messages, **columns}


@pytest.mark.parametrize(
    "row",
    [
        *(
            _two({key: value})
            for key in ("loss", "weight", "learnable", "compute_loss")
            for value in (False, 0, 0.0, "false")
        ),
        *(_two({key: value}) for key, value in (("Loss", False), ("is_loss", False), ("loss_scale", 0), ("Mask", 1))),
        _two({"mask": True}),
        _two(assistant_masks=[0, 1]),
        _two(loss_mask=[0, 0, 0, 1]),
        _two(loss_mask=[0, 1]),
        _two(loss_masks=[0, 1]),
        _two(mask_history=True),
    ],
)
def test_turns_marked_as_not_to_be_learned(row: dict[str, Any]) -> None:
    learned, counts = _conversations([row])
    assert learned == [[False, True]]
    assert counts["answers marked as not to be learned: in the context, not in the loss"] == 1


def test_marks_that_say_yes_or_nothing_change_nothing() -> None:
    rows = [_two({"weight": 1}), _two({"loss": True}), _two({"loss": None}), _two(loss_mask=None), _two({"mask": 0})]
    learned, counts = _conversations(rows)
    assert learned == [[True, True]] * 5 and not +counts


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (_two({"weight": 0.5}), "weight '0.5'"),
        (_two({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}), "a turn with train_detail"),
        (_two(loss=False), "dropped: a row marked as not to be learned (loss: false)"),
        (_two(Weight=0), "dropped: a row marked as not to be learned (weight: 0)"),
        (_two(kto_tag=False), "dropped: a row marked as not to be learned (kto_tag: false)"),
        (_two(Desirable="False"), "dropped: a row marked as not to be learned (desirable: false)"),
        (_two(label=False), "dropped: a row marked as not to be learned (label: false)"),
        ({"instruction": "a", "output": "b", "train": "false"}, "not to be learned (train: false)"),
        (_two(loss_mask=[1, 0, 1]), "another number of values than turns"),
        (_two(loss_mask=[0, 0]), "every answer marked as not to be learned"),
        (_two({"tool_calls": [{"name": "f"}]}), "a turn that calls a tool"),
    ],
)
def test_marks_that_cannot_be_followed_drop_the_row(row: dict[str, Any], why: str) -> None:
    learned, counts = _conversations([row, _two()])
    assert learned == [[True, True]] and any(why in reason for reason in counts)


def test_keys_and_columns_that_are_not_used_are_counted() -> None:
    _, counts = _conversations([_two({"name": "Li"}, source="web"), _two()])
    assert counts["not used: the key 'name' of turns"] == 1 and counts["not used: the column 'source'"] == 2


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "thought"])
def test_reasoning_under_any_key_is_seen(key: str) -> None:
    said: Any = [{"type": "reasoning.text", "text": "hm"}] if key == "reasoning" else "hm"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", key: said}]}
    with pytest.raises(InputError, match="1 answers with reasoning"):
        _conversations([row])
    assert _conversations([row], thinking=True)[0] == [[True]]
    alpaca = {"instruction": "a", "output": "b", key: said}
    with pytest.raises(InputError, match="1 answers with reasoning"):
        _conversations([alpaca])


@pytest.mark.parametrize("columns", [{"label": 0}, {"label": True}, {"weight": 1}, {"weight": 0.5}, {"loss": 1.7}])
def test_columns_that_say_something_else_drop_no_row(columns: dict[str, Any]) -> None:
    learned, counts = _conversations([_two(**columns)])
    assert learned == [[True, True]] and counts[f"not used: the column '{next(iter(columns))}'"] == 1


_BLOCKS = [{"type": "thinking", "thinking": "hm"}]


@pytest.mark.parametrize(
    "answer",
    [
        *({"reasoning": said} for said in ({"content": "hm"}, ["hm"], _BLOCKS, [{"type": "x", "summary": ["hm"]}])),
        *({key: "hm"} for key in ("thoughts", "cot", "reasoning_text", "Reasoning_Content", "thinking_content")),
        {"thinking_blocks": _BLOCKS},
        {"content": [*_BLOCKS, {"type": "text", "text": "b"}]},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                {"type": "text", "text": "b"},
            ]
        },
    ],
)
def test_reasoning_of_any_shape_is_read(answer: dict[str, Any]) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **answer}]}
    task = task_of(Settings(task="dialogue", dataset="x.json", system_prompt="s", thinking=True))
    [read], _ = clean_conversations([row], "all", task)
    assert read.messages[-1]["content"] == "<think>\nhm\n</think>\n\nb"


def test_reasoning_beside_the_messages_is_the_last_answers_or_a_switch() -> None:
    with pytest.raises(InputError, match="1 answers with reasoning"):
        _conversations([_two(reasoning="hm")])
    assert _conversations([_two(reasoning="hm")], thinking=True)[0] == [[True, True]]
    learned, counts = _conversations([_two(thinking="off"), _two(thinking=False)])
    assert learned == [[True, True]] * 2 and counts["not used: the key 'thinking' of turns"] == 2


@pytest.mark.parametrize("said", [{"odd": 1}, 5, [{"type": "redacted", "data": "x"}], {"thinking": 3}])
def test_reasoning_of_an_unknown_shape_is_never_dropped_alone(said: Any) -> None:
    _, counts = _conversations([_two({"reasoning": said}), _two()])
    assert counts == {"dropped: reasoning of a kind that is not known": 1}


@pytest.mark.parametrize("block", ["<think>\n\n</think>\n\n", "<think></think>", "<Thinking>\u200b</thinking>\n"])
def test_an_empty_block_is_no_thinking(block: str) -> None:
    learned, counts = _conversations([_two({"content": f"{block}b"})])
    assert learned == [[True, True]] and counts == {"changed: empty thinking blocks removed": 1}
    _, counts = _conversations(
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": block}]}]
    )
    assert counts == {"dropped: empty thinking": 1}


def test_many_dropped_rows_are_said_on_every_page() -> None:
    flow = {
        ("read", "train"): 100,
        ("dropped: no thinking in the last answer", "train"): 80,
        ("dropped: empty text", "train"): 5,
        ("dropped: empty text", "test"): 10,
    }
    [note] = _much_dropped({"train": 100, "test": 100}, flow)
    assert note.startswith("85 of 100 rows of train were left out") and "80 of them for: no thinking" in note


def test_the_first_sheet_that_is_seen_is_read(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl is not installed")
    book = openpyxl.Workbook()
    book.active.append(["text", "label"])
    book.active.sheet_state = "hidden"
    sheet = book.create_sheet("data")
    for row in (
        [None, "text", "label"],
        [None, "好, 很好", 1],
        [None] * 3,
        [None, 'a_x000D_\n"', 0],
        [None, "#N/A", 0],
    ):
        sheet.append(row)
    sheet["XFD2"], book.active = "stray", 1
    sheet.row_dimensions[2].hidden = True
    sheet.merge_cells("C5:C6")
    book.create_sheet("notes").append(["a"])
    book.save(tmp_path / "t.xlsx")
    rows, counts = _rows(tmp_path / "t.xlsx", ["负面", "正面"])
    assert rows == [("好, 很好", 1), ('a\n"', 0)]
    assert +counts == {
        "not used: the sheet 'Sheet' (hidden); 'data' is read": 1,
        "cells with an error such as #N/A read as empty": 1,
        "rows that the sheet hides, read like the others": 1,
        "merged cells: only the first has the value": 1,
        "not used: cells of columns without a name": 1,
        "CRLF line ends": 1,
        "dropped: empty text": 1,
        "records over several lines (the longest: lines 3 to 4)": 1,
    }


def test_formulas_of_a_sheet_without_their_values_are_counted(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl is not installed")
    book = openpyxl.Workbook()
    for row in (["text", "label"], ["好", 1], ['="很" & A2', 0], ["差", "=1-B2"]):
        book.active.append(row)
    book.save(tmp_path / "t.xlsx")  # as pandas and openpyxl write them; Excel stores the values beside the formulas
    rows, counts = _rows(tmp_path / "t.xlsx", ["负面", "正面"])
    assert rows == [("好", 1)] and counts["cells with a formula whose value the file does not hold, read as empty"] == 2


def test_a_sheet_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("openpyxl", reason="openpyxl is not installed")
    with zipfile.ZipFile(tmp_path / "t.xlsx", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("xl/worksheets/sheet1.xml", b" " * (300 << 20))
    with pytest.raises(InputError, match="times its own size"):
        _rows(tmp_path / "t.xlsx", ["负面", "正面"])


def test_a_column_that_cannot_be_read_and_is_not_used_is_left_out(tmp_path: Path) -> None:
    for kind, value in ((pa.timestamp("us"), 2**60), (pa.timestamp("us", "Mars/Olympus"), 5), (pa.date64(), 2**60)):
        columns = {"text": ["a", "b"], "label": [0, 1], "t": pa.array([value] * 2, pa.int64()).cast(kind, safe=False)}
        pq.write_table(pa.table(columns), tmp_path / "r.parquet")
        rows, counts = _rows(tmp_path / "r.parquet", ["负面", "正面"])
        assert rows == [("a", 0), ("b", 1)] and counts["not used: the column 't', which cannot be read"] == 2
        pq.write_table(pa.table(columns).rename_columns(["x", "label", "text"]), tmp_path / "r.parquet")
        with pytest.raises(InputError, match="column text"):
            _rows(tmp_path / "r.parquet", ["负面", "正面"])
