"""The one table builder and its registry of columns."""

from __future__ import annotations

import yaml

from lib.report import display
from lib.statistics.intervals import Interval


def test_every_column_is_explained_and_formats_a_number() -> None:
    entries = yaml.safe_load(display._COLUMNS.read_text(encoding="utf-8"))
    for key, entry in entries.items():
        heading, explanation = entry["en"]
        assert heading and explanation.endswith("."), key
        assert format(0.5, entry.get("format", "")), key
        assert entry.keys() <= {"unit", "better", "format", "en"} and entry.get("better", "up") in ("up", "down"), key


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
    assert found.headings == ["rows: a < b", "share", "KL, nats ↓"] and found.rows == [["0.5", "25.0%", "0"]]
    assert "<th" in display.table([{"a < b": None}], "c").data and "a &lt; b" in display.table([{"a < b": 1}], "c").data


def test_no_rows() -> None:
    assert display.build([], "").rows == [["none"]]
