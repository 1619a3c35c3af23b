"""What the command line says, for its catalogue: help, refusals, lines on stderr; `scripts.messages` collects with it.

Texts that are formatted stand in the catalogue with the names of their values in braces, without formats: what a
command says is recognised by them (`lib.language.told`).
"""

from __future__ import annotations

import ast
import itertools
import re
import string
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from lib.language import HELP, LABEL, MESSAGE, template_messages
from lib.runs.files import PROJECT
from lib.runs.render import message_name

LIB = PROJECT / "lib"
MESSAGES = LIB / "locale" / "messages.yaml"
"""Messages that stand in libraries, or are put together in a way that is not followed here."""

_RAISE = {"InputError", "SourceError", "ExchangeTooLongError", "UnreachableError"}
_NAMED = {"refusal", "refusing"}
_TELL = {"tell", "say"}
_SAYS = _RAISE | _TELL | {"_check", "Check", "Failure", "Progress", "track"}
"""Functions whose arguments are words for the user."""
_PAGES = LIB / "report"
_CHECKS = ("settings.py", "data_files.py")
"""Files whose ValueError becomes a part of a refusal."""
_PROMPTS = "labels.py"
"""The file whose functions return what a model is told."""
_SILENT = ("statistics", "stages/package/scripts", "serve/limits.py", "serve/messages.py")
"""Below lib: what programmers and programs read."""
_COMMANDS_OF_PAGES = ("runner.py", "pdf.py", "execute.py")
"""Files of the report that speak on the command line."""
_FEWEST = 5
"""Letters of a message of the code: with fewer it would be found in sentences that are none of it."""
_MOST = 40
"""Forms of one expression: more are no message any more."""


def messages() -> Iterator[tuple[str, str]]:
    """(context, English), in the order of the sources."""
    listed = _table(MESSAGES)
    for context in (HELP, LABEL, MESSAGE):
        for text in listed[context]:
            yield context, text
    yield from _helps()
    for path in sorted((LIB / "cli").glob("*.j2")):
        yield from template_messages(path.read_text(encoding="utf-8"), message_name(path)).items()
    seen = set(listed[MESSAGE])
    tables = set(map(_distinct, _tables()))
    for text in map(_distinct, itertools.chain(_tables(), _in_code())):
        if text not in seen and _says(text) and (text in tables or _letters(text) >= _FEWEST):
            seen.add(text)
            yield MESSAGE, text


def _table(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _helps() -> Iterator[tuple[str, str]]:
    """Help of commands and options, meanings of keys: said as they stand."""
    options = _table(LIB / "cli" / "options.yaml")
    found = [*options.pop("commands").values()]
    for words in options.values():
        for entry in filter(None, words.values()):
            found += [entry[name] for name in ("argument", "help") if name in entry] if isinstance(entry, dict) else []
    found.append(options["every command"]["log_level"]["help"])
    for path in sorted((LIB / "cli").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name in options:
                found += _paragraphs(ast.get_docstring(node) or "")
    found += [entry["meaning"] for entry in _table(LIB / "settings.yaml").values()]
    yield from ((HELP, text) for text in dict.fromkeys(found))


def _paragraphs(text: str) -> list[str]:
    return text.split("\n\n")


def _tables() -> Iterator[str]:
    """Messages of tables of sentences."""
    for path in sorted(LIB.rglob("refusals.yaml")):
        for entry in _table(path).values():
            yield from map(template, entry.values())
    errors = _table(LIB / "settings_errors.yaml")
    yield from map(template, [*errors.pop("contradictions").values(), *errors.values()])
    for entry in _table(LIB / "cli" / "cures.yaml").values():
        yield from map(template, entry.values())
    yield from map(template, _table(LIB / "serve" / "sentences.yaml").values())
    for name, keys in _PHRASES.items():
        table = _table(LIB / name)
        yield from (template(text) for key in keys for text in _leaves(table[key]))


def _in_code() -> Iterator[str]:
    """What the code says itself, file by file."""
    sources = [_Source(path) for path in sorted(LIB.rglob("*.py")) if _speaks(path)]
    wrappers: set[str] = set()
    while more := {name for source in sources for name in source.wrappers(wrappers)} - wrappers:
        wrappers |= more
    for source in sources:
        yield from source.texts(wrappers)


_PHRASES = {
    "models/architectures.yaml": ("plain", "other_tasks", "elsewhere", "no_system_turn"),
    "models/merge_plan.yaml": ("unsupported",),
}
"""Tables that hold parts of refusals and findings beside other things, and their keys."""


def _leaves(value: Any) -> Iterator[str]:
    """The texts of several words inside a value."""
    if isinstance(value, str):
        yield from [value] if " " in value else []
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)


def _speaks(path: Path) -> bool:
    name = path.relative_to(LIB).as_posix()
    return not name.startswith(_SILENT) and (_PAGES not in path.parents or path.name in _COMMANDS_OF_PAGES)


def template(text: str) -> str:
    """A text for `str.format` with plain names in its braces."""
    made = []
    for literal, field, _, _ in string.Formatter().parse(text):
        made.append(literal.replace("{", "{{").replace("}", "}}"))
        if field is not None:
            made.append(f"{{{field.partition('[')[0].rpartition('.')[2]}}}")
    return "".join(made)


_FIELD = re.compile(r"(?<!\{)\{(\w+)\}(?!\})")


def _distinct(text: str) -> str:
    """A message in which no two values have the same name: {path}, {path2}."""
    seen: Counter[str] = Counter()

    def named(field: re.Match[str]) -> str:
        seen[field[1]] += 1
        return f"{{{field[1]}{seen[field[1]] if seen[field[1]] > 1 else ''}}}"

    return _FIELD.sub(named, text)


def _letters(text: str) -> int:
    """Letters of a message beside its values."""
    return len(re.findall(r"[^\W\d_]", _FIELD.sub("", text)))


def _says(text: str) -> bool:
    """Whether a text is a message: it holds a word of its own, and is neither a name alone nor a part of a sentence."""
    words = _FIELD.sub(" ", text)
    whole = not text[:1].isspace() and text[:1] not in ",;" and text.rstrip() == text and text[-1:] not in ",;:"
    return whole and bool(re.search(r"[^\W\d_]{2}", words)) and (" " in text or text.endswith("."))


class _Source:
    """One file: which texts its errors, lines and findings can be."""

    def __init__(self, path: Path) -> None:
        self.checks, self.prompts = path.name in _CHECKS, path.name == _PROMPTS
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.constants = {
            node.targets[0].id: node.value.value
            for node in self.tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and _is_text(node.value)
        }
        self.functions = [n for n in ast.walk(self.tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]

    def wrappers(self, known: Collection[str]) -> set[str]:
        """Functions that make an error of their parameters' words, by themselves or by one of the known."""
        return {f.name for f in self.functions if self._wraps(f, _RAISE | _NAMED | {"ValueError", *known})}

    def _wraps(self, function: ast.AST, makers: Collection[str]) -> bool:
        return any(
            isinstance(n, (ast.Return, ast.Raise))
            and isinstance(value := n.value if isinstance(n, ast.Return) else n.exc, ast.Call)
            and _name(value.func) in makers
            and {x.id for x in ast.walk(value) if isinstance(x, ast.Name)} & set(_names(function))
            for n in ast.walk(function)
        )

    def texts(self, wrappers: Collection[str]) -> Iterator[str]:
        """The messages; `wrappers`: functions of any file that make errors of words given to them."""
        inside = {id(n): f for f in self.functions for n in ast.walk(f)}  # the innermost comes last
        for node in ast.walk(self.tree):
            where = inside.get(id(node))
            for value in self._said(node, wrappers):
                yield from self.forms(value, where)

    def _said(self, node: ast.AST, wrappers: Collection[str]) -> list[ast.expr]:
        """The expressions of a statement or call that are words for the user."""
        if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add) and _name(node.target) in _LISTS:
            return list(node.value.elts) if isinstance(node.value, ast.List) else [node.value]
        if isinstance(node, ast.Return) and node.value is not None and not self.prompts:
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            return [value for value in values if _phrase(value)]
        if not isinstance(node, ast.Call):
            return []
        name = _name(node.func)
        if (
            name in _RAISE | _TELL | {"_check", "Check", "Failure", "Progress", "track"}
            or name in wrappers
            or (name == "ValueError" and self.checks)
        ):
            return [*node.args, *(k.value for k in node.keywords)]
        if name == "put":  # of a key: its value and the reason
            return list(node.args[2:])
        if name in _NAMED:
            return [k.value for k in node.keywords]
        if name == "append" and isinstance(node.func, ast.Attribute) and _name(node.func.value) in _LISTS:
            return list(node.args)
        return []

    def forms(self, value: ast.expr, where: ast.AST | None, deep: int = 0) -> list[str]:
        """The texts that an expression can be, values in braces; none where it is no text."""
        if isinstance(value, ast.Constant):
            return [value.value.replace("{", "{{").replace("}", "}}")] if isinstance(value.value, str) else []
        if isinstance(value, ast.JoinedStr):
            parts = [self._part(part, where, deep) for part in value.values]
            return ["".join(p) for p in itertools.islice(itertools.product(*parts), _MOST)]
        if isinstance(value, ast.IfExp):
            return self.forms(value.body, where, deep) + self.forms(value.orelse, where, deep)
        if isinstance(value, ast.BoolOp):
            return [text for part in value.values for text in self.forms(part, where, deep)]
        if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
            both = [self.forms(v, where, deep) or [f"{{{_label(v)}}}"] for v in (value.left, value.right)]
            return ["".join(p) for p in itertools.islice(itertools.product(*both), _MOST)]
        if isinstance(value, ast.Name) and where is not None and deep < 3:
            return [t for v in _assigned(where, value.id) for t in self.forms(v, where, deep + 1)]
        return []

    def _part(self, part: ast.expr, where: ast.AST | None, deep: int) -> list[str]:
        if not isinstance(part, ast.FormattedValue):
            return self.forms(part, where, deep)
        as_it_is = (
            part.conversion == -1 and part.format_spec is None and isinstance(part.value, (ast.IfExp, ast.Constant))
        )
        if as_it_is and (made := self.forms(part.value, where, deep)):
            return made
        if isinstance(part.value, ast.Name) and part.value.id in self.constants:
            return [self.constants[part.value.id]]
        return [f"{{{_label(part.value)}}}"]


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


_LISTS = {"notes", "problems", "notes.append", "told", "unsaid"}


def _phrase(value: ast.expr) -> bool:
    """Whether a returned expression is words: a text of several words, alone or the first of a tuple."""
    texts = [n.value for n in ast.walk(value) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return isinstance(value, (ast.Constant, ast.JoinedStr, ast.IfExp)) and any(
        re.search(r"[a-z]{2,} [a-z]{2,}", text) for text in texts
    )


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return str(node.slice.value)
    return getattr(node, "id", "")


def _names(function: Any) -> list[str]:
    return [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]


def _assigned(where: ast.AST, name: str) -> list[ast.expr]:
    """What a name of a function is set to, as far as that stands there."""
    found = []
    for node in ast.walk(where):
        if not isinstance(node, (ast.Assign, ast.NamedExpr)):
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name) and target.id == name:
                found.append(node.value)
            elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = zip(target.elts, node.value.elts, strict=False)
                found += [value for one, value in pairs if isinstance(one, ast.Name) and one.id == name]
    return found


def _label(value: ast.expr) -> str:
    """A name for a value: that of the variable or attribute."""
    joined = isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "join"
    if joined and value.args:
        value = value.args[0]
    names = [_name(n) for n in ast.walk(value) if isinstance(n, (ast.Attribute, ast.Name))]
    return re.sub(r"\W", "", names[0]).strip("_") or "value" if names else "value"
