"""The turns of a row of conversations: forms of a table that are known, and what a file says about single turns."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lib.errors import refusal
from lib.prompts.templates import ASSISTANT, SYSTEM, TAG, is_blank
from lib.stages.data.cleaning import DamagedError, text_of
from lib.stages.data.data_files import NAMES, by_name

ROLES, FORMS = by_name("roles"), NAMES["forms"]


@dataclass
class Turn:
    """One turn as the file has it: our role (else the speaker as written), text, and whether it is to be learned."""

    role: str
    text: Any
    learn: bool = True

    def __post_init__(self) -> None:
        self.role = ROLES.get(self.role.strip().lower(), self.role)


LEARN, IGNORE = frozenset(NAMES["learn"]), frozenset(NAMES["ignore"])
"""Keys of a turn by which data sets say whether it is learned; with 0 or false it stays in the context alone. And the
same the other way round."""
MASKS, REASONING = NAMES["masks"], NAMES["reasoning"]
"""Columns with one such value for every turn, or for every answer. Keys of a turn, or columns of a row, that hold the
reasoning apart."""
SYSTEMS = NAMES["system_columns"]
_FORMS = [[re.compile(part, re.IGNORECASE) for part in form] for form in NAMES["thinking_tags"]]
"""How other models write reasoning at the beginning of an answer: opening, closing, and marks around the rest."""
_ESCAPED = [re.compile(rf"&lt;{slash}think(ing)?&gt;", re.IGNORECASE) for slash in ("", "/")]
_SAID = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False, "yes": True, "no": False}
_SWITCH = (*_SAID, "on", "off", "none", "")
"""What `thinking` holds where it says whether there is reasoning, not what it is."""
ALPACA = ("instruction", "input", "output", "history", *REASONING)
CALLS = ("tool_calls", "function_call")
_OF_A_TURN = frozenset(("role", "content", "from", "value", "channel", *LEARN, *IGNORE, *REASONING, *CALLS))


def snake(name: str) -> str:
    """A key as it is compared: reasoningContent and Reasoning_Content are reasoning_content."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip()).lower()


_SPEAKER = re.compile(r"\s*([^：:\s]{1,12})[：:]")


def find_form(columns: Sequence[str], where: str) -> tuple[str, dict[str, str]]:
    """The form of a table, and its columns by folded name (capitals do not matter; a name in small letters wins).

    Raises:
        InputError: none of the forms.
    """
    names = {snake(name): name for name in columns} | {name: name for name in columns if name.islower()}
    for form, needed in FORMS.items():
        if names.keys() >= set(needed):
            return form, names
    raise refusal("data/no-conversations", where=where, columns=", ".join(map(repr, columns))[:300])


def turns_of(raw: Mapping[str, Any], form: str, unused: Counter[str]) -> list[Turn]:
    """The turns of a row (columns by folded name); a cell of text may hold JSON, as in CSV files.

    Args:
        unused: gets the keys of turns that say something the workbook does not use.

    Raises:
        DamagedError: a cell of another kind, or a row that its file marks as not to be learned.
    """
    if marked := next((name for name in sorted(raw) if _unlearned(raw[name], name)), None):
        raise DamagedError(f"a row marked as not to be learned ({marked}: {str(raw[marked]).lower()})")
    if form == "alpaca":
        asked = "\n".join(part for part in request_of(raw) if part)
        turns = [*_history(raw.get("history")), Turn("user", asked), Turn("assistant", text_of(raw["output"]))]
    elif form == "dialogue":
        turns = [_spoken(line) for line in _lines(raw["dialogue"])]
    else:
        turns = [_message(message, form, unused) for message in _list(raw[form], f"{form} that are no list")]
    answers = [turn for turn in turns if turn.role == ASSISTANT]
    _mask(turns, answers, raw)
    for turn, holder in zip(answers, _by_answer(raw, len(answers)), strict=True):
        turn.text = _with_reasoning(_in_think_tags(text_of(turn.text)), holder, unused)
    own = bool(turns) and turns[0].role == SYSTEM
    said = [text_of(turns[0].text).strip()] if own else []
    for name in SYSTEMS:
        if text := text_of(raw.get(name)).strip():
            unused[name] += bool(said) and text not in said
            said.append(text)
    return [Turn(SYSTEM, said[0]), *turns] if said and not own else turns


def _by_answer(raw: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The reasoning beside the turns, for every answer: of a list one each, anything else is that of the last.

    Raises:
        DamagedError: a list of another length.
    """
    held: list[dict[str, Any]] = [{} for _ in range(count)]
    for name in (name for name in REASONING if count and name in raw):
        each = count > 1 and isinstance(raw[name], list | tuple) and bool(raw[name])
        if each and len(raw[name]) != count:
            raise DamagedError(f"{name} with another number of values than answers")
        for holder, value in zip(held, raw[name] if each else [*[None] * (count - 1), raw[name]], strict=True):
            holder[name] = value
    return held


def _mask(turns: Sequence[Turn], answers: Sequence[Turn], raw: Mapping[str, Any]) -> None:
    """Take lists beside the turns that say which of them are learned, and `mask_history`: the last answer alone."""
    for name in (name for name in raw if name in MASKS or says_of_turns(name, raw[name])):
        if raw[name] in (None, "", []):
            continue
        values = _list(raw[name], f"{name} that is no list")
        masked = {len(turns): turns, len(answers): answers}.get(len(values))
        if masked is None:
            raise DamagedError(f"{name} with another number of values than turns")
        for turn, value in zip(masked, values, strict=True):
            turn.learn = turn.learn and _learned(value, name) != (name in IGNORE)
    if raw.get("mask_history") is not None and _learned(raw["mask_history"], "mask_history"):
        for turn in answers[:-1]:
            turn.learn = False


def says_of_turns(name: str, value: Any) -> bool:
    """Whether a column that may mark its row holds a list instead, one value for every turn or answer."""
    return name in LEARN | IGNORE and (isinstance(value, list | tuple) or str(value).lstrip().startswith("["))


def _learned(value: Any, key: str) -> bool:
    """What a value of `LEARN` says.

    Raises:
        DamagedError: anything but yes or no: half an answer cannot be learned.
    """
    if (known := _SAID.get(str(value).strip().lower())) is None:
        raise DamagedError(f"a turn with {key} {str(value)[:20]!r} (known are 0 and 1, true and false)")
    return known


def _unlearned(value: Any, name: str) -> bool:
    """Whether a column says that its row is not learned; `label: false` marks bad answers (KTO), 0 is a class."""
    said = str(value).strip().lower()
    if name == "label":
        return said == "false"
    return (name in LEARN and _SAID.get(said) is False) or (name in IGNORE and _SAID.get(said) is True)


def _in_think_tags(text: str) -> str:
    """An answer whose reasoning stands in the tags of another model, with ours."""
    for opening, closing, *marks in _FORMS:
        if opened := opening.match(text.lstrip()):
            text = "<think>" + closing.sub("</think>", text.lstrip()[opened.end() :], count=1)
            for mark in marks:
                text = re.sub(rf"({mark.pattern})\s*\Z", "", text, flags=re.IGNORECASE)
    return text


def asked_in_think_tags(text: str, answers: Sequence[str] = ()) -> str:
    """A turn that asks for reasoning in the tags of another model, with ours, as answers have them.

    Args:
        answers: whose own use of such tags says that they hold something else.
    """
    for opening, closing, *marks in (*_FORMS, _ESCAPED):
        if opening.search(text) and not any(opening.search(answer) for answer in answers):
            text = closing.sub("</think>", opening.sub("<think>", text))
            for mark in marks:
                text = mark.sub("", text)
    return text


def _with_reasoning(text: str, holder: Mapping[str, Any], unused: Counter[str]) -> str:
    """An answer with the reasoning that its file keeps under a key of its own; tags in the answer itself win.

    Raises:
        DamagedError: reasoning of a shape that is not known: it is never dropped.
    """
    for name in (name for name in REASONING if name in holder):
        if str(holder[name]).strip().lower() in _SWITCH:
            unused[name] += holder[name] not in (None, "")
        elif TAG.search(text):
            with contextlib.suppress(DamagedError):
                if _reasoning(holder[name]).strip() in text:
                    continue
            unused[name] += 1
        elif not is_blank(found := _reasoning(holder[name])):
            text = f"<think>\n{found}\n</think>\n\n{text}"
    return text


def _reasoning(value: Any) -> str:
    """Reasoning out of a text, an object that holds it, or a list of them: OpenRouter's details, Anthropic's blocks."""
    if isinstance(value, list | tuple):
        return "\n".join(filter(None, map(_reasoning, value)))
    if isinstance(value, Mapping):
        value = {snake(str(key)): part for key, part in value.items()}
        keys = ("thinking", "text", "content", "summary", *REASONING)
        if value and (value := next((value[key] for key in keys if value.get(key)), None)) is None:
            raise DamagedError("reasoning of a kind that is not known")
        return _reasoning(value) if value else ""
    if isinstance(value, float) and value != value:
        return ""
    if not isinstance(value, str):
        raise DamagedError("reasoning of a kind that is not known")
    return value


def request_of(raw: Mapping[str, Any]) -> tuple[str, str]:
    """Instruction and input of an Alpaca row."""
    return text_of(raw["instruction"]).strip(), text_of(raw.get("input")).strip()


def _list(cell: Any, damage: str) -> list[Any]:
    """A cell that should be a list; nothing for an empty one."""
    if isinstance(cell, str) and cell.strip():
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):  # also a number of more digits than Python reads
            raise DamagedError(damage) from None
    if cell is None or cell == "":
        return []
    if not isinstance(cell, list | tuple):
        raise DamagedError(damage)
    return list(cell)


def _message(message: Any, form: str, unused: Counter[str]) -> Turn:
    """A turn {role, content} or {from, value}, with its reasoning and with whether it is to be learned."""
    if not isinstance(message, Mapping):
        raise DamagedError(f"{form} that are no list of turns with a role")
    message = {snake(str(key)): value for key, value in message.items()} | dict(message)
    role, text = (
        message.get(other) if message.get(name) is None else message[name]
        for name, other in (("role", "from"), ("content", "value"))
    )
    said = {key: value for key, value in message.items() if value not in (None, "", [], {})}
    if any(key in said for key in CALLS):
        raise DamagedError("a turn that calls a tool")
    learn = all(_learned(said[key], key) for key in said.keys() & LEARN)
    learn = learn and not any(_learned(said[key], key) for key in said.keys() & IGNORE)
    unused.update(key for key in said.keys() - _OF_A_TURN if snake(key) not in said.keys() - {key})
    if isinstance(text, list):  # Anthropic, Mistral and Gemini keep reasoning among the parts of the content
        parts = [part for part in text if isinstance(part, Mapping)]
        thought = [part for part in parts if part.get("type") in REASONING or part.get("thought") is True]
        text = [part for part in text if part not in thought]
        message |= {"thinking": thought} if thought else {}
    turn = Turn(str(role), text_of(text), learn)
    if turn.role != ASSISTANT:  # nobody else's thoughts are learned, nor what they say
        unused.update(key for key in said.keys() & {*LEARN, *REASONING} if key in REASONING or _learned(said[key], key))
        return turn
    if said.get("channel") == "analysis":  # of gpt-oss: a turn of its own in front of the answer
        turn.text, message = "", {"reasoning": turn.text}
    turn.text = _with_reasoning(_in_think_tags(turn.text), message, unused)
    return turn


def _lines(cell: Any) -> list[Any]:
    """The turns of a dialogue: a list of texts, also as JSON, or the lines of one text."""
    if isinstance(cell, str) and not cell.lstrip().startswith("["):
        return [line for line in cell.splitlines() if line.strip()]
    return _list(cell, "dialogue that are no list")


def _spoken(line: Any) -> Turn:
    if line is not None and not isinstance(line, str):
        raise DamagedError("dialogue with turns that are no text")
    found = _SPEAKER.match(line or "")
    if not found:
        raise DamagedError("a turn without its speaker")
    return Turn(found[1], line[found.end() :])


def _history(cell: Any) -> list[Turn]:
    """The earlier turns of an Alpaca row: a list of [question, answer]; empty or absent = none."""
    damage = "history that is no list of [question, answer]"
    pairs = _list(cell, damage)
    if any(not isinstance(p, list) or len(p) != 2 or not all(isinstance(text, str) for text in p) for p in pairs):
        raise DamagedError(damage)
    return [turn for question, answer in pairs for turn in (Turn("user", question), Turn("assistant", answer))]
