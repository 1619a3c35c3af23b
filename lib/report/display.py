"""One look for every figure: colour-blind-safe colours that never carry meaning alone, and a font with Chinese.
How numbers are written in tables, by the name of their column; a table in a notebook need not repeat it.
Names that every table of a page marks, once they are known.
What a cell shows: a figure with caption and alternative text, a table, a sentence with computed numbers.
Figures, tables and sentences of a notebook, fit for a report: captions, alternative text, safe colours, no gaps.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown
    from matplotlib.figure import Figure

    from lib.runs.run import Product, Run


# One look for every figure: colour-blind-safe colours that never carry meaning alone, and a font with Chinese.

CJK_FONTS = (
    *("Noto Sans CJK SC", "Source Han Sans SC", "Source Han Sans CN", "Noto Sans SC", "WenQuanYi Micro Hei"),
    *("WenQuanYi Zen Hei", "Noto Sans CJK JP", "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC"),
    *("Hiragino Sans GB", "Heiti SC", "Arial Unicode MS"),
)

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6b6b6b"
"""Okabe and Ito's palette, the parts that stay apart for every common kind of colour blindness and in print."""


@functools.cache
def cjk_font() -> str | None:
    """The first installed font that has Chinese glyphs; None when there is none."""
    from matplotlib import font_manager

    def known() -> str | None:
        installed = {font.name for font in font_manager.fontManager.ttflist}
        return next((name for name in CJK_FONTS if name in installed), None)

    return known() or (known() if _add_new_fonts() else None)


def _add_new_fonts() -> int:
    """Make fonts known that were installed after matplotlib wrote its list of fonts; returns their number."""
    from matplotlib import font_manager

    listed, added = {font.fname for font in font_manager.fontManager.ttflist}, 0
    for path in sorted(set(font_manager.findSystemFonts()) - listed):
        with contextlib.suppress(RuntimeError, OSError):  # a file that FreeType cannot read
            font_manager.fontManager.addfont(path)
            added += 1
    return added


def readable(names: Sequence[str]) -> list[str]:
    """Names as a figure can show them: unchanged, or 'label 0', 'label 1', … where no Chinese font is installed."""
    if cjk_font() or all(name.isascii() for name in names):
        return list(names)
    return [f"label {index}" for index in range(len(names))]


def font_note(names: Sequence[str]) -> str:
    """A sentence for the caption when names had to be replaced; empty otherwise."""
    shown = readable(names)
    if shown == list(names):
        return ""
    pairs = ", ".join(f"{short} = {name}" for short, name in zip(shown, names, strict=True))
    return f" No Chinese font is installed, so the figure says {pairs}."


def use_style() -> None:
    """Set the look of every following figure."""
    import matplotlib as mpl
    from cycler import cycler

    colours = cycler(color=[BLUE, ORANGE, GREEN, PINK]) + cycler(linestyle=["-", "--", "-.", ":"])
    fonts = [name for name in ("DejaVu Sans", cjk_font()) if name]
    mpl.rcParams.update(
        {
            "axes.prop_cycle": colours,
            "font.family": fonts,  # concrete names: only then is a missing glyph looked for in the next font
            "axes.unicode_minus": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "grid.linewidth": 0.6,
            "figure.figsize": (7.0, 3.6),
            "figure.dpi": 100,
            "savefig.dpi": 150,
            "font.size": 10,
            "legend.frameon": False,
        }
    )


# How numbers are written in tables, by the name of their column; a table in a notebook need not repeat it.

FORMATS: dict[str, str] = {
    **dict.fromkeys(("accuracy ↑", "macro-F1 ↑", "precision", "recall", "F1", "95 % low", "95 % high"), ".3f"),
    **dict.fromkeys(("MB", "predicted, MB"), ",.3f"),
    **dict.fromkeys(("bits per weight", "bits / weight", "bits", "load, s", "ms a row", "MDE, points"), ".2f"),
    **dict.fromkeys(("MiB", "peak memory, MiB", "prompt, tokens/s", "generation, tokens/s"), ",.0f"),
    **dict.fromkeys(
        (
            "KL, nats ↓",
            "label KL ↓",
            "leak-free label KL",
            "mean",
            "± (1.96 SE)",
            "median",
            "99th percentile",
            "largest",
        ),
        ".2e",
    ),
    **dict.fromkeys(("same top token ↑", "same first answer token ↑", "same top ↑", "share of the source"), ".1%"),
    "share of the effect": ".3%",
    **dict.fromkeys(("p", "p (Holm)", "p (TOST)", "TOST (Holm)"), ".2g"),
    **dict.fromkeys(("difference, points", "from, points", "to, points"), "+.2f"),
    **dict.fromkeys(("perplexity ↓", "PPL ↓", "±"), ".3f"),
    **dict.fromkeys(("truncated share", "seconds"), ".3g"),
    "margin change, nats": "+.4f",
    "Δ macro-F1": "+.3f",
    "ratio to reference": ".4f",
    "probability": ".3f",
    "answer PPL ↓": ".3f",
    "change, %": "+.3f",
}


def with_interval(value: float, limits: Sequence[float | None], form: str = ".2g") -> str:
    """ "0.1 [0.05, 0.2]"; "0.1 (no interval)" where a limit is open (None), as with two or three rows."""
    low, high = limits
    if low is None or high is None:
        return f"{value:{form}} (no interval)"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


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


def caption_of_marks() -> str:
    """What the mark means."""
    return f"{GRID_MARK} {_caption}"


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
