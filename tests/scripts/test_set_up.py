"""A machine without a compiler: a ready wheel where the user's own index has one, a cure where it has not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
WANTED = next(
    line
    for line in (PROJECT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if line.startswith("llama_cpp_python==")
)
VERSION = WANTED.partition("==")[2]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python of its own without packages but pip."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def index(folder: Path, version: str | None, sources: bool = False) -> str:
    """The address of a package index on this disk: with a wheel of that version, or with nothing else than sources."""
    place = folder / "simple" / "llama-cpp-python"
    place.mkdir(parents=True)
    links = ""
    if version and not sources:
        name = f"llama_cpp_python-{version}"
        info = f"{name}.dist-info"
        with zipfile.ZipFile(place / f"{name}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llama_cpp/__init__.py", "ready = True\n")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
        links = f'<a href="{name}-py3-none-any.whl">{name}-py3-none-any.whl</a>'
    elif version:
        (place / f"llama_cpp_python-{version}.tar.gz").write_bytes(b"no wheel")
        links = f'<a href="llama_cpp_python-{version}.tar.gz">llama_cpp_python-{version}.tar.gz</a>'
    (place / "index.html").write_text(f"<html><body>{links}</body></html>", encoding="utf-8")
    return (folder / "simple").as_uri()


def ready_wheel(python: Path, address: str, empty: str, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON"))}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": empty, "PIP_EXTRA_INDEX_URL": address}
    command = ["sh", str(PROJECT / "scripts" / "ready_wheel.sh"), str(python), WANTED, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def has_it(python: Path) -> bool:
    return subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode == 0


def test_a_wheel_of_the_locked_version_is_taken_from_the_index_of_the_user(bare: Path, tmp_path: Path) -> None:
    address, empty = index(tmp_path / "own", VERSION), index(tmp_path / "empty", None)
    tried = ready_wheel(bare, address, empty, "--dry-run")
    assert tried.returncode == 0 and not has_it(bare), tried.stderr
    made = ready_wheel(bare, address, empty)
    assert made.returncode == 0 and has_it(bare), made.stderr
    subprocess.run([bare, "-m", "pip", "uninstall", "--yes", "--quiet", "llama_cpp_python"], check=True)


@pytest.mark.parametrize("there", ["nothing", "another version", "sources"])
def test_without_one_nothing_is_compiled_and_the_cure_is_named(there: str, bare: Path, tmp_path: Path) -> None:
    version = {"nothing": None, "another version": "0.1.0", "sources": VERSION}[there]
    address = index(tmp_path / "own", version, sources=there == "sources")
    answer = ready_wheel(bare, address, index(tmp_path / "empty", None))
    assert answer.returncode == 2 and not has_it(bare)
    assert all(
        word in answer.stderr for word in ("Found:", "Expected:", "Do this:", "build-essential", "docs/setup.md")
    )


def preflight(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """With a PATH that has tools and this Python, but no compiler."""
    for tool in ("sh", "mktemp", "rm", "df", "awk", "make", "git", "dirname"):
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    command = ["/bin/sh", str(PROJECT / "scripts" / "preflight.sh")]
    environment = {"PATH": str(folder), "PYTHON": sys.executable, "WORKBOOK_NEED_GB": "0", **environment}
    return subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, text=True)


def test_the_preflight_wants_a_compiler_unless_the_user_names_an_index(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    without = preflight(tmp_path / "a")
    assert without.returncode == 2 and without.stderr.count("Missing: ") == 2
    assert "docs/setup.md" in without.stderr
    named = preflight(tmp_path / "b", PIP_EXTRA_INDEX_URL="https://example.invalid/simple")
    assert named.returncode == 0, named.stderr
    assert "PIP_EXTRA_INDEX_URL" in named.stderr and "Missing" not in named.stderr
