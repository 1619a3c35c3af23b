"""From a table to conversations: roles checked, thinking validated, everything dropped counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lib.data.cleaning import DamagedError, Row, plain, safe_text
from lib.data.forms import find_form, turns_of
from lib.errors import InputError
from lib.models.conversations import ASSISTANT, SYSTEM, USER, ConversationTask, Message, split_thinking, with_thinking

if TYPE_CHECKING:
    from datasets import Dataset

ROLES = {
    **dict.fromkeys(("system",), SYSTEM),
    **dict.fromkeys(("user", "human", "client", "求助者", "来访者"), USER),
    **dict.fromkeys(("assistant", "gpt", "counselor", "支持者", "心理咨询师"), ASSISTANT),
}
"""Names of the speakers in messages, SMILE and CPsyCoun files, and what they are called here."""

KEPT = ("topic", "difficulty")
"""Further columns whose values stay with a row."""


@dataclass
class Conversation(Row):
    """A row of turns; `text` is the user's opening, by which rows are grouped, and `label` has no meaning."""

    messages: list[Message] = field(default_factory=list)

    @property
    def whole(self) -> str:
        """All turns but the system's, as one text."""
        return "\n".join(message["content"] for message in self.messages if message["role"] != SYSTEM)

    def to_json(self, split: str) -> dict[str, Any]:
        """The row as the product holds it."""
        row = {"id": f"{split}-{self.index:05d}", "messages": self.messages}
        return {**row, "group": self.group, "leaked": self.leaked, **self.extra}


def clean_conversations(table: Dataset, where: str, task: ConversationTask) -> tuple[list[Conversation], Counter[str]]:
    """Rows with an explicit system turn, in the table's order, and why the others were left out.

    Read are Alpaca columns (instruction, input, output, system; history as earlier turns), `messages` ({role,
    content}), `conversations` ({from, value}) and `dialogue` (texts that begin with their speaker). Turns behind the
    last answer are removed and counted.

    Raises:
        InputError: no such column; roles that are not known; thinking in the answers and `thinking: false`.
    """
    form, columns = find_form(table.column_names, where)
    counts: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    rows: list[Conversation] = []
    for index, cells in enumerate(table):
        raw = {folded: cells[name] for folded, name in columns.items()}
        try:
            turns = [(role, safe_text(text, counts).strip()) for role, text in turns_of(raw, form)]
            messages = _messages(turns, task, counts, unknown)
        except DamagedError as reason:
            counts[f"dropped: {reason}"] += 1
            continue
        opening = next(message["content"] for message in messages if message["role"] == USER)
        given = {name: raw[name] for name in KEPT if raw.get(name) is not None}
        extra = {name: plain(value) for name, value in given.items() if value == value}  # NaN is no value
        rows.append(Conversation(index, opening, 0, extra=extra, messages=messages))
    _refuse(unknown, counts, len(table), where, task)
    return rows, counts


def _messages(
    turns: Sequence[tuple[str, str]], task: ConversationTask, counts: Counter[str], unknown: Counter[str]
) -> list[Message]:
    """Turns with our roles, the system turn explicit, ending on an answer; its parts are checked."""
    odd = [role for role, _ in turns if role.strip().lower() not in ROLES]
    if odd:
        unknown[odd[0]] += 1
        raise DamagedError("a role that is not known")
    messages = [{"role": ROLES[role.strip().lower()], "content": text} for role, text in turns]
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == SYSTEM else task.system_prompt
    if any(not message["content"] for message in messages):
        raise DamagedError("an empty turn")
    if any(m["role"] != (USER, ASSISTANT)[i % 2] for i, m in enumerate(messages)):
        raise DamagedError("roles not in turn (user first, then assistant)")
    if len(messages) < 2:
        raise DamagedError("no assistant turn")
    if len(messages) % 2:
        messages.pop()
        counts["changed: last turn without an answer removed"] += 1
    _check_thinking(messages, task, counts)
    return [{"role": SYSTEM, "content": system}, *messages]


def _check_thinking(messages: Sequence[Message], task: ConversationTask, counts: Counter[str]) -> None:
    reasoning = ""
    for message in messages[1::2]:
        try:
            reasoning, _ = split_thinking(message["content"])
        except ValueError as error:
            raise DamagedError(str(error)) from None
        if reasoning and not task.thinking:
            counts["thinking"] += 1
    if task.thinking and not reasoning:
        raise DamagedError("no thinking in the last answer")


def _refuse(unknown: Counter[str], counts: Counter[str], rows: int, where: str, task: ConversationTask) -> None:
    """What is not a slip of single rows stops the run."""
    if thinking := counts.pop("thinking", 0):
        raise InputError(
            f"{where}: {thinking} answers with <think> or <thinking>, and thinking: false.",
            "the setting that says what the answers hold.",
            "set thinking: true, or remove the blocks.",
        )
    if sum(unknown.values()) > max(1, rows // 100):
        names = ", ".join(f"{name!r} ({count} rows)" for name, count in unknown.most_common(6))
        raise InputError(f"{where}: the roles {names}.", f"one of {', '.join(ROLES)}.", "rename them.")


def in_tags_of(tokenizer: Any, messages: Sequence[Message]) -> list[Message]:
    """The turns with thinking in the form of the base model's own tags."""
    return [
        {**m, "content": with_thinking(tokenizer, *split_thinking(m["content"]))} if m["role"] == ASSISTANT else m
        for m in messages
    ]
