"""Reading files and folders: every format, every kind of bad file."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path

import pytest

from lib.errors import InputError
from lib.stages.data.cleaning import clean_split
from lib.stages.data.data_files import file_fingerprint
from lib.stages.data.reading import read_table

NAMES = ["负面", "正面"]
ROWS = [{"text": '他说"好"，真的', "label": 1}, {"text": "null", "label": 0}, {"text": "很差, 退货", "label": 0}]


def rows_of(path: Path, split: str = "all") -> list[tuple[str, int]]:
    table = read_table(str(path))
    rows, _ = clean_split(table.splits[split], split, "", "", NAMES)
    return [(row.text, row.label) for row in rows]


def write(path: Path, kind: str) -> Path:
    if kind == "csv":
        path.write_text('label,text\n1,"他说""好""，真的"\n0,null\n0,"很差, 退货"\n', encoding="utf-8")
    elif kind == "tsv":
        path.write_text('label\ttext\n1\t他说"好"，真的\n0\tnull\n0\t很差, 退货\n', encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(ROWS, ensure_ascii=False, indent=1), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    else:
        import pandas as pd

        pd.DataFrame(ROWS).to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows(home: Path, tmp_path: Path, kind: str):
    path = write(tmp_path / f"reviews.{kind}", kind)
    assert rows_of(path) == [(row["text"], row["label"]) for row in ROWS]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"text": "a"}\n,,,\n{"text": "b"}\n', 2),
        ('{"text": "a"}\n{"text": "b"}\n{"text": [{"role"', 3),
        ('[{"text": "a"},\n{"text" "b"}]', 2),
    ],
)
def test_a_line_that_is_no_json_is_named(home: Path, tmp_path: Path, text: str, line: int):
    path = tmp_path / "a.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=rf"a\.jsonl, line {line} is not JSON"):
        read_table(str(path))


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_dates_stay_as_they_are_written(home: Path, tmp_path: Path, kind: str):
    rows = [{"a": i, "text": f"2024-02-0{i}", "turns": [{"said": f"2024-01-01T10:00:0{i}"}]} for i in range(1, 4)]
    path = tmp_path / f"a.{kind}"
    path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert read_table(str(path)).splits["all"] == rows


def test_tsv_is_unquoted(home: Path, tmp_path: Path):
    path = tmp_path / "a.tsv"
    path.write_text('label\ttext_a\n1\t"开头有引号\n0\t第二行"有\n1\t三\n', encoding="utf-8")
    assert rows_of(path) == [('"开头有引号', 1), ('第二行"有', 0), ("三", 1)]


def test_a_quoted_field_may_hold_a_line_break(home: Path, tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_bytes('label,review\r\n1,"一\r\n二"\r\n0,三\r\n'.encode())
    assert rows_of(path) == [("一\n二", 1), ("三", 0)]


def test_bom_crlf_and_nul_are_removed_and_counted(home: Path, tmp_path: Path):
    path = tmp_path / "a.tsv"
    path.write_bytes("\ufefflabel\ttext\r\n1\t好\0吃\r\n0\t差\r劲\r\n".encode())
    table = read_table(str(path))
    assert dict(table.changes) == {
        "byte-order mark": 1, "NUL characters": 1, "CRLF line ends": 3, "stray CR characters": 1
    }  # fmt: skip
    assert rows_of(path) == [("好吃", 1), ("差 劲", 0)]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_lone_surrogates_go_and_pairs_stay(home: Path, tmp_path: Path, kind: str):
    path = tmp_path / f"a.{kind}"
    objects = ['{"text": "好\\ud83d了\\u0000", "label": 1}', '{"text": "\\ud83d\\ude00\\\\ud83d", "label": 0}']
    path.write_text(f"[{','.join(objects)}]" if kind == "json" else "\n".join(objects), encoding="utf-8")
    table = read_table(str(path))
    assert table.changes["lone surrogates"] == 1
    rows, counts = clean_split(table.splits["all"], "all", "", "", NAMES)
    assert [row.text for row in rows] == ["好了", "😀\\ud83d"]
    assert counts["changed: NUL characters removed"] == 1


def test_nfd_is_kept_and_counted(home: Path, tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("label,text\n1,cafe\u0301 好\n0,差\n", encoding="utf-8")
    rows, counts = clean_split(read_table(str(path)).splits["all"], "all", "", "", NAMES)
    assert rows[0].text == "cafe\u0301 好" and counts["kept: texts not in NFC"] == 1


def test_folder_splits_and_shards(home: Path, tmp_path: Path):
    folder = tmp_path / "data set"
    folder.mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "dev", "test"):
        write(folder / f"{name}.jsonl", "jsonl")
    (folder / "README.md").write_text("not data")
    table = read_table(str(folder))
    assert {name: len(split) for name, split in table.splits.items()} == {"train": 6, "validation": 3, "test": 3}
    assert "test" in table.splits


def test_folder_with_one_file_has_no_split(home: Path, tmp_path: Path):
    folder = tmp_path / "one"
    folder.mkdir()
    write(folder / "reviews.csv", "csv")
    table = read_table(str(folder))
    assert list(table.splits) == ["all"]


def test_a_changed_file_is_read_again(home: Path, tmp_path: Path):
    import os

    path = write(tmp_path / "a.csv", "csv")
    stamp, before = path.stat().st_mtime_ns, file_fingerprint(path)
    assert rows_of(path)[1][0] == "null"
    path.write_text(path.read_text(encoding="utf-8").replace("null", "NULL"), encoding="utf-8")
    os.utime(path, ns=(stamp, stamp))  # same size, same time: only the content differs
    assert rows_of(path)[1][0] == "NULL"
    assert file_fingerprint(path) != before


BAD = {
    "empty.csv": (b"", "is empty"),
    "blank.tsv": (b"\xef\xbb\xbf\r\n \n", "is empty"),
    "pointer.csv": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    "page.json": (b"\n<!DOCTYPE html><html></html>", "web page"),
    "gb.csv": ("label,text\n1,很好吃\n".encode("gb18030"), "readable as GB18030"),
    "wide.csv": ("label,text\n1,好\n".encode("utf-16"), "UTF-16"),
    "zipped.csv": (gzip.compress(b"label,text\n1,a\n"), "compressed by gzip.*gunzip"),
    "renamed.csv": (b"PAR1 and more", "parquet by its content.*end its name"),
    "workbook.tsv": (b"PK\x03\x04 and more", r"xlsx or another zip archive.*\.xlsx"),
    "bare.csv": ("label,text\n1,好\n".encode("utf-16-le"), "UTF-16.*iconv -f UTF-16LE"),
    "big.json": ('[{"text": "好"}]'.encode("utf-16-be"), "UTF-16.*iconv -f UTF-16BE"),
    "wider.csv": ("label,text\n1,好\n".encode("utf-32"), "is UTF-32"),
    "raw_surrogate.csv": (b"label,text\n1,\xed\xa0\xbd\n", "line 2"),
    "header_only.tsv": (b"label\ttext\n", "holds no rows"),
    "list.json": (b"[]", "holds no rows"),
    "broken.json": (b'[{"text": "a", "label": 1}', "line 1 is not JSON"),
    "broken.jsonl": (b'{"text": "a", "label": 1}\n{"text": \n', "line 2 is not JSON"),
    "cut.parquet": (b"PAR1 and no more", "start and end as Parquet"),
    "too_many.csv": (b"label,text\n1,a\n1,a,b,c\n", "line 3 has 4 cells, the header 2"),
    "one_more.csv": (b"label,text\n1,a,b\n1,a,b\n", "line 2 has 3 cells, the header 2"),
    "no_objects.json": (b"[1, 2]", "a list of numbers"),
    "twice.csv": (b"text,text\na,b\n", "distinct name"),
    "table.ods": (b"PK", r"ends in '\.ods'"),
    "table.xlsx": (b"PK", "openpyxl is not installed|no XLSX workbook"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_a_sentence(home: Path, tmp_path: Path, name: str):
    content, message = BAD[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_table(str(path))
    for part in (caught.value.found, caught.value.expected, caught.value.do):
        assert part.endswith(".") and "\n" not in part
    assert name in caught.value.found or "begins with" in caught.value.found


@pytest.mark.parametrize("source", ["no/such/file.csv", "./nothing", "missing.tsv", "a b", "/nowhere/at/all"])
def test_missing_paths(home: Path, source: str):
    with pytest.raises(InputError, match="no file or folder"):
        read_table(source)


def test_bad_folders(home: Path, tmp_path: Path):
    with pytest.raises(InputError, match="holds nothing"):
        (tmp_path / "empty").mkdir()
        read_table(str(tmp_path / "empty"))
    folder = tmp_path / "twice"
    folder.mkdir()
    write(folder / "train.csv", "csv")
    write(folder / "train.tsv", "tsv")
    with pytest.raises(InputError, match=r"train\.csv, train\.tsv for train"):
        read_table(str(folder))
    (folder / "train.csv").rename(folder / "test.csv")
    (folder / "train.tsv").rename(folder / "other.tsv")
    with pytest.raises(InputError, match=r"a file train\.csv"):
        read_table(str(folder))


def test_cr_ends_lines_where_it_ends_the_first(home: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("label,text\r1,好\r0,坏\r\n".encode())
    assert rows_of(tmp_path / "a.csv") == [("好", 1), ("坏", 0)]


def folder_of(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, "csv")
    return folder


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (("hotel_train.csv", "hotel_test.csv"), {"train": 3, "test": 3}),
        (("train_data.csv", "test_data.csv"), {"train": 3, "test": 3}),
        (("ChnSentiCorp-Train.csv", "ChnSentiCorp-Dev.csv"), {"train": 3, "validation": 3}),
        (("train1.csv", "train2.csv", "test.csv"), {"train": 6, "test": 3}),
        (("reviews_2023.csv", "reviews_2024.csv"), {"all": 6}),
        (("part-1-of-2.csv", "part-2-of-2.csv"), {"all": 6}),
        (("top_10_of_2023.csv",), {"all": 3}),
    ],
)
def test_a_folder_is_read_by_the_words_in_its_names(home: Path, tmp_path: Path, names: tuple, rows: dict) -> None:
    table = read_table(str(folder_of(tmp_path / "f", *names)))
    assert {name: len(split) for name, split in table.splits.items()} == rows and not table.changes


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("train.csv", "train_2.csv", "test.csv"), "several tables: train.csv, train_2.csv for train"),
        (("train.csv", "train (1).csv"), "several tables"),
        (("train-00000-of-00003.csv", "train-00002-of-00003.csv"), "2 of the 3 parts .*: 00000, 00002"),
        (("part-1-of-2.csv",), "1 of the 2 parts"),
        (("train.csv", "test-00001-of-00002.csv"), "1 of the 2 parts"),
        (("hotel_test.csv", "book_test.csv"), r"a file train\.csv"),
    ],
)
def test_a_folder_that_is_no_whole_table_is_refused(home: Path, tmp_path: Path, names: tuple, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_table(str(folder_of(tmp_path / "f", *names)))


def test_files_that_are_not_read_are_said(home: Path, tmp_path: Path) -> None:
    table = read_table(str(folder_of(tmp_path / "f", "train.csv", "unlabeled.csv", "extra/train2.csv", ".git/x.csv")))
    assert table.changes == {"not used: the files extra/train2.csv, unlabeled.csv": 2} and table.rows == 3


@pytest.mark.parametrize(
    ("column", "values", "rows"),
    [
        ("split", ["train", "Test", "dev"], {"train": 2, "test": 2, "validation": 2}),
        ("Subset", ["training", "eval"], {"train": 3, "validation": 3}),
        ("is_test", [True, False], {"test": 3, "train": 3}),
        ("is_train", [1, 0], {"test": 3, "train": 3}),
        ("isTest", ["yes", "no"], {"test": 3, "train": 3}),
        ("is_validation", [1, 0, 0], {"validation": 2, "train": 4}),
        ("测试集", [1, 0], {"test": 3, "train": 3}),
        ("是否训练", ["是", "否"], {"train": 3, "test": 3}),
        ("type", ["train", "test"], {"train": 3, "test": 3}),
        ("phase", ["Training set", "TEST-1", "held-out"], {"train": 2, "test": 4}),
        ("划分", ["训练", "验证", "测试"], {"train": 2, "validation": 2, "test": 2}),
        ("mode", ["train", "dev", None], None),
        ("type", ["train", "bus", "ship"], {"all": 6}),
        ("train", [1, 0], {"all": 6}),
        ("is_valid", [1, 0], {"all": 6}),
        ("is_deleted", [1, 0], {"all": 6}),
        ("isVerified", ["yes", "no"], {"all": 6}),
        ("ISBN", ["978-7-02", "978-7-03"], {"all": 6}),
        ("issue", ["noise", "price", None], {"all": 6}),
        ("是否入住", ["是", "否"], {"all": 6}),
        ("is_test", ["a", "b"], None),
        ("is_test", [0, 0], {"all": 6}),
        ("is_test", [0, 1, 2], None),
        ("fold", [1, 2, 3], {"all": 6}),
        ("split", ["train"], {"all": 6}),
        ("set", ["hotel", "book"], {"all": 6}),
    ],
)
def test_a_column_that_says_the_splits_is_followed(
    home: Path, tmp_path: Path, column: str, values: list, rows: dict | None
) -> None:
    said = [{"text": str(i), "label": i % 2, column: values[i % len(values)]} for i in range(6)]
    (tmp_path / "a.json").write_text(json.dumps(said))
    if rows is None:
        with pytest.raises(InputError, match=f"the column {column} says"):
            read_table(str(tmp_path / "a.json"))
        return
    table = read_table(str(tmp_path / "a.json"))
    assert {name: len(split) for name, split in table.splits.items()} == rows
    assert ("all" in rows) == (column in table.splits[next(iter(rows))][0])
    assert bool(table.changes) == ("all" not in rows)


@pytest.mark.parametrize("values", [["train", "unlabelled"], ["train", "test", ""], ["test", "validation"]])
def test_a_column_that_says_some_of_the_splits_is_refused(home: Path, tmp_path: Path, values: list) -> None:
    said = [{"text": str(i), "label": 0, "split": values[i % len(values)]} for i in range(6)]
    (tmp_path / "a.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match="the column split says"):
        read_table(str(tmp_path / "a.json"))


@pytest.mark.parametrize(
    ("columns", "rows"),
    [
        ({"is_train": [1, 0, 0], "is_validation": [0, 1, 0]}, {"train": 2, "validation": 2, "test": 2}),
        ({"train": [1, 0, 0], "val": [0, 1, 0], "test": [0, 0, 1]}, {"train": 2, "validation": 2, "test": 2}),
        ({"split": ["train", "dev", "test"], "is_test": [0, 0, 1]}, {"train": 2, "validation": 2, "test": 2}),
        ({"split": ["train", "train", "test"], "is_test": [0, 1, 0]}, None),
        ({"split": ["train", "test", "test"], "subset": ["test", "train", "test"]}, None),
        (
            {"is_train": [1, 0, 0], "is_dev": [0, 1, 0], "is_test": [0, 0, 1]},
            {"train": 2, "validation": 2, "test": 2},
        ),
        ({"is_train": [1, 0, 0], "is_dev": [0, 1, 0], "is_test": [1, 0, 0]}, None),
    ],
)
def test_columns_that_say_the_splits_together(tmp_path: Path, columns: dict, rows: dict | None) -> None:
    said = [{"text": str(i), "label": i % 2, **{c: v[i % 3] for c, v in columns.items()}} for i in range(6)]
    (tmp_path / "a.json").write_text(json.dumps(said))
    if rows is None:
        with pytest.raises(InputError, match="say one split of every row"):
            read_table(str(tmp_path / "a.json"))
        return
    table = read_table(str(tmp_path / "a.json"))
    assert {name: len(split) for name, split in table.splits.items()} == rows
    assert not table.splits["train"][0].keys() & columns.keys()


def test_labels_that_are_called_like_splits_are_labels(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        json.dumps([{"text": str(i), "class": ["train", "test"][i % 2]} for i in range(4)])
    )
    assert list(read_table(str(tmp_path / "a.json")).splits) == ["all"]


@pytest.mark.parametrize(("file", "said", "refused"), [("train", "test", True), ("test", "dev", False)])
def test_rows_of_another_split_than_their_file_are_refused(tmp_path: Path, file: str, said: str, refused: bool) -> None:
    for name in ("train", "test"):
        values = [said if name == file and i % 2 else name for i in range(4)]
        rows = [{"text": str(i), "label": i % 2, "phase": value} for i, value in enumerate(values)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match="2 rows among those of") if refused else contextlib.nullcontext():
        assert list(read_table(str(tmp_path)).splits) == ["train", "test"]


@pytest.mark.parametrize("form", ["parquet", "csv", "split", "table", "named", "one level"])
def test_an_index_of_words_is_a_column_like_others(tmp_path: Path, form: str) -> None:
    import pandas as pd

    rows = [
        pd.DataFrame({"text": [f"第{i}间房" for i in range(n)], "label": [i % 2 for i in range(n)]}) for n in (6, 4)
    ]
    frame = pd.concat(rows, keys=["train", "test"])
    path = tmp_path / (
        "x.json" if form in ("split", "table", "named") else f"x.{'csv' if form == 'csv' else 'parquet'}"
    )
    if form == "one level":
        frame.index = frame.index.get_level_values(0)
    if form == "named":
        frame = frame.rename_axis(["split", "n"])
    if path.suffix == ".json":
        frame.to_json(path, orient="split" if form == "split" else "table", force_ascii=False)
    else:
        frame.to_csv(path) if path.suffix == ".csv" else frame.to_parquet(path)
    splits = read_table(str(path)).splits
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 6, "test": 4}
    assert splits["train"][0].keys() == {"text", "label"}


@pytest.mark.parametrize("more", ["train-00000-of-00001-0123456789abcdef", "train-00000-of-00002 train-00001-of-00002"])
def test_parts_of_two_writings_are_refused(tmp_path: Path, more: str) -> None:
    for name in ("train-00000-of-00001", *more.split(), "test-00000-of-00001"):
        (tmp_path / f"{name}.csv").write_text("text,label\na,0\nb,1\n")
    with pytest.raises(InputError, match="parts twice, or of two tables: train-00000-of-00001"):
        read_table(str(tmp_path))
