"""A user's words never break a page, and never become markup on one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat import v4

from lib.cli import doctor
from lib.hub.fetching import fetch
from lib.hub.sources import SourceError
from lib.models.base_model import fallback_note
from lib.report import charts, display
from lib.report.html import harmless, in_letters, problems_in, render, whole
from lib.report.index import summarise
from lib.report.runner import run_report
from lib.runs.render import as_written
from lib.runs.run import open_run

WORDS = (
    "Traceback (most recent call last): KeyError",
    "<Figure size 700x360 with 1 Axes>",
    "<lib.models.Model object at 0x7f>",
    "Glyph 20320 missing from font",
    "{{ text }} {% if %}",
)
EVIL = (
    "<b onmouseover=alert(6)>x</b>",
    "[y](javascript:alert(8))",
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "<svg onload=alert(2)></svg>",
    "<iframe src=//a></iframe>",
    "<a href=' java\tscript:alert(3)'>z</a>",
    '<a href="data:image/svg+xml,x">d</a>',
    "`code` **bold** _x_ | $a$",
    "<style>body{display:none}</style>",
    '<meta http-equiv="refresh" content="0;url=https://evil.example/">',
    *(f"<{name}>" for name in ("plaintext", "textarea", "xmp", "template", "select", "noscript")),
    "<link rel=stylesheet href=https://evil.example>",
    "<video src=//evil.example>",
    "<input type=image src=//evil.example>",
)
WRITTEN = (
    *EVIL,
    "</main><b>EVIL</b>",
    "<title>",
    '<div style="position:fixed;inset:0;background:url(//evil.example)">',
    '<a href="https://evil.example">',
    "<h1>EVIL</h1>",
    '<img src="data:," alt="">',
)
"""Also what only Markdown must not let through."""


@pytest.fixture
def page(home: Path):
    """A page of one cell with these outputs."""

    def made(*outputs: nbformat.NotebookNode) -> str:
        cell = v4.new_code_cell("# a cell", outputs=list(outputs))
        notebook = v4.new_notebook(cells=[v4.new_markdown_cell("# Title"), cell], metadata={"papermill": {}})
        path = home / "01_data.ipynb"
        nbformat.write(notebook, path)
        return render(path, summarise(open_run("x")), [])

    return made


def _shown(text: str) -> nbformat.NotebookNode:
    return v4.new_output("display_data", {"text/html": display.table([{"text": text}], "caption").data})


@pytest.mark.parametrize("words", WORDS)
def test_words_of_rows_are_no_fault_of_a_page(page, words: str) -> None:
    assert problems_in(page(_shown(words), v4.new_output("stream", name="stdout", text=words))) == []


def test_faults_are_found_by_the_kind_of_output(page) -> None:
    error = v4.new_output("error", ename="KeyError", evalue="a", traceback=["KeyError: a"])
    assert problems_in(page(error)) == ["an error output"]
    assert problems_in(page(v4.new_output("stream", name="stderr", text="no warning"))) == ["text on stderr"]
    bare = v4.new_output("execute_result", {"text/plain": "<Figure size 700x360 with 1 Axes>"}, execution_count=1)
    assert problems_in(page(bare)) == ["a bare object"]


def test_a_warning_of_a_library_never_costs_a_run(page) -> None:
    text = "/lib/matplotlib/x.py:12: UserWarning: constrained_layout not applied\n  plt.show()\n"
    html = page(v4.new_output("stream", name="stderr", text=text))
    assert problems_in(html) == [] and "constrained_layout not applied" in html


@pytest.mark.parametrize("text", WRITTEN)
def test_markup_of_parameters_and_rows_does_nothing(page, text: str) -> None:
    written = v4.new_output("display_data", {"text/markdown": as_written(text)})
    raw = v4.new_output("display_data", {"text/markdown": text, "text/plain": text})
    html = page(written, _shown(text), raw)
    assert problems_in(html) == [] and "Content-Security-Policy" in html
    assert not BeautifulSoup(html, "html.parser").select("main b, main h1 + h1, main div[style*=fixed]")
    assert not BeautifulSoup(page(written), "html.parser").select("main a, main b, main h1 + h1")
    main = BeautifulSoup(html, "html.parser").select_one("main").get_text()
    assert main.count(" ".join(text.split())) >= 2 or "\t" in text  # as it was written, in the sentence and the table


MARKED = (
    *WRITTEN,
    "**x**",
    "_x_",
    "https://evil.example/a",
    "[a][b]",
    "![i](u)",
    "# h",
    "- x",
    "1. x",
    "a¶b",
    "a\n\n- b",
    "www.evil.example",
    "https://evil.example [a](b)",
)


@pytest.mark.parametrize("text", MARKED)
def test_words_of_users_in_sentences_are_shown_as_written(page, text: str) -> None:
    """Alone in a sentence, joined to others, beside markup of the sentence, and through another macro."""
    told = [
        display.tell("evaluate.nothing_written", labels=[text, "b"]),
        display.tell("display.made", message=text, left={"done": [text]}),
        display.tell("quantize.not_measured", reason=text),
        display.tell("compare.kept_reading", words={text: "3 %"}, poor=[text], little=0.1, note="", order=None),
    ]
    html = page(*(v4.new_output("display_data", {"text/markdown": one.data}) for one in told))
    main = BeautifulSoup(html, "html.parser").select_one("main")
    assert problems_in(html) == [] and not main.select("a, em, img, code, del, li, h1 + h1, h2, h3, p + p")
    assert [strong for strong in main.select("b, strong") if strong.get_text() == "x"] == []
    shown = " ".join(main.get_text().split())
    assert shown.count(" ".join(text.split())) >= 4


PARAMETERS = 'run_name: str = "test"  # name\nuser_prompt: str = "{text}"  # turn\ndataset: str = "sample"  # data'
CHANGED = """
from lib.report.display import made, show, stamps
from lib.runs.run import open_run

def build(work):
    (work.folder / "rows.txt").write_text("rows")
    work.facts = {"source": dataset, "base_model": "offline", "offline_base": True, "sample_data": True}
    work.notes = [f"fallback: data set {dataset} could not be had"]

run = open_run(run_name)
show(made(run.produce("data", build, parameters={"user_prompt": user_prompt, "dataset": dataset})), stamps(run))
"""


def test_parameters_that_changed_are_words_in_a_real_report(
    home: Path, params: Path, write_notebook: Callable[..., Path]
) -> None:
    """The sentence "parameters changed: …", stamps, cards and both indexes."""
    write_notebook("01_data", CHANGED, parameters=PARAMETERS)
    params.write_text("run_name: test\n", encoding="utf-8")
    evil = " ".join(EVIL[:9])
    for overrides in ({}, {"user_prompt": f"{evil} {{text}}", "dataset": f"{home}/{EVIL[2]} {EVIL[1]}.csv"}):
        result = run_report(params, overrides, notebooks=home / "notebooks", say=lambda _: None)
    pages = [page.read_text(encoding="utf-8") for page in (*result.pages, result.index, home / "reports/index.html")]
    assert [problems_in(page) for page in pages] == [[], [], []]
    text = BeautifulSoup(pages[0], "html.parser").select_one("main").get_text()
    assert "parameters changed: dataset" in text and EVIL[0] in text and EVIL[1] in text
    for page in pages:
        assert not BeautifulSoup(page, "html.parser").select("b, script, svg, iframe, [onerror], [href*='script:']")


@pytest.mark.parametrize("text", [text for text in EVIL if "<" in text])
def test_live_markup_is_refused_by_the_check(text: str) -> None:
    assert problems_in(f"<html lang=en><title>t</title><body>{text}") != []
    assert harmless("<p>plain &amp; simple</p>") == "<p>plain &amp; simple</p>"


@pytest.mark.parametrize(
    "names",
    [
        ["cheap", "a_$x^$"],
        ["$5-$10", r"\frac{1}{2} $\alpha$"],
        ["negative feelings about the stay " * 4, "positive feelings\nabout the stay"],
        ["🙂🙃", "مرحبا"],
    ],
)
def test_any_label_can_be_drawn(names: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="Glyph")
        charts.label_balance({"train": [3, 4]}, names)


SECRET = "PASSWORDxyz"
PLACES = ("127.0.0.1:9", "127.0.0.1:9/path", "127.0.0.1:9/?token=PASSWORDxyz")


@pytest.mark.parametrize("source", ["Qwen/Qwen3-0.6B", "modelscope:Qwen/Qwen3-0.6B"])
@pytest.mark.parametrize("user", [f"user:{SECRET}@", f"{SECRET}@", f"u:pa/{SECRET}@", f"u:p?{SECRET}#@", ""])
def test_a_password_in_an_address_is_never_said(
    monkeypatch: pytest.MonkeyPatch, home: Path, source: str, user: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither in the error, nor in the stamp of a fallback, nor on a terminal."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("lib.hub.transport.FIRST_WAIT", 0.0)
    for place in PLACES:
        address = f"http://{user}{place}"
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("MODELSCOPE_DOMAIN", address)
        monkeypatch.setattr("lib.hub.fetching.HUB", address)
        with pytest.raises(SourceError) as refused:
            fetch(source, "main", "model")
        stamp = fallback_note("base model", source, "offline", [refused.value])[0]
        for words in (str(refused.value), stamp, *capsys.readouterr(), *(check.found for check in doctor._hub())):
            assert SECRET not in words
        assert "127.0.0.1:9" in stamp


@pytest.mark.parametrize("name", ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy"])
@pytest.mark.parametrize("scheme", ["http", "socks5", "no"])
@pytest.mark.parametrize("place", ["127.0.0.1:9", "127.0.0.1:port"])
def test_a_password_of_a_proxy_is_never_said(
    monkeypatch: pytest.MonkeyPatch, home: Path, name: str, scheme: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for other in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(other, raising=False)
        monkeypatch.delenv(other.lower(), raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("lib.hub.transport.FIRST_WAIT", 0.0)
    monkeypatch.setenv(name, f"{scheme}://user:{SECRET}@{place}")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", f"http{'s' if 'S' in name else ''}://a.invalid")
    with pytest.raises(SourceError) as refused:
        fetch("modelscope:Qwen/Qwen3-0.6B", "main", "model")
    assert all(SECRET not in words for words in (str(refused.value), refused.value.why, *capsys.readouterr()))
    assert "a.invalid" in refused.value.why


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (r'label_names = ["\u8d1f\u9762"]', 'label_names = ["负面"]'),
        (r'x = "\ud83d\ude00"', 'x = "😀"'),
        (r'x = "\\u4f60"', r'x = "\\u4f60"'),
        (r'x = "\ud83d"', r'x = "\ud83d"'),
    ],
)
def test_parameters_are_shown_in_their_letters(written: str, shown: str) -> None:
    """papermill writes \\uXXXX; half of a pair is no letter."""
    assert in_letters(written) == shown


def test_lines_do_not_end_inside_an_exponent_or_a_date() -> None:
    """In words, that is: an attribute, a file's name and a hash stay what they are."""
    assert whole("<p>6.7e-09 nats, 2026-11-30</p>").count('<span class="whole">') == 2
    for text in ('<a href="x" title="on 2026-11-30">x</a>', "<p>log-2026-11-30.txt, 08c7e-05b, 12-13</p>"):
        assert whole(text) == text
