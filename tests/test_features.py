"""docs/features.md: every promise once, with one of three words; what it names exists; its cheap commands work."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lib.cli.__main__ import app
from tests import tiny_run

PROJECT = Path(__file__).resolve().parents[1]
TEXT = (PROJECT / "docs" / "features.md").read_text(encoding="utf-8")
SPANS = re.findall(r"`([^`\n]+)`", TEXT)
STATUSES = ("works", "replaced", "not possible here")
ROW = re.compile(r"^\| S(\d+) \| ([^|]+) \| ([^|]+) \| (.+) \|$", re.M)
TRIED = [span.removeprefix("$ workbook ") for span in SPANS if span.startswith("$ workbook ")]
PLACES = ("benchmarks", "docs", "lib", "notebooks", "params", "scripts", "tests", "workflow")
COMMANDS = typer.main.get_command(app)


def test_every_promise_stands_once_with_one_of_three_words() -> None:
    rows = ROW.findall(TEXT)
    assert [int(number) for number, *_ in rows] == list(range(1, 134))
    assert {status for _, _, status, _ in rows} == set(STATUSES)
    assert len(re.findall(r"^\| S\d", TEXT, re.M)) == 133, "a row of another form"
    assert all(shown.strip() for *_, shown in rows)


def words_of(span: str) -> list[str]:
    """The words behind `workbook` in a code span; empty where it is something else."""
    words = shlex.split(span.removeprefix("$ "))
    return words[1:] if words[:1] == ["workbook"] else []


@pytest.mark.parametrize("span", sorted({span for span in SPANS if words_of(span)}))
def test_commands_and_their_options_exist(span: str) -> None:
    words, command = words_of(span), COMMANDS
    for word in words:
        options = {name for parameter in command.params for name in parameter.opts}
        if word.startswith("-"):
            assert word.partition("=")[0] in options, f"{word} of {span}"
        elif word in getattr(command, "commands", ()):
            command = command.commands[word]
    assert command is not COMMANDS or "--log-level" in words, f"no command in {span}"


def test_files_and_targets_exist() -> None:
    words = {word.rstrip(":,") for span in SPANS for word in span.split()}
    named = {word for word in words if word.partition("/")[0] in PLACES and "/" in word}
    named |= {word for word in words if re.fullmatch(r"[\w-]+\.(?:md|toml|yml)|requirements\.txt|LICENSE", word)}
    made = {"deployment_guide.md"}  # of packages and exports
    assert len(named) > 30
    assert not sorted(name for name in named - made if not (PROJECT / name).exists())
    targets = set(re.findall(r"^([a-z0-9-]+):", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert {span.split()[1] for span in SPANS if re.match(r"make \w", span)} <= targets


def test_the_headings_that_it_names_exist() -> None:
    """`test_documents` follows those of all texts; here are some at all."""
    assert len(re.findall(r'(?:README|docs/[\w-]+)\.md "[^"]+"', TEXT)) >= 5


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the commands of the page are run, one after another."""
    import torch
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("features")
    (folder / "params").symlink_to(PROJECT / "params")
    tiny_run.make_base(folder / "BASE")
    tiny_run.make_adapter(folder / "BASE", folder / "ADAPTER")
    shutil.copytree(folder / "BASE", folder / "PICKLED")
    weights = folder / "PICKLED" / "model.safetensors"
    torch.save(load_file(weights), folder / "PICKLED" / "pytorch_model.bin")
    weights.unlink()
    return folder


def test_the_cheap_commands_are_few() -> None:
    assert 5 <= len(TRIED) <= 10


@pytest.mark.parametrize("command", TRIED)
def test_a_command_of_the_page_works(command: str, material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page: some take what earlier ones made."""
    monkeypatch.chdir(material)
    monkeypatch.setenv("WORKBOOK_HOME", str(material))
    answer = CliRunner().invoke(app, shlex.split(command))
    assert answer.exit_code == 0, answer.output
