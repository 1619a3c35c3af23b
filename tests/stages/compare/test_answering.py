"""The recommendation for rows without labels: the smallest file that is good enough, and when none is named."""

from __future__ import annotations

import numpy as np
import pytest

from lib.scoring.log_probabilities import AnswerScores
from lib.scoring.metric import ANSWER_PERPLEXITY, RowGroups, compare
from lib.stages.compare.recommend import judge, recommend

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
    judged = compare(ANSWER_PERPLEXITY, scores(0.0, 6, 0.0), others, rows, 0)
    sizes = {"F16": 16, "Q8_0": 8, "Q4_K_M": 5, "Q2_K": 3, "noisy": 2}
    divergences = {"F16": 0.0, "Q8_0": 1e-5, "Q4_K_M": 1e-3, "Q2_K": 0.1, "noisy": 0.5}
    found = [
        {"type": name, "kind": "gguf", "bytes": 1e6 * size, "kld_mean": divergences[name]}
        | judged["" if name == "F16" else name]
        for name, size in sizes.items()
    ]
    words = judge(ANSWER_PERPLEXITY, found[0], found[1:], 1.0, 500.0)
    return [{**entry, "verdict": words.get(entry["type"], "reference")} for entry in found]


def test_words_and_figures(entries: list[dict]) -> None:
    words = {entry["type"]: entry["verdict"] for entry in entries}
    assert words["F16"] == "reference" and words["Q2_K"] == "worse"
    assert words["Q8_0"] == words["Q4_K_M"] == "good enough" and words["noisy"] == "not shown"
    worse = next(entry for entry in entries if entry["type"] == "Q2_K")
    assert worse["answer_ratio"] == pytest.approx(np.exp(0.2), rel=0.01) and worse["p_holm"] < 1e-6
    assert worse["loss"] < worse["loss_limit"] and worse["leak_free"]["n"] == 40
    assert worse["answer_ppl"] == pytest.approx(worse["answer_ratio"] * entries[0]["answer_ppl"])


def test_the_smallest_good_enough_file_is_recommended(entries: list[dict]) -> None:
    found = recommend(ANSWER_PERPLEXITY, entries[0], entries[1:], 1.0, 500.0)
    assert (found["type"], found["reason"], found["ended_by"]) == ("Q4_K_M", "good enough", "Q2_K")
    assert "31 % of F16" in found["headline"] and "on the 40 leak-free rows answer perplexity +" in found["details"]
    assert "Worse than F16: Q2_K (answer perplexity +2" in found["details"] and "Worse: Q2_K." in found["text"]


def test_folders_are_named_in_the_details_alone(entries: list[dict]) -> None:
    *files, last = entries[1:]
    folders = [{**last, "type": "nf4", "kind": "folder"}, {**entries[3], "type": "int8", "kind": "folder"}]
    assert entries[3]["verdict"] == "worse"
    found = recommend(ANSWER_PERPLEXITY, entries[0], [*files, *folders], 1.0, 500.0)
    assert "Not shown, of folders for other programs: nf4 (answer perplexity" in found["details"]
    assert ", int8 (" in found["details"].partition("Worse than F16: Q2_K")[2]
    assert "nf4" not in found["text"] + found["headline"] and found["type"] == "Q4_K_M"


def test_files_behind_the_last_test_are_named(entries: list[dict]) -> None:
    reference, fine, noisy = entries[0], entries[1], entries[4]
    behind = {**fine, "type": "smaller", "bytes": noisy["bytes"] - 1}
    found = recommend(ANSWER_PERPLEXITY, reference, [noisy, behind], 1.0, 500.0)
    assert found["ended_by"] == "noisy" and "The tests end there; not shown either: smaller." in found["details"]


def test_nothing_is_recommended_without_evidence(entries: list[dict]) -> None:
    found = recommend(ANSWER_PERPLEXITY, entries[0], entries[4:], 1.0, None)
    assert (found["type"], found["reason"]) == (None, "not shown") and "Not shown: noisy" in found["details"]
    assert "noisy, 2.00 MB, could raise answer perplexity" in found["text"], "what few labels show at best is not meant"
    found = recommend(ANSWER_PERPLEXITY, entries[0], entries[1:], 1.0, entries[0]["answer_ppl"])
    assert (found["type"], found["reason"]) == (None, "unlearned") and "Train longer, or on more rows" in found["text"]
    found = recommend(ANSWER_PERPLEXITY, entries[0], entries[1:], 1.0, entries[0]["answer_ppl"], trained=False)
    assert found["reason"] == "unlearned" and "Train" not in found["text"] and "Nothing was trained" in found["text"]
