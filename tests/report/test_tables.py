"""The one table builder and its registry of columns."""

from __future__ import annotations

from lib.report import display
from lib.report.sentences import cell_text
from lib.runs.files import data_file
from lib.statistics.intervals import Interval


def test_every_column_is_explained_and_formats_a_number() -> None:
    entries = data_file("report/columns.yaml")
    for key, entry in entries.items():
        heading, explanation = entry["en"]
        assert heading and explanation.endswith("."), key
        assert cell_text(0.5, entry.get("format", "")), key
        assert entry.keys() <= {"unit", "better", "format", "times", "per", "interval", "en"}, key
        assert entry.get("better", "up") in ("up", "down"), key


def test_keys_become_headings_and_formats() -> None:
    rows = [{"type": "Q8_0", "kld": 0.00123, "n": 1234}, {"type": "Q2_K", "accuracy": Interval(0.9, 0.85, 0.93)}]
    found = display.build(rows, "Files.")
    assert found.headings == ["type", "KL, nats ↓", "n", "accuracy ↑"]
    assert found.rows == [["Q8_0", "1.23e-03", "1,234", "–"], ["Q2_K", "–", "–", "0.900 [0.850,\u00a00.930]"]]
    assert [column.numeric for column in found.columns] == [False, True, True, True]
    html = display.table(rows, "a < b").data
    assert '<th class="number" scope="col" title="Mean Kullback' in html and "<caption>a &lt; b</caption>" in html
    assert '<td class="number">1.23e-03</td>' in html


def test_headings_of_the_data_and_formats_of_the_caller() -> None:
    found = display.build([{"rows: a < b": 0.5, "share": 0.25, "KL, nats ↓": 0.0}], "", {"share": ".1%"})
    assert found.headings == ["rows: a < b", "share", "KL, nats ↓"] and found.rows == [["0.5", "25.0\u00a0%", "0"]]
    assert "<th" in display.table([{"a < b": None}], "c").data and "a &lt; b" in display.table([{"a < b": 1}], "c").data


def test_cells_come_from_what_an_entry_stores() -> None:
    """By another name, from inside another object, with limits, in the column's unit, or computed."""
    entry = {"bytes": 2_500_000, "before": {"accuracy_difference": 0.01, "accuracy_difference_interval": [0.0, 0.02]}}
    (row,) = display.rows_of("compare.steps_accuracy", [entry])
    assert row["step_points"] == Interval(1.0, 0.0, 2.0) and row["first_points"] is None is row["accuracy"]
    test = Interval(0.5, 0.4, 0.6)
    (scaled,) = display.rows_of("evaluate.accuracy_parts", [{"part": "leak_free", "point": vars(test)}])
    assert scaled["which rows"] == "leak free" and scaled["accuracy"] == 0.5 and scaled["low"] == 0.4
    (file,) = display.rows_of("index.files", [{**entry, "type": "Q8_0", "recommended": True}], column="ppl", key="ppl")
    assert (file["type"], file["overview_mb"], file["ppl"], file["verdict"]) == ("Q8_0 ★", 2.5, None, None)


def test_every_key_of_a_table_is_a_column_or_a_heading_of_its_own() -> None:
    """Keys of columns.yaml are words with underscores; a misspelled one would silently become a heading."""
    known = data_file("report/columns.yaml")
    plain = ("class", "confidence", "leaked", "model", "prompts", "row", "rows", "runtime", "support", "text")
    plain += ("MB", "answer", "estimate", "evidence", "fits", "group", "groups", "label", "loss", "name")
    plain += ("decoding", "prompt", "question", "reference", "threads")
    plain += ("bytes", "predicted")
    for name, table in data_file("report/tables.yaml").items():
        odd = [key for key in table if key.isidentifier() and key not in known and key not in plain]
        assert not odd, f"{name}: {odd}"


def test_no_rows() -> None:
    assert display.build([], "").rows == [["none"]]
