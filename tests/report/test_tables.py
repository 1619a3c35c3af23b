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
    assert found.headings == ["rows: a < b", "share", "KL, nats ↓"] and found.rows == [["0.5", "25.0%", "0"]]
    assert "<th" in display.table([{"a < b": None}], "c").data and "a &lt; b" in display.table([{"a < b": 1}], "c").data


def test_cells_come_from_what_an_entry_stores() -> None:
    """By another name, from inside another object, with limits, in the column's unit, or computed."""
    entry = {"bytes": 2_500_000, "before": {"accuracy_difference": 0.01, "accuracy_difference_interval": [0.0, 0.02]}}
    columns = "size_mb=bytes step_points=before.accuracy_difference first_points=first.accuracy_difference verdict"
    row = display.row_of(entry, columns, verdict=lambda e: len(e))
    assert row == {"size_mb": 2.5, "step_points": Interval(1.0, 0.0, 2.0), "first_points": None, "verdict": 2}
    (scaled,) = display.rows_of([Interval(0.5, 0.4, 0.6)], "difference_points=estimate low")
    assert scaled == {"difference_points": 50.0, "low": 0.4}


def test_no_rows() -> None:
    assert display.build([], "").rows == [["none"]]
