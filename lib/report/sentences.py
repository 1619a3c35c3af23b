"""What the pages say: sentences as Jinja templates with computed values, one file a page.

A sentence is a macro in ``templates/sentences/<page>.j2``; its arguments are the values that it needs. Code
hands in numbers and names, never words of a sentence, so that another language is a catalogue (`lib.language`):

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
    {{ "run `x`" | code }}        run <code>x</code>  (HTML)
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from lib.language import language, retold, translated
from lib.runs.render import as_written, megabytes, templates, three_digits
from lib.statistics.intervals import IN_BRACKETS, IN_WORDS, Interval, estimate_text, limits_text

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2.ext import Extension

TEMPLATES = Path(__file__).parent / "templates"


def counted(number: int, one: str, many: str = "") -> str:
    """1 → "1 row", 2 → "2 rows"; `many` where it is not formed by an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def listed(names: Sequence[str], last: str = "and") -> str:
    """["a", "b", "c"] → "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"


def spread(values: Sequence[float], dash: str = "to", middle: float | None = None) -> str | None:
    """Median, or another middle, and range: "12.0 (10.0 to 13.5)", "3,025 (2,353 to 3,153)"; None of no values."""
    if not values:
        return None
    shown = median(values) if middle is None else middle
    form = ",.0f" if shown >= 1000 else ",.1f"
    return f"{shown:{form}} ({min(values):{form}} {dash} {max(values):{form}})"


SIZE = "size"
"""Form of sizes: three significant digits."""


def cell_text(value: Any, form: str = "") -> str:
    """A value as text; numbers and intervals by the format of their column."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return translated("yes" if value else "no")
    if isinstance(value, Interval):
        return format(value, form or ".4g").replace("%", "\u00a0%")
    if isinstance(value, (int, float)) and form == SIZE:
        return three_digits(value)
    if isinstance(value, (int, float)) and form:
        return "0" if value == 0 and form.endswith("e") else format(value, form).replace("%", "\u00a0%")
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return translated(", ").join(cell_text(item) for item in value)
    if isinstance(value, Mapping):
        return translated(", ").join(f"{key}{translated(': ')}{cell_text(item)}" for key, item in value.items())
    return str(value)


def _limits(values: Sequence[float | None], form: str = ".3f", factor: float = 1.0, words: bool = False) -> str | None:
    return limits_text(values, form, factor, IN_WORDS if words else IN_BRACKETS)


def _with_code(text: str) -> Markup:
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


_UNIT = re.compile(
    r"(?<=\d) (?=[%\u4e00-\u9fff]|(?:[kKMGT]i?B|m?s|min|nats|bits?|points?|rows?|answers?|tokens?(?:/s)?)(?![\w-]))"
)


def unbroken(text: str) -> str:
    """A text whose lines never end between a number and its unit."""
    return _UNIT.sub("\u00a0", text)


FILTERS: dict[str, Callable[..., Any]] = {
    "code": _with_code,
    "unbroken": unbroken,
    "number": format,
    "count": lambda value: format(value, ","),
    "plain": cell_text,
    "percent": lambda share, digits=0: f"{100 * share:.{digits}f} %",
    "mb": lambda size: f"{megabytes(size)} MB",
    "counted": counted,
    "listed": listed,
    "spread": spread,
    "commonest": lambda values: Counter(values).most_common(),
    "limits": _limits,
    "estimate": estimate_text,
    "retold": retold,
}


def environment(folder: str, escape: bool, markdown: bool = False) -> Environment:
    """In this process's language the templates below one folder of ``templates``, with the filters above.

    Args:
        escape: True for templates that write HTML.
        markdown: True for sentences that are shown as Markdown: only the template's own markup is any.
    """
    return _environment(folder, escape, markdown, language())


@functools.cache
def _environment(folder: str, escape: bool, markdown: bool, _: str) -> Environment:
    made = templates(TEMPLATES / folder, autoescape=escape or markdown, trim_blocks=escape)
    made.filters |= FILTERS
    if not escape:
        made.add_extension(_rows_of_templates())
        made.finalize = _as_markdown if markdown else _as_text
    return made


_ROW, _CELL, _PARAGRAPH = "\x1e", "\x1f", "\x1d"
"""Line ends, `` | `` and ¶ of a template, as against those of its values; white space, too."""


def _as_text(value: Any) -> Any:
    """A sentence in a cell of `word_rows` must not end the row."""
    return value.strip(f"\n{_ROW}") if isinstance(value, str) else value


def _as_markdown(value: Any) -> Any:
    """What a template shows: text of others as it is written, and what another macro has written already."""
    if not isinstance(value, str):
        return value
    return Markup(_as_text(value)) if hasattr(value, "__html__") else Markup(as_written(_LINES.sub(" ", value)))


_LINES = re.compile(r"\s*[\n\r\v\f\x1c-\x1f\x85\u2028\u2029]\s*")


_MARKS = str.maketrans({"\n": _ROW, "¶": _PARAGRAPH})


def _rows_of_templates() -> type[Extension]:
    """Marks them while a template is read."""
    from jinja2.ext import Extension
    from jinja2.lexer import Token

    class Marks(Extension):
        def filter_stream(self, stream: Any) -> Iterator[Token]:
            for token in stream:
                text = token.value.translate(_MARKS).replace(" | ", f" {_CELL} ") if token.type == "data" else None
                yield token if text is None else Token(token.lineno, token.type, text)

    return Marks


def sentence(name: str, /, **values: Any) -> str:
    """A sentence, or several, with its values.

    Args:
        name: "page.macro", e.g. "quantize.mix_reading".

    Raises:
        jinja2.UndefinedError: a value is missing.
        TypeError: a value that the template does not take.
    """
    return _text_of(name, values)


def in_markdown(name: str, /, **values: Any) -> str:
    """`sentence` for a page: its own markup is Markdown, and a value is text as it is written, never markup."""
    return _text_of(name, values, markdown=True)


def _text_of(name: str, values: dict[str, Any], markdown: bool = False) -> str:
    return joined(_rendered(name, values, markdown).replace(_ROW, "\n").replace(_CELL, "|"))


def word_rows(name: str, /, **values: Any) -> list[list[str]]:
    """Rows of words, for cards and tables of text: a row is a line of the template, its cells are parted by `` | ``.

    A line that begins with a blank continues the one before.
    """
    text = re.sub(rf"{_ROW}[ \t]+(?=\S)", " ", _rendered(name, values))
    return [[cell.strip() for cell in line.split(f" {_CELL} ")] for line in text.split(_ROW) if line.strip()]


def _rendered(name: str, values: dict[str, Any], markdown: bool = False) -> str:
    page, _, macro = name.partition(".")
    template = environment("sentences", False, markdown).get_template(f"{page}.j2")
    return str(getattr(template.module, macro)(**values))


def joined(text: str) -> str:
    """Lines as one line, except where a list or ¶ (its mark) begins a new one; punctuation at a start is attached."""
    paragraphs = []
    for part in text.split(_PARAGRAPH):
        line = re.sub(r"\s*\n\s*(?=[.,;:)；，。：）])", "", re.sub(r"[ \t]*\n\s*", "\n", part.strip()))
        line = re.sub(r"(?<=[。；：，！？）])\n(?!- )", "", line)
        paragraphs.append(re.sub(r"\n(?!- )", " ", line))
    return "\n\n".join(paragraphs)
