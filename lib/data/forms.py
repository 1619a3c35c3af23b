"""Where conversations come from: the forms of a table that are known, and the turns of one of its rows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lib.data.cleaning import DamagedError, text_of
from lib.errors import InputError
from lib.textmetrics.thinking import TAG, is_blank

Turn = tuple[str, str]
"""(speaker as written, text)."""

FORMS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "dialogue": ("dialogue",),
    "alpaca": ("instruction", "output"),
}
"""The columns that tell a form; the first form that a table has is taken."""

_SPEAKER = re.compile(r"\s*([^：:\s]{1,12})[：:]")


def find_form(columns: Sequence[str], where: str) -> tuple[str, dict[str, str]]:
    """The form of a table, and its columns by folded name (capitals do not matter; a name in small letters wins).

    Raises:
        InputError: none of the forms.
    """
    names = {name.strip().lower(): name for name in columns} | {name: name for name in columns if name.islower()}
    for form, needed in FORMS.items():
        if names.keys() >= set(needed):
            return form, names
    raise InputError(
        f"{where}: the columns {', '.join(map(repr, columns))[:300]}.",
        "messages ({role, content}), conversations ({from, value}), dialogue (lines that begin with their speaker), or "
        "instruction and output.",
        "rename the columns, or set task: classification for labelled texts.",
    )


def turns_of(raw: Mapping[str, Any], form: str) -> list[Turn]:
    """The turns of a row (columns by folded name); a cell of text may hold JSON, as in CSV files.

    Raises:
        DamagedError: a cell of another kind.
    """
    if form == "alpaca":
        asked = "\n".join(part for part in request_of(raw) if part)
        turns = [*_history(raw.get("history")), ("user", asked), ("assistant", text_of(raw["output"]))]
    elif form == "dialogue":
        turns = [_spoken(line) for line in _lines(raw["dialogue"])]
    else:
        turns = [_message(message, form) for message in _list(raw[form], form)]
    system = text_of(raw.get("system"))
    own = bool(turns) and turns[0][0].strip().lower() == "system"
    return [("system", system), *turns] if system.strip() and not own else turns


def request_of(raw: Mapping[str, Any]) -> tuple[str, str]:
    """Instruction and input of an Alpaca row."""
    return text_of(raw["instruction"]).strip(), text_of(raw.get("input")).strip()


def _list(cell: Any, name: str) -> list[Any]:
    """A cell that should be a list; nothing for an empty one."""
    if isinstance(cell, str) and cell.strip():
        try:
            cell = json.loads(cell)
        except json.JSONDecodeError:
            raise DamagedError(f"{name} that are no list") from None
    if not isinstance(cell, list | tuple):
        if cell is None or cell == "":
            return []
        raise DamagedError(f"{name} that are no list")
    return list(cell)


def _message(message: Any, form: str) -> Turn:
    """A turn {role, content} or {from, value}; `reasoning_content` is its reasoning where the content has none."""
    if not isinstance(message, Mapping):
        raise DamagedError(f"{form} that are no list of turns with a role")
    role, text = (
        message.get(other) if message.get(name) is None else message[name]
        for name, other in (("role", "from"), ("content", "value"))
    )
    content, reasoning = text_of(text), message.get("reasoning_content")
    if isinstance(reasoning, str) and not is_blank(reasoning) and not TAG.search(content):
        content = f"<think>\n{reasoning}\n</think>\n\n{content}"
    return str(role), content


def _lines(cell: Any) -> list[Any]:
    """The turns of a dialogue: a list of texts, also as JSON, or the lines of one text."""
    if isinstance(cell, str) and not cell.lstrip().startswith("["):
        return [line for line in cell.splitlines() if line.strip()]
    return _list(cell, "dialogue")


def _spoken(line: Any) -> Turn:
    if line is not None and not isinstance(line, str):
        raise DamagedError("dialogue with turns that are no text")
    found = _SPEAKER.match(line or "")
    if not found:
        raise DamagedError("a turn without its speaker")
    return found[1], line[found.end() :]


def _history(cell: Any) -> list[Turn]:
    """The earlier turns of an Alpaca row: a list of [question, answer]; empty or absent = none."""
    try:
        pairs = _list(cell, "history")
    except DamagedError:
        pairs = [[]]
    if any(not isinstance(p, list) or len(p) != 2 or not all(isinstance(text, str) for text in p) for p in pairs):
        raise DamagedError("history that is no list of [question, answer]")
    return [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]
