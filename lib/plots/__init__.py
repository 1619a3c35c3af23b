"""Figures, tables and sentences of a notebook, fit for a report: captions, alternative text, safe colours, no gaps."""

from __future__ import annotations

from lib.plots.display import banner, figure, key_values, made, say, stamps, table, texts, tokens
from lib.plots.style import font_note, readable, use_style

__all__ = [
    "banner",
    "figure",
    "font_note",
    "key_values",
    "made",
    "readable",
    "say",
    "stamps",
    "table",
    "texts",
    "tokens",
    "use_style",
]
