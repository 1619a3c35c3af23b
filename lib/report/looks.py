"""One look for every figure: colour-blind-safe colours that never carry meaning alone, words in the process's language,
and a font with Chinese."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

from lib.language import ENGLISH, retold, speaking
from lib.report.sentences import TEMPLATES, sentence
from lib.runs.files import data_file

CJK_FONTS = tuple(data_file("report/fonts.yaml"))

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6b6b6b"
"""Okabe and Ito's palette, the parts that stay apart for every common kind of colour blindness and in print."""


@functools.cache
def cjk_font() -> str | None:
    """The first installed font that has Chinese glyphs; None when there is none."""
    from matplotlib import font_manager

    listed = {font.fname for font in font_manager.fontManager.ttflist}
    for path in sorted(set(font_manager.findSystemFonts()) - listed):  # installed after matplotlib wrote its list
        with contextlib.suppress(RuntimeError, OSError):  # a file that FreeType cannot read
            font_manager.fontManager.addfont(path)
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return next((name for name in CJK_FONTS if name in installed), None)


def drawn(text: Callable[[], str]) -> str:
    """Words of a figure: in English where no installed font has Chinese glyphs."""
    with contextlib.nullcontext() if cjk_font() else speaking(ENGLISH):
        return text()


def word(text: str) -> str:
    """A word of a figure, or what a product says, as of a step of the error ladder."""
    return drawn(lambda: retold(text))


def axis_label(name: str, /, **values: Any) -> str:
    """A sentence that stands at an axis."""
    return drawn(lambda: sentence(name, **values))


LONGEST_NAME = 24
"""Characters of a label's name in a figure."""


def readable(names: Sequence[str]) -> list[str]:
    """Names as a figure can show them, or 'label 0', 'label 1', … where no Chinese font is installed.

    A long name is cut, a line end is a space, and a dollar sign is escaped: two of them would be mathematics.
    """
    if not cjk_font() and not all(name.isascii() for name in names):
        return [f"label {index}" for index in range(len(names))]
    lines = [" ".join(name.split()) for name in names]
    return [(name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…").replace("$", r"\$") for name in lines]


def replaced(names: Sequence[str]) -> list[tuple[str, str]]:
    """(what a figure shows, name) where names had to be replaced; none where they stand as they are."""
    shown = [name.replace(r"\$", "$") for name in readable(names)]
    return [] if shown == list(names) else list(zip(shown, names, strict=True))


def use_style() -> None:
    """Set the look of every following figure."""
    from matplotlib import rcParams, style

    style.use(TEMPLATES / "workbook.mplstyle")
    # concrete names: only then is a missing glyph looked for in the next font
    rcParams["font.family"] = [name for name in ("DejaVu Sans", cjk_font()) if name]


def panels(
    width: float = 6.0, height: float = 3.6, columns: int = 1, rows: int = 1, heights: Sequence[float] | None = None
) -> tuple[Any, Any]:
    """An empty figure in the common style, and its axes: one panel, or several beside or below one another.

    Args:
        width, height: inches; a figure wider than 6 cannot be read on a phone.
        heights: of the rows, relative to one another.
    """
    import matplotlib.pyplot as plt

    use_style()
    return plt.subplots(rows, columns, figsize=(width, height), height_ratios=heights, layout="constrained")
