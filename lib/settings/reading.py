"""Parameters from a file, the command line or a notebook, checked against the schema.

A parameter file is flat YAML; unknown keys, wrong types and contradictions are refused in one sentence that names the
key, the value and what was expected.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lib.errors import InputError
from lib.settings.schema import Settings


def _sentence(place: str, error: dict[str, Any]) -> InputError:
    """One pydantic error as found – expected – do this; `place`: "in FILE", or "given by -p"."""
    key = ".".join(str(part) for part in error["loc"][:1]) or "the parameters together"
    value = error["input"]
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, Settings.model_fields, 1)
        do = f"write {near[0]!r}." if near else "remove it; `workbook params` lists every key."
        return InputError(f"unknown parameter {key!r} {place}.", "a key of the workbook.", do)
    if isinstance(value, str) and error["type"] in ("float_type", "int_type"):
        try:
            number = float(value)
        except ValueError:
            pass
        else:
            plain = format(number, ".12g") if error["type"] == "int_type" else _with_dot(number)
            return InputError(
                f"{key}: {value!r} {place} is text for YAML.",
                "a number (YAML reads an exponent only behind a dot).",
                f"write {key}: {plain}",
            )
    if key == "the parameters together":
        message = error["msg"].removeprefix("Value error, ")
        return InputError(f"a contradiction {place}.", f"{message}.", "change one of the two.")
    message = error["msg"].removeprefix("Value error, ")
    do = f"correct {key} ({Settings.model_fields[key].description})."
    return InputError(f"{key}: {value!r} {place}.", f"{message[0].lower()}{message[1:]}.", do)


def _with_dot(number: float) -> str:
    text = f"{number:.12g}"
    mantissa, _, exponent = text.partition("e")
    mantissa = mantissa if "." in mantissa else mantissa + ".0"
    return f"{mantissa}e{exponent}" if exponent else mantissa


def check(values: dict[str, Any], where: str, replaced: Collection[str] = ()) -> Settings:
    """Validate a mapping of parameters.

    Args:
        where: the file or notebook that they come from, but for `replaced`, which were given by -p.

    Raises:
        InputError: the first problem, with the number of further ones.
    """
    try:
        return Settings(**values)
    except ValidationError as error:
        first, *others = error.errors()
        by_hand = bool(first["loc"]) and first["loc"][0] in replaced
        problem = _sentence("given by -p" if by_hand else f"in {where}", first)
        if others:
            problem = InputError(problem.found, problem.expected, f"{problem.do} ({len(others)} more after this one.)")
        raise problem from None
    except TypeError:
        raise InputError(
            f"a key that is not text in {where}.", "text keys.", "write each key as `name: value`."
        ) from None


def load(path: Path | str, overrides: dict[str, Any] | None = None) -> Settings:
    """Read a parameter file.

    Args:
        path: flat YAML, UTF-8.
        overrides: keys that replace those of the file (the command line's ``-p``).

    Raises:
        InputError: missing file, not YAML, not a flat mapping, or any refused key.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(p.as_posix() for p in Path("params").glob("*.yaml"))
        known = ", ".join(near) if near else "params/quick.yaml of a clone"
        raise InputError(f"no file {path}.", "a parameter file (flat YAML).", f"use one of: {known}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is not YAML ({reason}).", "flat YAML in UTF-8.", "correct that line.") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}.", "lines `key: value`.", "see params/quick.yaml.")
    return check({**values, **(overrides or {})}, str(path), overrides or ())


def parse_override(key: str, text: str) -> Any:
    """The value of ``-p KEY TEXT``: YAML, except that a number in exponent form needs no dot."""
    field = Settings.model_fields.get(key)
    if field is not None and field.annotation is str:
        return text
    if field is not None and field.annotation in (float, int):
        try:
            return field.annotation(text)
        except ValueError:
            return text
    if field is not None and field.annotation == list[str] and not text.lstrip().startswith("["):
        return [part.strip() for part in text.split(",")]
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def from_notebook(namespace: dict[str, Any]) -> Settings:
    """Settings from a notebook's variables: call it as ``from_notebook(globals())`` after the parameters cell.

    Names that papermill injected and the workbook does not know are refused (papermill itself only warns).
    """
    fields = Settings.model_fields
    known = {key: namespace[key] for key in fields if key in namespace}
    injected: dict[str, Any] = {}
    for source in namespace.get("In", []):
        if source.startswith("# Parameters\n"):
            targets = [t for node in ast.parse(source).body if isinstance(node, ast.Assign) for t in node.targets]
            injected |= {t.id: namespace.get(t.id) for t in targets if isinstance(t, ast.Name)}
    unknown = {key: value for key, value in injected.items() if key not in fields}
    return check({**known, **unknown}, "the parameters of this notebook")
