"""What a written answer is worth where the task has a right one: entities of a text, or the answer to a question.

The setting `answer_metric` chooses one of two measures, each as its field defines it:

* entity_f1: mentions, (type, text), of an answer that is a JSON list of {"type", "text"}. A mention is right where the
  reference has the same one; one that stands twice counts twice. An answer of another form holds none.
* exact_match: the whole answer, and its F1 as SQuAD takes it (Rajpurkar et al. 2016): without capitals, punctuation and
  English articles, over the words that both hold, Chinese by characters as CMRC 2018 has it.
"""

from __future__ import annotations

import json
import operator
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lib.errors import refusal
from lib.prompts.templates import read_block
from lib.settings import Settings

NONE, ENTITY_F1, EXACT_MATCH = "none", "entity_f1", "exact_match"
KEYS = (ENTITY_F1, "readable", "entity_types", EXACT_MATCH, "answer_f1")
"""What `measured` gives; values are None where they do not apply."""
RIGHT = (ENTITY_F1, EXACT_MATCH, "answer_f1")
"""Those that say whether an answer is right."""
OTHER = "other types"

_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
_EAST = "\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_EAST}]|[^\\s{_EAST}]+")
"""One Chinese or Japanese character, or what stands between spaces and them."""
_ARTICLES = ("a", "an", "the")


def parameter(settings: Settings) -> dict[str, str]:
    """What a product depends on; nothing without a metric, so that older products stay as they are."""
    return settings.pick("answer_metric") if settings.answer_metric != NONE else {}


def entities(answer: str) -> Counter[tuple[str, str]] | None:
    """How often an answer holds each mention (type, text), in NFKC; None where it is no JSON list of them.

    Read are a code fence around the list, "entity" for "text", and further keys beside the two.
    """
    fenced = _FENCE.fullmatch(answer.strip())
    try:
        found = json.loads(fenced[1] if fenced else answer)
        pairs = [(entry["type"], entry["text"] if "text" in entry else entry["entity"]) for entry in found]
        named = [tuple(unicodedata.normalize("NFKC", part).strip() for part in pair) for pair in pairs]
        "".join(map("".join, named)).encode()  # half a surrogate pair, which no file can hold, is no text
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return Counter(named) if isinstance(found, list) and all(map(all, named)) else None


def answer_words(answer: str) -> list[str]:
    """What exact match and F1 compare; articles stay where there is nothing else (A as the letter of an option)."""
    text = unicodedata.normalize("NFKC", answer).casefold()
    bare = "".join(character for character in text if unicodedata.category(character)[0] not in "PS")
    words = _WORD.findall(bare)
    return [word for word in words if word not in _ARTICLES] or words


def measured(metric: str, answer: str, reference: str) -> dict[str, Any]:
    """The values of `KEYS`: "entity_f1" as [2 × right, written + wanted], and the counts by type that it is made of.

    Args:
        metric: a value of the setting.
        answer, reference: without reasoning.
    """
    values: dict[str, Any] = dict.fromkeys(KEYS)
    if metric == ENTITY_F1 and (wanted := entities(reference)) is not None:
        read = entities(answer)
        written = read or Counter()
        types: dict[str, list[int]] = {}
        for place, mentions in enumerate((written & wanted, written, wanted)):
            for (kind, _), count in mentions.items():
                types.setdefault(kind, [0, 0, 0])[place] += count
        score = [2 * (written & wanted).total(), written.total() + wanted.total()]
        values |= {ENTITY_F1: score, "readable": read is not None, "entity_types": types}
    elif metric == EXACT_MATCH and (words := answer_words(reference)):
        own = answer_words(answer)
        shared = (Counter(own) & Counter(words)).total()
        values |= {EXACT_MATCH: own == words, "answer_f1": 2 * shared / (len(own) + len(words))}
    return values


def by_type(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Precision, recall and F1 over the mentions of each type; None where 0 / 0.

    Types that no reference has are one line.
    """
    counted = [found for row in rows for found in (row["entity_types"] or {}).items()]
    known = {kind for kind, (_, _, wanted) in counted if wanted}
    sums: dict[str, list[int]] = {kind: [0, 0, 0] for kind in sorted(known)}
    for kind, counts in counted:
        line = sums.setdefault(kind if kind in known else OTHER, [0, 0, 0])
        line[:] = map(operator.add, line, counts)
    return [
        {
            "type": kind,
            "wanted": wanted,
            "written": written,
            "right": right,
            "precision": right / written if written else None,
            "recall": right / wanted if wanted else None,
            "f1": 2 * right / (written + wanted),
        }
        for kind, (right, written, wanted) in sums.items()
    ]


def refuse_other_form(metric: str, references: Iterable[str]) -> None:
    """Refuse reference answers that the metric cannot be taken of.

    Raises:
        InputError: the first of them, and how many there are.
    """
    read = {ENTITY_F1: lambda text: entities(text) is not None, EXACT_MATCH: answer_words}.get(metric)
    answers = [read_block(text).answer for text in references] if read else []
    if wrong := [text for text in answers if not read(text)]:
        count, of, text = len(wrong), len(answers), wrong[0][:80]
        if metric == ENTITY_F1:
            raise refusal("scoring/no-entities", count=count, of=of, text=text)
        raise refusal("scoring/no-words", count=count, of=of, text=text)
