"""From a table to conversations: roles checked, thinking validated, everything dropped counted."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import numpy as np

from lib.errors import InputError, refusal
from lib.prompts.conversations import Encoded
from lib.prompts.tasks import Task, texts_of
from lib.prompts.templates import (
    ASSISTANT,
    RENAMED,
    SYSTEM,
    USER,
    Message,
    in_tags_of,
    is_blank,
    read_block,
    split_thinking,
)
from lib.scoring.answer_metrics import refuse_other_form
from lib.settings import Settings
from lib.stages.data.cleaning import (
    DamagedError,
    Row,
    RowsOfTask,
    Splits,
    find_column,
    not_used,
    plain,
    safe_text,
    usable_rows,
)
from lib.stages.data.data_files import NAMES, Rows, alone
from lib.stages.data.labels import label_reader
from lib.stages.data.near_duplicates import audit, joined, normalise
from lib.stages.data.turns import (
    ALPACA,
    FORMS,
    MASKS,
    REASONING,
    ROLES,
    SYSTEMS,
    Turn,
    asked_in_think_tags,
    find_form,
    request_of,
    says_of_turns,
    turns_of,
)

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
    _refuse(unknown, counts, len(table), len(rows), where, task)
    _set_shared(rows, requests)
    used = {*FORMS[form], *KEPT, *MASKS, *REASONING, *SYSTEMS, "mask_history", *(ALPACA if form == "alpaca" else ())}
    used |= {name for name, own in columns.items() if any(says_of_turns(name, cells[own]) for cells in table)}
    used |= {name for name in columns if any("dropped" in why and f"({name}: " in why for why in counts)}
    return rows, counts + not_used([name for folded, name in columns.items() if folded not in used], len(table))


def told_by_rows(
    table: Rows, label_names: Sequence[str] | None, text_column: str = "", label_column: str = ""
) -> tuple[str, bool] | None:
    """Task and thinking of rows that are conversations, by their answers; None of texts with labels.

    Rows that can be read as both (instruction, input, output) have labels where columns or names of labels were chosen,
    or each answer is a label.
    """
    try:
        form, columns = find_form(list(table[0]), "")
    except InputError:
        return None
    with contextlib.suppress(InputError):
        find_column(list(table[0]), text_column, "text")
        label = find_column(list(table[0]), label_column, "label")
        read = label_reader(label_names or Settings().label_names)
        if label_names or text_column or label_column or all(read(alone(row.get(label))) is not None for row in table):
            return None
    several = thinking = False
    for cells in table:
        with contextlib.suppress(DamagedError, ValueError, RecursionError):  # counted when the rows are cleaned
            turns = turns_of({folded: cells.get(name) for folded, name in columns.items()}, form, Counter())
            answers = [turn.text for turn in turns if turn.role == ASSISTANT]
            several = several or len(answers) > 1
            thinking = thinking or any(split_thinking(answer)[0] for answer in answers)
    return "dialogue" if several else "instruction", thinking


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
    if odd := [turn.role for turn in turns if turn.role not in (SYSTEM, USER, ASSISTANT)]:
        unknown[odd[0]] += 1
        raise DamagedError("a role that is not known")
    learn = [{} if turn.learn or turn.role != ASSISTANT else {"learn": False} for turn in turns]
    messages = [{"role": turn.role, "content": turn.text, **own} for turn, own in zip(turns, learn, strict=True)]
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
    messages = [{"role": SYSTEM, "content": system}, *messages]
    answers = [message["content"] for message in messages[2::2]]
    for message in messages if task.thinking else ():
        if message["role"] != ASSISTANT:
            content = asked_in_think_tags(message["content"], answers)
            changed[RENAMED] += content != message["content"]
            message["content"] = content
    return messages


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


_PLAIN = "rows without reasoning: learned as answers without it"


_UNTAGGED = "kept: answers that begin as reasoning does, in no tags that are known"
_UNTAGGED_THINKING = re.compile(NAMES["untagged_thinking"], re.IGNORECASE)


def _check_thinking(messages: Sequence[Message], task: Task, changed: Counter[str]) -> None:
    reasoning, earlier = "", False
    for message in messages[1::2]:
        earlier = earlier or bool(reasoning)
        block = read_block(message["content"])
        if block.parts[:3] == [True, True, False] and not is_blank(block.answer):  # of an answer without thinking
            message["content"] = block.answer
            changed["changed: empty thinking blocks removed"] += 1
        try:
            reasoning, _ = split_thinking(message["content"])
        except ValueError as error:
            raise DamagedError(str(error)) from None
        if reasoning and not task.thinking:
            changed["thinking"] += 1
        changed[_UNTAGGED] += not reasoning and _UNTAGGED_THINKING.match(message["content"]) is not None
    if task.thinking and not reasoning:
        if earlier:
            raise DamagedError("no thinking in the last answer")
        changed[_PLAIN] += 1


def _refuse(unknown: Counter[str], counts: Counter[str], rows: int, kept: int, where: str, task: Task) -> None:
    """What is not a slip of single rows stops the run."""
    if kept and counts[_PLAIN] == kept:
        raise refusal("data/no-reasoning", where=where)
    if thinking := counts.pop("thinking", 0):
        raise refusal("data/reasoning", where=where, thinking=thinking)
    if sum(unknown.values()) > max(1, rows // 100):
        names = ", ".join(f"{name!r} ({count} rows)" for name, count in unknown.most_common(6))
        raise InputError(f"{where}: the roles {names}.", f"one of {', '.join(ROLES)}.", "rename them.")


class Conversations(RowsOfTask):
    """Rows of turns whose answers are free text."""

    keys: Sequence[str] = NAMES["settings"]["conversations"]
    fewest = 5
    cluster = "group"
    rule = "group (openings or texts nearly the same, or opening within opening), seed {seed}; copies dropped first"

    def clean(self, table: Rows, where: str) -> tuple[list[Row], Counter[str]]:
        return clean_conversations(table, where, self.task)

    def write_tags_of(self, tokenizer: Any, splits: Splits, changed: Counter[str]) -> None:
        """The system turn that later questions bring is written as that of the rows."""
        rows = [row for split in splits.values() for row in split]
        for row in rows:
            row.messages = in_tags_of(tokenizer, row.messages, changed)
        told = self.task.system_prompt
        if self.task.thinking:
            told = asked_in_think_tags(told, [message["content"] for row in rows for message in row.messages[2::2]])
        [turn] = in_tags_of(tokenizer, [{"role": SYSTEM, "content": told}], Counter())
        self.task = replace(self.task, system_prompt=turn["content"])

    def require_any(self, splits: Splits, flow: Mapping[tuple[str, str], int]) -> None:
        if not any(splits.values()):
            reasons = "; ".join(f"{count:,} rows {step}" for (step, _), count in flow.items())
            found = f"no usable conversation ({reasons})."
            raise InputError(found, "rows with a question and an answer.", "correct them.")

    def require_each(self, splits: Splits) -> None:
        refuse_other_form(
            self.settings.answer_metric, [row.messages[-1]["content"] for rows in splits.values() for row in rows]
        )

    def refuse_few(self, rows: Sequence[Row]) -> None:
        groups = Counter(row.group for row in rows)
        if len(groups) < self.fewest:
            [(largest, size)] = groups.most_common(1)
            first = next(row for row in rows if row.group == largest)
            have = f"{len(rows)} rows in {len(groups)} groups"
            raise refusal("data/few-groups", have=have, size=size, text=first.text[:60], fewest=self.fewest)

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

    def example(self, row: Row, encoded: Encoded, tokenizer: Any) -> dict[str, Any]:
        return {"turns": 2 * (len(encoded.answers) + encoded.unlearned)}


def _without(line: Mapping[str, Any], part: str) -> dict[str, Any]:
    """A line without the columns whose names hold `part`."""
    return {key: value for key, value in line.items() if part not in key}


def _compared(tables: Mapping[str, Mapping[str, Any]], name: str, without: str) -> list[dict[str, Any]]:
    """Tables of one name, of whatever was compared, as one."""
    return [{"compared": what, **_without(line, without)} for what, found in tables.items() for line in found[name]]
