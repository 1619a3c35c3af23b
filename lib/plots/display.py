"""What a cell shows: a figure with caption and alternative text, a table, a sentence with computed numbers."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lib.plots.formats import FORMATS
from lib.plots.marks import caption_of_marks, marked

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown
    from matplotlib.figure import Figure

    from lib.run import Product, Run


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


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_cell(item)}" for key, item in value.items())
    return str(value)


def table(rows: Iterable[Mapping[str, Any]], caption: str, formats: Mapping[str, str] | None = None) -> HTML:
    """Rows as an HTML table with a caption.

    Args:
        rows: one mapping a row; the keys of the first are the columns (name them with their units).
        formats: a format specification for columns that `formats.FORMATS` does not know, e.g. {"share": ".1%"}.
    """
    known = {**FORMATS, **(formats or {})}
    rows = list(rows) or [{"rows": "none"}]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {c for c in columns if all(isinstance(r.get(c), (int, float, type(None))) for r in rows)}

    any_marked = False

    def named(text: str) -> str:
        nonlocal any_marked
        written = marked(text)
        any_marked = any_marked or written != text  # a text of the data may hold the sign itself
        return written

    def shown(column: str, value: Any) -> str:
        given = known.get(column)
        if given and isinstance(value, (int, float)) and not (isinstance(value, float) and math.isnan(value)):
            return "0" if value == 0 and given.endswith("e") else format(value, given)
        return named(_cell(value))

    def tag(name: str, column: str, text: str) -> str:
        kind = ' class="number"' if column in numeric else ""
        scope = ' scope="col"' if name == "th" else ""
        return f"<{name}{kind}{scope}>{html.escape(text)}</{name}>"

    head = "".join(tag("th", c, named(c)) for c in columns)
    body = "".join("<tr>" + "".join(tag("td", c, shown(c, row.get(c))) for c in columns) + "</tr>" for row in rows)
    if any_marked:
        caption = f"{caption} {caption_of_marks()}"
    return _html(
        f'<div class="table"><table><caption>{html.escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def key_values(values: Mapping[str, Any], caption: str) -> HTML:
    """A mapping as a table of two columns."""
    body = "".join(
        f'<tr><th scope="row">{html.escape(str(key))}</th><td>{html.escape(_cell(value))}</td></tr>'
        for key, value in values.items()
    )
    return _html(
        f'<div class="table"><table class="key-values"><caption>{html.escape(caption)}</caption>'
        f"<tbody>{body}</tbody></table></div>"
    )


def say(text: str) -> Markdown:
    """A paragraph whose numbers were computed (Markdown)."""
    from IPython.display import Markdown

    return Markdown(text)


def made(product: Product) -> Markdown:
    """The sentence of a product, and what an interrupted try had done of it (its facts "found_done")."""
    names: dict[str, list[str]] = {}
    for name, words in product.entry.facts.get("found_done", {}).items():
        names.setdefault(words, []).append(name)
    done = "; ".join(f"{', '.join(own)}: {words}" for words, own in names.items())
    return say(product.message + (f" An interrupted try had left: {done}." if done else ""))


def banner(text: str) -> HTML:
    """A warning that must not be overlooked."""
    return _html(f'<p class="stamp" role="note"><strong>{html.escape(text)}</strong></p>')


def stamps(run: Run) -> HTML:
    """What every page of this run must say (sample data, offline base, fallbacks), one line each."""
    lines = "".join(f'<p class="stamp" role="note"><strong>{html.escape(note)}</strong></p>' for note in run.stamps())
    return _html(lines)


def texts(rows: Iterable[Mapping[str, Any]], caption: str, longest: int = 160) -> HTML:
    """Rows that hold reviews, as `table`; a text over `longest` characters is cut, which the dots say."""
    short = [{key: _shortened(value, longest) for key, value in row.items()} for row in rows]
    return _html(f'<div class="texts">{table(short, caption).data}</div>')


def _shortened(value: Any, longest: int) -> Any:
    return f"{value[:longest]} …" if isinstance(value, str) and len(value) > longest else value


def tokens(pieces: Sequence[str], in_loss: Sequence[bool], caption: str) -> HTML:
    """A tokenized example; the tokens that the loss is computed on are marked (and underlined, for print)."""
    spans = []
    for piece, learned in zip(pieces, in_loss, strict=True):
        shown = html.escape(piece).replace("\n", "↵<br>")
        spans.append(f'<mark class="loss"><u>{shown}</u></mark>' if learned else f'<span class="token">{shown}</span>')
    text = "".join(spans)
    return _html(
        f'<figure class="tokens"><p lang="zh">{text}</p><figcaption>{html.escape(caption)}</figcaption></figure>'
    )
