"""Paths that are no file, no folder or no UTF-8: one sentence and exit code 2, at once, whatever command gets them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lib.cli.__main__ import app
from lib.cli.console import guarded
from lib.errors import InputError
from lib.runs.files import user_path
from lib.runs.run import Run
from lib.settings import Settings
from lib.stages.data.stage import prepare
from tests import tiny_gguf
from tests.conftest import PROJECT

NEW, ODD, GOOD = "NEW.gguf", "ODD", "GOOD.gguf"
ADAPTER = ("--base-model", "FOLDER", "--adapter", ODD, "--output-dir", NEW)
BASE = ("--base-model", ODD, "--adapter", "FOLDER", "--output-dir", NEW)
READ = {
    "quantize": (ODD, NEW, "Q8_0"),
    "quantize-imatrix": (GOOD, NEW, "Q8_0", "--imatrix", ODD),
    "convert": (ODD, NEW),
    "unpack": (ODD, "NEW"),
    "merge": BASE,
    "merge-adapter": ADAPTER,
    "perplexity": (ODD, "--text", "TEXT.txt"),
    "perplexity-text": (GOOD, "--text", ODD),
    "evaluate-data": (GOOD, "--data", ODD),
    "imatrix": (ODD, NEW, "--text", "TEXT.txt"),
    "serve": (ODD, "--port", "0"),
    "serve-phone": (ODD, "--phone", "--port", "0"),
    "compare": (ODD, GOOD, "--data", "TEXT.txt", "--output", "NEW"),
    "report": (ODD,),
    "params-complete": ("--complete", ODD),
    "package": (ODD,),
    "pick": (ODD,),
    "select": (ODD, ODD),
}
"""Commands, and words for what differs, with where they read ODD."""
WRITTEN = {
    "quantize": (GOOD, ODD, "Q8_0"),
    "convert": ("FOLDER", ODD),
    "unpack": (GOOD, ODD),
    "evaluate": (GOOD, "--data", "TEXT.txt", "--output", ODD),
    "compare": (GOOD, GOOD, "--data", "TEXT.txt", "--output", ODD),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_gguf.write(tmp_path / GOOD, layers=1, tokens=tiny_gguf.WITH_MERGE)
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "TEXT.txt").write_text("text\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(words: tuple[str, ...], command: str, capsys: pytest.CaptureFixture[str]) -> str:
    before, begun = {path.name for path in Path().iterdir()}, time.monotonic()
    code = app([command.partition("-")[0], *words], standalone_mode=False)
    said = capsys.readouterr().err
    assert code == 2 and said.splitlines()[-1].startswith("Found: ") and "Traceback" not in said, (code, said)
    assert time.monotonic() - begun < 5  # far less, but for imports
    assert {path.name for path in Path().iterdir()} == before
    return said


@pytest.mark.parametrize("command", READ)
@pytest.mark.parametrize("kind", ["fifo", "zero", "socket"])
def test_no_device_is_read(command: str, kind: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = {"fifo": place / "f", "zero": Path("/dev/zero"), "socket": place / "s"}[kind]
    if kind == "fifo":
        os.mkfifo(odd)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s")
        refusal(tuple(str(odd) if word == ODD else word for word in READ[command]), command, capsys)


LATER = ("torch", "transformers", "llama_cpp", "peft", "pandas", "matplotlib")
EARLY = """
import sys
from lib.cli.__main__ import app
for words in {commands!r}:
    assert app(words, standalone_mode=False) == 2, words
    assert not sys.modules.keys() & set({later!r}), (words, sys.modules.keys() & set({later!r}))
"""


def test_a_device_is_refused_before_libraries_are_loaded(place: Path) -> None:
    os.mkfifo("f")
    devices = ("/dev/zero", "f", str(place / "f"), "~/f")
    commands = [
        [command.partition("-")[0], *(odd if word == ODD else word for word in READ[command])]
        for command in READ
        for odd in devices
    ]
    code = EARLY.format(commands=commands, later=LATER)
    environment = {**os.environ, "HOME": str(place), "PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("neither a file nor a folder") == len(commands)


@pytest.mark.parametrize("key", ["base_model", "adapter", "imatrix", "terms", "prompts_file"])
def test_devices_of_a_parameter_file(key: str, place: Path) -> None:
    os.mkfifo("f")
    talk = {"task": "dialogue", "dataset": "d", "system_prompt": ""}
    with pytest.raises(InputError, match="neither a file nor a folder"):
        user_path(str(getattr(Settings(**talk, **{key: str(place / "f")}), key)))


@pytest.mark.parametrize("command", [*READ, *(f"{name}-written" for name in WRITTEN)])
def test_names_that_are_not_utf8(command: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = WRITTEN[command.partition("-")[0]] if command.endswith("-written") else READ[command]
    name = os.fsdecode(b"\xff\xfe.gguf")
    shutil.copyfile(GOOD, name)
    assert "is not UTF-8" in refusal(tuple(name if word == ODD else word for word in words), command, capsys)
    inner = place / os.fsdecode(b"\xff")
    inner.mkdir()
    shutil.copyfile(GOOD, inner / "m.gguf")
    whole = tuple(str(inner / "m.gguf") if word == ODD else word for word in words)
    assert "is not UTF-8" in refusal(whole, command, capsys)


@pytest.mark.parametrize("command", [*WRITTEN, "merge"])
def test_no_folder_is_named_after_a_user_who_is_none(
    command: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {**WRITTEN, "merge": tuple({ODD: "FOLDER", NEW: ODD}.get(word, word) for word in ADAPTER)}[command]
    said = refusal(tuple("~nosuchuser/y.gguf" if word == ODD else word for word in words), command, capsys)
    assert "no path ~nosuchuser" in said and not Path("~nosuchuser").exists()


def test_an_output_at_home_is_at_home(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place))
    given: list[object] = []
    guarded(lambda **paths: given.append(paths))(output=Path("~/x"), several=[Path("~/y")], text="~/z", own=Path("a~"))
    assert given == [{"output": place / "x", "several": [place / "y"], "text": "~/z", "own": Path("a~")}]


def test_a_folder_that_is_not_utf8_around_a_plain_name(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inner = place / os.fsdecode(b"\xff")
    inner.mkdir()
    shutil.copyfile(GOOD, inner / GOOD)
    os.chdir(inner)
    assert "is not UTF-8" in refusal((GOOD, NEW, "Q8_0"), "quantize", capsys)


def test_inspect_reads_under_any_name(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"\xff.gguf")
    shutil.copyfile(GOOD, name)
    codes = [app(["inspect", path], standalone_mode=False) for path in (name, GOOD)]
    said = capsys.readouterr().out
    assert codes == [2, 2] and said.count("PROBLEM: workbook serve: no chat template") == 2


@pytest.mark.parametrize("command", WRITTEN)
def test_nothing_is_written_over_a_device(command: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("f.gguf")
    assert "neither a file nor a folder" in refusal(
        tuple("f.gguf" if word == ODD else word for word in WRITTEN[command]), command, capsys
    )


@pytest.mark.parametrize("key", ["dataset", "fallbacks"])
def test_a_data_set_that_is_a_device(key: str, place: Path) -> None:
    """Of a parameter file: a pipe would be waited for, and /dev/zero hashed for ever."""
    os.mkfifo("rows.csv")
    for odd in (place / "rows.csv", Path("/dev/zero")):
        dataset = {"dataset": str(odd)} if key == "dataset" else {"fallbacks": [{"dataset": str(odd), "rows": 3}]}
        with pytest.raises(InputError, match="neither a file nor a folder"):
            prepare(Settings(**{"run_name": "x", **dataset}), Run("x", place))
