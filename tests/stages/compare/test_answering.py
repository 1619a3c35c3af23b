"""The recommendation for rows without labels: the smallest equivalent file, and when none is named."""

from __future__ import annotations

import numpy as np
import pytest

from lib.scoring.log_probabilities import AnswerScores
from lib.scoring.metric import ANSWER_PERPLEXITY, RowGroups, compare
from lib.stages.compare.recommend import recommend

N = 60


def scores(shift: float, seed: int, noise: float = 0.002) -> AnswerScores:
    """Losses around 2 nats a token, `shift` added to every row."""
    tokens = np.random.default_rng(0).integers(20, 60, N)
    losses = np.random.default_rng(1).uniform(1.5, 2.5, N) + shift + np.random.default_rng(seed).normal(0, noise, N)
    return AnswerScores([f"test-{i:05d}" for i in range(N)], -losses * tokens, tokens, 1.0)


@pytest.fixture
def entries() -> list[dict]:
    rows = RowGroups(np.arange(N), np.arange(N) % 3 > 0)
    others = {"Q8_0": scores(0.0, 2), "Q4_K_M": scores(0.004, 3), "Q2_K": scores(0.2, 4), "noisy": scores(0.0, 5, 0.5)}
    judged = compare(ANSWER_PERPLEXITY, scores(0.0, 6, 0.0), others, rows, 1.0, 0)
    sizes = {"F16": 16, "Q8_0": 8, "Q4_K_M": 5, "Q2_K": 3, "noisy": 2}
    divergences = {"F16": 0.0, "Q8_0": 1e-5, "Q4_K_M": 1e-3, "Q2_K": 0.1, "noisy": 0.5}
    return [
        {"type": name, "bytes": 1e6 * size, "kld_mean": divergences[name], **judged["" if name == "F16" else name]}
        for name, size in sizes.items()
    ]


def test_words_and_figures(entries: list[dict]) -> None:
    words = {entry["type"]: entry["verdict"] for entry in entries}
    assert words["F16"] == "reference" and words["Q2_K"] == "worse"
    assert words["Q8_0"] == words["Q4_K_M"] == "equivalent within 1 %"
    assert words["noisy"].startswith("cannot tell (MDE ")
    worse = next(entry for entry in entries if entry["type"] == "Q2_K")
    assert worse["answer_ratio"] == pytest.approx(np.exp(0.2), rel=0.01) and worse["p_holm"] < 1e-6
    assert worse["leak_free"]["n"] == 40 and worse["leak_free"]["verdict"] == "worse"
    assert worse["answer_ppl"] == pytest.approx(worse["answer_ratio"] * entries[0]["answer_ppl"])


def test_the_smallest_equivalent_file_is_recommended(entries: list[dict]) -> None:
    found = recommend(ANSWER_PERPLEXITY, entries, 1.0, 500.0)
    assert (found["type"], found["reason"]) == ("Q4_K_M", "equivalent")
    assert found["next_higher"] == {"Q2_K": "Q4_K_M"} and "31 % of F16" in found["text"]
    assert "On the 40 leak-free rows" in found["text"] and "Q2_K is worse" in found["text"]


def test_nothing_is_recommended_without_evidence(entries: list[dict]) -> None:
    found = recommend(ANSWER_PERPLEXITY, [e for e in entries if e["type"] in ("F16", "noisy")], 1.0, None)
    assert (found["type"], found["reason"]) == (None, "insufficient") and "Closest by KL divergence" in found["text"]
    found = recommend(ANSWER_PERPLEXITY, entries, 1.0, entries[0]["answer_ppl"])
    assert (found["type"], found["reason"]) == (None, "reference") and "Train the model first" in found["text"]
