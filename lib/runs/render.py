"""Long texts from Jinja templates: cards, guides, papers, sentences; in the language of the process."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from lib.language import retold, translated_code, translated_template

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2.ext import Extension

_LIB = Path(__file__).resolve().parents[1]


def message_name(template: Path) -> str:
    """How the catalogue names a template: its path below lib, without what says that it is one."""
    parts = template.resolve().relative_to(_LIB).with_suffix("").parts
    return "/".join(part for part in parts if part not in ("templates", "sentences"))


def templates(folder: Path, **options: bool) -> Environment:
    """The templates of a folder; a missing value is an error. `options`: of jinja2.Environment."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    class Translated(FileSystemLoader):
        def get_source(self, environment: Environment, template: str) -> Any:
            text, path, fresh = super().get_source(environment, template)
            if _LIB in Path(path).resolve().parents:
                told = translated_code if template.endswith(".py.j2") else translated_template
                text = told(text, message_name(Path(path)))
            return text, path, fresh

    made = Environment(loader=Translated(folder), undefined=StrictUndefined, **options)
    made.globals["_"] = retold
    return made


_MARKDOWN = re.compile(
    r"""( [\\`*|~$] | (?<!\w)_ | _(?!\w) | \](?=[(\[:]) | :(?=//) | ^[#+=-]+(?=\s|$) | (?<=^\d)[.)](?=\s|$) )""", re.X
)
"""What Markdown takes for more than a character; one inside a word (Q4_K_M) or a pair of brackets alone is none."""


def as_written(text: str) -> str:
    """A text of a user's (a parameter, a file's name) inside Markdown: shown as it is, never markup or a link."""
    return html.escape(_MARKDOWN.sub(r"\\\1", text), quote=False)


def _value_as_written(value: Any) -> Any:
    """`as_written` of any value of a template; `{{ value | markdown }}` is Markdown of our own."""
    plain = not isinstance(value, str) or isinstance(value, Markup)
    return value if plain else as_written(_LINES.sub(" ", value))


def megabytes(size: float) -> str:
    """Bytes in MB (10⁶ bytes), see `three_digits`.

    >>> [megabytes(size) for size in (1_234_567, 29_996_000, 987_654_321, 1_234_567_890, 91_403, 132, 0)]
    ['1.23', '30.0', '988', '1,235', '0.091', '< 0.001', '0']
    """
    return three_digits(size / 1e6)


def three_digits(value: float) -> str:
    """A size: three significant digits, every digit before the point, and at most three behind it."""
    if 0 < value < 5e-4:
        return "< 0.001"
    rounded = float(f"{value:.3g}")
    return f"{value:,.{min(3, max(0, 2 - math.floor(math.log10(rounded))))}f}" if rounded else "0"


def _in_docstring(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


_PLACES = re.compile(r"(```)|(`)|(?:^|(?<=\n))(---)(?=\n)")
"""What begins and ends a place where Markdown shows texts as they are: a block of code, code, the head of the file."""
_RUNS = re.compile("`+")
_LINES = re.compile(r"\s*[\r\n]+\s*")
_SPECIAL = re.compile(r"[^\w\s.,:;/()-]")


def code_span(text: str, row: bool = False) -> str:
    """A text as code in a line of Markdown, whatever it holds: the fence is longer than its runs of backticks.

    Args:
        row: whether it stands in a table, where a bar ends the cell even inside of code: HTML then says it.
    """
    text = _LINES.sub(" ", text)
    if row and "|" in text:
        return f"<code>{_SPECIAL.sub(lambda found: f'&#{ord(found[0])};', text)}</code>"
    lengths = {len(run) for run in _RUNS.findall(text)}
    fence = "`" * next(n for n in range(1, len(lengths) + 2) if n not in lengths)
    blank = " " if not text or "`" in (text[0], text[-1]) or (text.strip() and text[0] == text[-1] == " ") else ""
    return f"{fence}{blank}{text}{blank}{fence}"


def code_block(text: str) -> str:
    """A block of code; `text` begins with the name of its language and ends with a line end."""
    return f"{(fence := '`' * max(3, 1 + max(map(len, _RUNS.findall(text)), default=0)))}{text}{fence}"


def _values_of_markdown() -> type[Extension]:
    """Makes values of a template show what they hold, wherever they stand, while the template is read.

    In running text or a table a value goes through `as_written`; code and blocks of code go as a whole through
    `code_span` and `code_block`, so that no value can end them. In the head of the file values are as they are.

    Macros write for several places: their own values are as they are, and what they write counts as a value.
    """
    from jinja2.ext import Extension
    from jinja2.lexer import Token

    filters = {"`": "code_span", "```": "code_block"}

    def tokens(line: int, *parts: tuple[str, str]) -> Iterator[Token]:
        return (Token(line, *part) for part in parts)

    def block(line: int, *parts: tuple[str, str]) -> Iterator[Token]:
        return tokens(line, ("block_begin", "{%"), *parts, ("block_end", "%}"))

    class Values(Extension):
        def filter_stream(self, stream: Any) -> Iterator[Token]:
            inside, heads, macros, last, shown, written = "", 0, 0, "", False, ""
            for token in stream:
                if token.type == "data" and not macros:
                    begin, text = 0, token.value
                    for found in _PLACES.finditer(text):
                        kind = found[0]
                        if kind == "---" and heads < 2 and inside in ("", "---"):
                            heads, inside = heads + 1, "" if inside else kind
                        elif kind in filters and inside in ("", kind):
                            yield Token(token.lineno, "data", text[begin : found.start()])
                            begin = found.end()
                            if inside:
                                yield from block(token.lineno, ("name", "endfilter"))
                            else:
                                row = (written + text[: found.start()]).rpartition("\n")[2].startswith("|")
                                given = [("lparen", "("), ("name", "true"), ("rparen", ")")] if row else []
                                name = ("name", filters[kind])
                                yield from block(
                                    token.lineno, ("name", "filter"), name, *(given if kind == "`" else [])
                                )
                            inside = "" if inside else kind
                    written = (written + text).rpartition("\n")[2]
                    last = token.type
                    yield Token(token.lineno, "data", text[begin:])
                    continue
                if token.type == "name" and last == "block_begin":
                    macros += (token.value == "macro") - (token.value == "endmacro")
                elif token.type == "variable_end" and shown:
                    yield from tokens(token.lineno, ("rparen", ")"), ("pipe", "|"), ("name", "as_written"))
                last = token.type
                yield token
                if token.type == "variable_begin" and (shown := not inside and not macros):
                    yield Token(token.lineno, "lparen", "(")

    return Values


FILTERS = {
    "as_written": _value_as_written,
    "code_block": code_block,
    "code_span": code_span,
    "docstring": _in_docstring,
    "form": format,
    "markdown": Markup,
    "mb": lambda size: f"{megabytes(size)} MB",
    "megabytes": megabytes,
    "python": repr,
}


def render(template: Path, **values: Any) -> str:
    """The text of a template with the values put in, and a missing value is an error.

    In Markdown (.md.j2) values in the text are shown as they are written; elsewhere nothing is escaped.

    A line that holds nothing but a statement leaves no line. `{{ number | form(".2f") }}` formats as Python does,
    `{{ value | python }}` is the value as Python source, `{{ value | docstring }}` a text inside of a docstring,
    `{{ bytes | mb }}` a size.
    """
    environment = templates(template.parent, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= FILTERS
    if template.name.endswith(".md.j2"):
        environment.add_extension(_values_of_markdown())
    return environment.get_template(template.name).render(values)
