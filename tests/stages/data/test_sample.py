"""The sample corpus: deterministic, distinct, balanced, with the faults it promises and no others."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from lib.runs.files import sha256_json
from lib.stages.data import sample
from lib.stages.data.baseline import linear_floor
from lib.stages.data.cleaning import clean_split
from lib.stages.data.near_duplicates import audit

NAMES = ["负面", "正面"]


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[dict]]:
    return sample.reviews()


@pytest.fixture(scope="module")
def splits():
    return {name: clean_split(table, name, "", "", NAMES)[0] for name, table in sample.reviews().items()}


@pytest.fixture(scope="module")
def found(splits):
    return audit(splits)


def test_the_corpus_is_one_fixed_data_set(corpus):
    # `python -c "from lib.stages.data.sample import *; from lib.runs.files import *; print(sha256_json(reviews()))"`;
    # a change of the grammar must raise sample.VERSION, which redoes the stage.
    assert sample.VERSION == 1
    assert sha256_json(corpus) == "49881e656565a4adaee0db91f6938a982b13ec02a81e56b05da379daabcaa410"
    assert corpus == sample.reviews()


def test_sizes_balance_and_length(corpus):
    faults = sample.FAULTS
    into_test = sum(count for name, count in faults.items() if "into test" in name)
    assert len(corpus["test"]) == sample.SIZES["test"] + into_test
    assert len(corpus["train"]) == sample.SIZES["train"] + sum(faults.values()) - into_test
    for rows in corpus.values():
        assert abs(sum(row["label"] for row in rows) / len(rows) - 0.5) < 0.02
    lengths = [len(row["text"]) for rows in corpus.values() for row in rows]
    assert 25 <= sum(lengths) / len(lengths) <= 60 and max(lengths) <= 90


def test_a_third_of_the_test_rows_is_unseen(corpus):
    patterns = {name: Counter(row["pattern"] for row in rows) for name, rows in corpus.items()}
    assert set(patterns["train"]) == set(patterns["validation"]) == {"seen"}
    assert patterns["test"]["unseen"] == sample.SIZES["test"] // 3
    train = "".join(row["text"] for row in corpus["train"])
    assert not any(word in train for word in ("尽管", "即使", "就算", "要是", "谁说", "景区", "门票", "索道"))


def test_the_audit_finds_the_faults_and_nothing_else(found):
    faults = sample.FAULTS
    verbatim = faults["train rows copied into test"]
    normal = verbatim + faults["train rows copied into test, other punctuation"]
    near = normal + faults["train rows copied into test, two characters added"]
    conflicts = faults["train rows copied within train with the other label"]
    leak = next(line for line in found["overlaps"] if line["rows of"] == "test" and line["also in"] == "train")
    assert (leak["verbatim"], leak["after normalisation"], leak["or near-duplicate"]) == (verbatim, normal, near)
    train = found["duplicates"][0]
    assert train["surplus verbatim copies"] == faults["train rows copied within train"] + conflicts
    assert train["texts with conflicting labels"] == conflicts
    assert found["duplicates"][-1]["distinct texts"] - found["duplicates"][-1]["duplicate clusters"] == near - verbatim


def test_empty_rows_are_dropped():
    _, counts = clean_split(sample.reviews()["train"], "train", "", "", NAMES)
    assert counts == {"dropped: empty text": sample.FAULTS["empty train rows"]}


def test_word_counts_learn_it_but_not_all_of_it(splits, found):
    floor = linear_floor(splits, NAMES, seed=0)["test"]
    assert 0.80 <= floor["leak_free"]["accuracy"] <= 0.93
    assert floor["by_pattern"]["unseen"]["accuracy"] < floor["by_pattern"]["seen"]["accuracy"] - 0.05


def test_every_aspect_has_words_that_can_be_negated():
    for domain in (*sample.words()["seen"].values(), *sample.words()["unseen"].values()):
        assert len(domain["aspects"]) >= 5  # the longest pattern uses four
        for noun, (good, bad) in domain["aspects"].items():
            assert sample.short(good) and sample.short(bad), noun
            assert not set(good) & set(bad), noun


ANSWERED = {
    "sample-ner": "b9dc60feb19bc19f4122b0065e9cb4a728b79cac5559391f3b7e40b6b4431dff",
    "sample-qa": "385968dfc5a67331a9e9cb231229306611cf80022f5f32a2b8816c3e3f4fcd43",
}


@pytest.mark.parametrize("name", ANSWERED)
def test_the_corpora_with_answers(name):
    splits = sample.CORPORA[name]()
    assert {split: len(rows) for split, rows in splits.items()} == sample.ANSWERED_SIZES
    assert sha256_json(splits) == ANSWERED[name], "a change must raise sample.VERSION"
    rows = [row for split in splits.values() for row in split]
    assert len({row["input"] for row in rows}) == len(rows)
    empty = 0
    for row in rows:
        if name == "sample-qa":
            text, _, question = row["input"].partition("\n问题：")
            assert row["output"] in text and question.endswith("？") and row["output"] not in question
            continue
        given, at = json.loads(row["output"]), 0
        empty += not given
        for entity in given:  # in the order of the sentence
            at = row["input"].index(entity["text"], at) + len(entity["text"])
            assert entity["type"] in ("人物", "地点", "机构")
    assert name == "sample-qa" or 0.02 < empty / len(rows) < 0.2
