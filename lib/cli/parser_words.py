"""What the option parser says by itself (usage, headings, errors) in the language of this process.

Its English is left as it is: nothing here is loaded for it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

import typer

from lib.cli.console import tell, width
from lib.language import HELP, translated

_WIDE = r"\u2e80-\uffef"
_WORDS = re.compile(rf"\s+|[（“《]*(?:[{_WIDE}]|[^\s{_WIDE}]+)[，。；：、！？）”》]*")
"""Blanks, words, and single Chinese characters with the marks that no line may end or begin with."""


def fill(text: str, columns: int, first: str = "", rest: str = "") -> str:
    """A paragraph in lines of so many columns; a Chinese character takes two of them, and a line may end behind it."""
    lines, line = [], first
    for word in _WORDS.findall(text):
        if width(line + word.rstrip()) > columns and line.strip():
            lines.append(line.rstrip())
            line = rest
        line += word if line.strip() or not word.isspace() else ""
    return "\n".join([*lines, line.rstrip()])


def _wrap(
    text: str, width: int = 78, initial_indent: str = "", subsequent_indent: str = "", preserve_paragraphs: bool = False
) -> str:
    """In place of the formatter's own, which counts characters and ends lines at blanks alone."""
    parts = re.split(r"\n\s*\n", text.strip()) if preserve_paragraphs else [text]
    return "\n\n".join(fill(" ".join(part.split("\n")), width, initial_indent, subsequent_indent) for part in parts)


def speak() -> None:
    """From now on the parser says what it says in the language of this process."""
    context = next(kind for kind in typer.Context.__mro__ if "formatter_class" in vars(kind))
    plain: Any = context.formatter_class
    usage = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")

    class Formatter(plain):  # type: ignore[misc]
        def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
            super().write_usage(prog, args, prefix or f"{translated('Usage', HELP)}：")

        def write_heading(self, heading: str) -> None:
            self.write(f"{'':>{self.current_indent}}{translated(heading, HELP)}：\n")

        def write_dl(self, rows: Sequence[tuple[str, str]], *sizes: int, **named: int) -> None:
            super().write_dl([(first, translated(second, HELP)) for first, second in rows], *sizes, **named)

    def show(error: Any, file: Any = None) -> None:
        if error.ctx is not None:
            tell(error.ctx.get_usage())
            tell(f"Try '{error.ctx.command_path} {error.ctx.help_option_names[0]}' for help.")
            tell("")
        tell(f"Error: {error.format_message()}")

    context.formatter_class = Formatter
    usage.show = show
    sys.modules[plain.__module__].wrap_text = _wrap  # type: ignore[attr-defined]
    typer.core._ = lambda text: translated(text, HELP)  # type: ignore[attr-defined]
