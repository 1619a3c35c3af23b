"""Duplicates: exact, normalised, near; against brute force."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.stages.data.cleaning import Row
from lib.stages.data.near_duplicates import CONTAINED, audit, close_pairs, find_duplicates, normalise

TEXTS = st.lists(st.text("好差吃房间", min_size=1, max_size=14), min_size=0, max_size=25, unique=True)


def grams(text: str) -> set[str]:
    return {text[i : i + 3] for i in range(max(1, len(text) - 2))}


def brute_force(texts: list[str], threshold: float) -> set[tuple[int, int]]:
    found = set()
    for i, a in enumerate(texts):
        for j in range(i + 1, len(texts)):
            common = len(grams(a) & grams(texts[j]))
            if common >= threshold * len(grams(a) | grams(texts[j])) - 1e-9:
                found.add((i, j))
    return found


@settings(deadline=None)
@given(TEXTS, st.sampled_from([0.3, 0.5, 0.8, 1.0]))
def test_near_pairs_are_exact(texts: list[str], threshold: float):
    assert {tuple(pair) for pair in close_pairs(texts, threshold=threshold).tolist()} == brute_force(texts, threshold)


@settings(deadline=None)
@given(st.lists(st.text("好差吃房间", min_size=8, max_size=40), max_size=12, unique=True), st.data())
def test_contained_pairs_are_exact(texts: list[str], data: st.DataObject):
    for text in texts[:4]:  # parts of texts, with something before and behind
        start = data.draw(st.integers(0, len(text) // 2))
        texts.append(data.draw(st.sampled_from(["", "另", "别的话"])) + text[start:])
    texts = list(dict.fromkeys(texts))
    expected = set()
    for i, a in enumerate(texts):
        for j in range(i + 1, len(texts)):
            smaller = min(len(grams(a)), len(grams(texts[j])))
            if smaller >= 10 and len(grams(a) & grams(texts[j])) >= CONTAINED * smaller - 1e-9:
                expected.add((i, j))
    assert {tuple(pair) for pair in close_pairs(texts, True, CONTAINED).tolist()} == expected


def test_a_post_with_and_without_its_body_is_one_group():
    title, body = (
        "毕业六年在做程序员到底要不要裸辞",
        "我毕业以后一直在做程序员的工作，久坐使身体出现了很多毛病，想换一个环境。" * 2,
    )
    train, test = [Row(0, f"{title}？{body}", 0), Row(1, "嗯", 0)], [Row(0, f"{title}？", 0), Row(1, "嗯嗯", 0)]
    audit({"train": train, "test": test})
    assert not any(row.leaked for row in test) and train[0].group != test[0].group
    found = audit({"train": train, "test": test}, contained=True)
    assert [row.leaked for row in test] == [True, False] and train[0].group == test[0].group
    (line,) = found["overlaps"]
    assert (line["or near-duplicate"], line["or one contains the other"]) == (0, 1)
    assert (
        found["duplicates"][-1]["pairs of which one contains the other"] == 1
        and found["leaked_examples"][0]["train row"] == 0
    )


@settings(deadline=None)
@given(TEXTS.filter(len))
def test_groups_are_the_connected_components(texts: list[str]):
    result = find_duplicates([*texts, texts[0] + "！"])
    pairs = {frozenset(pair) for pair in brute_force(result.unique, 0.8)}
    group_of = dict(zip(result.unique_of.tolist(), result.groups.tolist(), strict=True))
    assert all(group_of[min(pair)] == group_of[max(pair)] for pair in pairs)
    assert result.groups[-1] == result.groups[0] == 0
    reachable = {0}
    while more := {b for pair in pairs if pair & reachable for b in pair} - reachable:
        reachable |= more
    assert {unique for unique, group in group_of.items() if group == 0} == reachable


def test_normalise():
    assert normalise("Ｗｉｆｉ 很好！！") == normalise("wifi很好。") == "wifi很好"
    assert normalise("cafe\u0301") == normalise("café")
    assert normalise("！！！") != normalise("？？？")
    assert normalise(" 😀 ") == "😀"


def test_audit_counts_and_flags():
    long = "这家酒店的早餐非常丰富而且前台的服务也很热情下次还会再来"
    train = [Row(0, "好吃", 1), Row(1, "好吃", 1), Row(2, "难吃。", 0), Row(3, "难吃", 1), Row(4, long, 1)]
    test = [Row(0, "好吃", 1), Row(1, "难 吃！", 0), Row(2, long + "哈", 0), Row(3, "没见过", 0)]
    result = audit({"train": train, "test": test})
    assert [row.leaked for row in test] == [True, True, True, False]
    assert not any(row.leaked for row in train)
    assert [row.group for row in train + test] == [0, 0, 1, 1, 2, 0, 1, 2, 3]
    within = result["duplicates"][0]
    assert (within["surplus verbatim copies"], within["surplus copies after normalisation"]) == (1, 2)
    assert within["texts with conflicting labels"] == 0
    assert within["texts with conflicting labels after normalisation"] == 1
    assert result["overlaps"] == [
        {
            "rows of": "test", "also in": "train", "rows": 4,
            "verbatim": 1, "after normalisation": 2, "or near-duplicate": 3, "label agrees": 2,
        }
    ]  # fmt: skip
    assert result["duplicates"][-1]["near-duplicate pairs"] == 1
    assert result["conflict_examples"] == [{"text": "难吃。", "rows by label": {"0": 2, "1": 1}}]
    near = next(example for example in result["leaked_examples"] if example["text"] == long + "哈")
    assert near["train text"] == long and near["label"] == 0 and near["train label"] == 1


def test_audit_again_after_a_new_split_forgets_old_flags():
    rows = [Row(0, "好吃", 1), Row(1, "好吃", 1)]
    audit({"train": rows[:1], "test": rows[1:]})
    assert rows[1].leaked
    audit({"train": [], "test": rows})
    assert not rows[1].leaked


def test_many_alike_texts_stay_fast():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("好差吃房间早餐"), 40)) for _ in range(300)]
    texts += [text[:-1] + "新" for text in texts]
    assert len(close_pairs(texts)) == 300
