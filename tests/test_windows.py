"""Every module of lib imports where the parts of Python that Windows lacks are not there. No Windows is needed for
that, and none was tried: what runs there is told by docs/windows.md."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
ABSENT = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "termios")
"""Modules that Windows lacks."""

PROBE = """
import builtins, importlib, json, os, pathlib, sys

absent = set(json.loads(sys.argv[1]))
real = builtins.__import__

class Blocked:  # for importlib.import_module, whoever calls it with such a name for lib
    def find_spec(self, name, path=None, target=None):
        if name in absent and sys._getframe(1).f_globals.get("__name__", "").startswith("lib."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def without(name, globals=None, locals=None, fromlist=(), level=0):  # libraries were built for this system: lib alone
    if name.partition(".")[0] in absent and (globals or {}).get("__name__", "").partition(".")[0] == "lib":
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return real(name, globals, locals, fromlist, level)

sys.meta_path.insert(0, Blocked())
builtins.__import__ = without
del os.fork, os.forkpty
failed = {}
for path in sorted(pathlib.Path("lib").rglob(sys.argv[2])):
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    if not all(part.isidentifier() for part in path.with_suffix("").parts) or "scripts" in path.parts:
        continue  # what is copied into packages
    if path.parent.name == "runtimes" and path.stem != "protocol":
        continue  # of an environment of its own, with packages that are not in this one
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed[name] = repr(error)
print(json.dumps({"failed": failed, "imported": sum(name.startswith("lib.") for name in sys.modules)}))
"""


def probe(absent: tuple[str, ...], files: str = "*.py") -> dict:
    command = [sys.executable, "-c", PROBE, json.dumps(absent), files]
    answer = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])


def test_every_module_imports_without_what_windows_lacks() -> None:
    found = probe(ABSENT)
    assert found["failed"] == {}
    assert found["imported"] > 100


def test_the_probe_sees_a_module_that_would_fail() -> None:
    assert "lib.runs.files" in probe(("tempfile",), "runs/files.py")["failed"]


@functools.cache
def asked_at_import() -> dict[str, list[str]]:
    """Attributes that modules of lib ask for outside functions, and where."""
    found: dict[str, list[str]] = {}
    for path in sorted((PROJECT / "lib").rglob("*.py")):
        todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
        while todo:
            node = todo.pop()
            if isinstance(node, ast.Attribute):
                found.setdefault(node.attr, []).append(f"{path.name}:{node.lineno}")
            functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
            todo += [] if isinstance(node, functions) else list(ast.iter_child_nodes(node))
    return found


@pytest.mark.parametrize("name", ["fork", "O_PATH", "pwrite", "getuid", "sched_getaffinity", "SIGKILL", "SIGHUP"])
def test_no_module_asks_for_it_while_it_is_imported(name: str) -> None:
    """As an attribute of os or signal, outside functions."""
    assert name not in asked_at_import()


def test_files_are_written_and_locked_without_these_modules(tmp_path: Path) -> None:
    """The stand-ins do their work: two writers of one file exclude each other, and parts are written in their place."""
    code = """
import builtins, os, pathlib, sys
real = builtins.__import__
def without(name, globals=None, locals=None, fromlist=(), level=0):
    if name in ("fcntl", "resource") and (globals or {}).get("__name__", "").startswith("lib"):
        raise ModuleNotFoundError(name=name)
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = without
del os.pwrite
from lib.errors import InputError
from lib.runs import files, locks
assert locks.fcntl is None
folder = pathlib.Path(sys.argv[1])
path = folder / "a.jsonl"
with path.open("a+b") as first, locks.writing_alone(first, path):
    try:
        with path.open("a+b") as second, locks.writing_alone(second, path):
            raise SystemExit("two writers")
    except InputError as error:
        assert "another process writes" in str(error)
with path.open("a+b") as third, locks.writing_alone(third, path):
    pass
descriptor = os.open(folder / "parts", os.O_WRONLY | os.O_CREAT)
files.write_at(descriptor, b"world", 6)
files.write_at(descriptor, b"hello ", 0)
os.close(descriptor)
assert (folder / "parts").read_bytes() == b"hello world"
with files.atomic_path(folder / "whole") as temporary:
    temporary.write_text("x")
files.remove_abandoned(folder)
assert (folder / "whole").read_text() == "x"
"""
    answer = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=PROJECT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
