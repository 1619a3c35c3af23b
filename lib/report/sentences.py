"""What the pages say: sentences as Jinja templates with computed values, one file a page and language.

A sentence is a macro in ``templates/sentences/<language>/<page>.j2``; its arguments are the values that it needs. Code
hands in numbers and names, never words of a sentence, so that another language is another folder of templates:

    sentence("quantize.planned", megabytes=271.2, wider=2, types=7)

with, in ``quantize.j2``,

    {% macro planned(megabytes, wider, types) %}
    Together {{ megabytes | number(".1f") }} MB. {{ wider }} of {{ types }} types need more bits than their names say.
    {% endmacro %}

Lines of a template are joined, so they may be broken anywhere; an empty line begins a paragraph, ``- `` a line of a
list. A missing value is an error (StrictUndefined), and so is one that the template does not take. The filters:

    {{ 0.1234 | number(".2f") }}  0.12           {{ 0.1234 | percent(1) }}          12.3 %
    {{ 1234 | count }}            1,234          {{ 1234567 | mb }}                 1.23 MB
    {{ limits | limits(".2f") }}  [0.85, 0.93]   {{ 0.9 | estimate(limits, ".2f") }} 0.90 [0.85, 0.93]
    {{ 2 | counted("row") }}      2 rows         {{ ["a", "b", "c"] | listed }}     a, b and c
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.statistics.intervals import IN_BRACKETS, IN_WORDS, Interval, estimate_text, limits_text

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
LANGUAGE = "en"


def percent(share: float, digits: int = 0) -> str:
    """0.1234 → "12 %"."""
    return f"{100 * share:.{digits}f} %"


def megabytes(size: float, digits: int = 2) -> str:
    """Bytes in MB (10⁶ bytes)."""
    return f"{size / 1e6:,.{digits}f} MB"


def counted(number: int, one: str, many: str = "") -> str:
    """1 → "1 row", 2 → "2 rows"; `many` where it is not formed by an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def listed(names: Sequence[str], last: str = "and") -> str:
    """["a", "b", "c"] → "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"


def number(value: float | Interval, form: str = ",") -> str:
    """A number by a format specification; an `Interval` is written with its limits."""
    return format(value, form)


def _limits(values: Sequence[float | None], form: str = ".3f", factor: float = 1.0, words: bool = False) -> str | None:
    return limits_text(values, form, factor, IN_WORDS if words else IN_BRACKETS)


FILTERS: dict[str, Callable[..., str | None]] = {
    "number": number,
    "count": number,
    "percent": percent,
    "mb": megabytes,
    "counted": counted,
    "listed": listed,
    "limits": _limits,
    "estimate": estimate_text,
}


@functools.cache
def environment(folder: str, escape: bool) -> Environment:
    """The templates below one folder of ``templates``, with the filters above.

    Args:
        escape: True for templates that write HTML.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(TEMPLATES / folder),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=not escape,
    )
    made.filters |= FILTERS
    return made


def sentence(name: str, **values: Any) -> str:
    """A sentence, or several, with its values.

    Args:
        name: "page.macro", e.g. "quantize.mix_reading".

    Raises:
        jinja2.UndefinedError: a value is missing.
        TypeError: a value that the template does not take.
    """
    page, _, macro = name.partition(".")
    template = environment(f"sentences/{LANGUAGE}", False).get_template(f"{page}.j2")
    return joined(getattr(template.module, macro)(**values))


def joined(text: str) -> str:
    """Lines as one line, except where an empty line or a list begins a new one."""
    paragraphs = re.split(r"\n[ \t]*\n", text.strip())
    return "\n\n".join(re.sub(r"[ \t]*\n(?![ \t]*- )[ \t]*", " ", part.strip()) for part in paragraphs)
