"""JSON that every reader takes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from lib.cli.output import show
from lib.run.files import write_json, write_jsonl

VALUE = {"a": [math.inf, -math.inf, math.nan, 1.5], "b": (np.float64("nan"), {"c": math.inf}), "d": "∞"}
PLAIN = {"a": [None, None, None, 1.5], "b": [None, {"c": None}], "d": "∞"}


def _strictly(text: str) -> object:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_json_has_not_are_written_as_null(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_json(tmp_path / "one.json", VALUE)
    write_jsonl(tmp_path / "many.jsonl", [VALUE, {"e": 1}])
    show(VALUE, True, "")
    assert _strictly((tmp_path / "one.json").read_text(encoding="utf-8")) == PLAIN
    lines = (tmp_path / "many.jsonl").read_text(encoding="utf-8").splitlines()
    assert [_strictly(line) for line in lines] == [PLAIN, {"e": 1}]
    assert _strictly(capsys.readouterr().out) == PLAIN
