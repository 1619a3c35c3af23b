"""What README.md and docs/ say leads somewhere: links, anchors, headings that code names, commands; and stays short."""

from __future__ import annotations

import re
import shlex
import unicodedata
from pathlib import Path
from urllib.parse import unquote

import pytest
import typer

from lib.cli.__main__ import app, joined

PROJECT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.zh-CN.md")
PAGES = [
    *READMES,
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(f"docs/{p.name}" for p in (PROJECT / "docs").glob("*.md")),
]
LARGEST = 9 * 1024
"""Bytes of the README: two printed pages."""
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def text_of(page: str) -> str:
    return (PROJECT / page).read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))


def headings(page: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", re.sub(r"^ *```.*?^ *```$", "", text_of(page), flags=re.M | re.S), re.M)


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    kept = [c for c in heading.lower() if unicodedata.category(c)[0] in "LN" or c in " -_"]
    return "".join(kept).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_every_anchor_to_a_heading(page: str) -> None:
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text_of(page))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, part = unquote(link).partition("#")
        target = (PROJECT / page).parent / name if name else PROJECT / page
        page_of = target.resolve().relative_to(PROJECT).as_posix()
        if not target.exists() or (part and part not in map(anchor, headings(page_of))):
            wrong.append(link)
    assert not wrong


NAMING = [
    path
    for folder in ("lib", "scripts", "benchmarks", "params", "docs")
    for path in sorted((PROJECT / folder).rglob("*.*"))
    if path.suffix in (".py", ".yaml", ".j2", ".sh", ".md")
]


def test_headings_and_pages_that_cures_and_comments_name_exist() -> None:
    named, wrong = 0, []
    for path in NAMING:
        text = path.read_text(encoding="utf-8").replace('\\"', '"')
        if path.name not in ("LOG.md", "README.md.j2"):
            wrong += [f"{path.name}: {said}" for said in re.findall(r"README: [A-Z]\w+", text)]
        for page, heading in re.findall(r'((?:docs/)?\b(?!LOG)[\w.-]+\.md),? "([^"\n]+)"', text):
            named += 1
            if not (PROJECT / page).is_file() or heading not in headings(page):
                wrong.append(f'{path.name}: {page} "{heading}"')
        for page in re.findall(r"\bdocs/[\w.-]+\.md", text):
            if not (PROJECT / page).is_file() and page != "docs/android.md":  # of llama.cpp
                wrong.append(f"{path.name}: {page}")
    assert not wrong and named > 5


@pytest.mark.parametrize("page", READMES)
def test_the_readme_is_short_and_has_its_pictures_and_its_two_commands(page: str) -> None:
    text = text_of(page)
    assert len(text.encode()) <= LARGEST
    pictures = re.findall(r"!\[([^\]]+)\]\((docs/images/[\w.]+)\)", text)
    assert [path for _, path in pictures] == ["docs/images/index.png", "docs/images/07.png"]
    assert all(len(words) > 8 for words, _ in pictures), "a picture without words for those who do not see it"
    first = re.search(r"^```bash\n(.*?)^```$", text, re.M | re.S)
    assert first and "make report" in text and "make test" in text
    assert text.count("notebooks/0") >= 7


def test_the_chinese_readme_names_mirrors_first_and_is_as_long() -> None:
    chinese, english = text_of("README.zh-CN.md"), text_of("README.md")
    at = {word: chinese.index(word) for word in ("PIP_INDEX_URL", "HF_ENDPOINT", "make report")}
    assert at["PIP_INDEX_URL"] < at["make report"] and at["HF_ENDPOINT"] < at["make report"]
    own, other = (len(re.findall(r"^## ", text, re.M)) for text in (chinese, english))
    assert own == other, "a part of the README stands in one language alone"
    links = [set(re.findall(r"\]\(([^)]+)\)", text)) for text in (chinese, english)]
    assert links[0] ^ links[1] == set(READMES)
    numbers = [set(re.findall(r"\d+\.\d+", text.partition("SmolLM2")[2])) for text in (chinese, english)]
    assert numbers[0] == numbers[1], "a figure was changed in one language alone"


def test_ci_runs_the_command_that_the_readme_names() -> None:
    command = "make test"
    assert re.search(rf"^{command}$", text_of(".ci/run"), re.M)
    assert all(re.search(rf"^{command}\b", text_of(page), re.M) for page in READMES)


def shell_lines() -> list[tuple[str, str]]:
    """Lines of the bash blocks of all pages but those about the past, that call the workbook."""
    found = []
    for page in PAGES:
        if page in ("docs/LOG.md", "docs/features.md"):
            continue
        for block in re.findall(r"^ *```bash\n(.*?)^ *```$", text_of(page), re.M | re.S):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page, part.strip()) for line in lines for part in line.partition("  #")[0].split("&&")]
    return [(page, line) for page, line in found if line.startswith("workbook ")]


@pytest.mark.parametrize(("page", "line"), sorted(set(shell_lines())))
def test_the_commands_of_the_pages_exist_with_their_options(page: str, line: str) -> None:
    words = joined(shlex.split(line.partition(" # ")[0])[1:])
    known = {name for parameter in COMMANDS[words[0]].params for name in parameter.opts}
    assert {word.partition("=")[0] for word in words[1:] if word.startswith("-")} <= known


def test_make_targets_that_the_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", text_of("Makefile"), re.M))
    said = {
        (page, name)
        for page in PAGES
        if page != "docs/LOG.md"
        for name in re.findall(r"\bmake ([a-z0-9-]+)\b(?=[^\n]*`)", text_of(page))
    }
    code = {(page, name) for page, name in said if f"`make {name}" in text_of(page)}
    assert code and {name for _, name in code} <= targets
