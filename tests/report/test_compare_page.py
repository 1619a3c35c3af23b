"""Page 07 on made comparisons of both kinds: every part is there, and says what the entries say."""

from __future__ import annotations

import re
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from lib.report import compare_page
from lib.scoring.answer_metrics import measured
from lib.scoring.log_probabilities import AnswerScores, Scores
from lib.scoring.metric import ACCURACY, ANSWER_PERPLEXITY, Metric, RowGroups, compare
from lib.scoring.text_metrics import summarise
from lib.stages.compare.changes import agreements
from lib.statistics.noninferiority import least_margin, rows_for

N = 120
IDS = [f"r{i}" for i in range(N)]
GROUPS = RowGroups(np.arange(N) * 3 // 4, np.arange(N) % 3 > 0)
SIZE = {"bits_per_weight": 8.5, "peak_memory_mib": 50.0, "generation_tokens_per_second": 90.0, "file": "m.gguf"}
SIZE |= {"generation_tokens_per_second_range": [80.0, 95.0], "same_top": 0.9, "ppl": 9.0, "n_tokens": 4080}
SIZE |= {f"{kind}_runs": 3 for kind in ("load", "prompt", "generation")}
SIZE |= {"load_seconds": 0.1, "load_seconds_range": [0.1, 0.2], "prompt_tokens_per_second": 900.0}
SIZE |= {"prompt_tokens_per_second_range": [880.0, 950.0], "seconds_per_sample": 0.01}
SIZE |= {
    "retention": 0.8,
    "retention_interval": [0.7, 0.9],
    "source_grid": 0.0,
    "ppl_uncertainty": 0.1,
    "ppl_ratio": 1.1,
}
TEXT = {"kld_uncertainty": 1e-3, "kld_median": 1e-3, "kld_p99": 0.1, "kld_max": 0.2, "kld_mean_interval": None}


ANSWER = {"tokens": 4, "ended": True, "first_token_seconds": 0.01, "seconds": 0.1, "tokens_per_second": 40.0}
ANSWER |= {"measured": {"intact": True}, "same_text": False, "same_start": 0.5, "chrf": 50.0}


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
        classes = metric.classes(scores[name], ("bad", "good"))
        files.append({**entry, **judged["" if name == reference else name], **classes, "verdict": verdict})
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
            "headline": "No file is shown.",
            "text": "<b>Sure</b>.",
            "details": "One.\n\nTwo.",
            "warning": "Beware.",
            "margin": 1.0,
            "unit": metric.loss_unit,
            "rule": "The rule.",
            "formulas": "z = 1",
            "type": None,
            "reason": "not shown",
        },
        retention_note="A note.",
        fine_tuning_gain=0.2,
        below_floor=None,
        written=written,
        generated=[
            {
                "id": f"r{i}",
                "question": f"question {i}",
                "reference": "the reference",
                "answers": {name: ANSWER | {"text": f"says {min(place, 1)}"} for place, name in enumerate(scores)},
            }
            for i in range(2)
        ],
        prompts={"set": "", "prompts": []},
        scores=scores.__getitem__,
    )


COMPARISONS = {
    "labels": made(ACCURACY, {"F16": labels(0, 0), "Q8_0": labels(0.1, 1), "Q2_K": labels(5, 2)}),
    "answers": made(ANSWER_PERPLEXITY, {"F16": answers(0, 0), "Q8_0": answers(1e-3, 1), "Q2_K": answers(0.2, 2)}),
}
both = pytest.mark.parametrize("kind", COMPARISONS)


def test_files_with_one_answer_share_a_line() -> None:
    speeds, texts = compare_page.page_of(COMPARISONS["answers"]).written()[2:]
    assert texts.data.count("says 1") == texts.data.count("Q8_0, Q2_K") == texts.data.count("says 0") == 2
    assert texts.data.count("reference answer") == 2 and "2 of 2 test rows and 0 prompts" in texts.data
    assert "0/2" in speeds.data and "50%" in speeds.data and "40.0" in speeds.data


def test_the_label_that_a_file_lost_most_of_is_named() -> None:
    result = COMPARISONS["labels"]
    table = compare_page.page_of(result).tests()[2].data
    classes = [entry["per_class"] for entry in result.files]
    change = {name: classes[2][name]["recall"] - own["recall"] for name, own in classes[0].items()}
    lost = min(change, key=lambda name: change[name])
    assert change[lost] < 0 and f"{100 * change[lost]:+.2f}".replace("-", "−") in table.replace("-", "−")
    assert f"{classes[2][lost]['recall']:.3f}" in table and lost in table


@both
def test_every_part_of_the_page_is_there(kind: str) -> None:
    result = COMPARISONS[kind]
    page = compare_page.page_of(result)
    alone = [page.answer(), page.sizes(), page.quality(), page.differences(), page.learned()]
    seen, unseen = (page.margins(), page.written()) if kind == "labels" else (page.written(), page.margins())
    assert ">llama.cpp<" in page.speeds()[1].data and ">program<" in page.speeds()[1].data
    parts = [*alone, *page.detectable(), *page.tests(), *page.kept(), *seen, *page.disagreements(), *page.speeds()]
    parts += filter(None, page.divergences())
    assert seen and not unseen, "labels have margins, answers are written"
    assert all(part.data.strip() for part in parts)
    assert "Q2_K" in alone[2].data and "nan" not in alone[2].data
    rule = page.rule().data
    assert "The rule." in rule and "z = 1" in rule and "runs/coursework/comparison/scores-TYPE.jsonl" in rule
    (described,) = re.findall(r'<svg [^>]*aria-label="([^"]+)"', alone[1].data)
    unit = "accuracy points" if kind == "labels" else "% of answer perplexity"
    assert described.startswith(f"Loss by file size in {unit}, margin 1.") and "Q2_K 7.00 MB, loss" in described


@both
def test_the_answer_is_a_headline_its_certainty_and_what_folds(kind: str) -> None:
    box = BeautifulSoup(compare_page.page_of(COMPARISONS[kind]).answer().data, "html.parser").div
    lines = [(line.get("class"), line.get_text()) for line in box.find_all("p", recursive=False)]
    assert lines == [(["headline"], "No file is shown."), (None, "<b>Sure</b>."), (["warning"], "Beware.")]
    assert [line.get_text() for line in box.details.find_all("p")] == ["One.", "Two."]


@both
def test_the_conclusions_name_no_file_worse_that_was_not_shown_to_be(kind: str) -> None:
    result = copy(COMPARISONS[kind])
    assert "none is shown to be worse" in " ".join(compare_page.page_of(result).learned().data.split())
    small = {**result.others[1], "verdict": "good enough", "loss": 0.5, "p_holm": 0.01}
    result.others = [result.others[0], small]
    assert "Some loss of Q2_K is certain, and shown" in " ".join(compare_page.page_of(result).learned().data.split())
    result.others = [result.others[0], {**result.others[1], "verdict": "worse"}]
    assert "Q2_K is shown to be worse" in " ".join(compare_page.page_of(result).learned().data.split())


@both
def test_a_margin_wider_than_what_fine_tuning_gained_is_named(kind: str) -> None:
    result = copy(COMPARISONS[kind])
    said = " ".join(compare_page.page_of(result).learned().data.split())
    assert f"Fine-tuning itself gained 0.20 {result.metric.loss_unit} on these rows, less than the margin of 1:" in said
    for gain in (None, 1.5):
        result.fine_tuning_gain = gain
        assert "Fine-tuning itself" not in compare_page.page_of(result).learned().data


@both
def test_what_the_headline_does_not_say(kind: str) -> None:
    """A model below the linear floor; answers that are written otherwise, however likely the reference's are."""
    result = copy(COMPARISONS[kind])
    result.recommendation = {**result.recommendation, "type": "Q2_K"}
    said = " ".join(compare_page.page_of(result).learned().data.split())
    assert "linear floor" not in said and "otherwise than" not in said.replace("wrote 0 of 2 answers otherwise", "")
    result.below_floor, counts = 4.0, {"F16": 3, "Q2_K": 1}
    result.written = {**result.written, "reference": "F16", "same_text": counts}
    said = " ".join(compare_page.page_of(result).learned().data.split())
    assert "worse than the linear floor by 4.0 points" in said
    assert "Q2_K wrote 2 of 3 answers otherwise than F16" in said


@both
def test_the_answers_fold_promises_what_it_holds(kind: str) -> None:
    result = copy(COMPARISONS[kind])
    for verdicts, title in (
        (("good enough", "good enough"), "The figures behind it"),
        (("good enough", "not shown"), "What was not decided, and the figures behind it"),
        (("worse", "good enough"), "What is worse, and the figures behind it"),
        (("worse", "not shown"), "What was not decided, what is worse, and the figures behind it"),
    ):
        result.others = [{**e, "verdict": v} for e, v in zip(result.others, verdicts, strict=False)]
        assert f"<summary>{title}</summary>" in compare_page.page_of(result).answer().data


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
    tests, beside, _ = compare_page.page_of(COMPARISONS["labels"]).tests()
    assert "over 2 files and export folders" in tests.data
    entry = COMPARISONS["labels"].others[0]
    for limit in (entry["loss_limit"], entry["leak_free"]["loss_limit"]):
        assert f"{limit:.2f}" in tests.data
    assert "by more than 0.05 nats" in beside.data


def test_what_answers_can_show_is_said_with_what_frequencies_reach() -> None:
    (words,) = compare_page.page_of(COMPARISONS["answers"]).detectable()
    assert "4,784 answer tokens. The one-sided limits lie" in words.data and "alone reach 50.0." in words.data


def test_what_the_files_get_right_is_shown_by_type() -> None:
    rows = [measured("entity_f1", answer, '[{"type": "地点", "text": "杭州"}]') for answer in ("[]", "x")]
    right = [measured("entity_f1", row, row) for row in ['[{"type": "地点", "text": "杭州"}]'] * 2]
    result = copy(COMPARISONS["answers"])
    metrics = summarise({"F16": right, "Q8_0": right, "Q2_K": rows}, [0, 1], "F16")
    result.written = {**result.written, "metrics": metrics}
    parts = compare_page.page_of(result).written()[:3]
    first, differences, types = (re.sub("<[^>]+>", " ", part.data).split() for part in parts)
    assert "F1" in first and "readable" in first and "-1.00" in differences and "-0.50" in differences
    assert types[-6:] == ["F16", "1.00", "Q8_0", "1.00", "Q2_K", "0.00"] and "(2)" in types
