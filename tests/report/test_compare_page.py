"""Page 07 on made comparisons of both kinds: every part is there, and says what the entries say."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lib.report import compare_page
from lib.scoring.log_probabilities import AnswerScores, Scores
from lib.scoring.metric import ACCURACY, ANSWER_PERPLEXITY, Metric, RowGroups, compare
from lib.stages.compare.changes import agreements
from lib.statistics.noninferiority import least_margin, rows_for

N = 120
IDS = [f"r{i}" for i in range(N)]
GROUPS = RowGroups(np.arange(N) * 3 // 4, np.arange(N) % 3 > 0)
SIZE = {"bits_per_weight": 8.5, "peak_memory_mib": 50.0, "generation_tokens_per_second": 90.0, "file": "m.gguf"}
SIZE |= {"generation_tokens_per_second_range": [80.0, 95.0], "same_top": 0.9, "ppl": 9.0, "n_tokens": 4080}
SIZE |= {
    "retention": 0.8,
    "retention_interval": [0.7, 0.9],
    "source_grid": 0.0,
    "ppl_uncertainty": 0.1,
    "ppl_ratio": 1.1,
}
TEXT = {"kld_uncertainty": 1e-3, "kld_median": 1e-3, "kld_p99": 0.1, "kld_max": 0.2, "kld_mean_interval": None}


def labels(noise: float, seed: int) -> Scores:
    rng = np.random.default_rng(seed)
    margins = 2 * np.random.default_rng(0).normal(1, 1, N) + noise * rng.normal(0, 1, N)
    truth = np.arange(N) % 2
    log_probs = np.empty((N, 2))
    log_probs[np.arange(N), truth] = -np.logaddexp(0, -margins)
    log_probs[np.arange(N), 1 - truth] = -np.logaddexp(0, margins)
    return Scores(IDS, truth, log_probs, np.zeros(N, bool), 1.0)


def answers(shift: float, seed: int) -> AnswerScores:
    tokens = np.random.default_rng(0).integers(20, 60, N)
    losses = np.random.default_rng(1).uniform(1.5, 2.5, N) + shift * np.random.default_rng(seed).uniform(0, 2, N)
    return AnswerScores(IDS, -losses * tokens, tokens, 1.0)


def made(metric: Metric, scores: dict[str, Any]) -> SimpleNamespace:
    """What a page reads of a comparison."""
    (reference, first), *others = scores.items()
    judged = compare(metric, first, dict(others), GROUPS, 0)
    files = []
    for place, name in enumerate(scores):
        kld = 0.01 * place
        text = {"kld_mean": kld, "kld_low": 0.9 * kld, "kld_high": 1.1 * kld, **TEXT}
        entry = {"type": name, "kind": "gguf", "bytes": 10**6 * (9 - place), **SIZE, **text}
        verdict = "reference" if name == reference else "not shown"
        files.append({**entry, **judged["" if name == reference else name], "verdict": verdict})
    written = {
        "reference": reference,
        "same_text": dict.fromkeys(scores, 2),
        "decoding": {"rows": 2, "max_new_tokens": 8},
        "terms": None,
        "chrf": "chrF2",
        "metrics": [],
    }
    return SimpleNamespace(
        product=SimpleNamespace(path=Path("runs/coursework/comparison")),
        metric=metric,
        reference=reference,
        data={"rows": N},
        own_scores=scores.__getitem__,
        files=files,
        others=files[1:],
        margin=1.0,
        frontier=["Q2_K"],
        agreement=agreements(scores, None) if metric is ACCURACY else [],
        conditions={"window_tokens": 128, "floor": 50.0, "processor": "a CPU", "n_threads": 2},
        recommendation={
            "text": "One.\n\nTwo.",
            "rule": "The rule.",
            "formulas": "z = 1",
            "type": None,
            "reason": "insufficient",
        },
        retention_note="A note.",
        written=written,
        scores=scores.__getitem__,
    )


COMPARISONS = {
    "labels": made(ACCURACY, {"F16": labels(0, 0), "Q8_0": labels(0.1, 1), "Q2_K": labels(5, 2)}),
    "answers": made(ANSWER_PERPLEXITY, {"F16": answers(0, 0), "Q8_0": answers(1e-3, 1), "Q2_K": answers(0.2, 2)}),
}
both = pytest.mark.parametrize("kind", COMPARISONS)


@both
def test_every_part_of_the_page_is_there(kind: str) -> None:
    result = COMPARISONS[kind]
    page = compare_page.page_of(result)
    alone = [page.answer(), page.sizes(), page.quality(), page.differences(), page.divergences(), page.learned()]
    parts = [*alone, *page.detectable(), *page.tests(), *page.kept(), *page.beside(), *page.disagreements()]
    assert all(part.data.strip() for part in parts)
    assert alone[0].data == "> One.\n>\n> Two."
    assert "Q2_K" in alone[2].data and "nan" not in alone[2].data
    assert "Recommended: **none**" in alone[-1].data and "Rule: The rule." in alone[-1].data
    assert "runs/coursework/comparison/scores-TYPE.jsonl" in alone[-1].data
    described = re.findall(r'alt="([^"]+)"', alone[1].data)
    assert len(described) == 4 and ("accuracy" if kind == "labels" else "answer perplexity") in described[2]


@both
def test_the_test_by_hand_finds_what_the_page_has(kind: str) -> None:
    result = COMPARISONS[kind]
    entry = result.others[-1]
    names = (result.reference, entry["type"])
    pairs = pd.DataFrame({name: result.metric.row_values(result.scores(name))[0] for name in names}, index=IDS)
    table, words = compare_page.page_of(result).by_hand(entry, pairs)
    assert table.data.count("<tr>") >= 5 and "of 120 rows, of which the first are shown" in table.data
    if kind == "labels":
        assert f"{entry['mcnemar_b']} rows are lost and {entry['mcnemar_c']} won" in words.data
        assert words.data.count(f"{entry['mcnemar_p']:.3g}") == 2, "by hand and on the page"
    else:
        assert words.data.count(f"{entry['loss_difference']:+.6f}") == 2


def test_power_is_of_the_design() -> None:
    """Not of the results' design effect, which only the results tell."""
    result = COMPARISONS["labels"]
    independent = N / result.files[0]["copies_effect"]
    words = compare_page.page_of(result).detectable()[1].data
    assert f"120 rows, worth {independent:.0f} independent ones" in words
    assert f"exclude a loss of {100 * least_margin(independent):.2g} points" in words
    assert f"{rows_for(0.02, 0.01):,} (2 %)" in words


def test_the_table_of_tests_names_its_family() -> None:
    tests, beside = compare_page.page_of(COMPARISONS["labels"]).tests()
    assert "over 2 files and export folders" in tests.data
    entry = COMPARISONS["labels"].others[0]
    for limit in (entry["loss_limit"], entry["leak_free"]["loss_limit"]):
        assert f"{limit:.2f}" in tests.data
    assert "by more than 0.05 nats" in beside.data


def test_what_answers_can_show_is_said_with_what_frequencies_reach() -> None:
    (words,) = compare_page.page_of(COMPARISONS["answers"]).detectable()
    assert "4,784 answer tokens. The one-sided limits lie" in words.data and "alone reach 50.0." in words.data
