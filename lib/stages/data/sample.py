"""The sample corpus: Chinese reviews from a grammar of this project, so that a run needs no network and no files.

A review is an opening, clauses about aspects of a thing, and sometimes a verdict. Its label is what the reviewer means
in the end: 虽然 A，但是 B means B; 不 turns a word round; with mixed aspects the verdict decides; hedges weaken but do
not turn. A word count alone therefore cannot solve it: in most patterns words of both polarities occur. The words
stand in sample_words.yaml.

One third of the test rows is marked ``pattern: unseen``: sentence patterns or a domain (景区) that no training row has.
Deliberate faults, so that the audit has something to find (`FAULTS`, counted in rows): exact copies of train rows in
the test split, copies that differ only in punctuation, near-copies, copies within train, texts with both labels, empty
texts. They are put in after the distinct rows have been made.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

VERSION = 1
SIZES = {"train": 3000, "validation": 400, "test": 600}
"""Distinct rows a split, before the faults."""

FAULTS = {
    "train rows copied into test": 9,
    "train rows copied into test, other punctuation": 6,
    "train rows copied into test, two characters added": 6,
    "train rows copied within train": 12,
    "train rows copied within train with the other label": 5,
    "empty train rows": 3,
}
SEED = 20_240_517
"""The corpus is one fixed data set: its seed is not the run's seed."""


@functools.cache
def words() -> dict[str, Any]:
    """The content of sample_words.yaml."""
    return yaml.safe_load(Path(__file__).with_name("sample_words.yaml").read_text(encoding="utf-8"))


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


def _direct(w: Writer, good: bool) -> str:
    return f"{w.clause(good)}，{w.clause(good)}，{w.rng.choice((w.clause(good), w.end(good)))}。"


def _contrast(w: Writer, good: bool) -> str:
    joint = w.rng.choice(("，但是", "，但", "，不过"))
    return f"虽然{w.clause(not good)}{joint}{w.clause(good)}，{w.clause(good)}。"


def _concession(w: Writer, good: bool) -> str:
    lead = w.rng.choice(("总体", "综合来看"))
    return f"{w.clause(not good)}，{w.clause(not good)}，可{w.clause(good)}，{lead}{w.end(good)}。"


def _verdict(w: Writer, good: bool) -> str:
    first, second = (w.clause(good), w.clause(not good))
    if w.rng.random() < 0.5:
        first, second = second, first
    lead = w.rng.choice(("总的来说", "总之", "说到底"))
    return f"{first}，{second}，{w.clause(not good)}。{lead}，{w.end(good)}。"


def _expectation(w: Writer, good: bool) -> str:
    feared, met = w.aspects.pop(), w.aspects.pop()
    hoped = w.rng.choice(feared[2] if good else feared[1])
    real = w.rng.choice(met[1] if good else met[2])
    return f"本来以为{feared[0]}{hoped}，没想到{met[0]}{w.degree(real)}，{w.clause(good)}。"


def _others(w: Writer, good: bool) -> str:
    said = w.rng.choice(("网上都说", "别人都夸" if not good else "别人都骂", "评论里说"))
    own = w.rng.choice(("我觉得", "自己试下来"))
    return f"{said}{w.clause(not good, plain=True)}，{own}{w.clause(good)}，{w.clause(good)}。"


def _despite(w: Writer, good: bool) -> str:
    return f"尽管{w.clause(not good)}，{w.clause(good)}，{w.clause(good)}这两点更要紧。"


def _reversed(w: Writer, good: bool) -> str:
    return f"{w.clause(good)}，{w.clause(good)}，即使{w.clause(not good)}也不改变我的看法。"


def _question(w: Writer, good: bool) -> str:
    noun, liked, disliked = w.aspects.pop()
    if good:
        return f"谁说{noun}{w.rng.choice(disliked)}？我看{w.clause(True)}，{w.clause(True)}。"
    return f"{noun}这样也叫{w.rng.choice(short(liked))}？{w.clause(False)}，{w.clause(False)}。"


def _if_only(w: Writer, good: bool) -> str:
    noun, liked, disliked = w.aspects.pop()
    if good:
        return f"{w.clause(True)}，{w.clause(True)}，就算{noun}{w.rng.choice(short(disliked))}一点我也认了。"
    return f"要是{noun}{w.rng.choice(short(liked))}一些就好了，{w.clause(False)}，{w.clause(False)}。"


Pattern = Callable[[Writer, bool], str]
SEEN: tuple[tuple[Pattern, float], ...] = (
    (_direct, 0.22),
    (_contrast, 0.22),
    (_concession, 0.14),
    (_verdict, 0.20),
    (_expectation, 0.11),
    (_others, 0.11),
)
UNSEEN: tuple[tuple[Pattern, float], ...] = ((_despite, 0.3), (_reversed, 0.3), (_question, 0.2), (_if_only, 0.2))


def _review(rng: random.Random, good: bool, unseen: bool) -> str:
    patterns = SEEN
    domain = rng.choice(list(words()["seen"].values()))
    if unseen and rng.random() < 0.5:
        (domain,) = words()["unseen"].values()
    elif unseen:
        patterns = UNSEEN
    pattern = rng.choices([p for p, _ in patterns], [weight for _, weight in patterns])[0]
    writer = Writer(rng, domain)
    text = writer.opening + pattern(writer, good)
    return text[:-1] + rng.choice(words()["asides"]) + text[-1]


def reviews() -> dict[str, list[dict[str, Any]]]:
    """The rows of each split: text, label (0 negative, 1 positive), pattern ("seen" or "unseen"); faults included."""
    from lib.stages.data.near_duplicates import normalise

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
