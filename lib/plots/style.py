"""One look for every figure: colour-blind-safe colours that never carry meaning alone, and a font with Chinese."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

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
