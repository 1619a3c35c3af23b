"""Installed packages: of this environment as lines of a requirements.txt, and of those made for one format each."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

from lib.runs.files import PROJECT


def pin(name: str) -> str:
    """The line that installs the version of a package that is installed here (torch without its build)."""
    return f"{name}=={metadata.version(name).partition('+')[0]}"


def closure(wanted: str) -> list[str]:
    """The lines for a package and everything that it needs without extras."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    todo, found = [wanted], {}
    while todo:
        name = todo.pop()
        key = canonicalize_name(name)
        if key not in found:
            found[key] = pin(name)
            todo += [need.name for need in map(Requirement, metadata.requires(name) or ()) if need.marker is None]
    return [found[key] for key in sorted(found)]


# Environments beside this one, for programs whose packages do not go together with the lock.


def environment_python(name: str) -> Path:
    """The interpreter of the environment .venv-NAME beside the project, which `make format-NAME` makes."""
    folder = PROJECT / f".venv-{name}"
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def environment_problem(name: str) -> str | None:
    """Why that environment cannot be used, in words; None where it has exactly its lock."""
    if not environment_python(name).is_file():
        return f"no environment .venv-{name}: make format-{name} makes it"
    have = environment_versions(name)
    lines = (PROJECT / f"requirements-{name}.txt").read_text(encoding="utf-8").splitlines()
    wanted = {_plain(package): version for package, _, version in (line.partition("==") for line in lines) if version}
    other = [f"{package} {have.get(package, 'absent')}" for package in wanted if have.get(package) != wanted[package]]
    return f".venv-{name} differs from its lock ({', '.join(other[:3])}): make format-{name}" if other else None


def environment_versions(name: str) -> dict[str, str]:
    """{package: version} of what is installed in that environment; empty where there is none."""
    libraries = [str(path) for path in environment_python(name).parents[1].glob("[lL]ib*/**/site-packages")]
    found = metadata.distributions(path=libraries)
    return {_plain(one.metadata["Name"]): one.version.partition("+")[0] for one in found}


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
