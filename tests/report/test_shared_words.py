"""What the most confident mistakes have in common."""

from __future__ import annotations

import string

from hypothesis import given
from hypothesis import strategies as st

from lib.report.evaluate_page import shared_words

_TEXTS = st.lists(st.text("好差吃房间。，", max_size=12), max_size=8)
_ENDS = f" {string.punctuation}，。！？、；："


@given(_TEXTS)
def test_most_texts_hold_what_is_said_to_be_shared(texts: list[str]) -> None:
    found = shared_words(texts)
    assert found == found.strip(_ENDS)
    if found:
        assert len(found) >= 3
        assert sum(found in text for text in texts) >= 0.7 * len(texts)


@given(st.text("abcdefg", min_size=4, max_size=30), st.lists(st.sampled_from(["", "x", "yy"]), min_size=3, max_size=8))
def test_what_all_hold_is_found(common: str, beside: list[str]) -> None:
    """At least as long: a run that was planted, or a longer one."""
    found = shared_words([f"{extra}{common}{extra}" for extra in beside])
    assert len(found) >= len(common)


def test_punctuation_alone_is_nothing_shared() -> None:
    assert shared_words(["好。。。", "好。。。", "好。。。"]) == "" == shared_words([])
    assert shared_words(["一点我也认了", "就算床塌一点我也认了。", "物流", "一点我也认了！"]) == "一点我也认了"
