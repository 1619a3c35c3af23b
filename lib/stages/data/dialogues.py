"""From a table to conversations: forms known, roles checked, thinking validated, everything dropped counted."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter, ne
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError
from lib.prompts.tasks import Task, texts_of
from lib.prompts.templates import (
    ASSISTANT,
    SYSTEM,
    TAG,
    USER,
    Message,
    is_blank,
    split_thinking,
    think_tags,
    with_thinking,
)
from lib.stages.data.cleaning import (
    DamagedError,
    Row,
    RowsOfTask,
    Splits,
    not_used,
    plain,
    safe_text,
    text_of,
    usable_rows,
)
from lib.stages.data.near_duplicates import audit, joined, normalise

if TYPE_CHECKING:
    from lib.prompts.conversations import Encoded
    from lib.stages.data.reading import Rows


# Where conversations come from: the forms of a table that are known, and the turns of one of its rows.


@dataclass
class Turn:
    """One turn as the file has it: speaker as written, text, and whether the file says that it is to be learned."""

    role: str
    text: Any
    learn: bool = True


LEARN = frozenset(("loss", "weight", "train", "trainable", "training", "loss_weight", "learn"))
"""Keys of a turn by which data sets say whether it is learned; with 0 or false it stays in the context alone."""
IGNORE = frozenset(("mask", "masked"))
"""The same the other way round."""
MASKS = ("loss_mask", "weights", "train_mask")
"""Columns with one such value for every turn, or for every answer."""
REASONING = ("reasoning_content", "reasoning", "thinking", "thought")
"""Keys of a turn, or columns beside an output, that hold the reasoning apart: DeepSeek and Qwen; vLLM and OpenRouter;
Ollama; others."""
ALPACA = ("instruction", "input", "output", "history", *REASONING)
CALLS = ("tool_calls", "function_call")
_OF_A_TURN = frozenset(("role", "content", "from", "value", *LEARN, *IGNORE, *REASONING, *CALLS))

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


def turns_of(raw: Mapping[str, Any], form: str, unused: Counter[str]) -> list[Turn]:
    """The turns of a row (columns by folded name); a cell of text may hold JSON, as in CSV files.

    Args:
        unused: gets the keys of turns that say something the workbook does not use.

    Raises:
        DamagedError: a cell of another kind.
    """
    if form == "alpaca":
        asked = "\n".join(part for part in request_of(raw) if part)
        answer = _with_reasoning(text_of(raw["output"]), raw)
        turns = [*_history(raw.get("history")), Turn("user", asked), Turn("assistant", answer)]
    elif form == "dialogue":
        turns = [_spoken(line) for line in _lines(raw["dialogue"])]
    else:
        turns = [_message(message, form, unused) for message in _list(raw[form], f"{form} that are no list")]
    _mask(turns, raw)
    system = text_of(raw.get("system"))
    own = bool(turns) and turns[0].role.strip().lower() == "system"
    return [Turn("system", system), *turns] if system.strip() and not own else turns


def _mask(turns: Sequence[Turn], raw: Mapping[str, Any]) -> None:
    """Take a list beside the turns that says which of them are learned, and `mask_history`: the last answer alone."""
    answers = [turn for turn in turns if ROLES.get(turn.role.strip().lower()) == ASSISTANT]
    for name in MASKS:
        if raw.get(name) in (None, "", []):
            continue
        values = _list(raw[name], f"{name} that is no list")
        masked = {len(turns): turns, len(answers): answers}.get(len(values))
        if masked is None:
            raise DamagedError(f"{name} with another number of values than turns")
        for turn, value in zip(masked, values, strict=True):
            turn.learn = turn.learn and _learned(value, name)
    if raw.get("mask_history") is not None and _learned(raw["mask_history"], "mask_history"):
        for turn in answers[:-1]:
            turn.learn = False


def _learned(value: Any, key: str) -> bool:
    """What a value of `LEARN` says.

    Raises:
        DamagedError: anything but yes or no: half an answer cannot be learned.
    """
    said = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False, "yes": True, "no": False}
    if (known := said.get(str(value).strip().lower())) is None:
        raise DamagedError(f"a turn with {key} {str(value)[:20]!r} (known are 0 and 1, true and false)")
    return known


def _with_reasoning(text: str, holder: Mapping[str, Any]) -> str:
    """An answer with the reasoning that its file keeps under a key of its own; tags in the answer itself win."""
    for name in REASONING:
        found = holder.get(name)
        if isinstance(found, list):  # OpenRouter's details, Anthropic's blocks
            found = "\n".join(str(part.get("text", "")) for part in found if isinstance(part, Mapping))
        if isinstance(found, str) and not is_blank(found) and not TAG.search(text):
            return f"<think>\n{found}\n</think>\n\n{text}"
    return text


def request_of(raw: Mapping[str, Any]) -> tuple[str, str]:
    """Instruction and input of an Alpaca row."""
    return text_of(raw["instruction"]).strip(), text_of(raw.get("input")).strip()


def _list(cell: Any, damage: str) -> list[Any]:
    """A cell that should be a list; nothing for an empty one."""
    if isinstance(cell, str) and cell.strip():
        try:
            cell = json.loads(cell)
        except json.JSONDecodeError:
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
    role, text = (
        message.get(other) if message.get(name) is None else message[name]
        for name, other in (("role", "from"), ("content", "value"))
    )
    said = {key: value for key, value in message.items() if value not in (None, "", [], {})}
    if any(key in said for key in CALLS):
        raise DamagedError("a turn that calls a tool")
    learn = all(_learned(said[key], key) for key in said.keys() & LEARN)
    learn = learn and not any(_learned(said[key], key) for key in said.keys() & IGNORE)
    unused.update(said.keys() - _OF_A_TURN)
    return Turn(str(role), _with_reasoning(text_of(text), message), learn)


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


# From a table to conversations: roles checked, thinking validated, everything dropped counted.

ROLES = {
    **dict.fromkeys(("system",), SYSTEM),
    **dict.fromkeys(("user", "human", "client", "求助者", "来访者"), USER),
    **dict.fromkeys(("assistant", "gpt", "counselor", "支持者", "心理咨询师"), ASSISTANT),
}
"""Names of the speakers in messages, SMILE and CPsyCoun files, and what they are called here."""

_NAMED = re.compile("(?:求助者|来访者|支持者|心理咨询师|[Cc]lient|[Cc]ounselor)[：:]")

KEPT = ("topic", "difficulty")
"""Further columns whose values stay with a row."""

SHARED = 5
"""Different inputs from which on an instruction is the task of a file, not a question."""


def clean_conversations(table: Rows, where: str, task: Task) -> tuple[list[Row], Counter[str]]:
    """Rows with an explicit system turn, in the table's order, and why the others were left out.

    Read are Alpaca columns (instruction, input, output, system; history as earlier turns), `messages` ({role,
    content}), `conversations` ({from, value}) and `dialogue` (texts that begin with their speaker). Turns behind the
    last answer are removed and counted.

    Raises:
        InputError: no such column; roles that are not known; thinking in the answers and `thinking: false`.
    """
    form, columns = find_form(list(table[0]), where)
    unknown: Counter[str] = Counter()
    requests: list[tuple[str, str]] = []

    def row_of(index: int, cells: Mapping[str, Any], changed: Counter[str]) -> Row:
        raw = {folded: cells[name] for folded, name in columns.items()}
        unused: Counter[str] = Counter()
        turns = turns_of(raw, form, unused)
        for turn in turns:
            turn.text = safe_text(turn.text, changed).strip()
        messages = _messages(turns, task, changed, unknown)
        changed.update({f"not used: the key {str(key)[:40]!r} of turns": count for key, count in unused.items()})
        opening = next(message["content"] for message in messages if message["role"] == USER)
        given = {name: raw[name] for name in KEPT if raw.get(name) is not None}
        extra = {name: plain(value) for name, value in given.items() if value == value}  # NaN is no value
        requests.append(request_of(raw) if form == "alpaca" else ("", ""))
        return Row(index, opening, extra=extra, messages=messages)

    rows, counts = usable_rows(table, row_of)
    _refuse(unknown, counts, len(table), where, task)
    _set_shared(rows, requests)
    used = {*FORMS[form], *KEPT, *MASKS, "system", "mask_history", *(ALPACA if form == "alpaca" else ())}
    return rows, counts + not_used([name for folded, name in columns.items() if folded not in used], len(table))


def _set_shared(rows: Sequence[Row], requests: Sequence[tuple[str, str]]) -> None:
    """Rows whose instruction occurs with many inputs are compared by their input."""
    inputs: dict[str, set[str]] = {}
    for instruction, given in requests:
        inputs.setdefault(normalise(instruction), set()).add(normalise(given))
    for row, (instruction, given) in zip(rows, requests, strict=True):
        if given and len(inputs[normalise(instruction)]) >= SHARED and row.text == f"{instruction}\n{given}":
            row.text, row.shared = given, instruction


def _messages(turns: Sequence[Turn], task: Task, changed: Counter[str], unknown: Counter[str]) -> list[Message]:
    """Turns with our roles, the system turn explicit, ending on an answer; its parts are checked.

    An answer that the file marks as not to be learned has the key `learn`, false.
    """
    odd = [turn.role for turn in turns if turn.role.strip().lower() not in ROLES]
    if odd:
        unknown[odd[0]] += 1
        raise DamagedError("a role that is not known")
    messages: list[Message] = []
    for turn in turns:
        role = ROLES[turn.role.strip().lower()]
        marked = {} if turn.learn or role != ASSISTANT else {"learn": False}
        messages.append({"role": role, "content": turn.text, **marked})
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == SYSTEM else task.system_prompt
    if any(is_blank(message["content"]) for message in messages):
        raise DamagedError("an empty turn")
    messages = _in_turn(messages, changed)
    if any(m["role"] != (USER, ASSISTANT)[i % 2] for i, m in enumerate(messages)):
        raise DamagedError("roles not in turn (user first, then assistant)")
    if len(messages) < 2:
        raise DamagedError("no assistant turn")
    if len(messages) % 2:
        messages.pop()
        changed["changed: last turn without an answer removed"] += 1
    unlearned = sum("learn" in message for message in messages)
    if 2 * unlearned == len(messages):
        raise DamagedError("every answer marked as not to be learned")
    changed["answers marked as not to be learned: in the context, not in the loss"] += unlearned
    _check_thinking(messages, task, changed)
    return [{"role": SYSTEM, "content": system}, *messages]


def _in_turn(messages: Sequence[Message], changed: Counter[str]) -> list[Message]:
    """Turns of one speaker in succession as one, and without the assistant's greeting before the first question.

    They stay apart where a turn names a speaker inside: its text holds what somebody else said (SMILE has such rows).
    """
    if not any(_NAMED.search(message["content"]) for message in messages):
        speakers = [(role, list(said)) for role, said in itertools.groupby(messages, key=itemgetter("role"))]
        changed["changed: turns of one speaker in succession joined"] += len(messages) - len(speakers)
        messages = [_joined(role, said) for role, said in speakers]
    if messages and messages[0]["role"] == ASSISTANT:
        changed["changed: the assistant's greeting before the first question removed"] += 1
        messages = messages[1:]
    return list(messages)


def _joined(role: str, said: Sequence[Message]) -> Message:
    """Turns of one speaker as one, which is learned when all of them are."""
    learn = {} if all("learn" not in message for message in said) else {"learn": False}
    return {"role": role, "content": "\n".join(message["content"] for message in said), **learn}


def _check_thinking(messages: Sequence[Message], task: Task, changed: Counter[str]) -> None:
    reasoning = ""
    for message in messages[1::2]:
        try:
            reasoning, _ = split_thinking(message["content"])
        except ValueError as error:
            raise DamagedError(str(error)) from None
        if reasoning and not task.thinking:
            changed["thinking"] += 1
    if task.thinking and not reasoning:
        raise DamagedError("no thinking in the last answer")


def _refuse(unknown: Counter[str], counts: Counter[str], rows: int, where: str, task: Task) -> None:
    """What is not a slip of single rows stops the run."""
    if thinking := counts.pop("thinking", 0):
        raise InputError(
            f"{where}: {thinking} answers with reasoning (in tags, or under a key such as reasoning_content), and "
            "thinking: false.",
            "the setting that says what the answers hold.",
            "set thinking: true, or remove the reasoning.",
        )
    if sum(unknown.values()) > max(1, rows // 100):
        names = ", ".join(f"{name!r} ({count} rows)" for name, count in unknown.most_common(6))
        raise InputError(f"{where}: the roles {names}.", f"one of {', '.join(ROLES)}.", "rename them.")


def in_tags_of(tokenizer: Any, messages: Sequence[Message], changed: Counter[str]) -> list[Message]:
    """The turns with thinking in the form of the base model's own tags; answers that this changes are counted."""
    made = [
        {**message, "content": with_thinking(tokenizer, *split_thinking(message["content"]))}
        if message["role"] == ASSISTANT
        else dict(message)
        for message in messages
    ]
    changed["changed: thinking brought into the base model's form (tags, white space)"] += sum(map(ne, made, messages))
    tags = think_tags(tokenizer)
    for message in made:
        if message["role"] != ASSISTANT:  # a system turn that asks for <thinking> where answers have <think>
            named = TAG.sub(lambda found: tags["/" in found[0]], message["content"])
            changed["changed: tags that a turn asks for, named as the base model writes them"] += (
                named != message["content"]
            )
            message["content"] = named
    return made


class Conversations(RowsOfTask):
    """Rows of turns whose answers are free text."""

    keys = (
        *("task", "thinking", "dataset", "split", "system_prompt", "base_model", "revision"),
        *("max_seq_length", "max_train_rows", "max_eval_rows", "seed"),
    )
    fewest = 5
    cluster = "group"
    rule = "group (openings or texts nearly the same, or opening within opening), seed {seed}; copies dropped first"

    def clean(self, table: Rows, where: str) -> tuple[list[Row], Counter[str]]:
        return clean_conversations(table, where, self.task)

    def require_any(self, splits: Splits, flow: Sequence[Mapping[str, Any]]) -> None:
        if not any(splits.values()):
            reasons = "; ".join(f"{line['rows']:,} rows {line['step']}" for line in flow)
            found = f"no usable conversation ({reasons})."
            raise InputError(found, "rows with a question and an answer.", "correct them.")

    def refuse_few(self, rows: Sequence[Row]) -> None:
        groups = Counter(row.group for row in rows)
        if len(groups) < self.fewest:
            [(largest, size)] = groups.most_common(1)
            first = next(row for row in rows if row.group == largest)
            raise InputError(
                f"{len(rows)} rows in {len(groups)} groups of conversations that differ; {size} have nearly one "
                f"opening or text, e.g. {first.text[:60]!r}.",
                f"at least {self.fewest} groups for a split 8 : 1 : 1.",
                "add rows that differ, or put what all questions share into system_prompt (Alpaca: into instruction, "
                "the question into input).",
            )

    def audit(self, splits: Splits) -> dict[str, list[dict[str, Any]]]:
        """Openings and whole rows are compared; rows alike in either are a group. Tables say what was "compared"."""
        rows = [row for split in splits.values() for row in split]
        shadows = {name: [Row(row.index, row.compared) for row in split] for name, split in splits.items()}
        whole, opening = audit(shadows), audit(splits, contained=True)
        copies = [row for split in shadows.values() for row in split]
        groups = joined([row.group for row in rows], [row.group for row in copies])
        for row, copy, group in zip(rows, copies, groups, strict=True):
            row.group, row.leaked = group, row.leaked or copy.leaked
        tables = {"opening": opening, "whole row": whole}
        return {
            "duplicates": _compared(tables, "duplicates", "conflicting"),
            "overlaps": _compared(tables, "overlaps", "label agrees"),
            "leaked_examples": [_without(line, "label") for line in opening["leaked_examples"]],
            "conflict_examples": [],
        }

    def shape(self, split: str, rows: Sequence[Row]) -> dict[str, Any]:
        turns = [len(texts_of(row.content)) for row in rows]
        return {
            "split": split,
            "rows": len(turns),
            "turns": sum(turns),
            "median turns a row": float(np.median(turns)),
            "longest, turns": max(turns),
        }

    def audited(self, row: Row) -> str:
        """All turns of a row, its system turn where it brought its own."""
        system = row.messages[0]["content"]
        return row.whole if system == self.task.system_prompt else f"{system}\n{row.whole}"

    def length_columns(self, counts: Counter[str]) -> dict[str, int]:
        return {
            "turns cut": counts["cut"],
            "rows too long": counts["too long"],
            "answers learned": counts["learned"],
            "answers only read": counts["read"],
        }

    def example(self, row: Row, encoded: Encoded, note: str) -> dict[str, Any]:
        return {"turns": 2 * (len(encoded.answers) + encoded.unlearned)}


def _without(line: Mapping[str, Any], part: str) -> dict[str, Any]:
    """A line without the columns whose names hold `part`."""
    return {key: value for key, value in line.items() if part not in key}


def _compared(tables: Mapping[str, Mapping[str, Any]], name: str, without: str) -> list[dict[str, Any]]:
    """Tables of one name, of whatever was compared, as one."""
    return [{"compared": what, **_without(line, without)} for what, found in tables.items() for line in found[name]]
