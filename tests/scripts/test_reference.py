"""docs/cli.md and docs/parameters.md say what command line and settings are today; their examples are commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from lib.cli.__main__ import COMMANDS, app, joined
from lib.settings import Settings
from scripts import reference

PROJECT = Path(__file__).resolve().parents[2]
EXAMPLES: dict[str, list[str]] = yaml.safe_load((PROJECT / "scripts" / "examples.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_generated_page_is_not_stale(name: str) -> None:
    assert (PROJECT / name).read_text(encoding="utf-8") == reference.PAGES[name](), "run make docs"


def test_every_command_and_every_key_stands_there() -> None:
    cli, parameters = (reference.PAGES[name]() for name in ("docs/cli.md", "docs/parameters.md"))
    assert re.findall(r"^## workbook (\w+)$", cli, re.M) == [command.__name__ for command in COMMANDS]
    assert re.findall(r"^\| `(\w+)` \|", parameters, re.M) == list(Settings.model_fields)
    assert "`--json`" in cli and "--as-json" not in cli and "`-p, --parameter KEY VALUE`" in cli


@pytest.mark.parametrize("example", [example for of_one in EXAMPLES.values() for example in of_one])
def test_the_options_of_an_example_exist(example: str) -> None:
    words = joined(shlex.split(example.partition("  # ")[0])[1:])
    command = typer.main.get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words[1:] if word.startswith("-")} <= known


def test_a_changed_option_makes_a_page_stale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name in reference.PAGES:
        (tmp_path / name).write_text("old", encoding="utf-8")
    monkeypatch.setattr(reference, "PROJECT", tmp_path)
    monkeypatch.setattr("sys.argv", ["reference", "--check"])
    monkeypatch.setattr(reference, "PAGES", {"docs/cli.md": reference.cli})
    with pytest.raises(SystemExit, match=r"docs/cli\.md older"):
        reference.main()
    monkeypatch.setattr("sys.argv", ["reference"])
    reference.main()
    assert "## workbook new" in (tmp_path / "docs" / "cli.md").read_text(encoding="utf-8")
