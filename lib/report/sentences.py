"""What the pages say: sentences as Jinja templates with computed values, one file a page and language.

A sentence is a macro in ``templates/sentences/<language>/<page>.j2``; its arguments are the values that it needs. Code
hands in numbers and names, never words of a sentence, so that another language is another folder of templates:

    sentence("evaluate.decoding", rows=20, first=8, most=256)

with, in ``evaluate.j2``,

    {% macro decoding(rows, first, most) %}
    Answers to {{ "the first %d of " % first if rows > first }}{{ rows | counted("test row") }}, greedy, at most
    {{ most }} tokens each; long texts are cut.
    {% endmacro %}

Lines of a template are joined, so they may be broken anywhere, also before a full stop; ``- `` begins a line of a list,
and a line with ¶ alone a paragraph. A missing value is an error (StrictUndefined), and so is one that the template does
not take. The filters:

    {{ 0.1234 | number(".2f") }}  0.12           {{ 0.1234 | percent(1) }}          12.3 %
    {{ 1234 | count }}            1,234          {{ 1234567 | mb }}                 1.23 MB
    {{ limits | limits(".2f") }}  [0.85, 0.93]   {{ 0.9 | estimate(limits, ".2f") }} 0.90 [0.85, 0.93]
    {{ 2 | counted("row") }}      2 rows         {{ ["a", "b", "c"] | listed }}     a, b and c
    {{ 0.123456 | plain }}        0.1235         (whatever it is, as in a table)
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from lib.runs.files import templates
from lib.statistics.intervals import IN_BRACKETS, IN_WORDS, Interval, estimate_text, limits_text

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
LANGUAGE = "en"


def counted(number: int, one: str, many: str = "") -> str:
    """1 → "1 row", 2 → "2 rows"; `many` where it is not formed by an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def listed(names: Sequence[str], last: str = "and") -> str:
    """["a", "b", "c"] → "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"


def spread(values: Sequence[float], dash: str = "to", middle: float | None = None) -> str | None:
    """Median, or another middle, and range: "12.0 (10.0 to 13.5)"; None of no values."""
    if not values:
        return None
    shown = median(values) if middle is None else middle
    return f"{shown:,.1f} ({min(values):,.1f} {dash} {max(values):,.1f})"


def cell_text(value: Any, form: str = "") -> str:
    """A value as text; numbers and intervals by the format of their column."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Interval):
        return format(value, form or ".4g")
    if isinstance(value, (int, float)) and form:
        return "0" if value == 0 and form.endswith("e") else format(value, form)
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(cell_text(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {cell_text(item)}" for key, item in value.items())
    return str(value)


def _limits(values: Sequence[float | None], form: str = ".3f", factor: float = 1.0, words: bool = False) -> str | None:
    return limits_text(values, form, factor, IN_WORDS if words else IN_BRACKETS)


FILTERS: dict[str, Callable[..., Any]] = {
    "number": format,
    "count": lambda value: format(value, ","),
    "plain": cell_text,
    "percent": lambda share, digits=0: f"{100 * share:.{digits}f} %",
    "mb": lambda size, digits=2: f"{size / 1e6:,.{digits}f} MB",
    "counted": counted,
    "listed": listed,
    "spread": spread,
    "commonest": lambda values: Counter(values).most_common(),
    "limits": _limits,
    "estimate": estimate_text,
}


@functools.cache
def environment(folder: str, escape: bool) -> Environment:
    """The templates below one folder of ``templates``, with the filters above.

    Args:
        escape: True for templates that write HTML.
    """
    made = templates(TEMPLATES / folder, autoescape=escape, trim_blocks=escape)
    made.filters |= FILTERS
    if not escape:  # a sentence in a cell of `word_rows` must not end the row
        made.finalize = lambda value: value.strip("\n") if isinstance(value, str) else value
    return made


def sentence(name: str, /, **values: Any) -> str:
    """A sentence, or several, with its values.

    Args:
        name: "page.macro", e.g. "quantize.mix_reading".

    Raises:
        jinja2.UndefinedError: a value is missing.
        TypeError: a value that the template does not take.
    """
    return joined(_rendered(name, values))


def word_rows(name: str, /, **values: Any) -> list[list[str]]:
    """Rows of words, for cards and tables of text: a row is a line of the template, its cells are parted by `` | ``.

    A line that begins with a blank continues the one before.
    """
    text = re.sub(r"\n[ \t]+(?=\S)", " ", _rendered(name, values))
    return [[cell.strip() for cell in line.split(" | ")] for line in text.splitlines() if line.strip()]


def _rendered(name: str, values: dict[str, Any]) -> str:
    page, _, macro = name.partition(".")
    template = environment(f"sentences/{LANGUAGE}", False).get_template(f"{page}.j2")
    return str(getattr(template.module, macro)(**values))


def joined(text: str) -> str:
    """Lines as one line, except where a list or ¶ begins a new one; punctuation at the start of a line is attached."""
    paragraphs = []
    for part in text.split("¶"):
        line = re.sub(r"\s*\n\s*(?=[.,;:)])", "", re.sub(r"[ \t]*\n\s*", "\n", part.strip()))
        paragraphs.append(re.sub(r"\n(?!- )", " ", line))
    return "\n\n".join(paragraphs)
