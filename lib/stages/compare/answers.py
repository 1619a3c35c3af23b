"""Answers of a device to rows of a comparison, written by whatever program, beside those of the same file here.

The file is small JSON (docs/json.md, "Answers of a device"). It is checked key by key: anybody can have written it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.errors import InputError, refusal, refusing
from lib.prompts.tasks import Task
from lib.scoring.log_probabilities import load_scores
from lib.stages.compare.speed import is_number, is_text
from lib.statistics.intervals import wilson
from lib.statistics.paired import mcnemar_exact

_ANSWERS, _MOST_BYTES = 100_000, 64 << 20
_MOST_IDS = 10_000
_NUMBERS = ("seconds", "first_token_seconds", "tokens_per_second")


def is_answers(path: Path) -> bool:
    """Whether a file holds answers rather than a result of the phone page."""
    if not path.is_file() or path.stat().st_size > _MOST_BYTES:
        return False
    with refusing((ValueError, RecursionError), "compare/damaged-result", path=path):
        content = json.loads(path.read_bytes())
    return isinstance(content, Mapping) and "answers" in content


def read_answers(path: Path, files: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A file of answers, checked; keys that are not known are dropped.

    Args:
        files: names of the compared files and folders. rows: those that are compared.

    Raises:
        InputError: it is damaged, about another file or rows, or a value is of another kind.
    """
    content = json.loads(path.read_bytes())

    def wrong(found: str, expected: str) -> InputError:
        return refusal("compare/odd-answers", path=path, found=found, wanted=expected)

    if content.get("format") != 1:
        raise wrong(f"format {content.get('format')!r:.40}", "format 1")
    told = {key: content.get(key) for key in ("device", "runtime", "file")}
    if odd := [key for key, value in told.items() if not (is_text(value) and value)]:
        raise wrong(f"no text as {', '.join(odd)}", "device, runtime and file as texts")
    if told["file"] not in files:
        raise wrong(f"file {told['file']!r:.80}", f"one of {', '.join(files)}")
    given, known, found = content["answers"], {str(row["id"]) for row in rows}, {}
    if not isinstance(given, list) or not 0 < len(given) <= _ANSWERS:
        raise wrong("no list of answers", f"1 to {_ANSWERS:,} answers")
    for place, one in enumerate(given, 1):
        if not isinstance(one, Mapping) or not isinstance(one.get("id"), str):
            raise wrong(f"answer {place} without an id", "the id of a row")
        if one["id"] not in known:
            raise wrong(f"answer {place} to {one['id']!r:.60}", "a row that is compared")
        if one["id"] in found:
            raise wrong(f"two answers to {one['id']!r:.60}", "one to each row")
        if ("text" in one) == ("ids" in one):
            raise wrong(f"answer {place} with both or none of text and ids", "one of them")
        ids = one.get("ids", [])
        if not isinstance(one.get("text", ""), str) or not (
            isinstance(ids, list) and len(ids) <= _MOST_IDS and all(type(number) is int for number in ids)
        ):
            raise wrong(f"answer {place} of another kind", "a text, or a list of token ids")
        if bad := [key for key in _NUMBERS if key in one and not is_number(one[key])]:
            raise wrong(f"answer {place} with {bad[0]} {one[bad[0]]!r:.40}", "a number of at least 0")
        found[one["id"]] = {key: one[key] for key in ("text", "ids", *_NUMBERS) if key in one}
    return {**told, "answers": found}


def judge_answers(told: Mapping[str, Any], scores: Path, task: Task, words: Sequence[Sequence[int]]) -> dict[str, Any]:
    """How often a device's answers are right, and those that the same file gave here.

    Args:
        told: of `read_answers`. scores: the file's scores here. words: token ids of each label.

    Returns:
        "device", "runtime", "file"; "n" answers, "unread" (that are no label), "agree" (the same label here) and
        "agree_interval", "right" and "right_here", "accuracy" with "accuracy_interval", "p" (exact McNemar test of the
        two), and of the numbers that were given the medians.

    Raises:
        InputError: rows without labels.
    """
    if not words:
        raise refusal("compare/answers-without-labels", file=told["file"])
    here, given = load_scores(scores), told["answers"]
    places = [place for place, name in enumerate(here.ids) if name in given]
    read = [_label(given[here.ids[place]], task, words) for place in places]
    own = here.log_probs.argmax(axis=1)[places].tolist()
    true, n = here.labels[places].tolist(), len(places)
    right = [a == b for a, b in zip(read, true, strict=True)]
    right_here = [a == b for a, b in zip(own, true, strict=True)]
    agree = sum(a == b for a, b in zip(read, own, strict=True))
    medians = {
        key: statistics.median(values) for key in _NUMBERS if (values := [a[key] for a in given.values() if key in a])
    }
    return {
        **{key: told[key] for key in ("device", "runtime", "file")},
        "n": n,
        "unread": read.count(None),
        "agree": agree,
        "agree_interval": wilson(agree, n).to_json(),
        "right": sum(right),
        "right_here": sum(right_here),
        "accuracy": sum(right) / n,
        "accuracy_interval": wilson(sum(right), n).to_json(),
        "p": mcnemar_exact(right, right_here).p,
        **medians,
    }


def _label(answer: Mapping[str, Any], task: Task, words: Sequence[Sequence[int]]) -> int | None:
    """The label that an answer begins with; None where it begins with none."""
    if "ids" in answer:
        fits = [len(own) if answer["ids"][: len(own)] == list(own) else 0 for own in words]
    else:
        text = answer["text"].strip()
        fits = [len(name) if text.startswith(name) else 0 for name in task.label_names]
    return fits.index(max(fits)) if max(fits) else None
