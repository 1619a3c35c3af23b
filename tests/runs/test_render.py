"""Cards and guides from templates: what users wrote is shown as it is in Markdown, and only there."""

from __future__ import annotations

from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from mistune import create_markdown, html

from lib.runs.render import code_span, render

CARD = """---
base_model: {{ word }}
---
{% macro quoted(text) %}say {{ text }}{% endmacro %}
# Model {{ word }}

From `{{ name }}` by {{ word }}, {{ 0.5 | form(".2f") }} of
{{ "one " ~ word if word else "none" }}; {{ ours | markdown }}.

> {{ word }}

| {{ word }} |
|---|
| {{ [word, word] | join(", ") }} |

- {{ quoted(word) }}

```bash
run '{{ word }}' {{ quoted("**x**") }}
```
"""
WORDS = (
    "**x**",
    "_x_",
    "[a](https://evil.example)",
    "![a](u)",
    "https://evil.example",
    "`c`",
    "<img src=x onerror=alert(1)>",
    "a|b",
    "~~s~~",
    "a*b*c",
    "Q4_K_M",
    "C:\\new",
)


@pytest.mark.parametrize("word", WORDS)
def test_words_of_users_in_a_card_are_shown_as_written(tmp_path: Path, word: str) -> None:
    (tmp_path / "card.md.j2").write_text(CARD, encoding="utf-8")
    text = render(tmp_path / "card.md.j2", word=word, name="a_b*c", ours="**ours**")
    head, _, body = text.removeprefix("---\n").partition("---\n")
    assert head == f"base_model: {word}\n"
    assert f"run '{word}' say **x**" in body and "`a_b*c`" in body and "0.50 of\n" in body
    page = BeautifulSoup(html(body), "html.parser")
    assert not page.select("a, img, em, del") and [strong.get_text() for strong in page.select("strong")] == ["ours"]
    assert [code.get_text() for code in page.select("p code")] == ["a_b*c"]
    page.pre.decompose()
    assert page.get_text().count(word) == 8 and page.td.get_text() == f"{word}, {word}"


NAMES = (
    "a`b",
    "`",
    "``",
    "`a``b`",
    "a|b",
    "a`|``b",
    "a\\|b",
    "<b>x",
    "a\nb",
    "a\n\n# b",
    "*a*",
    "_a_",
    "[a](u)",
    "https://x.example/a|b",
    "&lt;",
    " a ",
    "a\\",
    "```\nx",
)
IN_CODE = """# `{{ name }}`

`{{ name }}` is {{ name }} in `runs/{{ name }}/x`{{ " and" if name }} `{% if name %}{{ name }}{% endif %}`; then `c`.

| name | file | all |
|---|---|---|
| `{{ name }}` | `{{ name }}.gguf` | {{ name }} |
| x | {{ name }} | `c` |

```bash
run {{ name }}
```

last
"""


@pytest.mark.parametrize("name", NAMES)
def test_no_name_ends_the_code_or_the_cell_that_it_stands_in(name: str, tmp_path: Path) -> None:
    (tmp_path / "guide.md.j2").write_text(IN_CODE, encoding="utf-8")
    written = render(tmp_path / "guide.md.j2", name=name)
    page = BeautifulSoup(create_markdown(escape=False, plugins=["table"])(written), "html.parser")
    line = " ".join(name.split())

    def code(place: str) -> list[str]:
        return [" ".join(found.get_text().split()) for found in page.select(f"{place} code")]

    assert code("h1") == [line]
    assert code("p") == [line, " ".join(f"runs/{name}/x".split()), line, "c"]
    assert [len(row.select("td")) for row in page.select("tr")[1:]] == [3, 3]
    assert code("td") == [line, " ".join(f"{name}.gguf".split()), "c"]
    assert " ".join(page.select("td")[2].get_text().split()) == line
    assert page.pre.get_text() == f"run {name}\n" and [p.get_text() for p in page.select("p")][-1] == "last"
    assert not page.select("a, em, b, h2") and len(page.select("h1")) == 1


@pytest.mark.parametrize(
    ("text", "row", "code"), [("Q4_K_M", True, "`Q4_K_M`"), ("a", False, "`a`"), ("a`", False, "`` a` ``")]
)
def test_code_as_it_is_written(text: str, row: bool, code: str) -> None:
    assert code_span(text, row) == code


def test_other_texts_are_not_changed(tmp_path: Path) -> None:
    (tmp_path / "a.txt.j2").write_text("{{ word }}")
    assert render(tmp_path / "a.txt.j2", word="**x**") == "**x**"
