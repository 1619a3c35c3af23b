"""Sentences come from templates: every one that the code asks for is there and takes the values that it gets."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jinja2
import nbformat
import pytest

from lib.report import sentences
from lib.report.sentences import joined, sentence
from lib.statistics.intervals import IN_WORDS, Interval, estimate_text, limits_text

PROJECT = Path(__file__).resolve().parents[2]
FOLDER = sentences.TEMPLATES / "sentences"

METRICS = "(?:accuracy|answer_ppl|answer_loss)"


def sources() -> Iterator[tuple[str, str]]:
    """Name and text of everything that may ask for a sentence."""
    for path in sorted((PROJECT / "lib").rglob("*.py")):
        yield path.name, path.read_text(encoding="utf-8")
    for path in sorted((PROJECT / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        yield path.name, "\n".join(cell.source for cell in cells if cell.cell_type == "code")


def asked() -> list[tuple[str, str, set[str] | None]]:
    """(file, sentence, names of its values; None where they are not spelled out) of every call."""
    found = []
    for name, source in sources():
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
                continue
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("sentence", "in_markdown", "tell", "absent", "axis_label", "tabled") and re.fullmatch(
                r"\w+\.\w+", str(node.args[0].value)
            ):
                keys = {keyword.arg for keyword in node.keywords}
                found.append((name, node.args[0].value, None if None in keys else keys))
    return found


def parameters() -> dict[str, tuple[set[str], set[str]]]:
    """{page.macro: (all names of values, those that must be given)}."""
    found = {}
    for path in sorted(FOLDER.glob("*.j2")):
        tree = jinja2.Environment().parse(path.read_text(encoding="utf-8"))
        for macro in tree.find_all(jinja2.nodes.Macro):
            names = [argument.name for argument in macro.args]
            found[f"{path.stem}.{macro.name}"] = (set(names), set(names[: len(names) - len(macro.defaults)]))
    return found


def test_every_sentence_that_is_asked_for_takes_its_values() -> None:
    known = parameters()
    for file, name, keys in asked():
        assert name in known, f"{file}: no sentence {name}"
        if keys is not None:
            every, needed = known[name]
            assert needed <= keys <= every, f"{file}: {name} takes {sorted(every)}"


def composed() -> list[str]:
    """Patterns of the names that the code puts together from a page and what a metric is called."""
    strings = [
        node.values
        for _, source in sources()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant)
    ]
    return [
        "".join(re.escape(part.value) if isinstance(part, ast.Constant) else METRICS for part in parts)
        for parts in strings
        if re.match(r"\w+\.\w*$", parts[0].value)
    ]


def test_every_sentence_is_asked_for() -> None:
    """By the code or by another template."""
    text, patterns = "\n".join(source for _, source in sources()), composed()
    text += (PROJECT / "lib/report/tables.yaml").read_text(encoding="utf-8")
    for name in parameters():
        page, _, macro = name.partition(".")
        calls = re.findall(rf"\b{macro}\(", (FOLDER / f"{page}.j2").read_text(encoding="utf-8"))
        names = {name, name.removesuffix("_axis")}  # of a figure whose caption has the name (`charts.estimates`)
        said = any(f'"{n}"' in text or any(re.fullmatch(pattern, n) for pattern in patterns) for n in names)
        assert said or len(calls) > 1, f"nothing says {name}"


def test_missing_and_superfluous_values_are_errors() -> None:
    values = {"rows": 20, "first": 8, "most": 256}
    assert sentence("evaluate.decoding", **values).startswith(
        "Answers to the first 8 of 20 test rows, greedy, at most 256"
    )
    with pytest.raises(jinja2.UndefinedError, match="most"):
        sentence("evaluate.decoding", rows=20, first=8)
    with pytest.raises(TypeError, match="colour"):
        sentence("evaluate.decoding", **values, colour="red")


def test_lines_are_joined_but_for_paragraphs_and_lists() -> None:
    assert joined("\n a\n  b\n\n.\n\x1d\n- c\n d\n\n- e\n") == "a b.\n\n- c d\n- e"
    assert joined("a .gguf\nb,\u00a0c\n(d)") == "a .gguf b,\u00a0c (d)"


def test_filters() -> None:
    template = sentences.environment("sentences", False).from_string(
        '{{ 0.1234 | percent(1) }}; {{ 1234567 | mb }}; {{ 1 | counted("row") }}; '
        '{{ 2 | counted("entry", "entries") }}; '
        '{{ ["a", "b", "c"] | listed }}; {{ 1234 | count }}; {{ [0.1, 0.2] | limits(".1f", words=True) }}; '
        '{{ 15 | estimate([10, 20], ".0f") }}'
    )
    expected = "12.3 %; 1.23 MB; 1 row; 2 entries; a, b and c; 1,234; 0.1 to 0.2; 15 [10,\u00a020]"
    assert template.render() == expected


def test_one_formatter_of_intervals() -> None:
    assert limits_text([-1.0, 2.0], "+.1f", pattern=IN_WORDS) == "-1.0 to +2.0"
    assert limits_text(None) is limits_text([None, 1.0]) is limits_text([0.0, float("inf")]) is None
    assert estimate_text(0.9, [0.85, 0.93], ".2f") == f"{Interval(0.9, 0.85, 0.93):.2f}" == "0.90 [0.85,\u00a00.93]"
    assert estimate_text(0.9, [None, None], ".1f") == "0.9 (no interval)" and estimate_text(0.9, None, ".1f") == "0.9"


@pytest.mark.parametrize("words", ["Qwen | tuned", "Qwen\nEVIL | line", "a\r\n b\u2028c", "| |"])
def test_words_of_a_user_neither_cut_a_cell_nor_make_a_row(words: str) -> None:
    base = SimpleNamespace(id=words, revision=None)
    result = SimpleNamespace(base=base, trainable=1, total=2, trainable_share=0.5, dtype="float32", method="LoRA")
    given = {"id": words, "revision": "", "base": words, "trained_on": words, "targets": [words]}
    plain = sentences.word_rows("finetune.adopted_card", result=_named(result, "x"), given=dict.fromkeys(given, "x"))
    rows = sentences.word_rows("finetune.adopted_card", result=result, given=given)
    assert [row[0] for row in rows] == [row[0] for row in plain] and {len(row) for row in rows[1:]} == {2}
    assert dict(rows[1:])["its own base model"] == words.strip()


def _named(result: SimpleNamespace, name: str) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(result), "base": SimpleNamespace(id=name, revision=None)})
