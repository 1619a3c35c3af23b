"""The languages: which one a process speaks, that both say everything, and with the same values."""

from __future__ import annotations

import re
from pathlib import Path
from string import Formatter

import jinja2
import jinja2.meta
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib import language
from lib.errors import InputError, refusal
from lib.language import (
    CHINESE,
    COMMANDS,
    ENGLISH,
    HELP,
    LABEL,
    MESSAGE,
    PAGES,
    PHONE,
    STORED,
    WORD,
    code_messages,
    retold,
    sentences,
    speaking,
    template_messages,
    told,
    translated,
    translated_code,
    translated_template,
)
from lib.report.display import build
from lib.report.sentences import FILTERS, joined, sentence
from lib.runs import render
from scripts import command_messages, messages

LOCALE = ("LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG", language.VARIABLE)


@pytest.mark.parametrize(
    ("environment", "spoken"),
    [
        ({}, ENGLISH),
        ({"LANG": "C.UTF-8"}, ENGLISH),
        ({"LANG": "zh_CN.UTF-8"}, CHINESE),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "en_GB.UTF-8"}, ENGLISH),
        ({"LANG": "de_DE.UTF-8"}, ENGLISH),
        ({"LANG": "de_DE.UTF-8", "WORKBOOK_LANGUAGE": "zh"}, CHINESE),
        ({"LANG": "zh_CN.UTF-8", "WORKBOOK_LANGUAGE": "en"}, ENGLISH),
        ({"LANG": "zh_CN.UTF-8", "WORKBOOK_LANGUAGE": "auto"}, CHINESE),
    ],
)
def test_which_language_a_process_speaks(
    environment: dict[str, str], spoken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LOCALE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(language.locale, "getlocale", lambda: (None, None))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert language.language() == spoken


@pytest.mark.parametrize("part", [PAGES, COMMANDS])
def test_every_message_is_translated_and_none_is_of_former_english(part: str) -> None:
    """`python -m scripts.messages` brings the catalogues up to date."""
    assert messages.unfinished(messages.updated(part)) == []
    known = {(m.context, m.id) for m in language.catalogue(CHINESE, part) if m.id}
    assert known == set(messages.messages(part))


@pytest.mark.parametrize("part", [PAGES, COMMANDS])
def test_a_catalogue_is_read_as_babel_reads_it(part: str) -> None:
    read = {(m.context, m.id): m.string for m in language.catalogue(CHINESE, part) if m.id}
    assert language._translations(CHINESE, part) == read


def _values(template: str) -> set[str]:
    environment = jinja2.Environment()
    environment.filters |= {**FILTERS, **render.FILTERS}
    return jinja2.meta.find_undeclared_variables(environment.parse(template)) - {"_", "joiner"}


def test_both_languages_use_the_same_values() -> None:
    different = []
    for message in (message for part in (PAGES, COMMANDS) for message in language.catalogue(CHINESE, part)):
        beside = (WORD, "code", HELP, LABEL, MESSAGE)  # without values, or with those of another test
        if not message.id or message.context in beside or message.context.startswith("notebooks/"):
            continue
        if message.context == PHONE:
            same = sorted(re.findall(r"\{\w+\}", message.id)) == sorted(re.findall(r"\{\w+\}", message.string))
        elif message.context == STORED:
            same = set(re.findall(r"\{(\w+)", message.id)) >= set(re.findall(r"\{(\w+)", message.string))
        else:
            same = _values(message.id) == _values(message.string)
        different += [] if same else [f"{message.context}: {_values(message.id) ^ _values(message.string)}"]
    assert different == []


def _fields(message: str) -> set[str]:
    """Names of the values of a message; the s of a plural has no Chinese."""
    return {name for _, name, *_ in Formatter().parse(message) if name} - {"plural"}


def test_a_command_says_the_same_values_in_both_languages() -> None:
    sentences = [message for message in language.catalogue(CHINESE, COMMANDS) if message.context == MESSAGE]
    assert [m.id for m in sentences if _fields(m.id) != _fields(m.string)] == []
    forms = {form for m in sentences for *_, form, _ in Formatter().parse(m.string) if form}
    assert forms <= {"told", "said", "words"}


@pytest.mark.parametrize("part", [PAGES, COMMANDS])
def test_no_english_sentence_is_left_in_a_translation(part: str) -> None:
    left = {}
    for message in language.catalogue(CHINESE, part):
        words = re.sub(r"\{[{%#].*?[}%#]\}|`[^`]*`|\]\([^)]*\)", " ", message.string, flags=re.S) if message.id else ""
        if run := re.search(r"(?:\b[A-Za-z][a-z]+ ){3,}[a-z]+", words):
            left[message.context] = run[0]
    assert left == {}


def test_a_notebook_keeps_its_headings_and_links() -> None:
    for message in language.catalogue(CHINESE):
        if message.id and message.context.startswith("notebooks/"):
            for pattern in (r"^#+ ", r"\]\(([^)]*)\)", r"`([^`]*)`"):
                found = [sorted(re.findall(pattern, text, re.M)) for text in (message.id, message.string)]
                assert set(found[0]) == set(found[1]), f"{message.context}: {message.id[:60]}"


def test_sentences_are_said_in_the_language_of_the_process() -> None:
    with speaking(ENGLISH):
        assert sentence("display.evidence") == "Evidence"
    with speaking(CHINESE):
        assert re.search("[\u4e00-\u9fff]", sentence("display.evidence"))
    with speaking(ENGLISH):
        assert sentence("display.evidence") == "Evidence"


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_stored_message_is_told_with_its_values(seconds: int, memory: int) -> None:
    text = f"data: made in {seconds} s, {memory} MiB at most (first time)."
    with speaking(CHINESE):
        told = retold(text)
        assert retold("no message that any product keeps") == "no message that any product keeps"
    assert told != text and str(seconds) in told and str(memory) in told
    with speaking(ENGLISH):
        assert retold(text) == text


def test_words_inside_a_stored_message_are_translated_too() -> None:
    text = "comparison: made in 5 s, 100 MiB at most (made from another gguf and merged)."
    with speaking(CHINESE):
        told = retold(text)
        assert f"{retold('gguf')}、{retold('merged')}" in told and " and " not in told


def test_a_line_end_behind_a_full_width_mark_is_no_blank() -> None:
    assert joined("甲。\n乙，\n丙\n。\n- 丁。\n- 戊") == "甲。乙，丙。\n- 丁。\n- 戊"
    assert joined("One.\nTwo\n; three") == "One. Two; three"


def test_headings_and_captions_of_a_table_are_translated() -> None:
    with speaking(CHINESE):
        made = build([{"difference_points": 1.0}], "Repairs, counted.")
    assert made.caption == language.catalogue(CHINESE).get("Repairs, counted.", context=WORD).string
    assert made.headings[0].endswith("（百分点）")


TEMPLATE = "{# what it is #}\n{% macro one(n) -%} {{ n }} files {%- endmacro %}\nIn all {{ one(2) }}.\n"


def test_the_messages_of_a_template(monkeypatch: pytest.MonkeyPatch) -> None:
    assert template_messages(TEMPLATE, "x") == {"x.one": "{{ n }} files", "x": "In all {{ one(2) }}."}
    assert template_messages("{% macro a(x) %}{{ x }}{% endmacro %}", "y") == {}
    known = {("x.one", "{{ n }} files"): "{{ n }} 个文件", ("x", "In all {{ one(2) }}."): "共 {{ one(2) }}。"}
    monkeypatch.setattr(language, "_translations", lambda _: known)
    assert jinja2.Template(translated_template(TEMPLATE, "x")).render().strip() == "共 2 个文件。"
    assert translated_template(TEMPLATE, "other") == TEMPLATE


PAPER = """{% set n = 2 %}
# Title {{ n }}

First.

## One (of {{ n }})

Text.
{% if n %}
## Two

{% for i in [1] %}
### Inner of a statement
{% endfor %}
{% endif %}
"""


def test_a_paper_is_translated_by_its_headings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence that changes leaves the translations below other headings as they are."""
    found = template_messages(PAPER, "x")
    assert list(found) == ["x", "x § One", "x § Two"] and found["x § One"] == "## One (of {{ n }})\n\nText."
    assert found["x § Two"].startswith("{% if n %}\n## Two") and found["x § Two"].endswith("{% endif %}")
    known = {("x § One", found["x § One"]): "## 一（共 {{ n }}）\n\n文字。"}
    monkeypatch.setattr(language, "_translations", lambda _: known)
    told = translated_template(PAPER, "x")
    assert told == PAPER.replace("## One (of {{ n }})\n\nText.", "## 一（共 {{ n }}）\n\n文字。")
    assert translated_template(PAPER, "y") == PAPER


PROGRAM = '''"""What it does.

At length.
"""
x = "a # b"  # why
# a line
def f():
    """One."""
    # two
    print(said("{n} rows", n=1))
    return "# no comment"
'''


def test_docstrings_comments_and_messages_of_a_program_are_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_messages(PROGRAM) == ["What it does.\n\nAt length.", "why", "a line", "One.", "two", "{n} rows"]
    known = {("p", text): f"译{place}" for place, text in enumerate(code_messages(PROGRAM))}
    monkeypatch.setattr(language, "_translations", lambda _: known)
    told = translated_code(PROGRAM, "p")
    assert told.startswith('"""译0\n"""\nx = "a # b"  # 译1\n# 译2\n')
    assert '    """译3"""\n    # 译4\n    print(said("译5", n=1))\n' in told
    assert translated_code(PROGRAM, "q") == PROGRAM


@pytest.mark.parametrize("spoken", [ENGLISH, CHINESE])
def test_sentences_stand_behind_one_another_in_their_own_language(spoken: str) -> None:
    """A product's English may be told by a process that speaks Chinese (`workbook package`)."""
    with speaking(spoken):
        assert sentences(("Take it.", "", "It loses nothing.")) == "Take it. It loses nothing."
        assert sentences(("选用它。", "没有损失。")) == "选用它。没有损失。"
        assert sentences(()) == ""


# What commands say.


def test_english_reads_no_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "catalogue_file", lambda *_: pytest.fail("a catalogue is read"))
    with speaking(ENGLISH):
        assert told("no memory left.") == "no memory left."
        assert translated("importance matrix", HELP) == "importance matrix"


def test_a_refusal_is_told_in_the_language_of_the_process_and_kept_in_english() -> None:
    with speaking(CHINESE):
        error = refusal("cli/log-level", level="loud", known="debug, info")
        assert error.found == "--log-level 'loud'."
        assert told(str(error)) == (
            "发现：--log-level 'loud'。 期望：以下之一：debug, info。 请这样做：写其中一个，或去掉这个选项。"
        )
        twice = InputError("-p seed twice.", "every key once: the last would win silently.", "leave one out.")
        assert told(f"{twice}").startswith("发现：-p seed 出现两次。 期望：每个键一次：否则最后一个会悄悄生效。")


@pytest.mark.parametrize(
    "text",
    [
        "Found: something new. Expected: at most 3. Do this: check the path.",
        "the cat sat on the mat",
        "the cat is a dog that barks.",
        "Found: the cat is empty. Expected: nobody knows. Do this: no file a.",
    ],
)
def test_no_sentence_is_half_in_one_language(text: str) -> None:
    with speaking(CHINESE):
        assert told(text) == text


@pytest.mark.parametrize(
    ("text", "chinese"),
    [
        ("lora_r: -4 given by -p.", "-p 给出的参数中，lora_r 为 -4。"),
        ("correct lora_r (rank of the adapter).", "改正 lora_r（适配器的秩）。"),
        ("check the path. (2 more after this one.)", "检查路径。（此外还有 2 处。）"),
        ("a whole GGUF file.", "完整的 GGUF 文件。"),
        ("check the path. Check the name.", "检查路径。检查名称。"),
        ("01_data: Found: no memory left. Expected: room for the model. Do this: check the path.", None),
    ],
)
def test_sentences_that_are_put_together_are_told(text: str, chinese: str | None) -> None:
    with speaking(CHINESE):
        assert told(text) == (chinese or "01_data：发现：内存不足。 期望：容纳模型的内存。 请这样做：检查路径。")


def test_every_sentence_with_values_is_recognised() -> None:
    """Whatever stands in its braces, a sentence is told by its own translation or by one of the same English."""
    missed = []
    for message in language.catalogue(CHINESE, COMMANDS):
        fields = {name: form for _, name, form, _ in Formatter().parse(message.string or "") if name}
        if message.context != MESSAGE or "told" in fields.values():
            continue
        values = {name: "7" if name == "number" else f"<{name}>" for name in [*fields, "plural"]}
        english, chinese = message.id.format(**values), message.string
        for name, form in fields.items():
            chinese = chinese.replace(f"{{{name}:{form}}}" if form else f"{{{name}}}", values[name])
        with speaking(CHINESE):
            found = told(english)
        if found.rstrip("。") != chinese.replace("{{", "{").replace("}}", "}").rstrip("。"):
            missed.append((english, found))
    assert missed == []


SOURCE = """
def refused(path, found):
    return InputError(f"{path}: {found}.", "a file.", "take another one.")

def check(path, sizes, all_of_them):
    what = f"{len(sizes)} sizes" if all_of_them else "no size at all"
    if path.name:
        raise refused(path, "it is of the wrong kind")
    notes.append(f"{path}: {what} in {path.parent}")
    tell("a part, ")
"""


def test_the_messages_of_a_source(tmp_path: Path) -> None:
    path = tmp_path / "source.py"
    path.write_text(SOURCE, encoding="utf-8")
    source = command_messages._Source(path)
    assert source.wrappers(()) == {"refused"}
    found = set(map(command_messages._distinct, source.texts({"refused"})))
    assert {"a file.", "it is of the wrong kind", "{path}: {what} in {parent}", "{path}: {found}."} <= found
    assert not command_messages._says("a part, ") and not command_messages._says("{path}: {found}.")
    assert command_messages.template("{path.name} has {count:,} of {shape[0]} {{text}}") == (
        "{name} has {count} of {shape} {{text}}"
    )
    assert command_messages._distinct("{a} and {a} in {{a}}") == "{a} and {a2} in {{a}}"
