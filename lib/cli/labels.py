"""What `workbook new` finds in texts with labels: their columns, names, and a question for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lib.errors import InputError, refusal

if TYPE_CHECKING:
    from lib.stages.data.data_files import Rows

MOST_CLASSES = 50
"""Different values of a column from which on they are no labels."""
SHOWN_LABELS = 20
"""Labels that a question lists, at most."""


@dataclass
class Keys:
    """Values for a parameter file, each with the reason why it is not that of params/quick.yaml."""

    values: dict[str, Any] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    def put(self, key: str, value: Any, why: str) -> None:
        self.values[key], self.why[key] = value, why


def label_keys(keys: Keys, source: str, splits: Mapping[str, Rows]) -> dict[str, Any]:
    """Columns, label names and prompts; returns which columns they are."""
    from lib.settings import Settings
    from lib.stages.data.cleaning import unlabelled

    whole = [row for split in splits.values() for row in split]
    text, label = _columns(keys, source, whole)
    labelled = [row for split in splits.values() if not unlabelled(split, label) for row in split] or whole
    counts = label_values(labelled, label)
    chinese = is_chinese(str(row[text]) for row in whole[:500])
    default = Settings()
    if options := _option_names(whole, counts):
        names, why = options, "the letters of the options that each question has"
    elif known := _sentiment(counts, chinese):
        names, why = known, "the texts are not Chinese, so neither are the answer words"
    else:
        names = _own_names(counts)
        numbers = all(name.isdecimal() for name in names)
        why = f"the {len(names)} labels of the column {label}" + ("; words teach more than numbers" if numbers else "")
        if len(names) < 2:
            raise refusal("cli/one-label", where=source, column=label, names=", ".join(names) or "nothing")
        if len(names) > MOST_CLASSES:
            raise refusal("cli/many-labels", where=source, count=len(names), column=label, most=MOST_CLASSES)
    if names != default.label_names:
        keys.put("label_names", names, why)
        system, user = _question(names, chinese, bool(options))
        keys.put("system_prompt", system, "says what the model is to do")
        keys.put("user_prompt", user, "names the labels; {text} is the row's text")
    return {"text_column": text, "label_column": label}


def _columns(keys: Keys, source: str, rows: Rows) -> tuple[str, str]:
    """The columns of text and label: by their names, as 01 finds them, else by what they hold."""
    from lib.stages.data.cleaning import find_column

    names = list(rows[0])
    found: dict[str, str] = {}
    for what in ("label", "text"):
        try:
            found[what] = find_column(names, "", what)
        except InputError:
            rest = [name for name in names if name not in found.values()]
            guess = _likely_label(rows, rest) if what == "label" else _likely_text(rows, rest)
            if not guess:
                raise refusal("cli/no-label-column", where=source, have=", ".join(map(repr, names))[:300]) from None
            found[what] = guess
            why = "its few values repeat" if what == "label" else "its texts are the longest"
            keys.put(f"{what}_column", guess, f"no column has a known name of a {what}; {why}")
    values = len(label_values(rows, found["label"]))
    if values > MOST_CLASSES and 2 * values > len(rows):
        raise refusal("cli/not-labels", where=source, column=found["label"], count=values, rows=len(rows))
    return found["text"], found["label"]


def _likely_label(rows: Rows, names: Sequence[str]) -> str:
    """The column with the fewest different values, of those whose values repeat; words go before numbers."""
    from lib.stages.data.labels import is_name

    found = []
    for name in names:
        counts = label_values(rows, name)
        if 1 < len(counts) <= MOST_CLASSES and 5 * len(counts) <= counts.total() and counts.total() > 0.9 * len(rows):
            found.append((not all(map(is_name, counts)), len(counts), name))
    return min(found)[2] if found else ""


def _likely_text(rows: Rows, names: Sequence[str]) -> str:
    """The column whose cells have the most characters."""
    lengths = {name: sum(len(str(row[name] or "")) for row in rows[:1000]) for name in names}
    return max(lengths, key=lambda name: lengths[name]) if lengths else ""


def label_values(rows: Rows, column: str) -> Counter[str]:
    """The values of a column as texts, without empty cells."""
    from lib.stages.data.data_files import alone

    cells = (alone(row.get(column)) for row in rows)
    return Counter(str(cell).strip() for cell in cells if cell is not None and cell == cell and str(cell).strip())


def _option_names(rows: Rows, answers: Counter[str]) -> list[str]:
    """The letters of options where rows have such columns; empty elsewhere."""
    from lib.stages.data.labels import option_columns, option_letters, options_of

    letters = option_letters([chr(ord("A") + place) for place in range(8)])
    columns = option_columns(list(rows[0]), letters)
    if not columns:
        return []
    most = 0
    for row in rows[:200]:
        try:
            most = max(most, len(options_of(row, columns, letters)))
        except ValueError:  # a damaged row, which 01 counts
            continue
    return list(letters)[:most] if most > 1 else []


def _sentiment(counts: Counter[str], chinese: bool) -> list[str]:
    """Names of two labels whose words are those of a known pair (好评 and 差评, 1 and 0); empty elsewhere."""
    from lib.settings import Settings
    from lib.stages.data.labels import label_reader

    for names in (Settings().label_names if chinese else ["negative", "positive"], ["否", "是"], ["no", "yes"]):
        read = label_reader(names)
        strange = sum(count for value, count in counts.items() if read(value) is None)
        if {read(value) for value in counts} >= {0, 1} and strange <= max(1, counts.total() // 100):
            return names
    return []


def _own_names(counts: Counter[str]) -> list[str]:
    """The labels as the file writes them: numbers in order, words by how often they occur."""
    from lib.settings import folded

    names: dict[str, str] = {}
    for value, count in counts.most_common():
        if 200 * count >= counts.total() or count >= 10:  # a slip, which 01 counts or refuses
            names.setdefault(folded(value), value)
    if all(key.isdecimal() for key in names):
        return sorted(names, key=int)
    return list(names.values())


def _question(names: Sequence[str], chinese: bool, options: bool) -> tuple[str, str]:
    """A system turn and a question that name the labels, in the language of the texts."""
    listed = ("、" if chinese else ", ").join(names) if len(names) <= SHOWN_LABELS else ""
    if any(mark in listed for mark in "{}"):  # would be slots
        listed = ""
    if options:
        plain = ("你是答题助手。", "下面是一道选择题，只回答选项的字母。\n{text}")
        return plain if chinese else ("You answer questions.", "Answer with the letter of the right option.\n{text}")
    if list(names) == ["negative", "positive"]:
        ask = "Is this review positive or negative? Answer with one word."
        return "You judge reviews.", f"{ask}\nReview: {{text}}"
    if chinese:
        which = f"，只回答其中一个：{listed}" if listed else "，只回答类别"
        return "你是文本分类助手。", f"判断下面这段文本属于哪一类{which}。\n文本：{{text}}"
    which = f" Answer with one of: {listed}." if listed else " Answer with the class alone."
    return "You classify texts.", f"Which class does this text belong to?{which}\nText: {{text}}"


def is_chinese(texts: Iterable[str]) -> bool:
    """Whether more than a fifth of the letters are Chinese characters."""
    from lib.stages.data.text_audit import is_ideograph

    letters = [c for text in texts for c in text[:2000] if c.isalpha()]
    return 5 * sum(map(is_ideograph, letters)) > len(letters)
