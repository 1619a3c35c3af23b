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

from lib.report.sentences import LANGUAGE, cell_text, environment, sentence, word_rows
from lib.runs.files import data_file
from lib.statistics.intervals import Interval
from lib.statistics.losses import kept_words

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
        form: format specification of its numbers; empty for four significant digits.
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


@functools.cache
def registry(language: str = LANGUAGE) -> dict[str, Column]:
    """The columns by key, and by heading as well: a heading is the key of a table that was made elsewhere."""
    columns = {}
    for key, entry in data_file("report/columns.yaml").items():
        name, explanation = entry[language]
        unit = f", {entry['unit']}" if "unit" in entry else ""
        heading = f"{name}{unit}{_ARROWS.get(entry.get('better'), '')}"
        stored = {part: entry[part] for part in ("times", "per", "interval") if part in entry}
        columns[key] = Column(heading, explanation, entry.get("format", ""), **stored)
    return {column.heading: column for column in columns.values()} | columns


_FUNCTIONS = {"Interval": Interval, "kept": kept_words, "median": median, "sentence": sentence}
"""What formulas call."""


@functools.cache
def _formula(text: str) -> Callable[..., Any]:
    return environment(f"sentences/{LANGUAGE}", False).compile_expression(text.removeprefix("="))


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


def build(rows: Iterable[Row], caption: str, formats: Mapping[str, str] | None = None) -> Table:
    """The table of some rows, in the order in which their keys first occur.

    >>> build([{"type": "Q8_0", "size_mb": 145.2}, {"type": "Q2_K"}], "Files.").rows
    [['Q8_0', '145.200'], ['Q2_K', '–']]

    Args:
        rows: mappings from keys of ``columns.yaml``, or headings, to numbers, `Interval`s and text.
        formats: format specifications for columns that are not registered.
    """
    rows = list(rows) or [{"rows": "none"}]
    columns, cells = [], []
    for key in dict.fromkeys(key for row in rows for key in row):
        column, values = registry().get(key, Column(key)), [row.get(key) for row in rows]
        numeric = all(isinstance(value, (int, float, Interval, type(None))) for value in values)
        columns.append(replace(column, numeric=numeric))
        cells.append([cell_text(value, (formats or {}).get(key, column.form)) for value in values])
    return Table(caption, columns, [list(row) for row in zip(*cells, strict=True)])


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


def _html(text: str) -> HTML:
    from IPython.display import HTML

    return HTML(text)


def figure(fig: Figure, caption: str, alt: str) -> HTML:
    """Close `fig` and return it as <figure>.

    Args:
        caption: what is seen, with units, n and the kind of uncertainty.
        alt: the same for a reader who does not see it: the message, not the looks.
    """
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", bbox_inches="tight")
    plt.close(fig)
    data = base64.b64encode(buffer.getvalue()).decode()
    return _html(
        f'<figure><img style="max-width:100%" alt="{html.escape(alt, quote=True)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def side_by_side(figures: Iterable[HTML]) -> HTML:
    """Figures that stand beside one another where the screen is wide enough, and below one another on a phone."""
    parts = (f'<div style="flex:1 1 28em;min-width:0">{shown.data}</div>' for shown in figures)
    return _html(f'<div style="display:flex;flex-wrap:wrap;gap:0 1em">{"".join(parts)}</div>')


def stacked(*parts: HTML) -> HTML:
    """Tables and figures below one another."""
    return _html("".join(part.data for part in parts))


def markup(macro: str, *values: Any) -> str:
    """HTML by a macro of ``templates/pages/macros.html.j2``."""
    return str(getattr(environment("pages", True).get_template("macros.html.j2").module, macro)(*values))


def table(rows: Iterable[Mapping[str, Any]], caption: str, formats: Mapping[str, str] | None = None) -> HTML:
    """Rows as an HTML table with a caption; see `build`. Names that `mark_names` knows are marked."""
    plain = build(rows, caption, formats)
    made = Table(
        caption,
        [replace(column, heading=marked(column.heading)) for column in plain.columns],
        [[marked(cell) for cell in row] for row in plain.rows],
    )
    if made != plain:  # compared, not searched for: a text of the data may hold the sign itself
        made = replace(made, caption=f"{caption} {GRID_MARK} {_caption}")
    return _html(f'<div class="table">{markup("data_table", made)}</div>')


def tabled(name: str, entries: Iterable[Any], /, **values: Any) -> HTML:
    """A table of ``tables.yaml`` below its caption, the sentence of the same name: both take the values."""
    return table(rows_of(name, entries, **values), sentence(name, **values))


def key_values(values: Mapping[str, Any], caption: str) -> HTML:
    """A mapping as a table of two columns."""
    pairs = [(str(key), cell_text(value)) for key, value in values.items()]
    return _html(f'<div class="table">{markup("pairs", pairs, caption)}</div>')


def card(name: str, /, **values: Any) -> HTML:
    """A table of two columns from a template whose first line is the caption, and the others "label | value".

    card("quantize.imatrix_card", record=matrix.record)
    """
    (caption,), *pairs = word_rows(name, **values)
    return _html(f'<div class="table">{markup("pairs", pairs, caption)}</div>')


def show(*parts: HTML | Markdown | None) -> None:
    """Show tables, figures and sentences of a cell below one another; None, what a run has not, is left out."""
    from IPython.display import display

    for part in parts:
        if part is not None:
            display(part)


_MARKDOWN = re.compile(r"([\\`*_\[\]|~$])")


def as_written(text: str) -> str:
    """A text of a user's (a parameter, a file's name) inside Markdown: shown as it is, never markup or a link."""
    return html.escape(_MARKDOWN.sub(r"\\\1", text), quote=False)


def say(text: str) -> Markdown:
    """A paragraph whose numbers were computed (Markdown)."""
    from IPython.display import Markdown

    return Markdown(text)


def tell(name: str, /, **values: Any) -> Markdown:
    """`sentence` as a paragraph: tell("evaluate.decoding", rows=20, first=8, most=256)."""
    return say(sentence(name, **values))


def made(product: Product) -> Markdown:
    """The sentence of a product, and what an interrupted run had already done of it (its facts "found_done")."""
    left: dict[str, list[str]] = defaultdict(list)
    for name, words in product.entry.facts.get("found_done", {}).items():
        left[words].append(name)
    return tell("display.made", message=as_written(product.message), left=left)


def stamps(run: Run) -> HTML:
    """What every page of this run must say (sample data, offline base, fallbacks), one line each."""
    return _html(markup("banners", run.stamps()))


def texts(rows: Iterable[Mapping[str, Any]], caption: str, longest: int = 160) -> HTML:
    """Rows that hold reviews, as `table`; a text over `longest` characters is cut, which the dots say."""

    def shortened(value: Any) -> Any:
        return f"{value[:longest]} …" if isinstance(value, str) and len(value) > longest else value

    short = [{key: shortened(value) for key, value in row.items()} for row in rows]
    return _html(f'<div class="texts">{table(short, caption).data}</div>')


def tokens(pieces: Sequence[str], in_loss: Sequence[bool], caption: str) -> HTML:
    """A tokenized example; the tokens that the loss is computed on are marked (and underlined, for print)."""
    return _html(markup("tokens", zip(pieces, in_loss, strict=True), caption))
