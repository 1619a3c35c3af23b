"""Entity F1, exact match and F1 against their definitions computed anew: seqeval's counts, SQuAD's script."""

from __future__ import annotations

import collections
import json
import random
import re
import string

import numpy as np
import pytest
from scipy.stats import t

from lib.errors import InputError
from lib.scoring.answer_metrics import KEYS, OTHER, answer_words, by_type, entities, measured, refuse_other_form
from lib.scoring.text_metrics import measure, read_stream, summarise
from lib.statistics.intervals import paired_score_interval

# Entities.


def listed(*pairs: tuple[str, str]) -> str:
    return json.dumps([{"type": kind, "text": text} for kind, text in pairs], ensure_ascii=False)


LI, WANG, HANGZHOU, BANK = ("人物", "李明"), ("人物", "王芳"), ("地点", "杭州"), ("机构", "华远银行")


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("[]", {}),
        (listed(LI, HANGZHOU), {LI: 1, HANGZHOU: 1}),
        (listed(LI, LI), {LI: 2}),
        ('```json\n[{"type": "人物", "text": "李明"}]\n```', {LI: 1}),
        ('[{"entity": " 李明 ", "type": "人物", "start": 3}]', {LI: 1}),
        ('[{"type": "编号", "text": "ＡＢ１"}]', {("编号", "AB1"): 1}),
        ("", None),
        ("李明是人物", None),
        ('{"type": "人物", "text": "李明"}', None),
        ('[{"type": "人物"}]', None),
        ('[{"type": "人物", "text": ""}]', None),
        ('[{"type": "人物", "text": 3}]', None),
        ('[["人物", "李明"]]', None),
        (listed(LI)[:-1], None),
        (f"答案：{listed(LI)}", None),
        ('[{"type": "人物", "text": "\\ud800"}]', None),
        ("[" * 100_000, None),
        ("null", None),
    ],
)
def test_entities_are_a_json_list_and_nothing_else(answer: str, found: dict | None) -> None:
    assert entities(answer) == found


CASES = [  # reference, answer of "a", answer of "b"
    ([LI, HANGZHOU], listed(LI, HANGZHOU), listed(LI)),
    ([LI, WANG, BANK], listed(LI, ("机构", "王芳")), listed(LI, WANG, BANK)),
    ([HANGZHOU, HANGZHOU], listed(HANGZHOU), listed(HANGZHOU, HANGZHOU, HANGZHOU)),
    ([BANK], "不知道", listed(BANK)),
    ([], listed(("产品", "手机")), "[]"),
    ([WANG], "[]", listed(WANG)),
]


def rows_of(model: int) -> list[dict]:
    return [measured("entity_f1", case[model], listed(*case[0])) for case in CASES]


def counted(model: int, kind: str | None = None) -> tuple[int, int, int]:
    """seqeval's three counts (true, predicted, right) over mentions, pair by pair, without the code under test."""
    right = predicted = true = 0
    for case in CASES:
        left = [pair for pair in case[0] if kind in (None, pair[0])]
        true += len(left)
        try:
            given = [(entry["type"], entry["text"]) for entry in json.loads(case[model])]
        except json.JSONDecodeError:
            given = []
        for pair in given:
            if kind in (None, pair[0]):
                predicted += 1
                if pair in left:
                    left.remove(pair)
                    right += 1
    return true, predicted, right


def test_entity_f1_is_micro_f1_over_mentions() -> None:
    models = {"a": rows_of(1), "b": rows_of(2)}
    found = {entry["key"]: entry for entry in summarise(models, range(len(CASES)), "a")}
    for place, name in enumerate("ab", 1):
        true, predicted, right = counted(place)
        precision, recall = right / predicted, right / true
        by_hand = 2 * precision * recall / (precision + recall)
        assert found["entity_f1"]["models"][name]["estimate"] == pytest.approx(by_hand)
    assert counted(1) == (9, 6, 4) and counted(2) == (9, 9, 8)
    a, b = (found["entity_f1"]["models"][name]["estimate"] for name in "ab")
    assert (a, b) == (pytest.approx(8 / 15), pytest.approx(16 / 18))
    assert found["entity_f1"]["differences"]["b"]["estimate"] == pytest.approx(b - a)
    assert [found["readable"]["models"][name]["estimate"] for name in "ab"] == [5 / 6, 1.0]
    assert found["entity_f1"]["wanted"] is None and "exact_match" not in found
    for place, name in enumerate("ab", 1):
        lines = found["entity_f1"]["types"][name]
        assert [line["type"] for line in lines] == ["人物", "地点", "机构", *([OTHER] if name == "a" else [])]
        for line in lines[:3]:
            true, predicted, right = counted(place, line["type"])
            assert (line["wanted"], line["written"], line["right"]) == (true, predicted, right)
            assert line["f1"] == pytest.approx(2 * right / (true + predicted))
            assert line["precision"] == (right / predicted if predicted else None)
            assert line["recall"] == right / true
    made_up = by_type(models["a"])[-1]
    assert (made_up["wanted"], made_up["written"], made_up["recall"], made_up["f1"]) == (0, 1, None, 0.0)


def test_the_difference_of_two_f1_has_the_linearized_error() -> None:
    """Oracle: the jackknife over rows, which the linearized standard error of a smooth figure comes near to."""
    rng = random.Random(0)
    cases = []
    for _ in range(80):
        wanted = [("人物", f"名{i}") for i in range(rng.randint(0, 4))]
        answers = [[pair for pair in wanted if rng.random() < share] for share in (0.6, 0.8)]
        answers = [given + [("地点", "错")] * (rng.random() < 0.4) for given in answers]
        cases.append((wanted, *(listed(*given) for given in answers)))
    models = {
        name: [measured("entity_f1", case[place], listed(*case[0])) for case in cases]
        for place, name in enumerate("ab", 1)
    }
    entry = next(entry for entry in summarise(models, range(80), "a") if entry["key"] == "entity_f1")
    pairs = np.array([[row["entity_f1"] for row in models[name]] for name in "ab"], dtype=float)

    def difference(kept: np.ndarray) -> float:
        sums = pairs[:, kept].sum(axis=1)
        return float(sums[1, 0] / sums[1, 1] - sums[0, 0] / sums[0, 1])

    left_out = np.array([difference(np.arange(80) != i) for i in range(80)])
    error = np.sqrt(79 / 80 * np.sum((left_out - left_out.mean()) ** 2))
    found = entry["differences"]["b"]
    assert found["estimate"] == pytest.approx(difference(np.arange(80)))
    half = (found["interval"][1] - found["interval"][0]) / 2
    assert half == pytest.approx(t.ppf(0.975, entry["n"] - 1) * error, rel=0.05)
    same = next(e for e in summarise({"a": models["a"], "b": models["a"]}, range(80), "a") if e["key"] == "entity_f1")
    assert same["differences"]["b"]["interval"] == paired_score_interval(0, 0, same["n"]).to_json()


@pytest.mark.parametrize("right", [0.6, 0.97])
def test_the_interval_of_f1_covers(right: float) -> None:
    """Simulated: mentions of a sentence stand or fall together; the F1 of very many sentences is the truth."""
    rng = np.random.default_rng(0)

    def drawn(count: int) -> list[dict]:
        sizes, level = rng.integers(1, 5, count), rng.beta(6 * right, 6 * (1 - right), count)
        hits, more = rng.binomial(sizes, level), rng.binomial(1, 1 - level)
        return [
            {"entity_f1": [2 * h, h + m + n], "entity_types": {}} for h, m, n in zip(hits, more, sizes, strict=True)
        ]

    sums = np.array([row["entity_f1"] for row in drawn(100_000)]).sum(axis=0)
    inside = 0
    for _ in range(200):
        (entry,) = summarise({"a": drawn(40)}, range(40), "a")
        low, high = entry["models"]["a"]["interval"]
        inside += low <= sums[0] / sums[1] <= high
    assert inside >= 180


def test_nothing_wanted_and_nothing_written_is_no_f1() -> None:
    rows = [measured("entity_f1", "[]", "[]") for _ in range(4)]
    assert [entry["key"] for entry in summarise({"a": rows, "b": rows}, range(4), "a")] == ["readable"]


# Answers.


def squad_normal(text: str) -> str:
    """`normalize_answer` of SQuAD's evaluation script, from its description."""
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_f1(answer: str, reference: str) -> float:
    given, wanted = squad_normal(answer).split(), squad_normal(reference).split()
    same = sum((collections.Counter(given) & collections.Counter(wanted)).values())
    if not same:
        return 0.0
    precision, recall = same / len(given), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("The Eiffel Tower.", "Eiffel Tower"),
        ("in the U.S. Senate", "the US Senate"),
        ("a cat, an owl and the dog", "cat and dog"),
        ("1,200 people", "1200"),
        ("don't know", "dont"),
        ("", "Paris"),
        ("New York New York", "New York"),
    ],
)
def test_english_answers_as_squad_takes_them(answer: str, reference: str) -> None:
    row = measured("exact_match", answer, reference)
    assert row["exact_match"] == (squad_normal(answer) == squad_normal(reference))
    assert row["answer_f1"] == pytest.approx(squad_f1(answer, reference))


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "f1"),
    [
        ("西安。", "西安", True, 1.0),
        ("在西安市", "西安", False, 2 * 2 / (4 + 2)),
        ("《红楼梦》", "红楼梦", True, 1.0),
        ("Ｑwen３ 模型", "qwen3模型", True, 1.0),  # words qwen3, 模, 型
        ("qwen2模型", "qwen3模型", False, 2 * 2 / 6),
        ("二〇〇三年", "二〇〇三", False, 2 * 4 / 9),
        ("A", "A", True, 1.0),
        ("不知道", "杭州", False, 0.0),
    ],
)
def test_chinese_answers_by_characters(answer: str, reference: str, exact: bool, f1: float) -> None:
    row = measured("exact_match", answer, reference)
    assert (row["exact_match"], row["answer_f1"]) == (exact, pytest.approx(f1))


def test_words() -> None:
    assert answer_words("Qwen3在2025年，發佈！") == ["qwen3", "在", "2025", "年", "發", "佈"]
    assert answer_words("カタカナ𠮷 naïve") == ["カ", "タ", "カ", "ナ", "𠮷", "naïve"]
    assert answer_words("……") == []


# In the row of an answer.


def test_the_row_of_an_answer_has_the_metric_that_was_chosen() -> None:
    def row(metric: str, text: str, reference: str, thinking: bool = False) -> dict:
        return measure(read_stream([text.encode()]), True, "", reference, None, thinking, answer_metric=metric)

    assert {row("none", "杭州", "杭州")[key] for key in KEYS} == {None}
    assert row("exact_match", "杭州", "")["exact_match"] is None, "nothing to compare with"
    assert row("entity_f1", "[]", "你好")["entity_f1"] is None
    thought = row("entity_f1", f"<think>想</think>{listed(LI)}", f"<think>找</think>{listed(LI, WANG)}", thinking=True)
    assert thought["entity_f1"] == [2, 3] and thought["entity_types"] == {"人物": [1, 1, 2]}


def test_references_of_another_form_are_refused() -> None:
    refuse_other_form("none", ["", "x"])
    refuse_other_form("entity_f1", ["[]", f"<think>找</think>\n{listed(LI)}"])
    refuse_other_form("exact_match", ["A", "杭州"])
    with pytest.raises(InputError, match=r"2 of 3 reference answers that list no entities, e\.g\. '人物：李明'.*\[\]"):
        refuse_other_form("entity_f1", ["[]", "人物：李明", ""])
    with pytest.raises(InputError, match="1 of 2 reference answers without a word"):
        refuse_other_form("exact_match", ["杭州", "……"])
