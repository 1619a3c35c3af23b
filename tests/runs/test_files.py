"""JSON that every reader takes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from lib.cli.console import printable, show
from lib.errors import InputError
from lib.runs.files import new_folder, write_json, write_jsonl

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


def test_one_folder_is_written_by_one_command_at_a_time(tmp_path: Path) -> None:
    """The second is refused, and takes nothing from the first."""
    with new_folder(tmp_path / "out") as first:
        (first / "a").write_text("one")
        with pytest.raises(InputError, match="another command is writing"), new_folder(tmp_path / "out"):
            pytest.fail("two at once")
    assert (tmp_path / "out/a").read_text() == "one" and [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / ".new.x1.part/new").mkdir(parents=True)
    (tmp_path / ".new.x1.part/new/left").write_text("by a process that was killed")
    with new_folder(tmp_path / "new") as folder:
        assert not any(folder.iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "out"]


def test_control_characters_of_a_file_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[2J\tb\n\x9bc\x7f 酒店") == "a\\x1b[2J\tb\n\\x9bc\\x7f 酒店"
