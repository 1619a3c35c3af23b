"""The golden results that are cheap to make again; the others are compared by command (README.md)."""

from __future__ import annotations

import pytest

from tests.golden.compare import compare, differences
from tests.golden.place import SHARED


def test_every_command_says_of_itself_what_it_said() -> None:
    assert compare(["help"]) == []


@pytest.mark.skipif(not (SHARED / "cases").is_dir(), reason="no ../shared/cases beside the project (WORKBOOK_SHARED)")
def test_bad_inputs_end_as_they_did() -> None:
    assert compare(["errors"]) == []


def test_a_difference_is_named_by_its_path() -> None:
    old = {"metrics": {"accuracy": 0.5, "loss": 1.0}, "rows": [1, 2], "gone": 1}
    new = {"metrics": {"accuracy": 0.6, "loss": 1.0000001}, "rows": [1, 3, 4], "come": True}
    assert list(differences(old, new, "case")) == [
        "case/come: nothing -> true",
        "case/gone: 1 -> nothing",
        "case/metrics/accuracy: 0.5 -> 0.6",
        "case/rows/0: 2 -> nothing",
        "case/rows/1: nothing -> 3",
        "case/rows/2: nothing -> 4",
    ]
    assert list(differences({"n": 1}, {"n": True}, "case")) == ["case/n: 1 -> true"]


def test_one_more_cell_is_one_difference() -> None:
    old = [{"table": "losses by step", "rows": [0.1, 0.2]}, "Two sentences about them."]
    new = ["A new cell: of something else altogether, 12345.", {"table": "losses by step", "rows": [0.1, 0.25]}, old[1]]
    found = list(differences(old, new, "page"))
    assert found[0] == "page/0/rows/1: 0.2 -> 0.25"
    assert len(found) == 2 and found[1].startswith('page/1: nothing -> "A new cell')
