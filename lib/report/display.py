"""What a cell shows: tables, figures and sentences, fit for a report: captions, alternative texts.

A notebook's cell ends in one of these:

    display.table(rows, caption)          rows by the keys of ``columns.yaml``
    display.tabled("page.table", files)   a table of ``tables.yaml``, a row for each entry of a product
    display.tell("page.sentence", n=12)   a sentence of ``templates/sentences`` (`lib.report.sentences`)
    display.card("page.card", record=r)   two columns from a template
    display.show(table, figure, words)    several below one another; None is left out
"""

from __future__ import annotations

import base64
import functools
import html
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from lib.language import CHINESE, language, retold, translated
from lib.report.sentences import cell_text, environment, in_markdown, sentence, word_rows
from lib.runs.files import data_file
from lib.statistics.intervals import Interval

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown
    from matplotlib.figure import Figure

    from lib.runs.run import Product, Run


Row = dict[str, Any]
"""A row of a table: cells by heading."""

Entry = Mapping[str, Any]
"""An object of a product's JSON file, as a step or a file of comparison.json."""

Shown = tuple["HTML | Markdown", ...]
"""Tables, figures and sentences that belong together; a cell shows them by `show`."""


# Tables: one registry of columns, one builder. A row is a mapping from keys of columns.yaml to plain values; a key that
# is not there is a heading of its own, which some tables make from the names of files or splits.

_ARROWS = {"up": " ↑", "down": " ↓"}


@dataclass(frozen=True)
class Column:
    """A column of a table in one language.

    Attributes:
        heading: with unit and the direction that is better: "KL, nats ↓".
        explanation: one sentence for whoever hovers over the heading; may be empty.
        form: format specification of its numbers, or SIZE; empty for four significant digits.
        times, per: what stored numbers are multiplied and divided by.
        interval: whether the limits of a stored number KEY lie beside it, as KEY_interval.
        numeric: whether its cells are set to the right.
    """

    heading: str
    explanation: str = ""
    form: str = ""
    times: float = 1
    per: float = 1
    interval: bool = False
    numeric: bool = False

    def value(self, entry: Any, key: str) -> Any:
        """The cell of an entry, which stores its number under `key`."""
        value = value_at(entry, key)
        if value is not None and self.interval:
            value = Interval.from_json(value, value_at(entry, f"{key}_interval"))
        if value is None or self.times == self.per == 1:
            return value
        return value.scaled(self.times) if isinstance(value, Interval) else self.times * value / self.per


def value_at(entry: Any, path: str) -> Any:
    """What lies in an entry of a JSON file, or in an object: "answers.kld"; None where there is no such key."""
    for name in path.split("."):
        entry = (entry or {}).get(name) if isinstance(entry, Mapping | None) else getattr(entry, name)
    return entry


def registry() -> dict[str, Column]:
    """The columns by key, and by heading as well: a heading is the key of a table that was made elsewhere."""
    return _registry(language())


def _in_unit(unit: str) -> str:
    return f"（{translated(unit)}）" if language() == CHINESE else f", {unit}"


@functools.cache
def _registry(_: str) -> dict[str, Column]:
    columns = {}
    for key, entry in data_file("report/columns.yaml").items():
        name, explanation = map(translated, entry["en"])
        unit = _in_unit(entry["unit"]) if "unit" in entry else ""
        heading = f"{name}{unit}{_ARROWS.get(entry.get('better'), '')}"
        stored = {part: entry[part] for part in ("times", "per", "interval") if part in entry}
        columns[key] = Column(heading, explanation, entry.get("format", ""), **stored)
    return {column.heading: column for column in columns.values()} | columns


_FUNCTIONS = {"Interval": Interval, "median": median, "sentence": sentence}
"""What formulas call."""


@functools.cache
def _formula(text: str) -> Callable[..., Any]:
    return environment("sentences", False).compile_expression(text.removeprefix("="))


def rows_of(name: str, entries: Iterable[Any], /, **values: Any) -> list[Row]:
    """The rows of a table of ``tables.yaml``, one for every entry of a JSON file, or object.

    Args:
        values: what its formulas and headings take beside the entry.
    """

    def cell(entry: Any, column: str, source: str) -> Any:
        if source.startswith("="):
            return _formula(source)(_FUNCTIONS | values, e=entry)
        return registry().get(column, Column(column)).value(entry, source)

    cells = [(key.format(**values), source or key) for key, source in data_file("report/tables.yaml")[name].items()]
    return [{column: cell(entry, column, source) for column, source in cells} for entry in entries]


@dataclass(frozen=True)
class Table:
    """A table whose cells are text: what notebooks, index pages and the command line show."""

    caption: str
    columns: list[Column]
    rows: list[list[str]]

    @property
    def headings(self) -> list[str]:
        return [column.heading for column in self.columns]

    def records(self) -> list[dict[str, str]]:
        """The rows by heading, for a terminal: with plain blanks where a page may not break the line."""
        rows = ([cell.replace("\u00a0", " ") for cell in row] for row in self.rows)
        return [dict(zip(self.headings, row, strict=True)) for row in rows]


_OF_USERS = frozenset(data_file("report/columns_of_users.yaml"))
"""Columns whose cells are never translated."""
_OURS = {"split", "decoding"}
"""Columns whose cells are, also in a table of texts of the data."""


def build(rows: Iterable[Row], caption: str, formats: Mapping[str, str] | None = None, of_users: bool = False) -> Table:
    """The table of some rows, in the order in which their keys first occur.

    >>> build([{"type": "Q8_0", "size_mb": 145.2}, {"type": "Q2_K"}], "Files.").rows
    [['Q8_0', '145'], ['Q2_K', '–']]

    Args:
        rows: mappings from keys of ``columns.yaml``, or headings, to numbers, `Interval`s and text.
        formats: format specifications for columns that are not registered.
        of_users: whether the cells hold texts of the data, which are never translated.
    """
    rows = list(rows) or [{"rows": "none"}]
    columns, cells = [], []
    for key in dict.fromkeys(key for row in rows for key in row):
        column, values = registry().get(key, Column(translated(key))), [row.get(key) for row in rows]
        numeric = all(isinstance(value, (int, float, Interval, type(None))) for value in values)
        columns.append(replace(column, numeric=numeric))
        form = (formats or {}).get(key, column.form)
        words = key in _OURS or (key not in _OF_USERS and not of_users)
        cells.append(
            [retold(value) if isinstance(value, str) and words else cell_text(value, form) for value in values]
        )
    return Table(retold(caption), columns, [list(row) for row in zip(*cells, strict=True)])


# Names that every table of a page marks, once they are known.

GRID_MARK = "‡"
_names: tuple[str, ...] = ()
_caption = ""


def mark_names(names: Iterable[str], caption: str) -> None:
    """From now on tables of this page (this process) write the mark behind these names, and the caption below.

    Args:
        names: of files and tensor types; a later call replaces them, none unmarks.
    """
    global _names, _caption
    _names, _caption = tuple(dict.fromkeys(names)), caption


def marked(text: str) -> str:
    """The text with the mark behind every name that stands in it as a word of its own."""
    if not _names:
        return text
    pattern = "|".join(map(re.escape, sorted(_names, key=len, reverse=True)))
    return re.sub(rf"(?<![\w-])({pattern})(?![\w‡-])", rf"\1{GRID_MARK}", text)


# What a cell shows: a figure with caption and alternative text, a table, a sentence with computed numbers.


def as_html(text: str) -> HTML:
    from IPython.display import HTML

    return HTML(text)


def figure(fig: Figure, caption: str, alt: str, tips: Mapping[str, str] | None = None) -> HTML:
    """Close `fig` and return it as <figure>: a PNG, or an SVG where parts of it have tooltips.

    Args:
        caption: what is seen, with units, n and the kind of uncertainty.
        alt: the same for a reader who does not see it: the message, not the looks.
        tips: gid of an artist → what is shown to whoever points at it.
    """
    import matplotlib.pyplot as plt
    from matplotlib import rcParams
    from matplotlib.text import Text

    for words in fig.findobj(Text) if len(rcParams["font.family"]) > 1 else ():  # with Chinese glyphs
        words.set_text(retold(words.get_text()))
    buffer = io.BytesIO()
    fig.savefig(buffer, format="svg" if tips else "png", bbox_inches="tight")
    narrowest = _narrowest(fig)  # ticks have words only once they are drawn
    plt.close(fig)
    described = html.escape(alt, quote=True)
    narrow = f";min-width:{narrowest}px" if narrowest else ""
    if tips:
        drawing = _with_tips(buffer.getvalue().decode(), described, tips, narrow)
    else:
        data = base64.b64encode(buffer.getvalue()).decode()
        drawing = f'<img style="max-width:100%{narrow}" alt="{described}" src="data:image/png;base64,{data}">'
    if narrowest:
        drawing = markup("scrolling_figure", Markup(drawing))
    shape = ' class="tall"' if fig.get_figheight() > fig.get_figwidth() else ""
    return as_html(f"<figure{shape}>{drawing}<figcaption>{html.escape(caption)}</figcaption></figure>")


_LETTERS = 9
"""CSS pixels of a figure's smallest letters: one that is shown narrower than that takes scrolls in a box of its own."""
_PHONE = 400
"""CSS pixels: a figure that asks for no more is shrunk to the width of a phone's window."""


def _narrowest(fig: Figure) -> int:
    """CSS pixels below which the smallest words of a figure could not be read; 0 where a phone is wide enough."""
    from matplotlib.text import Text

    sizes = [words.get_fontsize() for words in fig.findobj(Text) if words.get_text() and words.get_visible()]
    width = round(fig.get_figwidth() * 72 * _LETTERS / min(sizes))
    return width if width > _PHONE else 0


def _with_tips(svg: str, alt: str, tips: Mapping[str, str], narrow: str) -> str:
    """A drawing of matplotlib to stand in a page: without a head and a style sheet of its own, with tooltips."""
    drawing = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.S)
    looks = f"width:100%;max-width:42rem{narrow};height:auto;stroke-linejoin:round;stroke-linecap:butt"
    drawing = drawing.replace("<svg ", f'<svg role="img" aria-label="{alt}" style="{looks}" ', 1)
    for name, words in tips.items():
        drawing = drawing.replace(f'<g id="{name}">', f'<g id="{name}"><title>{html.escape(words)}</title>', 1)
    return drawing


def stacked(*parts: HTML) -> HTML:
    """Tables and figures below one another."""
    return as_html("".join(part.data for part in parts))


def markup(macro: str, *values: Any) -> str:
    """HTML by a macro of ``templates/pages/macros.html.j2``."""
    return str(getattr(environment("pages", True).get_template("macros.html.j2").module, macro)(*values))


def table(
    rows: Iterable[Mapping[str, Any]], caption: str, formats: Mapping[str, str] | None = None, of_users: bool = False
) -> HTML:
    """Rows as an HTML table with a caption; see `build`. Names that `mark_names` knows are marked."""
    plain = build(rows, caption, formats, of_users)
    made = Table(
        plain.caption,
        [replace(column, heading=marked(column.heading)) for column in plain.columns],
        [[marked(cell) for cell in row] for row in plain.rows],
    )
    if made != plain:  # compared, not searched for: a text of the data may hold the sign itself
        made = replace(made, caption=f"{plain.caption} {GRID_MARK} {_caption}")
    return as_html(f'<div class="table">{markup("data_table", made)}</div>')


def tabled(name: str, entries: Iterable[Any], /, **values: Any) -> HTML:
    """A table of ``tables.yaml`` below its caption, the sentence of the same name: both take the values."""
    return table(rows_of(name, entries, **values), sentence(name, **values))


def key_values(values: Mapping[str, Any], caption: str) -> HTML:
    """A mapping as a table of two columns."""
    pairs = [(translated(str(key)), retold(cell_text(value))) for key, value in values.items()]
    return as_html(f'<div class="table">{markup("pairs", pairs, retold(caption))}</div>')


def card(name: str, /, **values: Any) -> HTML:
    """A table of two columns from a template whose first line is the caption, and the others "label | value".

    card("quantize.imatrix_card", record=matrix.record)
    """
    (caption,), *pairs = word_rows(name, **values)
    return as_html(f'<div class="table">{markup("pairs", pairs, caption)}</div>')


def show(*parts: HTML | Markdown | None) -> None:
    """Show tables, figures and sentences of a cell below one another; None, what a run has not, is left out."""
    from IPython.display import display

    for part in parts:
        if part is not None:
            display(part)


def say(text: str, **metadata: Any) -> Markdown:
    """A paragraph whose numbers were computed (Markdown)."""
    from IPython.display import Markdown

    shown = Markdown("", metadata=metadata or None)
    shown.data = text  # handed over, one that begins with http would be taken for an address, and fetched
    return shown


def tell(name: str, /, **values: Any) -> Markdown:
    """`sentence` as a paragraph: tell("evaluate.decoding", rows=20, first=8, most=256)."""
    return say(in_markdown(name, **values))


def absent(name: str, /, **values: Any) -> Markdown:
    """Why there is nothing to show, for whoever runs the notebook; a section that says no more is left off the page."""
    return say(in_markdown(name, **values), **{ABSENT: True})


ABSENT = "absent"
"""Metadata of an output that says why there is none."""


def made(product: Product) -> Markdown:
    """The sentence of a product, and what an interrupted run had already done of it (its facts "found_done")."""
    left: dict[str, list[str]] = defaultdict(list)
    for name, words in product.entry.facts.get("found_done", {}).items():
        left[words].append(name)
    return tell("display.made", message=retold(product.message), left=left)


def stamps(run: Run) -> HTML:
    """What every page of this run must say (sample data, offline base, fallbacks), one line each."""
    return as_html(markup("banners", map(retold, run.stamps())))


def texts(rows: Iterable[Mapping[str, Any]], caption: str, longest: int = 160) -> HTML:
    """Rows that hold reviews, as `table`; a text over `longest` characters is cut, which the dots say."""

    def shortened(value: Any) -> Any:
        return f"{value[:longest]} …" if isinstance(value, str) and len(value) > longest else value

    short = [{key: shortened(value) for key, value in row.items()} for row in rows]
    return as_html(f'<div class="texts">{table(short, caption, of_users=True).data}</div>')


def tokens(pieces: Sequence[str], in_loss: Sequence[bool], caption: str) -> HTML:
    """A tokenized example; the tokens that the loss is computed on are marked (and underlined, for print)."""
    return as_html(markup("tokens", zip(pieces, in_loss, strict=True), caption))
