"""Splits and subsamples: whole clusters, near the wanted shares, the same for the same seed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.stages.data.cleaning import Row
from lib.stages.data.near_duplicates import drop_copies, shares_of, split_by_cluster, split_fold, subsample

ROWS = st.lists(st.tuples(st.integers(0, 25), st.integers(0, 2)), min_size=1, max_size=120).map(
    lambda pairs: [Row(i, f"t{i}", label, group=group) for i, (group, label) in enumerate(pairs)]
)


@given(ROWS, st.integers(0, 2**31 - 1))
def test_no_cluster_crosses_and_no_row_is_lost(rows: list[Row], seed: int):
    splits = split_by_cluster(rows, seed, shares_of(0.1))
    assert sorted(row.index for part in splits.values() for row in part) == [row.index for row in rows]
    groups = [{row.group for row in part} for part in splits.values()]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert all([row.index for row in part] == sorted(row.index for row in part) for part in splits.values())
    assert splits == split_by_cluster(rows, seed, shares_of(0.1))


@given(st.integers(10, 300), st.integers(10, 300), st.integers(0, 1000))
def test_single_rows_split_eight_one_one_by_label(first: int, second: int, seed: int):
    rows = [Row(i, "", int(i >= first), group=i) for i in range(first + second)]
    for part, share in zip(split_by_cluster(rows, seed, shares_of(0.1)).values(), (0.8, 0.1, 0.1), strict=True):
        have = Counter(row.label for row in part)
        assert abs(have[0] - share * first) <= 1 and abs(have[1] - share * second) <= 1


def test_another_seed_gives_another_split():
    rows = [Row(i, "", i % 2, group=i) for i in range(200)]
    assert split_by_cluster(rows, 1, shares_of(0.1))["test"] != split_by_cluster(rows, 2, shares_of(0.1))["test"]


@given(ROWS, st.integers(0, 130), st.integers(0, 1000))
def test_subsample_keeps_shares_and_order(rows: list[Row], most: int, seed: int):
    chosen = subsample(rows, most, seed)
    assert len(chosen) == (min(most, len(rows)) if most else len(rows))
    assert [row.index for row in chosen] == sorted({row.index for row in chosen})
    assert chosen == subsample(rows, most, seed)
    before, after = Counter(row.label for row in rows), Counter(row.label for row in chosen)
    for label, count in before.items():
        assert abs(after[label] - count * len(chosen) / len(rows)) <= max(1, len(before) - 1)


@pytest.mark.parametrize(("most", "left"), [(300, 3), (3, 3), (2, 2)])
def test_a_rare_label_keeps_a_row(most: int, left: int):
    chosen = subsample([Row(i, "", 0 if i < 500 else 1 if i < 990 else 2) for i in range(991)], most, 42)
    assert len(chosen) == most and len({row.label for row in chosen}) == left


def test_copies_and_contradictions_are_dropped():
    texts = [("好吃", 1), ("好吃！", 1), ("难吃", 0), ("难 吃", 1), ("新", 0)]
    kept, counts = drop_copies([Row(i, text, label) for i, (text, label) in enumerate(texts)])
    assert [row.index for row in kept] == [0, 4]
    assert counts == {"dropped: copy of an earlier row": 1, "dropped: text with conflicting labels": 2}


@given(ROWS, st.integers(2, 6), st.integers(0, 1000))
def test_every_row_is_tested_once_and_no_cluster_is_in_two_folds(rows: list[Row], folds: int, seed: int):
    splits = [split_fold(rows, seed, folds, fold) for fold in range(1, folds + 1)]
    tested = [[row.index for row in parts["test"]] for parts in splits]
    assert sorted(index for part in tested for index in part) == [row.index for row in rows]
    for parts in splits:
        groups = [{row.group for row in part} for part in parts.values()]
        assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
        assert sum(map(len, parts.values())) == len(rows)
