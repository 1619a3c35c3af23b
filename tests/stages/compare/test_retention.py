"""Retention by row: the slopes, what they are of, and every reason why there are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lib.runs.run import Run, open_run
from lib.scoring.log_probabilities import AnswerScores, Scores
from lib.scoring.metric import ACCURACY, ANSWER_PERPLEXITY
from lib.stages.compare.changes import BaseScores, Retentions, base_scores, other_model, retentions, with_retention
from lib.stages.compare.files import Comparison, compare_files
from lib.statistics.intervals import Interval
from lib.statistics.losses import advice_words
from tests.stages.compare.conftest import Ladder

pytestmark = pytest.mark.usefixtures("forked_children")

N = 80
IDS = [f"r{i}" for i in range(N)]
GROUPS = np.arange(N) // 2


def scores(log_probs: np.ndarray) -> Scores:
    n = len(log_probs)
    return Scores(IDS[:n], np.arange(n) % 2, log_probs, np.zeros(n, bool), 1.0)


def log_odds(values: np.ndarray) -> Scores:
    return scores(np.stack([-np.logaddexp(0, values), -np.logaddexp(0, -values)], axis=1))


def answers(losses: np.ndarray, tokens: np.ndarray) -> AnswerScores:
    return AnswerScores(IDS, -losses * tokens, tokens, 1.0)


@pytest.fixture
def odds() -> dict[str, np.ndarray]:
    """Log-odds that a fine-tuning moved apart, and files that keep nearly all, a third and nothing of it."""
    rng = np.random.default_rng(5)
    base = rng.normal(0.5, 1, N)
    change = 3 * np.where(np.arange(N) % 2, 1, -1) + rng.normal(0, 0.5, N)
    noise = rng.normal(0, 0.2, N)
    kept = {"F16": 1.0, "Q8_0": 0.97, "Q5_K_M": 0.31, "Q4_1": 0.0}
    return {"base": base, **{name: base + share * change + (share < 1) * noise for name, share in kept.items()}}


def test_two_labels_are_the_slope_of_log_odds(odds: dict[str, np.ndarray]) -> None:
    base = odds.pop("base")
    found = retentions(
        ACCURACY, {k: log_odds(v) for k, v in odds.items()}, BaseScores(log_odds(base), None, ""), GROUPS
    )
    x = odds["F16"] - base
    for name in ("Q8_0", "Q5_K_M", "Q4_1"):
        slope = np.linalg.lstsq(x[:, None], odds[name] - base, rcond=None)[0][0]
        assert found.by_name[name].estimate == pytest.approx(slope, rel=1e-9)
        assert found.by_name[name].low < slope < found.by_name[name].high < slope + 0.1
    assert list(found.by_name) == ["Q8_0", "Q5_K_M", "Q4_1"]
    rms = np.sqrt(np.mean(x**2))
    assert f"moved the 80 test rows by {rms:.3g} nats of log-odds" in found.note and "is not known" in found.note


def test_more_labels_do_not_depend_on_what_all_share() -> None:
    rng = np.random.default_rng(2)
    base, tuned, file = (rng.normal(0, 1, (N, 3)) for _ in range(3))
    start = BaseScores(scores(base), scores(tuned + 1e-3), "")
    found = retentions(ACCURACY, {"F16": scores(tuned), "Q8_0": scores(file + rng.normal(0, 1, (N, 1)))}, start, GROUPS)
    centred = [values - values.mean(axis=1, keepdims=True) for values in (base, tuned, file)]
    x, y = centred[1] - centred[0], centred[2] - centred[0]
    assert found.by_name["Q8_0"].estimate == pytest.approx(np.sum(x * y) / np.sum(x * x), rel=1e-9)
    assert "is noise" in found.note
    pairs = [(tuned - base)[:, i] - (tuned - base)[:, j] for i, j in ((0, 1), (0, 2), (1, 2))]
    assert f"by {np.sqrt(np.mean(np.square(pairs))):.3g} nats of log-odds" in found.note, "of pairs of labels"


def test_rows_without_labels_go_by_the_likelihood_a_token() -> None:
    rng = np.random.default_rng(4)
    tokens = rng.integers(5, 60, N)
    base, change = rng.uniform(2, 4, N), rng.uniform(-1, 0.1, N)
    made = {"F16": answers(base + change, tokens), "Q2_K": answers(base + 0.6 * change, tokens)}
    found = retentions(ANSWER_PERPLEXITY, made, BaseScores(answers(base, tokens), None, ""), GROUPS)
    assert found.by_name["Q2_K"].estimate == pytest.approx(0.6) and "nats a token of the answers" in found.note


def test_why_there_is_none(odds: dict[str, np.ndarray]) -> None:
    base = log_odds(odds.pop("base"))
    made = {name: log_odds(values) for name, values in odds.items()}
    assert retentions(ACCURACY, made, BaseScores(), GROUPS).note.startswith("Only files of a run")
    other = Scores([f"x{i}" for i in range(N)], base.labels, base.log_probs, base.truncated, 1.0)
    assert retentions(ACCURACY, made, BaseScores(other, None, ""), GROUPS).note == "03 scored other rows."
    still = retentions(ACCURACY, made, BaseScores(log_odds(odds["F16"] + 0.05), None, ""), GROUPS)
    assert not still.by_name and "by 0.05 nats of log-odds (root mean square), too little" in still.note
    noisy = BaseScores(base, log_odds(odds["F16"] + 1.5), "")  # the programs differ by half the change
    assert (
        not (found := retentions(ACCURACY, made, noisy, GROUPS)).by_name
        and "differ on the same model by 2" in found.note
    )


@pytest.fixture
def run(home: Path) -> Run:
    run = open_run("t")
    run.produce("data", lambda work: (work.folder / "x").write_text("1"), {"v": 1})
    run.produce("adapter", lambda work: (work.folder / "x").write_text("1"), {"v": 1}, ("data",))
    return run


def test_scores_of_03(run: Run, odds: dict[str, np.ndarray]) -> None:
    assert "03 was not run" in base_scores(run).note

    def evaluation(work) -> None:
        log_odds(odds["base"]).save(work.folder / "scores-base.jsonl")
        log_odds(odds["F16"]).save(work.folder / "scores-finetuned.jsonl")

    run.produce("evaluation", evaluation, {}, ("data", "adapter"))
    found = base_scores(run)
    assert found.base.ids == IDS and found.tuned.ids == IDS and found.note == ""
    run.produce("adapter", lambda work: (work.folder / "x").write_text("2"), {"v": 2}, ("data",))
    trained_again = base_scores(run)  # the base is the same, the tuned model is not
    assert trained_again.base is not None and trained_again.tuned is None
    (run.folder / "evaluation" / "scores-base.jsonl").write_text("")
    assert "not known" in base_scores(run).note
    run.produce("data", lambda work: (work.folder / "x").write_text("2"), {"v": 2})
    assert base_scores(run) == BaseScores(note="03 was not run again after the data changed.")


def test_comparison_json_and_the_answer(ladder: Ladder, tmp_path: Path) -> None:
    """The weights of a file against a base that was scored as random log-odds; a plain comparison knows none."""
    start = BaseScores(Scores([r["id"] for r in ladder.rows], *_random(ladder.rows)), None, "")
    fixed = (ladder.reference, [ladder.q2], ladder.rows, ladder.task)
    plain = compare_files(Comparison(*fixed, tmp_path / "0", n_threads=1))
    grid = {ladder.q2.name: 0.75}
    known = compare_files(Comparison(*fixed, tmp_path / "1", n_threads=1, start=start, grid=grid))
    assert [e["retention"] for e in plain["files"]] == [None, None] and "of a run" in plain["retention_note"]
    assert [e["source_grid"] for e in plain["files"]] == [None, None]
    reference, q2 = known["files"]
    assert (reference["retention"], reference["retention_interval"]) == (1.0, None) and q2["source_grid"] == 0.75
    saved = [Scores.load(tmp_path / "1" / f"scores-{e['type']}.jsonl") for e in known["files"]]
    base, tuned, file = (_odds(found) for found in (start.base, *saved))
    slope = np.linalg.lstsq((tuned - base)[:, None], file - base, rcond=None)[0][0]
    assert q2["retention"] == pytest.approx(slope) and q2["retention_interval"][0] < slope < q2["retention_interval"][1]


def _odds(found: Scores) -> np.ndarray:
    return found.log_probs[:, 1] - found.log_probs[:, 0]


def _random(rows: list[dict]) -> tuple:
    n = len(rows)
    odds = np.random.default_rng(1).normal(0, 4, n)
    log_probs = np.stack([-np.logaddexp(0, odds), -np.logaddexp(0, -odds)], axis=1)
    return np.array([row["label"] for row in rows]), log_probs, np.zeros(n, bool), 1.0


def test_the_answer_warns_and_is_filled_in_anew() -> None:
    slopes = {"Q5_K_M": Interval(0.3, 0.2, 0.4), "Q8_0": Interval(0.97, 0.9, 1.02)}
    files = [{"type": name, "kind": "gguf", "file": f"m-{name}.gguf"} for name in ("F16", *slopes)]
    folder = {"type": "nf4", "kind": "folder", "file": "nf4"}
    for chosen, named in (("Q5_K_M", 1), ("Q8_0", 0), (None, 1)):
        advice = {"type": chosen, "headline": "Take it.", "text": "Sure."}
        content = {"reference": "F16", "files": files, "recommendation": advice}
        found = with_retention(content, Retentions(slopes, "A note."), {"m-Q8_0.gguf": 0.75})
        assert found["recommendation"]["warning"].count("Q5_K_M keeps only 0.30") == named
        said = advice_words(found["recommendation"])
        assert said.startswith("Take it. Sure.") and said.count("Q5_K_M keeps only 0.30") == named
        assert [e["retention"] for e in found["files"]] == [1.0, 0.3, 0.97] and found["retention_note"] == "A note."
        assert [e["source_grid"] for e in found["files"]] == [None, None, 0.75]
        more = {**content, "files": [*files, folder]}
        told = with_retention(more, Retentions({**slopes, "nf4": Interval(0.2, 0.1, 0.3)}), {})["recommendation"][
            "warning"
        ]
        least, other = ("nf4 keeps only 0.20", "Q5_K_M (0.30)") if chosen is None else ("Q5_K_M keeps", "nf4 (0.20)")
        assert (least in told and told.endswith(f"in {other}.")) if named else not told, "folders that keep little, too"
        gone = with_retention(found, Retentions(), {})
        assert advice_words(gone["recommendation"]) == "Take it. Sure." and gone["files"][1]["retention"] is None


def test_scores_of_another_model_than_the_gguf(run: Run, odds: dict[str, np.ndarray]) -> None:
    """The noise of two programs is only told from the same weights."""

    def evaluation(work) -> None:
        for name, key in (("base", "base"), ("finetuned", "F16")):
            log_odds(odds[key]).save(work.folder / f"scores-{name}.jsonl")

    def merge(base: str, content: str) -> None:
        def build(work) -> None:
            (work.folder / "x").write_text(content)
            work.facts["merge_base"] = base

        run.produce("merged", build, {"v": content}, ("data", "adapter"))

    def train(method: str) -> None:
        def build(work) -> None:
            (work.folder / "x").write_text(method)
            work.facts["method"] = method

        run.produce("adapter", build, {"v": method}, ("data",))
        run.produce("evaluation", evaluation, {}, ("data", "adapter"))

    def convert() -> None:
        run.produce("gguf", lambda work: (work.folder / "x").write_text("g"), {}, ("data", "merged"))

    train("LoRA")
    merge("original", "1")
    convert()
    assert base_scores(run).tuned is not None
    merge("original", "2")
    assert base_scores(run).tuned is None and other_model(run).startswith("05 was not run again")
    convert()
    assert base_scores(run).tuned is not None
    train("QLoRA")
    merge("original", "3")
    convert()
    assert base_scores(run).tuned is None and other_model(run) == "", "03 scores the adapter on the NF4 base"
    merge("dequantized", "4")
    convert()
    assert base_scores(run).tuned is not None
