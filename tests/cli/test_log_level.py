"""What libraries and the workbook log is shown on stderr where it is asked for, of child processes too."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings

import pytest

from lib.cli.__main__ import joined
from lib.progress import LOG_FILE_VARIABLE, LOG_LEVEL_VARIABLE, join_log, shown_log
from lib.runs.child import run_child
from tests import tiny_gguf


def talk(argument: dict) -> dict:
    """In a child process: a library with a handler of its own, the workbook, and a warning."""
    import transformers.utils.logging as library

    from lib.runs.machine import quiet

    quiet()
    library.get_logger("transformers.models").info("from transformers")
    logging.getLogger("lib.models").debug("from the workbook, %s", argument["word"])
    warnings.warn("from Python", stacklevel=1)
    return {}


def workbook(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    own = {key: value for key, value in os.environ.items() if not key.startswith("WORKBOOK_DEBUG")}
    command = [sys.executable, "-m", "lib.cli", *arguments]
    return subprocess.run(command, env={**own, **environment}, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("level", "shown"), [("debug", 4), ("info", 2), ("warning", 1)])
def test_children_log_to_the_command(level: str, shown: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger().handlers[:]
    with shown_log(level):
        run_child("tests.cli.test_log_level:talk", {"word": "here"}, "talking")
    told = capsys.readouterr().err
    words = ["from Python", "from transformers", "from the workbook, here", "talking: tests.cli.test_log_level:talk"]
    assert [word in told for word in words] == [place < shown for place in range(4)]
    assert f" {os.getpid()} " in told or level != "debug"
    assert logging.getLogger().handlers == before and LOG_FILE_VARIABLE not in os.environ and not join_log("x")


def test_nothing_is_shown_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    run_child("tests.cli.test_log_level:talk", {"word": "here"}, "talking")
    assert "from" not in capsys.readouterr().err


def test_the_option_of_the_command_line(tmp_path) -> None:
    source = tiny_gguf.write(tmp_path / "tiny-F16.gguf", layers=1)
    asked = ["quantize", str(source), str(tmp_path / "tiny-Q8_0.gguf"), "Q8_0"]
    plain = workbook(*asked)
    assert plain.returncode == 0 and "DEBUG" not in plain.stderr
    for found in (workbook(*asked, "--log-level", "debug"), workbook(*asked, WORKBOOK_DEBUG="1")):
        assert found.returncode == 0 and "DEBUG lib.runs.child" in found.stderr and "DEBUG" not in found.stdout
    refused = workbook("params", "--log-level", "loud")
    assert refused.returncode == 2 and "one of: debug, info, warning, error" in refused.stderr


def test_it_may_stand_anywhere_before_two_dashes() -> None:
    assert joined(["params", "--log-level", "info", "--json"]) == ["--log-level", "info", "params", "--json"]
    assert joined(["params", "--log-level=info"]) == ["--log-level=info", "params"]
    assert joined(["a", "--", "--log-level", "info"]) == ["a", "--", "--log-level", "info"]
    assert joined(["a", "--log-level"]) == ["--log-level", "a"]
    assert LOG_LEVEL_VARIABLE == "WORKBOOK_LOG_LEVEL"
