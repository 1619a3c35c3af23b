"""The box that page 07 opens with, over generated comparisons: short, and never against the verdicts."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from bs4 import BeautifulSoup
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.language import CHINESE, ENGLISH, speaking
from lib.report import display
from lib.scoring.log_probabilities import AnswerScores, Scores
from lib.scoring.metric import ACCURACY, ANSWER_PERPLEXITY, Entry, Metric, RowGroups, compare
from lib.stages.compare.recommend import judge, recommend
from lib.statistics.noninferiority import GOOD_ENOUGH, NO_VERDICT, WORSE

MOST_WORDS = 60
NAMES = ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K"]


def labels(n: int, wrong: int, changed: int, rarest: float, shift: float) -> Scores:
    """Scores that are wrong on the last rows and changed on the first, every second of them to the better."""
    truth = np.where(np.arange(n) % 100 < 100 * rarest, 0, 1)
    right = np.ones(n, bool)
    right[n - wrong :] = False
    places = np.unique(np.linspace(0, n - 1, changed).astype(int))
    right[places] = ~right[places]
    given_label = np.where(right, truth, 1 - truth)
    margin = 2.0 + shift
    log_probs = np.full((n, 2), -np.logaddexp(0, margin))
    log_probs[np.arange(n), given_label] = -np.logaddexp(0, -margin)
    return Scores([str(i) for i in range(n)], truth, log_probs, np.zeros(n, bool), 1.0)


def answers(n: int, shift: float, noise: float, seed: int) -> AnswerScores:
    tokens = np.random.default_rng(0).integers(5, 40, n)
    losses = np.random.default_rng(1).uniform(1.5, 2.5, n) + np.random.default_rng(seed).normal(shift, noise, n)
    return AnswerScores([str(i) for i in range(n)], -losses * tokens, tokens, 1.0)


def entries_of(metric: Metric, reference: Any, others: dict[str, Any], rows: RowGroups) -> list[Entry]:
    sizes = {"": 4_068_864, **{name: 2_230_000 - 100_000 * place for place, name in enumerate(others)}}
    found = compare(metric, reference, others, rows, 0)
    return [{**found[name], "type": name or "F16", "kind": "gguf", "bytes": size} for name, size in sizes.items()]


@st.composite
def comparisons(draw: st.DrawFn) -> tuple[Metric, list[Entry], float, float | None]:
    """Metric, entries with the reference first, margin and floor."""
    n, names = draw(st.sampled_from([12, 60, 400])), NAMES[: draw(st.integers(0, len(NAMES)))]
    copies = draw(st.sampled_from([1, 1, 2]))
    leak_free = draw(st.sampled_from([None, np.arange(n) % 10 > 0]))
    rows, margin = RowGroups(np.arange(n) // copies, leak_free), draw(st.sampled_from([0.5, 1.0, 2.5, 10.0]))
    if draw(st.booleans()):
        # half of the rows wrong: a reference that has not learned
        wrong = draw(st.one_of(st.integers(0, n // 2), st.just(n // 2)))
        rarest = draw(st.sampled_from([0.5, 0.2]))
        reference = labels(n, wrong, 0, rarest, 0.0)
        changes = {
            name: (draw(st.sampled_from([0, 1, 2, n // 10, n // 2])), draw(st.sampled_from([0.0, 1e-3, -1.0])))
            for name in names
        }
        others = {name: labels(n, wrong, changed, rarest, shift) for name, (changed, shift) in changes.items()}
        return ACCURACY, entries_of(ACCURACY, reference, others, rows), margin, max(rarest, 1 - rarest)
    moves = {
        name: (draw(st.sampled_from([-0.02, 0.0, 1e-4, 0.005, 0.3])), draw(st.sampled_from([0.0, 1e-3, 0.3])))
        for name in names
    }
    others = {name: answers(n, shift, noise, seed) for seed, (name, (shift, noise)) in enumerate(moves.items(), 2)}
    floor = draw(st.sampled_from([None, 5.0, 500.0]))
    return ANSWER_PERPLEXITY, entries_of(ANSWER_PERPLEXITY, answers(n, 0, 0, 2), others, rows), margin, floor


def words_in(text: str) -> int:
    return sum(bool(re.search(r"\w", word)) for word in text.split())


Made = tuple[Metric, list[Entry], float, float | None]


@given(comparisons())
@settings(max_examples=60, deadline=None)
def test_the_box_is_short_and_says_what_the_verdicts_say(made: Made) -> None:
    check(made)


def check(made: Made) -> str:
    """Hold the box of a comparison against its verdicts; give its reason."""
    metric, (reference, *others), margin, floor = made
    verdicts = judge(metric, reference, others, margin, floor)
    told = [{**entry, "verdict": verdicts[entry["type"]]} for entry in others]
    advice = {**recommend(metric, reference, told, margin, floor), "warning": ""}
    box = BeautifulSoup(display.markup("answer", advice, "more"), "html.parser")
    shown = [line.get_text() for line in box.select("div.answer > p")]
    text = " ".join(shown)
    assert 0 < words_in(text) <= MOST_WORDS, f"{words_in(text)} words: {text}"
    assert not re.search(r"\bnan\b|\binf\b|None|  ", text), text
    taken = re.match(r"Take (\S+) · ", shown[0])
    assert (taken and taken[1]) == advice["type"]
    worse = {name for name, word in verdicts.items() if word == WORSE}
    named = re.search(r"Worse: ([^.]+)\.", text)
    if named and named[1].endswith(" files"):  # so many that their names would not fit
        assert named[1] == f"{len(worse)} files"
    else:
        assert set(named[1].split(", ") if named else []) == worse
    if advice["type"]:
        assert verdicts[advice["type"]] == GOOD_ENOUGH and f"; {reference['type']} " in text
        smaller = [entry["type"] for entry in told if entry["bytes"] < reference["bytes"]]
        assert GOOD_ENOUGH not in [verdicts[name] for name in smaller[smaller.index(advice["type"]) + 1 :]]
        most = re.search(r"(?:At most|rises by at most) ([\d.]+)", shown[1])
        assert most is None or float(most[1]) <= margin + 0.005
    else:
        assert GOOD_ENOUGH not in verdicts.values() and shown[0].startswith("No ")
        assert advice["reason"] == "alone" or shown[1:], f"nothing says what to do: {advice['reason']}"
    if NO_VERDICT in verdicts.values():
        assert advice["type"] is None and shown[0].startswith("No verdict: ")
    return advice["reason"]


NUMBER_AND_UNIT = re.compile(r"\d (?:[%\u4e00-\u9fff]|MB|points|rows|answers|nats)")


@pytest.mark.parametrize("spoken", [ENGLISH, CHINESE])
def test_no_line_ends_between_a_number_and_its_unit(spoken: str) -> None:
    with speaking(spoken):
        for metric, (reference, *others), margin, floor in (of_labels(400, 20, 1, 2.5), of_labels(60, 5, 2)):
            advice = recommend(metric, reference, others, margin, floor) | {"warning": "损失 5 %"}
            assert NUMBER_AND_UNIT.search(advice["text"])
            text = BeautifulSoup(display.markup("answer", advice, "more"), "html.parser").get_text()
            assert not NUMBER_AND_UNIT.search(text) and "\u00a0" in text


def of_labels(n: int, wrong: int, changed: int | None, margin: float = 1.0) -> Made:
    others = {} if changed is None else {"Q8_0": labels(n, wrong, changed, 0.5, 0.0)}
    entries = entries_of(ACCURACY, labels(n, wrong, 0, 0.5, 0.0), others, RowGroups(np.arange(n)))
    return ACCURACY, entries, margin, 0.5


def of_answers(n: int, noise: float | None, floor: float | None = None) -> Made:
    others = {} if noise is None else {"Q8_0": answers(n, 0.0, noise, 3)}
    entries = entries_of(ANSWER_PERPLEXITY, answers(n, 0.0, 0.0, 2), others, RowGroups(np.arange(n)))
    return ANSWER_PERPLEXITY, entries, 1.0, floor


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (of_labels(400, 20, None), "alone"),
        (of_labels(12, 1, 1), "few"),
        (of_labels(400, 200, 1), "unlearned"),
        (of_labels(400, 400, 1), "unlearned"),
        (of_labels(400, 20, 0, 2.5), "good enough"),
        (of_labels(60, 5, 2), "not shown"),
        (of_answers(400, None), "alone"),
        (of_answers(12, 0.1), "few"),
        (of_answers(400, 0.1, floor=2.0), "unlearned"),
        (of_answers(400, 0.0), "good enough"),
        (of_answers(400, 0.5), "not shown"),
    ],
)
def test_every_outcome(made: Made, reason: str) -> None:
    assert check(made) == reason
