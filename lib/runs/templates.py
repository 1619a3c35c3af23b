"""Texts of products (cards, guides) as Jinja templates in files, with computed values."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def render(template: Path, **values: Any) -> str:
    """The text of a template with the values put in; nothing is escaped, and a missing value is an error.

    A line that holds nothing but a statement leaves no line. `{{ number | form(".2f") }}` formats as Python does,
    `{{ value | python }}` is the value as Python source.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"form": format, "python": repr}
    return environment.get_template(template.name).render(values)
