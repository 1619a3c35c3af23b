"""The sentences of refusals: each is raised somewhere, with exactly the values that its braces name."""

from __future__ import annotations

import ast
import inspect
import pickle
import string
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from lib import errors
from lib.hub.sources import SourceError

LIB = Path(errors.__file__).parent
PARTS = ("found", "expected", "do")
TABLES = {
    f"{path.parent.name}/{name}": entry
    for path in sorted(LIB.rglob("refusals.yaml"))
    for name, entry in yaml.safe_load(path.read_text(encoding="utf-8")).items()
}


def calls() -> dict[str, list[tuple[str, str, set[str]]]]:
    """Name of a refusal → where it is raised, by which function, and the values given there."""
    found = defaultdict(list)
    for path in sorted(LIB.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id in ("refusal", "refusing"):
                given = {str(keyword.arg) for keyword in node.keywords}
                texts = (part.value for a in node.args for part in ast.walk(a) if isinstance(part, ast.Constant))
                for place in (text for text in texts if "/" in str(text)):  # one, or one of two
                    found[place].append((f"{path.relative_to(LIB)}:{node.lineno}", node.func.id, given))
    return dict(found)


CALLS = calls()


def wanted(entry: dict[str, str]) -> set[str]:
    """The names in the braces of an entry's sentences."""
    fields = (field for text in entry.values() for _, field, _, _ in string.Formatter().parse(text) if field)
    return {field.split(".")[0].split("[")[0] for field in fields}


@pytest.mark.parametrize("place", sorted(TABLES))
def test_every_sentence_is_raised_with_its_values(place: str) -> None:
    entry = TABLES[place]
    assert tuple(entry)[:3] == PARTS and set(entry) <= {*PARTS, "why"}
    assert CALLS.get(place), "raised nowhere"
    for where, function, given in CALLS[place]:
        more = {"error", "said"} if function == "refusing" else set()
        assert wanted(entry) - more == given, where


def test_every_name_has_its_sentences() -> None:
    assert sorted(CALLS.keys() - TABLES) == []


def test_no_sentence_stands_in_two_places() -> None:
    sentences = [tuple(entry.values()) for entry in TABLES.values()]
    assert [entry for entry in sentences if sentences.count(entry) > 1] == []


def test_a_refusal_is_the_error_of_its_sentences() -> None:
    error: Any = errors.refusal("hub/no-data", SourceError, remote=type("Remote", (), {"words": "hub {x}"}), names="a")
    assert (error.found, error.why) == ("hub {x} holds a.", "holds no data files")  # braces of a value are left alone
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.do, again.why) == (SourceError, error.do, error.why)


def test_what_a_library_raises_is_said_in_our_words() -> None:
    with pytest.raises(errors.InputError) as caught, errors.refusing(KeyError, "models/no-4-bit", problem="x"):
        raise KeyError("other")
    assert caught.value.found == "4-bit loading does not work here: x."
    with pytest.raises(errors.InputError, match="own words"), errors.refusing(ValueError, "models/no-4-bit"):
        raise errors.InputError("own words", "", "")
    with pytest.raises(OSError), errors.refusing(ValueError, "models/no-4-bit"):
        raise OSError
    assert inspect.isgeneratorfunction(errors.refusing.__wrapped__)
