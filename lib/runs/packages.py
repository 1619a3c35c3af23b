"""Installed packages as lines of a requirements.txt."""

from __future__ import annotations

from importlib import metadata


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
