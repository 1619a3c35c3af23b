"""requirements.txt of the package: the versions with which it was made and tested."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import metadata


def requirements(formats: Iterable[str], exports: Iterable[str] = ()) -> str:
    """The text: what the GGUF file needs, and in a second part what the folders for transformers need.

    Args:
        formats: folders of the export tree.
        exports: packages of the formats in them, beside torch and transformers.
    """
    lines = ["# The GGUF file: test_model.py and usage_examples.py", *_closure(["llama_cpp_python"])]
    if {*formats} - {"gguf"}:
        own = {line.partition("==")[0].lower() for line in lines}
        wanted = ["torch", "transformers", "accelerate", *exports]
        lines += ["", "# The folders for transformers (torch in the build that suits the device)"]
        lines += [line for line in _direct(wanted) if line.partition("==")[0].lower() not in own]
    return "\n".join(lines) + "\n"


def _pin(name: str) -> str:
    return f"{name}=={metadata.version(name).partition('+')[0]}"


def _direct(names: Iterable[str]) -> list[str]:
    return [_pin(name) for name in dict.fromkeys(names)]


def _closure(names: list[str]) -> list[str]:
    """The packages and everything that they need without extras, with the installed versions."""
    todo, found = list(names), {}
    while todo:
        name = todo.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in found:
            continue
        found[key] = _pin(name)
        for need in metadata.requires(name) or []:
            needed, _, marker = need.partition(";")
            if not marker.strip():
                todo.append(re.match(r"[A-Za-z0-9._-]+", needed)[0])
    return [found[key] for key in sorted(found)]
