"""CSV and TSV files: what spreadsheets, pandas and R write is read and counted; what would be a guess is refused."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.errors import InputError
from lib.stages.data import csv_table

FILE = Path("reviews.csv")


def read_csv(text: str, tabs: bool = False) -> tuple[dict[str, list[str]], list[str]]:
    """Columns, and what was noted."""
    notes: Counter[str] = Counter()
    rows = csv_table.read_csv(FILE, text, notes, tabs)
    return {name: [row[name] for row in rows] for name in rows[0]}, list(+notes)


@pytest.mark.parametrize(
    ("text", "columns", "note"),
    [
        ("text,label\na,1\nb,0\n", {"text": ["a", "b"], "label": ["1", "0"]}, ""),
        ("text,label\na,1,\nb,0,\n", {"text": ["a", "b"], "label": ["1", "0"]}, "empty cells at the ends of lines"),
        ("text,label,\na,1,\nb,0,\n", {"text": ["a", "b"], "label": ["1", "0"]}, "empty cells at the ends of lines"),
        (",text,label\n0,a,1\n1,b,0\n", {"text": ["a", "b"], "label": ["1", "0"]}, "index columns without a name"),
        ("text,label\n7,a,1\n9,b,0\n", {"text": ["a", "b"], "label": ["1", "0"]}, "index columns without a name"),
        ("text;label\na,b;1\n", {"text": ["a,b"], "label": ["1"]}, "cells separated by a semicolon"),
        ("text\tlabel\na,b\t1\n", {"text": ["a,b"], "label": ["1"]}, "cells separated by a tab"),
        ('text,label\n"a\nb, c",1\nd,0\n', {"text": ["a\nb, c", "d"], "label": ["1", "0"]}, "lines 2 to 3"),
        ('text,label\n"say ""no""",1\n', {"text": ['say "no"'], "label": ["1"]}, ""),
        (",,text,label\n0,0,a,1\n0,1,b,0\n", {"text": ["a", "b"], "label": ["1", "0"]}, "index columns without a name"),
        (
            'label, text\n0, "a, b"\n1, "c"\n',
            {"label": ["0", "1"], "text": ["a, b", "c"]},
            "spaces between a separator",
        ),
        *(
            (f",text,label\n{a},a,1\n{b},b,0\n", {"text": ["a", "b"], "label": ["1", "0"]}, "index columns")
            for a, b in (("0", "0"), ("0.0", "1.0"), ("-1", "-2"), ("2024-01-01", "2024-01-02 03:04:05"), ("7", ""))
        ),
        *(
            (text, {"text": ["a", "b"], "label": ["1", "0"]}, "empty c")
            for text in ("text,label,,\na,1,,\nb,0,,\n", "text,label\na,1,,\nb,0,,\n", ",text,label\n,a,1\n,b,0\n")
        ),
        ("text,,label\na,,1\nb,,0\n", {"text": ["a", "b"], "label": ["1", "0"]}, "empty cells"),
        (
            ",text,label\ntrain,a,1\ntest,b,0\n",
            {"(index) 1": ["train", "test"], "text": ["a", "b"], "label": ["1", "0"]},
            "",
        ),
        *((f"{mark}text;label\na,b;1\n", {"text": ["a,b"], "label": ["1"]}, "") for mark in ("sep=;\n", '"sep=;"\n')),
        ("text,label\n\nnull,007\n\n", {"text": ["null"], "label": ["007"]}, ""),
    ],
)
def test_what_programs_write_is_read(text: str, columns: dict[str, list[str]], note: str) -> None:
    found, notes = read_csv(text)
    assert found == columns
    assert [note in line for line in notes] == ([True] if note else [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("text,label\na,1\nb\n", "line 3 has 1 cell, the header 2"),
        ("text,label\na,1\nb,0,no,yes\n", "line 3 has 4 cells, the header 2"),
        ("text,label\na,1,\nb,0\n", "line 2 has 3 cells, the header 2"),
        ("text,label\nx,a,1\nx,b,0\n", "line 2 has 3 cells, the header 2"),  # a column that is no index
        ('text,label\na,1\n"b,0\nc,1\n', "line 3: a quotation mark opens here that is never closed"),
        ('text,label\n"a\\"b",1\n', "line 2: a quotation mark that neither ends its cell nor is doubled"),
        ('text,label\n"good" room,1\n', "line 2: a quotation mark that neither ends its cell nor is doubled"),
        ('text,label\n"a,1\nb,0\nc "d",1\n', "(the cell began with one in line 2)"),
        ("text，label\na，1\n", "full-width commas"),
        ("a,,b\n1,2,3\n", "one distinct name a column"),
        ("text,text\na,b\n", "one distinct name a column"),
        ("text,,label\na,x,1\nb,,0\n", "one distinct name a column"),
        ("text,label,\na,1,\nb,0,x\n", "one distinct name a column"),
        (",\na,b\n", "one distinct name a column"),
    ],
)
def test_what_would_be_a_guess_is_refused_with_its_line(text: str, said: str) -> None:
    with pytest.raises(InputError) as refused:
        read_csv(text)
    assert said in str(refused.value)


def test_a_mark_without_its_partner_does_not_swallow_the_rows_behind_it() -> None:
    rows = [f"the room no. {i},{i % 2}" for i in range(60)]
    rows[20], rows[40] = '"' + rows[20], 'late again",1'
    with pytest.raises(InputError, match=r"begins in line 22 with a quotation mark ends in line 42, and line 23 looks"):
        read_csv("text,label\n" + "\n".join(rows) + "\n")


@pytest.mark.parametrize("names", [["text", "label"], ["label", "text"], ["text", "label", "id"]])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_texts_over_several_lines_beside_few_labels_are_read(names: list[str], separator: str) -> None:
    texts = [
        f"第{i}天\n第二行，好" if i % 7 == 0 else f'第{i}天说"好"' if i % 5 == 0 else f"第{i}天" for i in range(60)
    ]
    texts[3], texts[4] = "三行\n\n好", 'a,b;c\td\n"e'
    frame = pd.DataFrame({"text": texts, "label": ["0", "1"] * 30, "id": [str(i) for i in range(60)]})[names]
    columns, notes = read_csv(frame.to_csv(index=False, sep=separator, lineterminator="\n"), separator == "\t")
    assert columns == frame.to_dict("list") and any("records over several lines" in note for note in notes)


@pytest.mark.parametrize("lines", [["好,1", '来",0'], ["好,1", "中,0", '来",0'], ["一", "好,1", "中,0", '来",0']])
def test_a_text_that_swallowed_records_is_refused(lines: list[str]) -> None:
    rest = "".join(f"第{i}天,{i % 2}\n" for i in range(20))
    more = rest.replace("天", "日")
    with pytest.raises(InputError, match="looks like a record of its own"):
        read_csv("text,label\n" + rest + '"' + "\n".join(lines) + "\n" + more)


@pytest.mark.parametrize("label_first", [True, False])
@pytest.mark.parametrize("more", [1, 2])
def test_a_text_that_swallowed_a_record_among_texts_of_several_lines_is_refused(label_first: bool, more: int) -> None:
    inner = "\n续" * more
    rows = [f'{i % 2},"第{i}天{inner}"' if label_first else f'"第{i}天{inner}",{i % 2}' for i in range(20)]
    assert len(read_csv("\n".join(["a,b", *rows]))[0]["a"]) == 20
    rows[5:7] = (
        [f"0,第6天{inner}".join(['1,"第5天' + inner + "\n", '"'])]
        if label_first
        else [f'"第5天{inner},1\n第6天{inner}",0']
    )
    with pytest.raises(InputError, match="looks like a record of its own"):
        read_csv("\n".join(["a,b", *rows]))


@pytest.mark.parametrize(
    ("text", "cells"),
    [
        ('text\tlabel\n"他说""好"""\t1\nb\t0\n', ['他说"好"', "b"]),
        ('text\tlabel\n"a\tb"\t1\nc\t0\n', ["a\tb", "c"]),
        ('"text"\t"label"\n"a"\t"1"\n', ["a"]),
        ('text\tlabel\n"a"\t1\n', ['"a"']),
        ('text\tlabel\n"a, b"\t1\nc\t0\n', ["a, b", "c"]),  # Excel
        ('text\tlabel\n"a, b"\t1\n"c"\t0\n', ['"a, b"', '"c"']),
        ('text\tlabel\n"a, b"\t1\nc, d\t0\n', ['"a, b"', "c, d"]),
        ('text\tlabel\n"a" b\t1\n"他说""好"""\t0\n', ['"a" b', '"他说""好"""']),
    ],
)
def test_marks_of_tab_separated_files_that_pandas_wrote(text: str, cells: list[str]) -> None:
    assert read_csv(text, tabs=True)[0]["text"] == cells


def test_marks_of_tab_separated_files_are_plain_characters() -> None:
    columns, _ = read_csv('text\tlabel\n"a\t1\nb"\t0\n', tabs=True)
    assert columns == {"text": ['"a', 'b"'], "label": ["1", "0"]}


_CELL = st.text(st.characters(exclude_categories=("Cs", "Cc"), include_characters="\n"), min_size=1)


@given(st.lists(st.tuples(_CELL, st.integers(0, 3)), min_size=1), st.booleans())
def test_what_pandas_writes_is_read_as_pandas_has_it(rows: list[tuple[str, int]], index: bool) -> None:
    frame = pd.DataFrame(rows, columns=["text", "label"]).astype(str)
    buffer = io.StringIO()
    frame.to_csv(buffer, index=index, lineterminator="\n")
    try:
        table, _ = read_csv(buffer.getvalue())
    except InputError as error:  # a text may look like a swallowed record, and is then refused, never changed
        assert "looks like a record of its own" in str(error)
    else:
        assert table == {name: frame[name].tolist() for name in frame.columns}
