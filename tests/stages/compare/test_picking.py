"""`workbook pick`: the file that a size and a loss leave, and the sentence where none is left."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import InputError
from lib.stages.compare.recommend import pick_file as pick


def entry(name: str, megabytes: float, low: float, high: float, **more) -> dict:
    """A file whose accuracy differs by low..high points from the reference's."""
    return {
        "type": name,
        "file": f"model-{name}.gguf",
        "kind": "gguf",
        "bytes": int(megabytes * 1e6),
        "verdict": "cannot tell",
        "accuracy": 0.9,
        "accuracy_difference": (low + high) / 200,
        "accuracy_difference_interval": [low / 100, high / 100],
        "design_effect": 1.0,
        "leak_free": None,
        "mcnemar_b": 6,
        "mcnemar_c": 2,
        "n": 400,
        **more,
    }


REFERENCE = entry("F16", 100, 0, 0, verdict="reference", accuracy_difference=None, accuracy_difference_interval=None)
FILES = [
    REFERENCE,
    entry("Q8_0", 53, -0.4, 0.4),
    entry("Q4_K_M", 30, -0.9, 0.5),
    entry("Q3_K_M", 25, -1.6, 0.2),
    entry("Q2_K", 20, -6.0, -2.0),
    entry("nf4", 10, 0.0, 0.0, kind="folder"),
]


def compared(*files: dict, reason: str = "insufficient") -> dict:
    return {"files": list(files or FILES), "recommendation": {"reason": reason, "text": "It guesses."}}


@pytest.mark.parametrize(
    ("size", "loss", "chosen", "reason"),
    [
        (None, 1.0, "Q4_K_M", "shown"),
        (None, 0.5, "Q8_0", "shown"),
        (None, 0.1, "F16", "shown"),
        (None, 7.0, "Q2_K", "shown"),
        (28, 1.0, None, "open"),
        (22, 1.0, None, "refuted"),
        (5, 1.0, None, "size"),
    ],
)
def test_the_smallest_that_is_shown_to_be_good_enough(size, loss, chosen, reason) -> None:
    answer = pick(compared(), size, loss)
    assert (answer["type"], answer["reason"]) == (chosen, reason)
    assert answer["file"] == (f"model-{chosen}.gguf" if chosen else None)
    assert answer["text"].startswith(chosen or "None")
    assert "nf4" not in [c["type"] for c in answer["candidates"]]
    assert (answer["rows_needed"] is not None) == (reason == "open")
    json.dumps(answer)


def test_open_evidence_says_how_many_rows() -> None:
    answer = pick(compared(), 28, 1.0)
    assert answer["rows_needed"] > 400 and f"{answer['rows_needed']:,} rows" in answer["text"]
    assert "Q3_K_M" in answer["text"]


def test_a_reference_that_has_learned_nothing_picks_nothing() -> None:
    answer = pick(compared(reason="reference"), None, 5.0)
    assert (answer["type"], answer["text"]) == (None, "It guesses.")


def test_without_labels_the_loss_is_perplexity() -> None:
    files = [{"type": "F16", "file": "f", "kind": "gguf", "bytes": 10, "verdict": "reference", "answer_ratio": 1.0}]
    files.append({**files[0], "type": "Q4_0", "bytes": 4, "verdict": "x", "answer_ratio": 1.012})
    files[1]["answer_ratio_interval"] = [1.004, 1.02]
    assert pick(compared(*files), None, 1.0)["type"] == "F16"
    answer = pick(compared(*files), None, 2.5)
    assert answer["type"] == "Q4_0" and "+1.20 % of answer perplexity" in answer["text"]
    assert pick(compared(*files), 0.000005, 1.0)["reason"] == "open"


def test_a_loss_as_large_as_the_limit_is_not_shown_by_more_rows() -> None:
    answer = pick(compared(REFERENCE, entry("Q2_K", 20, -2.5, -0.1)), 25, 1.0)
    assert answer["reason"] == "open" and answer["rows_needed"] is None
    assert "more than allowed, however many rows" in answer["text"]


def test_rows_needed_are_of_the_allowed_side() -> None:
    """A file that seems better needs fewer rows than one that seems worse by as much."""
    needed = [pick(compared(REFERENCE, entry("Q4", 20, *limits)), 25, 1.0)["rows_needed"] for limits in WIDE]
    assert 400 < needed[0] < needed[1]


WIDE = [(-1.1, 1.6), (-1.6, 1.1)]


def test_without_labels_rows_follow_from_the_width() -> None:
    files = [{"type": "F16", "file": "f", "kind": "gguf", "bytes": 10, "verdict": "reference", "answer_ratio": 1.0}]
    files.append({**files[0], "type": "Q4_0", "bytes": 4, "verdict": "x", "answer_ratio": math.exp(0.004), "n": 90})
    files[1] |= {"loss_difference": 0.004, "loss_difference_interval": [-0.008, 0.016]}
    files[1]["answer_ratio_interval"] = [math.exp(-0.008), math.exp(0.016)]
    answer = pick(compared(*files), 0.000005, 1.0)
    assert answer["rows_needed"] == math.ceil(90 * (0.012 / (math.log(1.01) - 0.004)) ** 2) > 90
    files[1] |= {"loss_difference_interval": [None, None], "answer_ratio_interval": [None, None]}
    alone = pick(compared(*files), 0.000005, 1.0)
    assert (alone["reason"], alone["rows_needed"]) == ("open", None) and "no interval" in alone["text"]
    json.dumps(alone, allow_nan=False)


@pytest.mark.parametrize("verdict", ["worse", "better"])
def test_a_file_worse_on_the_leak_free_rows_is_not_chosen(verdict: str) -> None:
    free = {**entry("", 1, -3.0, -0.5), "n": 300, "verdict": verdict}
    files = (REFERENCE, entry("Q8_0", 53, -0.4, 0.4), entry("Q4_K_M", 30, -0.9, 0.5, leak_free=free))
    answer = pick(compared(*files), None, 1.0)
    assert answer["type"] == ("Q8_0" if verdict == "worse" else "Q4_K_M")
    assert ("Q4_K_M is judged worse on the 300 leak-free rows" in answer["text"]) == (verdict == "worse")
    assert pick(compared(*files), None, 4.0)["type"] == "Q4_K_M", "the loss is within the limit on those rows too"


def test_small_things_are_told_as_they_are() -> None:
    files = [entry("Q8_0", 30.004, 0.0, 0.0), REFERENCE]
    assert "takes 30.004 MB" in pick(compared(*files), 30.0, 1.0)["text"]
    assert pick(compared(*files, reason="reference"), 30.0, 1.0)["reason"] == "size"
    chosen = pick(compared(*files), 31.0, 1.0)
    assert "-0" not in chosen["text"] and math.copysign(1, chosen["candidates"][0]["loss"]) == 1


def test_the_command(tmp_path, monkeypatch, capsys) -> None:
    from lib.cli.report import pick as command
    from lib.runs.files import write_json
    from lib.runs.run import open_run

    monkeypatch.setenv("WORKBOOK_HOME", str(tmp_path))
    open_run("r").produce("comparison", lambda work: write_json(work.folder / "comparison.json", compared()), {})
    command("r", 40.0, 1.0, as_json=True)
    assert json.loads(capsys.readouterr().out)["type"] == "Q4_K_M"
    command("r", 28.0, 1.0, as_json=False)
    shown = capsys.readouterr().out
    assert (
        "None: the evidence does not suffice" in shown and "Rule: Of the GGUF files" in shown and "-0.0 " not in shown
    )


@pytest.mark.parametrize(
    ("size", "loss"),
    [(0.0, 1.0), (-1.0, 1.0), (None, 0.0), (None, float("nan")), (None, math.inf), (math.inf, 1.0), (math.nan, 1.0)],
)
def test_impossible_limits(size, loss) -> None:
    with pytest.raises(InputError, match="above 0"):
        pick(compared(), size, loss)


@settings(deadline=None, max_examples=50)
@given(st.floats(1, 120), st.floats(0.01, 10), st.floats(0, 5), st.floats(0, 60))
def test_looser_limits_never_make_the_answer_larger(size: float, loss: float, more: float, room: float) -> None:
    strict, loose = pick(compared(), size, loss), pick(compared(), size + room, loss + more)
    sizes = {c["type"]: c["megabytes"] for c in strict["candidates"]}
    if strict["type"]:
        assert loose["type"] and sizes[loose["type"]] <= sizes[strict["type"]]
        assert sizes[strict["type"]] <= size


def test_a_file_that_keeps_little_is_chosen_with_a_warning() -> None:
    little = {"retention": 0.28, "retention_interval": [0.25, 0.31]}
    answer = pick(compared(REFERENCE, entry("Q5_K_M", 30, -0.9, 0.5, **little)), None, 1.0)
    assert (
        answer["type"] == "Q5_K_M" and "keeps only 0.28 [0.25,\u00a00.31] of what fine-tuning changed" in answer["text"]
    )
    assert "keeps only" not in pick(compared(), None, 1.0)["text"]
