"""Which file is taken: the rule on small synthetic scores, and `workbook pick` by the same rule."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import InputError
from lib.report.display import rows_of
from lib.scoring.log_probabilities import Scores
from lib.scoring.metric import ACCURACY, ANSWER_PERPLEXITY, RowGroups, compare
from lib.stages.compare.recommend import judge, pick_file, recommend
from tests.stages.compare.test_judging import scores

LADDER = {"Q8_0": 53, "Q4_K_M": 30, "Q3_K_M": 25, "Q2_K": 20}
"""Sizes, MB; the reference has 100."""
LABELS = [0, 1] * 500


def files(
    changes: dict[str, list[int]], labels: list[int] = LABELS, wrong: int = 20, leak_free: np.ndarray | None = None
) -> list[dict]:
    """Entries of comparison.json, the reference first.

    Args:
        changes: type -> rows whose label changes. wrong: rows from the end on which the reference errs.
    """

    def model(rows: list[int]) -> Scores:
        n = len(labels)
        flipped = {*range(n - wrong, n)} ^ {*rows}
        return scores(labels, [1 - label if i in flipped else label for i, label in enumerate(labels)])

    rows = RowGroups(np.arange(len(labels)), leak_free)
    found = compare(ACCURACY, model([]), {name: model(own) for name, own in changes.items()}, rows, 0)
    sizes = {"": 100, **{name: LADDER.get(name, 10) for name in changes}}
    return [
        {
            **entry,
            "type": name or "F16",
            "file": f"{name or 'F16'}.gguf",
            "kind": "gguf",
            "bytes": sizes[name] * 10**6,
            "majority_share": 0.5,
        }
        for name, entry in sorted(found.items(), key=lambda pair: pair[0] != "")
    ]


def answer(entries: list[dict], margin: float = 1.0, floor: float = 0.5) -> dict:
    verdicts = judge(ACCURACY, entries[0], entries[1:], margin, floor)
    told = [{**entry, "verdict": verdicts.get(entry["type"], "reference")} for entry in entries]
    return {**sixty_words(recommend(ACCURACY, told[0], told[1:], margin, floor)), "verdicts": verdicts}


def sixty_words(found: dict) -> dict:
    """The answer, whose headline and text have at most 60 words, and nothing that was not filled in."""
    assert len(f"{found['headline']} {found['text']}".split()) <= 60
    for part in ("headline", "text", "details"):
        assert "None" not in found[part].removeprefix("None: ") and "  " not in found[part] and " ." not in found[part]
    return found


STEPS = {"Q8_0": [], "Q4_K_M": [0, 1], "Q3_K_M": [*range(6)], "Q2_K": [*range(60)]}


def _about(text: str) -> int:
    """The number of rows that would show it: two digits and zeros."""
    (digits,) = re.findall(r"About ([\d,]+) rows like these would show it in 80 of 100 runs", text)
    assert set(digits.replace(",", "")[2:]) <= {"0"}
    return int(digits.replace(",", ""))


def test_a_file_that_saves_nothing_is_judged_and_never_recommended() -> None:
    """F32 beside F16: the order of the tests begins with the first file that is smaller."""
    larger = {**files({"F32": []})[1], "bytes": 2 * 100 * 10**6}
    found = answer([*files({"Q4_K_M": [*range(60)]}), larger])
    assert found["type"] is None and found["tested"] == ["Q4_K_M"]
    assert found["verdicts"] == {"Q4_K_M": "worse", "F32": "good enough"}
    alone = answer([files({})[0], larger])
    assert alone["type"] is None and alone["reason"] == "alone" and "no smaller GGUF file" in alone["headline"]


def test_the_smallest_that_is_good_enough_is_recommended() -> None:
    found = answer(files(STEPS))
    assert found["type"] == "Q4_K_M" and found["reason"] == "good enough"
    assert found["tested"] == ["Q8_0", "Q4_K_M", "Q3_K_M"] and found["ended_by"] == "Q3_K_M"
    assert found["verdicts"] == {"Q8_0": "good enough", "Q4_K_M": "good enough", "Q3_K_M": "not shown", "Q2_K": "worse"}
    lost = "0.20 points of accuracy lost, a loss of at most 0."
    assert found["headline"] == "Take Q4_K_M · 30.0 MB, 30 % of F16 · 2 of 1,000 answers change."
    assert found["text"].startswith("At most 0.64 points of accuracy are lost, with 95 % confidence.")
    assert "Accuracy 97.8 %; F16 98.0 %." in found["text"] and found["text"].endswith("Worse: Q2_K.")
    for words in ("smallest file shown to lose less than 1 point", lost, "2 labels changed", "Not shown: Q3_K_M"):
        assert words in found["details"]
    rows = _about(found["details"])
    assert rows == pytest.approx(found["rows_needed"], rel=0.1)
    assert f"Q3_K_M, 25.0 MB, could lose up to 1.19 points; about {rows:,} rows in all could tell." in found["text"]
    assert "Worse than F16: Q2_K (6.00 points of accuracy lost" in found["details"]
    assert "a loss of 1 point or more is excluded" in found["rule"] and "at most 5 of 100 runs" in found["rule"]


def test_better_is_no_reason_against_a_file() -> None:
    """Two-sided equivalence within a point rejected a file that won 15 of 1,000 rows."""
    found = answer(files({"Q8_0": [], "Q4_K_M": [*range(980, 995)]}))
    assert found["type"] == "Q4_K_M" and "At least 0.97 points of accuracy are won" in found["text"]
    assert "1.50 points of accuracy won, at least 0.97 on 1,000 rows" in found["details"]


def test_the_sequence_ends_at_the_first_that_is_not_good_enough() -> None:
    """Q4_0 fails; Q3_K_M would pass by itself: no claim, for the level is spent."""
    found = answer(files({"Q8_0": [], "Q4_K_M": [*range(9)], "Q3_K_M": []}))
    assert found["type"] == "Q8_0" and found["verdicts"]["Q3_K_M"] == "not shown"
    first = answer(files({"Q8_0": [*range(9)], "Q4_K_M": []}))
    assert first["type"] is None and first["reason"] == "not shown"
    assert first["headline"] == "No GGUF file is shown to lose less than 1 point."
    assert (
        "Q8_0, 53.0 MB, could lose up to 1.57 points; about 60,000 rows in all could tell. Worse: Q8_0."
        in first["text"]
    )
    lost = answer(files({"Q8_0": [*range(40)]}))
    assert "could lose up to 5.18 points; more rows would hardly help. Worse: Q8_0." in lost["text"]
    assert "no number of rows would show it" in lost["details"]


def test_a_certain_loss_below_the_margin_is_good_enough() -> None:
    found = answer(files({"Q8_0": [*range(6)]}), margin=3.0)
    assert found["type"] == "Q8_0" and found["verdicts"] == {"Q8_0": "good enough"}
    assert files({"Q8_0": [*range(6)]})[1]["p_holm"] < 0.05


def test_the_leak_free_rows_have_to_show_it_too() -> None:
    """Copies of training rows must not buy the recommendation."""
    few = np.arange(1000) >= 800
    assert answer(files({"Q8_0": []}, leak_free=few))["type"] is None, "200 rows cannot exclude a point"
    assert answer(files({"Q8_0": []}, leak_free=few), margin=2.0)["type"] == "Q8_0"
    lost = answer(files({"Q8_0": [*range(800, 806)]}, leak_free=few), margin=2.0)
    assert lost["type"] is None and "on the 200 leak-free rows 3.00 points of accuracy lost" in lost["details"]
    assert lost["rows_needed"] is None and "more rows would hardly help" in lost["text"], "3 points are not below 2"
    unseen = answer(files({"Q8_0": []}, leak_free=few))
    assert unseen["rows_needed"] == 5 * ACCURACY.rows_needed(files({"Q8_0": []}, LABELS[:200], wrong=4)[1], 1.0)


def test_no_verdict_where_it_means_nothing() -> None:
    guess = answer(files({"Q8_0": [], "Q2_K": [*range(300)]}, wrong=490))
    assert (
        guess["type"] is None and guess["reason"] == "unlearned" and set(guess["verdicts"].values()) == {"no verdict"}
    )
    assert "not clearly better than always naming the commonest label (50.0 %)" in guess["headline"]
    assert "Train longer, or on more rows" in guess["text"] and "says nothing of its quality" in guess["details"]
    tiny = answer(files({"Q2_K": [*range(9)]}, labels=LABELS[:16], wrong=0))
    assert tiny["reason"] == "few" and tiny["verdicts"] == {"Q2_K": "no verdict"}
    assert tiny["headline"] == "No verdict: 16 groups of alike test rows are fewer than 20."
    assert tiny["text"].startswith("Test more rows")
    free = answer(files({"Q8_0": []}, leak_free=np.arange(1000) < 5), 50.0)
    assert free["reason"] == "few" and "5 groups" in free["headline"]
    alone = answer(files({}))
    assert alone["reason"] == "alone" and alone["type"] is None


def test_a_bias_of_a_model_that_answers_one_label_is_no_verdict() -> None:
    """Labels 2 : 1, reference and files answer one label everywhere; the files lean a little otherwise."""
    labels = np.array([0, 0, 1] * 80)
    rng = np.random.default_rng(0)

    def leaning(bias: float) -> Scores:
        log_odds = 1.0 + bias + 0.01 * rng.normal(size=len(labels))
        log_probs = -np.stack([np.logaddexp(0, -log_odds), np.logaddexp(0, log_odds)], axis=1)
        return Scores([str(i) for i in range(240)], labels, log_probs, np.zeros(240, bool), 1.0)

    others = {"Q8_0": leaning(0.02), "Q2_K": leaning(-0.2)}
    found = compare(ACCURACY, leaning(0.0), others, RowGroups(np.arange(240)), 0)
    entries = [{**found[name], "type": name, "kind": "gguf", "bytes": 10, "kld_mean": 0} for name in ("", *others)]
    entries[0]["bytes"] = 20
    assert set(judge(ACCURACY, entries[0], entries[1:], 1.0, 2 / 3).values()) == {"no verdict"}
    assert not any(found[name]["odds_warning"] for name in others)
    told = recommend(ACCURACY, entries[0], entries[1:], 1.0, 2 / 3)
    assert told["reason"] == "constant" and "itself gives one label for all 240 rows" in told["headline"]


def test_an_imbalanced_reference_must_beat_one_label_for_all() -> None:
    """Of 9 : 1 the commonest label alone has 90 % right; the reference, 85 % on either label, has learned the task."""
    labels = [1 if i % 10 == 0 else 0 for i in range(1000)]
    entries = files({"Q8_0": []}, labels, wrong=150)
    assert entries[0]["accuracy"] == 0.85 and answer(entries, 3.0, 0.9)["reason"] == "good enough"
    blind = files({"Q8_0": []}, labels, wrong=0)
    everything = [1 if label else 0 for label in labels]
    blind[0] |= {"balanced_accuracy": 0.52, "labels_given": 2}
    told = answer(blind, 3.0, 0.9)
    assert everything and told["reason"] == "unlearned" and "52.0 % on 1,000 rows" in told["headline"]
    judged = answer(entries, 3.0, 0.9)["text"]
    assert "points of balanced accuracy are lost" in judged and "Balanced accuracy 85.0 %; F16 85.0 %." in judged


def test_rows_needed_show_it_four_times_in_five() -> None:
    entry = {"n": 400, "loss": 0.0, "mcnemar_b": 8, "mcnemar_c": 8, "design_effect": 1.0}
    rows = ACCURACY.rows_needed(entry, 1.0)
    draws = np.random.default_rng(0).multinomial(rows, [0.02, 0.02, 0.96], 300)
    from lib.statistics.intervals import tango_statistic

    assert 0.74 < np.mean(tango_statistic(-0.01, draws[:, 0], draws[:, 1], rows) > 1.6449) < 0.87
    assert ACCURACY.rows_needed({**entry, "design_effect": 2.0}, 1.0) == 2 * rows
    assert ACCURACY.rows_needed({**entry, "loss": 1.0}, 1.0) is None
    assert ACCURACY.rows_needed({**entry, "loss": -3.0, "mcnemar_b": 0}, 1.0) == 401


def test_answers_without_labels() -> None:
    """Loss is perplexity in percent; 100 rows, a file that adds 0.4 % and one that adds 3 %."""
    from lib.scoring.log_probabilities import AnswerScores

    rng, tokens = np.random.default_rng(1), np.full(100, 20)

    def model(more: float, noise: float) -> AnswerScores:
        losses = 2.0 + 0.3 * np.sin(np.arange(100)) + more + noise * rng.normal(size=100)
        return AnswerScores([str(i) for i in range(100)], -losses * tokens, tokens, 1.0)

    others = {"Q8_0": model(0.004, 0.01), "Q2_K": model(0.03, 0.02)}
    found = compare(ANSWER_PERPLEXITY, model(0.0, 0.0), others, RowGroups(np.arange(100)), 0)
    entries = [
        {**found[name], "type": name or "F16", "file": name, "kind": "gguf", "bytes": (10 - i) * 10**6, "kld_mean": 0.0}
        for i, name in enumerate(("", *others))
    ]
    told = recommend(ANSWER_PERPLEXITY, entries[0], entries[1:], 1.0, 50.0)
    assert told["type"] == "Q8_0" and told["rows_needed"] is None and "answer perplexity +0.33 %" in told["headline"]
    assert "Answer perplexity rises by at most 0.47 %, with 95 % confidence. Answer perplexity 7.4" in told["text"]
    assert "Q2_K, 8.00 MB, could raise answer perplexity by up to 3.23 %; more rows would hardly help" in told["text"]
    assert "answer perplexity +0.33 %, at most +0.47 % on 100 rows" in sixty_words(told)["details"]
    assert recommend(ANSWER_PERPLEXITY, entries[0], entries[1:], 1.0, 7.0)["reason"] == "unlearned"
    tight = recommend(ANSWER_PERPLEXITY, entries[0], entries[1:2], 0.4, 50.0)
    assert tight["type"] is None and 100 < tight["rows_needed"] < 2_000
    assert tight["headline"] == "No GGUF file is shown to lose less than 0.4 % of answer perplexity."
    assert re.search(
        r"Q8_0, 9.00 MB, could raise .* by up to 0.47 %; about [\d,]+ rows in all could tell", tight["text"]
    )
    better = {**entries[1], "loss": -3.1, "loss_limit": -2.82}
    fallen = sixty_words(recommend(ANSWER_PERPLEXITY, entries[0], [better], 1.0, 50.0))
    assert "Answer perplexity falls by at least 2.82 %" in fallen["text"] and "-3.10 %" in fallen["headline"]
    few = {**entries[1], "loss": 0.001, "loss_limit": None}
    unknown = sixty_words(recommend(ANSWER_PERPLEXITY, entries[0], [few], 1.0, 50.0))
    assert unknown["rows_needed"] is None and "could raise answer perplexity by any amount." in unknown["text"]
    assert "answer perplexity 0.00 %, without a limit" in unknown["details"]


def test_a_folder_that_is_good_enough_is_named_where_no_file_is() -> None:
    """The figure shows it as good enough; the headline speaks of GGUF files."""
    entries = files({"Q8_0": [*range(9)], "int8": []})
    entries[-1]["kind"] = "folder"
    found = answer(entries)
    assert found["headline"] == "No GGUF file is shown to lose less than 1 point."
    assert "Good enough, of folders for other programs: int8." in found["text"]
    assert "Good enough, of folders" not in answer(files({"Q8_0": []}))["text"]


def test_small_data_get_an_answer_of_another_kind() -> None:
    """60 rows cannot show a loss below a point; that nothing moved, they can."""
    few = answer(files({"Q8_0": [], "Q4_K_M": [], "Q3_K_M": [], "Q2_K": [0, 1, 2]}, LABELS[:60], wrong=5))
    assert few["type"] is None and few["reason"] == "not shown" and few["unproven"] == "Q3_K_M"
    assert "Even without a changed answer, 60 rows cannot exclude a loss of 5.1 points." in few["text"]
    assert "Q3_K_M shows no sign of harm, which is no proof." in few["text"]
    assert "Without proof: Q3_K_M, 25.0 MB, shows no sign of harm. No answer of 60 changed" in few["details"]
    assert "would take 316 independent rows without any change" in few["details"]
    sixteen = answer(files({"Q8_0": []}, LABELS[:16], wrong=0))
    assert sixteen["reason"] == "few" and sixteen["unproven"] == "Q8_0"
    assert answer(files(STEPS))["unproven"] is None, "where a file is recommended there is no second answer"
    assert answer(files({"Q8_0": []}, wrong=490))["unproven"] is None, "nor from a reference that has not learned"


def test_folds_and_many_worse_files_stay_within_sixty_words() -> None:
    names = ["Q2_K", "IQ3_M", "IQ3_S", "IQ2_M"]
    entries = files({"Q8_0": [0], "Q4_K_M": [*range(6)], **{name: [*range(90)] for name in names}}, wrong=30)
    told = answer([{**entry, "folds": 5, "own": entry} for entry in entries])
    assert "with 95 % confidence, on average over 5 models" in told["text"] and "Worse: 4 files." in told["text"]
    assert all(f"{name} (9.00 points" in told["details"] for name in names)
    assert "Of the first model, whose file it is: 0.10 points" in told["details"]


# By limits that the user names.


def compared(changes: dict[str, list[int]] = STEPS, **more: int) -> dict:
    return {"files": files(changes, **more), "conditions": {"floor": 0.5}, "recommendation": {"headline": "Of 07."}}


@pytest.mark.parametrize(
    ("size", "loss", "chosen", "reason"),
    [
        (None, 1.0, "Q4_K_M", "good enough"),
        (40.0, 1.0, "Q4_K_M", "good enough"),
        (28.0, 1.0, None, "size"),
        (28.0, 3.0, "Q3_K_M", "good enough"),
        (None, 0.1, "F16", "good enough"),
        (60.0, 0.1, None, "size"),
    ],
)
def test_pick(size: float | None, loss: float, chosen: str | None, reason: str) -> None:
    found = pick_file(compared(), size, loss)
    assert (found["type"], found["reason"]) == (chosen, reason)
    assert found["file"] == (chosen and f"{chosen}.gguf")
    best = "the smallest file that is good enough" if loss == 1.0 else "the reference itself"
    assert found["type"] is not None or sixty_words(found)["headline"].startswith(f"None: {best}")
    assert ("Take" in found["headline"]) == (chosen in ("Q4_K_M", "Q3_K_M"))
    assert ("No GGUF file is shown to lose less than 0.1 points." in found["headline"]) == (loss == 0.1)


def test_a_file_that_is_good_enough_for_the_user_is_not_called_worse() -> None:
    """Worse by the run's margin of a point, surely below the three that the user allows."""
    worse = compared({"Q8_0": [], "Q4_K_M": [*range(9)]})
    worse["files"][2]["verdict"] = "worse"
    found = pick_file(worse, None, 3.0)
    assert found["type"] == "Q4_K_M" and "Worse" not in found["text"] + found["details"]
    assert "Worse: Q4_K_M." in pick_file(worse, None, 1.0)["text"]


def test_pick_prints_megabytes() -> None:
    """As files have them: the heading MB stands for bytes elsewhere, and 53 MB were printed as 5.3e-05."""
    candidates = pick_file(compared(), None, 1.0)["candidates"]
    printed = rows_of("select.candidates", candidates)
    assert [row["MB"] for row in printed] == pytest.approx([entry["megabytes"] for entry in candidates])
    assert printed[0]["MB"] > 1


def test_pick_is_the_rule_of_07() -> None:
    for changes in (STEPS, {"Q8_0": [*range(980, 995)], "Q4_K_M": [0]}, {"Q8_0": [0], "Q4_K_M": [*range(9)]}):
        assert pick_file(compared(changes), None, 1.0)["type"] == answer(files(changes))["type"]
    guess = pick_file(compared({"Q8_0": []}, wrong=490), None, 1.0)
    assert guess["type"] is None and guess["reason"] == "unlearned"


@settings(deadline=None, max_examples=25)
@given(st.floats(1, 120), st.floats(0.01, 10), st.floats(0, 5), st.floats(0, 60))
def test_looser_limits_never_make_the_answer_larger(size: float, loss: float, more: float, room: float) -> None:
    strict, loose = pick_file(COMPARED, size, loss), pick_file(COMPARED, size + room, loss + more)
    sizes = {c["type"]: c["megabytes"] for c in strict["candidates"]}
    if strict["type"]:
        assert loose["type"] and sizes[loose["type"]] <= sizes[strict["type"]]
        assert sizes[strict["type"]] <= size


COMPARED = compared()


@pytest.mark.parametrize(
    ("size", "loss"),
    [(0.0, 1.0), (-1.0, 1.0), (None, 0.0), (None, float("nan")), (None, math.inf), (math.inf, 1.0), (math.nan, 1.0)],
)
def test_impossible_limits(size: float | None, loss: float) -> None:
    with pytest.raises(InputError, match="above 0"):
        pick_file(COMPARED, size, loss)


def test_a_size_that_is_missed_by_little_is_told_with_its_digits() -> None:
    close = compared({"Q8_0": []})
    close["files"][1]["bytes"] = 30_004_000
    assert "takes 30.004 MB" in pick_file(close, 30.0, 1.0)["headline"]


def test_a_comparison_of_an_older_version_is_refused() -> None:
    old = compared()
    del old["files"][1]["loss_limit"]
    with pytest.raises(InputError, match="older version"):
        pick_file(old, None, 1.0)
    with pytest.raises(InputError, match=r"older version.*07_compare_quantized"):
        pick_file({**compared(), "recommendation": {"type": "Q4_K_M", "text": "Recommended."}}, None, 1.0)


def test_a_file_that_keeps_little_is_chosen_with_a_warning() -> None:
    little = compared()
    little["files"][2] |= {"retention": 0.28, "retention_interval": [0.25, 0.31]}
    assert "keeps only 0.28 [0.25,\u00a00.31] of what fine-tuning changed" in pick_file(little, None, 1.0)["warning"]
    assert pick_file(COMPARED, None, 1.0)["warning"] == ""


def test_the_command(tmp_path, monkeypatch, capsys) -> None:
    from lib.cli.report import pick as command
    from lib.runs.files import write_json
    from lib.runs.run import open_run

    monkeypatch.setenv("WORKBOOK_HOME", str(tmp_path))
    open_run("r").produce("comparison", lambda work: write_json(work.folder / "comparison.json", COMPARED), {})
    command("r", 40.0, 1.0, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["type"] == "Q4_K_M"
    command("r", 40.0, 1.0, as_json=False)
    assert f"{found['headline']} {found['text']}\n{found['details']}" in capsys.readouterr().out
    command("r", 28.0, 1.0, as_json=False)
    shown = capsys.readouterr().out
    assert "None: the smallest file that is good enough, Q4_K_M, takes 30.00 MB" in shown
    assert "Rule: A GGUF file is good enough when a loss of 1 point or more is excluded" in shown
    assert "-0.0 " not in shown


def beside_folders(changes: dict[str, list[int]]) -> dict:
    """A comparison in which the last file is a folder of another program, and a smaller one than all."""
    found = compared(changes)
    found["files"][-1] |= {"kind": "folder", "runtime": "MNN", "file": "mnn-int4"}
    return found


def test_pick_among_runtimes() -> None:
    comparison = beside_folders({"Q8_0": [], "Q4_K_M": [0], "Q3_K_M": [1]})
    assert pick_file(comparison, None, 1.0)["type"] == "Q4_K_M"
    both, own = (pick_file(comparison, None, 1.0, names) for names in (["mnn", "llama.cpp"], ["MNN"]))
    assert both["type"] == own["type"] == "Q3_K_M" and both["file"] == "mnn-int4"
    assert [one["runtime"] for one in both["candidates"]] == [*["llama.cpp"] * 3, "MNN"]
    assert [one["type"] for one in own["candidates"]] == ["Q3_K_M"], "the reference is none of this program's"
    worse = pick_file(beside_folders({"Q8_0": [], "Q4_K_M": [0], "Q3_K_M": [*range(60)]}), None, 1.0, ["mnn"])
    assert worse["type"] is None and worse["reason"] == "not shown"


@pytest.mark.parametrize("names", [["litert"], ["mnn", "torch"]])
def test_runtimes_of_which_nothing_was_compared(names: list[str]) -> None:
    with pytest.raises(InputError, match=r"no file of (litert|torch).*llama\.cpp, MNN"):
        pick_file(beside_folders({"Q8_0": [], "Q4_K_M": [0], "Q3_K_M": [1]}), None, 1.0, names)


def test_runtimes_beside_folds() -> None:
    comparison = beside_folders({"Q8_0": [], "Q4_K_M": [0], "Q3_K_M": [1]})
    comparison["files"][0]["folds"] = 3
    with pytest.raises(InputError, match="with folds"):
        pick_file(comparison, None, 1.0, ["mnn"])
