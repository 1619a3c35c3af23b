"""The sample corpus: Chinese reviews from a grammar of this project, so that a run needs no network and no files.

A review is an opening, clauses about aspects of a thing, and sometimes a verdict. Its label is what the reviewer means
in the end: 虽然 A，但是 B means B; 不 turns a word round; with mixed aspects the verdict decides; hedges weaken but do
not turn. A word count alone therefore cannot solve it: in most patterns words of both polarities occur. The words and
the patterns of sentences stand in sample_words.yaml.

One third of the test rows is marked ``pattern: unseen``: sentence patterns or a domain (景区) that no training row has.
Deliberate faults, so that the audit has something to find (`FAULTS`, counted in rows): exact copies of train rows in
the test split, copies that differ only in punctuation, near-copies, copies within train, texts with both labels, empty
texts. They are put in after the distinct rows have been made.

Two further corpora have answers instead of labels, without faults: sentences whose entities are asked for as a JSON
list (sample-ner), and short texts with a question about one of their facts (sample-qa).
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from lib.stages.data.data_files import NAMES
from lib.stages.data.near_duplicates import normalise

VERSION = 1
SIZES = {"train": 3000, "validation": 400, "test": 600}
"""Distinct rows a split, before the faults."""

FAULTS: dict[str, int] = NAMES["sample_faults"]
ANSWERED_SIZES = {"train": 2400, "validation": 200, "test": 300}
"""Rows a split of the corpora with answers."""
SEED = 20_240_517
"""The corpus is one fixed data set: its seed is not the run's seed."""


@functools.cache
def words() -> dict[str, Any]:
    """The content of sample_words.yaml."""
    return yaml.safe_load(Path(__file__).with_name("sample_words.yaml").read_text(encoding="utf-8"))


@functools.cache
def _template(pattern: str) -> Any:
    from jinja2 import Template

    return Template(pattern)


def short(choices: Sequence[str]) -> list[str]:
    """Those of two characters, which can be negated."""
    return [word for word in choices if len(word) == 2 and word[0] not in "不太没"]


class Writer:
    """Draws the parts of a review about one domain; `good` is the polarity a part must have."""

    def __init__(self, rng: random.Random, domain: dict[str, Any]) -> None:
        self.rng, self.domain = rng, domain
        aspects = [(noun, *choices) for noun, choices in domain["aspects"].items()]
        self.aspects = rng.sample(aspects, len(aspects))
        self.opening = rng.choice((rng.choice(domain["openings"]) + "，", ""))

    def clause(self, good: bool, plain: bool = False) -> str:
        """A statement about the next aspect: direct, or (unless `plain`) negated or hedged."""
        noun, liked, disliked = self.aspects.pop()
        word, form = self.rng.choice(liked if good else disliked), self.rng.random()
        if not plain and form < 0.22:
            nots = ("没有想象中", "并不", "一点也不") if good else ("不", "不太", "一点也不", "谈不上")
            return noun + self.rng.choice(nots) + self.rng.choice(short(disliked if good else liked))
        if not plain and form < 0.36:
            return noun + self.rng.choice(words()["good_hedges" if good else "bad_hedges"]) + word
        return noun + self.degree(word)

    def degree(self, word: str) -> str:
        """The word, a short one with an adverb of degree or without."""
        return (self.rng.choice(words()["degrees"]) if len(word) == 2 else "") + word

    def end(self, good: bool) -> str:
        return self.rng.choice(self.domain["good_end" if good else "bad_end"])

    def pick(self, *choices: str) -> str:
        return self.rng.choice(choices)

    def pick_short(self, choices: Sequence[str]) -> str:
        return self.rng.choice(short(choices))


def _review(rng: random.Random, good: bool, unseen: bool) -> str:
    patterns = "seen"
    domain = rng.choice(list(words()["seen"].values()))
    if unseen and rng.random() < 0.5:
        (domain,) = words()["unseen"].values()
    elif unseen:
        patterns = "unseen"
    weights, texts = zip(*words()["patterns"][patterns], strict=True)
    pattern = rng.choices(texts, weights)[0]
    writer = Writer(rng, domain)
    text = writer.opening + _template(pattern).render(w=writer, good=good)
    return text[:-1] + rng.choice(words()["asides"]) + text[-1]


def reviews() -> dict[str, list[dict[str, Any]]]:
    """The rows of each split: text, label (0 negative, 1 positive), pattern ("seen" or "unseen"); faults included."""
    rng = random.Random(SEED)
    known: set[str] = set()
    splits: dict[str, list[dict[str, Any]]] = {}
    for split, size in SIZES.items():
        rows = splits[split] = []
        while len(rows) < size:
            label = len(rows) % 2
            unseen = split == "test" and len(rows) % 6 in (1, 4)  # one third, both labels alike
            text = _review(rng, bool(label), unseen)
            if normalise(text) not in known:
                known.add(normalise(text))
                rows.append({"text": text, "label": label, "pattern": "unseen" if unseen else "seen"})
    _add_faults(splits, rng)
    for rows in splits.values():
        rng.shuffle(rows)
    return splits


def _add_faults(splits: dict[str, list[dict[str, Any]]], rng: random.Random) -> None:
    """Copies, contradictions and empty rows, as `FAULTS` counts them, each of another train row."""
    train, test = splits["train"], splits["test"]
    chosen = iter(rng.sample(train, sum(FAULTS.values())))
    changes: tuple[tuple[list, Callable[[dict[str, Any]], dict[str, Any]]], ...] = (
        (test, dict),
        (test, lambda row: {**row, "text": row["text"].replace("，", " ") + "！"}),
        (test, lambda row: {**row, "text": row["text"] + "哈哈"}),
        (train, dict),
        (train, lambda row: {**row, "label": 1 - row["label"]}),
        (train, lambda row: {**row, "text": "  "}),
    )
    for count, (target, change) in zip(FAULTS.values(), changes, strict=True):
        target += [change(next(chosen)) for _ in range(count)]


# Corpora with answers, in Alpaca's columns.

Alpaca = dict[str, str]


def _filled(rng: random.Random, pattern: str, known: dict[str, str] | None = None) -> tuple[str, list[tuple[str, str]]]:
    """A pattern with its slots filled, and (slot, text) in their order.

    Args:
        known: texts of slots that are the same wherever they occur; gets those that are drawn. None = drawn each time.
    """
    slots, drawn = words()["slots"], []

    def fill(match: re.Match[str]) -> str:
        parts = {"人物": ("姓", "名"), "机构": ("号", "类")}.get(match[1], (match[1],))
        text = (known or {}).get(match[1]) or "".join(rng.choice(slots[part]) for part in parts)
        if known is not None:
            known[match[1]] = text
        drawn.append((match[1], text))
        return text

    return re.sub(r"\{(\w+)\}", fill, pattern), drawn


def _entity_row(rng: random.Random) -> Alpaca:
    text, drawn = _filled(rng, rng.choice(words()["entity_sentences"]))
    found = [{"type": slot, "text": name} for slot, name in drawn if slot in words()["entities"]]
    instruction = f"找出句子里的{'、'.join(words()['entities'])}，只写 JSON 列表。"
    return {"instruction": instruction, "input": text, "output": json.dumps(found, ensure_ascii=False)}


def _question_row(rng: random.Random) -> Alpaca:
    known: dict[str, str] = {}
    text, _ = _filled(rng, rng.choice(words()["question_texts"]), known)
    asked = rng.choice(list(words()["questions"]))
    question, _ = _filled(rng, rng.choice(words()["questions"][asked]), known)
    return {"instruction": "读短文，回答问题，只写答案。", "input": f"{text}\n问题：{question}", "output": known[asked]}


def _answered(make: Callable[[random.Random], Alpaca]) -> dict[str, list[Alpaca]]:
    """Distinct rows of each split."""
    rng, rows = random.Random(SEED), {}
    while len(rows) < sum(ANSWERED_SIZES.values()):
        row = make(rng)
        rows.setdefault(row["input"], row)
    left = iter(rows.values())
    return {split: list(itertools.islice(left, size)) for split, size in ANSWERED_SIZES.items()}


CORPORA: dict[str, Callable[[], dict[str, list[dict[str, Any]]]]] = {
    "sample": reviews,
    "sample-ner": functools.partial(_answered, _entity_row),
    "sample-qa": functools.partial(_answered, _question_row),
}
"""Rows of each split, by the name that `dataset` takes."""
