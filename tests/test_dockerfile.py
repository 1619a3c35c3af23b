"""The classroom image, read, not built: bases are pinned, what is copied exists, nobody is root, commands exist."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[1]
TEXT = (PROJECT / "Dockerfile").read_text(encoding="utf-8")
LINES = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.M)).splitlines()
STEPS = [line.split(maxsplit=1) for line in LINES if line.strip()]
KNOWN = {"FROM", "ARG", "RUN", "ENV", "WORKDIR", "COPY", "USER", "EXPOSE", "CMD"}


def of(kind: str) -> list[str]:
    return [rest for name, rest in STEPS if name == kind]


def test_every_line_is_an_instruction() -> None:
    assert {name for name, _ in STEPS} <= KNOWN


def test_bases_are_pinned_and_one() -> None:
    images = {line.split()[0] for line in of("FROM")}
    assert len(images) == 1
    (image,) = images
    name, _, tag = image.partition(":")
    assert name == "python" and re.fullmatch(r"3\.\d+\.\d+-slim-\w+", tag), image
    minor = tuple(map(int, tag.split("-")[0].split(".")[:2]))
    assert (3, 11) <= minor <= (3, 13), "the versions the lock is made for"
    assert "latest" not in TEXT


def sources() -> list[str]:
    found = []
    for line in of("COPY"):
        words = shlex.split(line)
        if not any(word.startswith("--from=") for word in words):
            found += [word for word in words if not word.startswith("--")][:-1]
    return found


@pytest.mark.parametrize("name", sources())
def test_what_is_copied_exists_and_is_not_ignored(name: str) -> None:
    assert (PROJECT / name).exists()
    ignored = (PROJECT / ".dockerignore").read_text(encoding="utf-8").split()
    assert name not in ignored


def test_what_the_package_is_built_of_is_copied() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"pyproject.toml", "lib", project["readme"], "requirements.txt", "notebooks", "params"} <= set(sources())


def test_stages_that_are_copied_from_are_named() -> None:
    named = {line.split(" AS ")[1].strip() for line in of("FROM") if " AS " in line}
    assert set(re.findall(r"--from=(\S+)", TEXT)) == named


def test_the_last_user_has_no_rights_and_exists() -> None:
    (user,) = of("USER")
    assert user not in ("root", "0") and re.search(rf"useradd [^&]*\b{user}\b", TEXT)
    names = [name for name, _ in STEPS]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name in ("RUN", "COPY"))


def test_the_command_exists_and_listens_on_the_port_that_is_exposed() -> None:
    (command,) = map(json.loads, of("CMD"))
    (port,) = of("EXPOSE")
    assert f"--port={port}" in command and (PROJECT / command[-1]).is_dir()
    scripts = {entry.name for entry in metadata.entry_points(group="console_scripts")}
    assert command[0] in scripts and f"{command[0]}-{command[1]}" in scripts


def test_nothing_is_installed_beside_the_lock() -> None:
    for line in of("RUN"):
        for call in re.findall(r"pip install ([^&]*)", line):
            assert "--requirement requirements.txt" in call or "--no-deps" in call
            assert "--no-cache-dir" in call
        if "apt-get install" in line:
            assert "--no-install-recommends" in line and "rm -rf /var/lib/apt/lists" in line
    assert "-U__AMX_INT8__" in TEXT, "what scripts/setup.sh compiles without"


def test_the_hooks_of_pre_commit_are_the_commands_of_make_test() -> None:
    hooks = yaml.safe_load((PROJECT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    entries = [hook["entry"] for hook in hooks]
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    for tool in ("ruff check", "ruff format --check"):
        assert any(entry.startswith(f"python -m {tool}") for entry in entries)
        assert f"-m {tool} ." in makefile
    assert "python -m scripts.reference --check" in entries


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((PROJECT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert cited["version"] == project["version"] and cited["license"] == project["license"]
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert f"## {project['version']}" in (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
