"""From a table to labelled rows: columns found, labels understood, text made safe, everything dropped counted."""

from __future__ import annotations

import contextlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lib.errors import InputError, refusal
from lib.prompts.conversations import Encoded
from lib.prompts.tasks import Task, texts_of
from lib.prompts.templates import Message
from lib.settings import Settings, folded
from lib.stages.data.data_files import NAMES, SURROGATE, DamagedError, Rows, alone
from lib.stages.data.labels import (
    answer_reader,
    asked_options,
    class_lists,
    is_name,
    label_reader,
    meanings,
    option_columns,
    option_letters,
    options_of,
    said_by_name,
    told_by_lists,
)
from lib.stages.data.near_duplicates import audit
from lib.stages.data.reading import Table


@dataclass
class Row:
    """One row of a split: a text with its label, or a conversation.

    Attributes:
        index: its place in the source, counted from 0.
        text: by which rows are compared and grouped: the text, or a conversation's opening without what it shares.
        label: number of the label; 0 where there are none.
        group: number of its duplicate cluster. leaked: whether it is a copy of a training row.
        extra: further columns that go along.
        messages: turns of a conversation; none for a text with its label.
        shared: an instruction that many conversations begin with, and by which they are therefore not compared.
    """

    index: int
    text: str
    label: int = 0
    group: int = -1
    leaked: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    shared: str = ""

    @property
    def content(self) -> dict[str, Any]:
        """What a task is asked about."""
        return {"messages": self.messages} if self.messages else {"text": self.text, "label": self.label}

    @property
    def whole(self) -> str:
        """The text, or all turns but the system's as one text."""
        return "\n".join(texts_of(self.content))

    @property
    def compared(self) -> str:
        """As `whole`, without what many rows share."""
        return self.whole.removeprefix(self.shared).lstrip()

    def to_json(self, split: str) -> dict[str, Any]:
        """The row as the product holds it."""
        row = {"id": f"{split}-{self.index:05d}", **self.content}
        return {**row, "group": self.group, "leaked": self.leaked, **self.extra}


Splits = dict[str, list[Row]]


def find_column(names: Sequence[str], wanted: str, what: str) -> str:
    """The given column, or the first known name that the table has (upper and lower case alike).

    Raises:
        InputError: the message lists the columns there are.
    """
    if wanted:
        if wanted not in names:
            raise refusal("data/no-such-column", have=", ".join(names), what=what, wanted=wanted)
        return wanted
    by_lower = {name.strip().lower(): name for name in names} | {name: name for name in names if name.islower()}
    known = NAMES[f"{what}_columns"]
    for name in known:
        if name in by_lower:
            return by_lower[name]
    have = ", ".join(map(repr, names))[:300]
    raise refusal("data/no-known-column", have=have, what=what, known=", ".join(known[:5]))


def _same_column(names: Sequence[str], first: Sequence[str], wanted: str, what: str, where: str) -> tuple[str, str]:
    """The column of a split that is the one of the first split, and how that one is called there.

    Raises:
        InputError: no such column; or another one than in the first split, which has it too and does not use it.
    """
    own = find_column(names, wanted, what)
    try:
        theirs = find_column(first, wanted, what)
    except InputError:  # without labels
        return own, own
    if theirs in names:
        return theirs, theirs
    if own in first:
        raise refusal("data/another-column", where=where, theirs=theirs, what=what, own=own)
    return own, theirs


def clean_split(
    table: Rows,
    where: str,
    text_column: str,
    label_column: str,
    label_names: Sequence[str],
    keep: Sequence[str] = ("pattern",),
    whole: Rows | None = None,
) -> tuple[list[Row], Counter[str]]:
    """Rows with text and label, in the table's order, and why the others were left out.

    Args:
        keep: further columns whose values go along when the table has them.
        whole: rows of all splits, in which numbers of labels mean the same.

    NUL characters and lone surrogates are removed from a text; an NFD text is kept as it is (comparisons normalise).

    Raises:
        InputError: a column is missing, a label is not among those named.
    """
    names, whole = list(table[0]), whole or table
    text_name, texts = _same_column(names, list(whole[0]), text_column, "text", where)
    label_name, labels = _same_column(names, list(whole[0]), label_column, "label", where)
    if text_name == label_name:
        raise InputError(f"{where}: the column {text_name!r} as text and as label.", "two columns.", "set text_column.")
    read = label_reader(label_names)
    unknown: Counter[str] = Counter()
    letters = option_letters(label_names)
    options = option_columns(names, letters)
    unused = [name for name in names if name not in (text_name, label_name, *options.values(), *keep)]
    others = [name for name in {**table[0], **whole[0]} if name in unused or name not in names]
    meant, beside = meanings(whole, label_name, others, read, bool(label_column), where)
    named = {} if meant or beside else said_by_name(label_name, len(label_names), read)
    named = named if any(read(value) != meaning for value, meaning in named.items()) else {}
    lists = [] if options else class_lists(whole, others, read, len(label_names))
    verdicts = [name for name in unused if _is_verdict(table, name)]
    questions, again = [], []
    for cells in whole if options else ():
        with contextlib.suppress(DamagedError, KeyError):  # of another split
            if (answer := alone(cells[label_name])) not in (None, ""):
                questions.append((options_of(cells, options, letters), answer))
                again.append({read(alone(cells[name])) for name in beside if cells[name] not in (None, "")})
    answered = answer_reader(questions, label_names, "" in options, where)
    for (choices, answer), meanings_beside in zip(questions, again if not label_column else (), strict=False):
        if answered and (mark := answered(choices, answer)) and meanings_beside - {read(mark)}:
            raise refusal("data/columns-contradict", where=where, columns=", ".join(map(repr, [label_name, *beside])))

    def row_of(index: int, cells: Mapping[str, Any], changed: Counter[str]) -> Row:
        if any(folded(cells[name]) in REJECTED for name in verdicts):
            raise DamagedError("an answer that its annotator did not accept")
        text, value = safe_text(cells[text_name], changed), cells[label_name]
        if not text.strip():
            raise DamagedError("empty text")
        choices = options_of(cells, options, letters) if options else {}
        asked = {mark: safe_text(said, changed) for mark, said in asked_options(choices, letters).items()}
        text = with_options(text, asked, changed)
        if value is not alone(value):
            value = alone(value)
            changed["changed: label out of a list of one"] += 1
        if value is None or (isinstance(value, str) and not value.strip()):
            raise DamagedError("no label")
        if (told := told_by_lists(cells, lists, value, where)) is not value:
            changed[f"numbers of {label_name} read by the names in {', '.join(lists)}"] += 1
            value = told
        if letters and not choices and not _holds_options(text, letters):
            changed[UNASKED] += letters.keys() <= set(label_names)
        if choices:
            value = answered(choices, value) if answered else choices.get(str(value).strip(), (value, ""))[0]
        by_names = folded(value) in named or (meant and not is_name(value))  # the file says what its numbers mean
        label = (meant or named).get(folded(value)) if by_names else read(value)
        told = "its name" if named else f"the names in {', '.join(beside)}"
        changed[f"numbers of {label_name} read by {told}"] += bool(by_names)
        if choices and (not value or (label is not None and label_names[label] not in asked)):
            raise DamagedError("an answer that is none of its question's options")
        if label is None:
            unknown[str(value).strip()[:40]] += 1
            raise DamagedError("label not understood")
        return Row(index, text, label, extra={name: plain(cell) for name, cell in cells.items() if name in keep})

    rows, counts = usable_rows(table, row_of)
    refuse_labels(unknown, len(table), label_names, where)
    other = {own: theirs for own, theirs in ((text_name, texts), (label_name, labels)) if own != theirs}
    counts += Counter(
        {f"the column {own!r} of {where} read as {theirs!r}": len(table) for own, theirs in other.items()}
    )
    used = (*beside, *lists, *verdicts)
    return rows, counts + not_used([name for name in unused if name not in used], len(table))


ACCEPTED, REJECTED = ("accept",), ("reject", "ignore")
"""What annotators of Prodigy answer to the label that a row proposes."""
UNASKED = "kept: questions without options, for labels that are letters"


def _is_verdict(table: Rows, name: str) -> bool:
    """Whether a column says which proposed labels an annotator accepted."""
    said = {folded(row[name]) for row in table} if name.strip().lower() == "answer" else set()
    return bool(said) and said <= {*ACCEPTED, *REJECTED}


def _holds_options(text: str, letters: Mapping[str, str]) -> bool:
    """Whether a text names two options by their letters."""
    return sum(re.search(rf"(?<![A-Za-z]){mark}\s*[.．、:：)）]", text) is not None for mark in letters) > 1


def refuse_labels(unknown: Counter[str], rows: int, label_names: Sequence[str], where: str) -> None:
    """A value that is a label of its own, not a slip, stops the run."""
    total = sum(unknown.values())
    numbers = [value for value in unknown if value.lstrip("+-").replace(".", "", 1).isdigit()]
    if numbers or total > max(1, rows // 100):
        values = ", ".join(f"{value!r} ({count} rows)" for value, count in unknown.most_common(6))
        k, names = len(label_names), ", ".join(label_names)
        if not any(folded(name).isdecimal() for name in label_names):
            names = f"0 to {k - 1}, or {names}"
        raise refusal("data/labels-not-understood", where=where, values=values, k=k, names=names)


def with_options(text: str, options: Mapping[str, str], changed: Counter[str]) -> str:
    """A question with its options, one a line, each under its letter once; as it is where it holds them already."""
    if not options:
        return text
    lettered = {
        letter: re.compile(rf"\s*[(（]?{re.escape(letter)}\s*[.．、:：)）]\s*", re.IGNORECASE) for letter in options
    }
    if all(lettered[letter].match(said) for letter, said in options.items()):
        options = {letter: lettered[letter].sub("", said, count=1) for letter, said in options.items()}
    if all(
        re.search(found.pattern + re.escape(options[letter].strip()), text, re.I) for letter, found in lettered.items()
    ):
        changed["kept: options that the question holds already"] += 1
        return text
    changed["changed: options joined to their question, one a line"] += 1
    return "\n".join([text.rstrip(), *(f"{letter}. {said}" for letter, said in options.items())])


def not_used(names: Sequence[str], rows: int) -> Counter[str]:
    """What is said of columns that the run does not use."""
    return Counter({f"not used: the column {str(name)[:60]!r}": rows for name in names})


def usable_rows(
    table: Rows, row_of: Callable[[int, Mapping[str, Any], Counter[str]], Row]
) -> tuple[list[Row], Counter[str]]:
    """The rows that `row_of` makes of a table's cells; how often it changed one, and why it refused the others."""
    rows: list[Row] = []
    counts: Counter[str] = Counter()
    for index, cells in enumerate(table):
        changed: Counter[str] = Counter()
        try:
            rows.append(row_of(index, cells, changed))
        except DamagedError as reason:
            changed = Counter({f"dropped: {reason}": 1})
        except RecursionError:
            changed = Counter({"dropped: lists too deep inside each other": 1})
        counts += changed
    return rows, counts


def text_of(raw: Any) -> str:
    """The text of a cell; nothing is empty text, a number is written out, text parts of OpenAI's form are joined.

    Raises:
        DamagedError: a list of anything else, a mapping, true or false, bytes; written out it would be code.
    """
    if raw is None or (isinstance(raw, float) and raw != raw):
        return ""
    if isinstance(raw, list) and raw:
        parts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in raw]
        if all(isinstance(part, str) for part in parts):
            return "\n".join(parts)
    if isinstance(raw, list | tuple | Mapping | bool | bytes):
        raise DamagedError("content that is no text")
    return str(raw)


def plain(value: Any) -> Any:
    """A value that goes along with a row: as it is where JSON can hold it, else as text (a date)."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value


def safe_text(raw: Any, counts: Counter[str]) -> str:
    """The text of a cell without NUL characters and lone surrogates (counted).

    Raises:
        DamagedError: a cell that holds no text.
    """
    text = text_of(raw)
    if "\0" in text:
        counts["changed: NUL characters removed"] += text.count("\0")
        text = text.replace("\0", "")
    if SURROGATE.search(text):
        text, removed = SURROGATE.subn("", text)
        counts["changed: lone surrogates removed"] += removed
    if not text.isascii() and not unicodedata.is_normalized("NFC", text):
        counts["kept: texts not in NFC"] += 1
    return text


def unlabelled(table: Rows, label_column: str) -> bool:
    """True for a split whose labels are absent or all -1, as hub data sets mark a test split without labels."""
    try:
        name = find_column(list(table[0]), label_column, "label")
    except InputError:
        return True
    return all(row[name] in (-1, None, "-1", "") for row in table)


def require_labels(rows: Sequence[Row], label_names: Sequence[str], split: str) -> None:
    """Refuse a split that cannot teach or test anything: no rows, or a label without any row."""
    if not rows:
        raise refusal("data/no-usable-row", where=split)
    have = Counter(row.label for row in rows)
    missing = [name for number, name in enumerate(label_names) if number not in have]
    if len(have) == 1 or (missing and split == "train"):
        present = ", ".join(f"{label_names[number]!r} ({count} rows)" for number, count in sorted(have.items()))
        present = f"only the label {present}" if len(have) == 1 else f"the labels {present}"
        raise refusal("data/labels-without-rows", split=split, present=present, names=", ".join(label_names))


class RowsOfTask:
    """What the stage does with the rows of a task: what labelled texts and conversations have in common.

    Each of the two adds `clean` (the usable rows of a split, and what was changed and dropped), `require_any` and
    `refuse_few` (refuse data without usable rows, or with too few to be divided), `shape` (what a split holds, as a
    line of a table) and `example` (what is said of the worked example).

    Attributes:
        keys: settings that the product depends on.
        fewest: distinct rows a label, or groups of rows, that a split 8 : 1 : 1 needs.
        cluster: what whole rows are divided by, in words. rule: the rest of the rule by which they are divided.
    """

    def __init__(self, settings: Settings, task: Task) -> None:
        self.settings, self.task, self.names = settings, task, task.label_names

    def usable(self, table: Table) -> list[str]:
        """A validation split stands in for a test split that is missing; the note that says so."""
        if "test" in table.splits or "validation" not in table.splits:
            return []
        table.splits["test"] = table.splits.pop("validation")
        labels = " with labels" if self.names else ""
        return [f"the data has no test split{labels}: its validation split is the test split of this run"]

    def write_tags_of(self, tokenizer: Any, splits: Splits, changed: Counter[str]) -> None:
        """Write the tags around reasoning as the base model does."""

    def require_each(self, splits: Splits) -> None:
        """Refuse splits that cannot teach or test anything; empty ones when their rows have been measured."""

    def audit(self, splits: Splits) -> dict[str, list[dict[str, Any]]]:
        """Compare the rows and set each one's `group` and `leaked`; see `near_duplicates.audit`."""
        return audit(splits)

    def audited(self, row: Row) -> str:
        """The characters that are looked at."""
        return row.whole

    def length_columns(self, counts: Counter[str]) -> dict[str, int]:
        """What a table of lengths says beside them."""
        return {}

    def floor(self, splits: Splits) -> dict[str, Any]:
        """What a linear model reaches; nothing where there are no labels, for it cannot write an answer."""
        return {}


class LabelledRows(RowsOfTask):
    """Texts with a label each."""

    keys: Sequence[str] = NAMES["settings"]["labelled"]
    whole: Rows | None = None
    fewest = 10
    cluster = "duplicate cluster"
    rule = "duplicate cluster, seed {seed}; copies and conflicting texts dropped first"

    def usable(self, table: Table) -> list[str]:
        """Splits without labels are left out, too."""
        notes = []
        for name in ("validation", "test"):
            if name in table.splits and unlabelled(table.splits[name], self.settings.label_column):
                del table.splits[name]
                notes.append(f"the {name} split of the data has no labels and was left out")
        self.whole = [row for rows in table.splits.values() for row in rows]
        return notes + super().usable(table)

    def clean(self, table: Rows, where: str) -> tuple[list[Row], Counter[str]]:
        columns = (self.settings.text_column, self.settings.label_column)
        return clean_split(table, where, *columns, self.names, whole=self.whole)

    def require_any(self, splits: Splits, flow: Mapping[tuple[str, str], int]) -> None:
        rows = [row for rows in splits.values() for row in rows]
        reasons = "; ".join(f"{count:,} rows {step}" for (step, _), count in flow.items())
        require_labels(
            rows, self.names, f"the data set ({reasons})" if sum(flow.values()) > len(rows) else "the data set"
        )

    def require_each(self, splits: Splits) -> None:
        for name in ("train", "validation", "test"):
            require_labels(splits[name], self.names, name)

    def refuse_few(self, rows: Sequence[Row]) -> None:
        counts = Counter(row.label for row in rows)
        if min(counts.values(), default=0) < self.fewest:
            shown = ", ".join(f"{name!r}: {counts[label]}" for label, name in enumerate(self.names))
            raise refusal("data/few-of-a-label", shown=shown, fewest=self.fewest)

    def shape(self, split: str, rows: Sequence[Row]) -> dict[str, Any]:
        """Rows of each label, one line of a table."""
        counts = Counter(row.label for row in rows)
        return {"split": split, **{name: counts[number] for number, name in enumerate(self.names)}}

    def example(self, row: Row, encoded: Encoded, tokenizer: Any) -> dict[str, Any]:
        return {"label": self.names[row.label], "answer_words": self.task.note(tokenizer)}

    def floor(self, splits: Splits) -> dict[str, Any]:
        from lib.stages.data.baseline import linear_floor

        return linear_floor(splits, self.names, self.settings.seed)
