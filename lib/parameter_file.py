"""The text of a parameter file: YAML without its traps, so that nothing in it means something else than it says.

A parameter file is flat: keys with single values, lists of them, or (fallbacks) lists of mappings. What YAML allows
beyond that and reads otherwise than it looks is refused with the line: a key that stands twice (the last would win),
anchors and aliases (a few lines can stand for 10^9 values), numbers in base 8 and 60, words such as `no` where a text
is meant, a `#` that cuts a text off, line ends that nobody sees, and a `\\n` in a prompt that is no line end.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, NoReturn

import yaml

from lib.errors import InputError, refusal, refusing

LARGEST = 1 << 20
"""Bytes: a parameter file is a page of text."""
DEEPEST = 4
"""Levels of brackets and indents; `fallbacks` has three."""
MOST_DIGITS = 18
"""Of a number: more are no parameter, and Python refuses to print very long ones."""

_TAG = "tag:yaml.org,2002:"
_WORDS_OF_YAML = {"bool": "true or false", "null": "nothing at all", "timestamp": "a date"}
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", re.ASCII)
_UNSEEN_ENDS = re.compile("[\x85\u2028\u2029]")
"""Characters that end a line in YAML and look like nothing."""
_LATEX = "abla|atural|e|earrow|eg|eq|eqq|ewline|exists|geq|gtr|i|leq|less|mid|olimits|onumber|ormalsize|ot|otin"
_LATEX += "|parallel|prec|subseteq|succ|supseteq|u|warrow|ag|an|anh|au|ext[a-z]*|frac|heta|herefore|ilde|imes|iny|o|op"
_LATEX += "|riangle|riangleq"
_UNESCAPED = re.compile(rf"\\[nt](?!({_LATEX})(?![a-z]))")
"""Backslash and n or t where a line end or a tab is meant, not as in the words of LaTeX."""


def parse(text: str, where: str, texts: Collection[str] = ()) -> dict[str, Any]:
    """The mapping that a parameter file holds.

    Args:
        where: the file, for messages. texts: keys whose values are texts (or lists of texts), whatever they look like.

    Raises:
        InputError: not flat YAML, or something that YAML reads otherwise than it looks, with the line.
    """
    if len(text) > LARGEST:
        raise InputError(f"{where} has {len(text):,} characters.", "a parameter file: a page.", "check the path.")
    file = _File(text, where)
    value = file.value(file.root(), texts) if text.strip() else None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{where} holds a {type(value).__name__}.", "lines `key: value`.", "see params/quick.yaml.")
    return value


def parse_value(text: str, key: str, is_text: bool = False) -> Any:
    """The value that ``-p KEY TEXT`` gives: as in a file.

    Raises:
        InputError: as `parse`.
    """
    file = _File(text, f"-p {key}")
    return file.value(file.root(), {key} if is_text else (), key)


def refuse_escape(key: str, written: str, where: str) -> None:
    """Refuse a prompt with a backslash and an n, or a t, which would reach the model as two characters."""
    if key.endswith("prompt") and (cut := _UNESCAPED.search(written)):
        text = written[max(0, cut.start() - 20) : cut.end() + 20]
        raise refusal("lib/escape", where=where, key=key, text=text, letter=cut[0][1])


class _File:
    """One text and where it comes from; nodes become values with every refusal naming the line."""

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where, self.lines = text, where, text.splitlines()

    def root(self) -> yaml.Node | None:
        """The nodes of the text, after anchors and depth were looked at: composing them may never end."""
        depth = 0
        with refusing(yaml.YAMLError, "lib/no-yaml", where=self.where):
            for event in yaml.parse(self.text, Loader=yaml.SafeLoader):
                if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                    self.refuse(event, f"the anchor or alias {event.anchor!r}", "each value written out.", "write it.")
                if tag := getattr(event, "tag", None):
                    self.refuse(event, f"the tag {tag!r}", "a plain value.", "leave it out.")
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if depth > DEEPEST:
                    self.refuse(event, "values deep inside each other", "lines `key: value`.", "see params/quick.yaml.")
            return yaml.compose(self.text, Loader=yaml.SafeLoader)

    def value(self, node: yaml.Node | None, texts: Collection[str] = (), key: str = "") -> Any:
        """What a node means."""
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, texts)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, texts, key) for item in node.value]
        return None if node is None else self._scalar(node, key, key in texts)

    def _mapping(self, node: yaml.MappingNode, texts: Collection[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode) or name.tag == f"{_TAG}merge":
                self.refuse(name, "a key that is no word", "lines `key: value`.", "see params/quick.yaml.")
            line = name.start_mark.line + 1
            self._refuse_unseen(name, name.start_mark.index - 1)
            if name.value in found:
                raise refusal(
                    "lib/key-twice", line=self._line(name), key=name.value, first=lines[name.value], second=line
                )
            found[name.value], lines[name.value] = self.value(value, texts, name.value), line
        return found

    def _scalar(self, node: yaml.ScalarNode, key: str, is_text: bool) -> Any:
        """A single value; an unquoted one is what it looks like, or refused."""
        kind, written = node.tag.removeprefix(_TAG), self._whole(node)
        self._refuse_unseen(node, node.start_mark.index)
        if node.style in (None, "'"):
            refuse_escape(key, written, self._line(node))
        if node.style is not None or kind == "str":
            self._refuse_cut(node, written)
            return _number(written) if node.style is None and not is_text and _FLOAT.fullmatch(written) else written
        if is_text:
            looks = f"a number of {len(written):,} digits" if len(written) > 4 * MOST_DIGITS else ""
            if kind in _WORDS_OF_YAML and written:
                looks = f"{written}, which YAML reads as {_WORDS_OF_YAML[kind]}"
            if looks:
                self.refuse(node, f"{key}: {looks}", "a text.", "put it in quotation marks.")
            return written
        if kind == "int":
            return self._whole_number(node, key, written)
        if kind == "float":
            if not _FLOAT.fullmatch(written) or len(written) > 40:
                self.refuse(node, f"{key}: {written[:40]}", "a decimal number.", "write it so.")
            return _number(written)
        if kind not in ("bool", "null"):
            self.refuse(node, f"{key}: {written} ({kind})", "a word, a number or a list.", "put it in quotation marks.")
        return written.lower() in ("yes", "true", "on") if kind == "bool" else None

    def _whole(self, node: yaml.ScalarNode) -> str:
        """The text of a node; the two halves that JSON writes for an emoji are one character."""
        try:
            return node.value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            half = next(c for c in node.value if "\ud800" <= c <= "\udfff")
            self.refuse(node, f"\\u{ord(half):x}, half of a character", "whole characters.", "write the character.")

    def _refuse_unseen(self, node: yaml.ScalarNode, begin: int) -> None:
        """Refuse a line that ends where nobody sees it: what stands behind would be a key of its own, or a space."""
        if node.style is None and (end := _UNSEEN_ENDS.search(self.text, max(0, begin), node.end_mark.index)):
            found = f"U+{ord(end[0]):04X}, which ends a line for YAML and cannot be seen"
            self.refuse(node, found, "lines that end visibly.", "delete it, or put the text in quotation marks.")

    def _refuse_cut(self, node: yaml.ScalarNode, written: str) -> None:
        """Refuse an unquoted text that a # cuts off: `判断 #情感`. A comment has a space behind its #."""
        rest = self.lines[node.end_mark.line][node.end_mark.column :] if node.style is None and self.lines else ""
        if cut := re.match(r"\s+(#\S.*)", rest):
            raise refusal("lib/cut-text", line=self._line(node), text=written[:60], comment=cut[1][:60])

    def _whole_number(self, node: yaml.ScalarNode, key: str, written: str) -> int:
        if not _DECIMAL.fullmatch(written) or len(written) > MOST_DIGITS:
            shown = written if len(written) <= 40 else f"{written[:40]}… ({len(written):,} characters)"
            if _DECIMAL.fullmatch(written) or len(written) > 40:
                found = f"{key}: {shown}, no number of a parameter"
                self.refuse(node, found, f"at most {MOST_DIGITS} digits.", "shorten it.")
            found = f"{key}: {shown}, which YAML reads as {_meaning(written)}"
            self.refuse(node, found, "a decimal number without leading zeros.", "write it so.")
        return int(written.replace("_", ""))

    def _line(self, place: yaml.Node | yaml.Event) -> str:
        """Where a node begins, in words."""
        return f"{self.where}, line {place.start_mark.line + 1}"

    def refuse(self, place: yaml.Node | yaml.Event, found: str, expected: str, do: str) -> NoReturn:
        """Raise with the line of a node."""
        raise InputError(f"{self._line(place)}: {found}.", expected, do)


def _number(written: str) -> float:
    """A float; YAML 1.1 takes 1e-3 for a text, which nobody means."""
    return float(re.sub(r"^([-+]?)\.(?=[a-zA-Z])", r"\1", written.replace("_", "")))


def _meaning(written: str) -> str:
    try:
        return str(yaml.safe_load(written))
    except (yaml.YAMLError, ValueError):
        return "something else"
