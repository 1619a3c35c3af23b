"""The rule: the best where the rows show it, else the smaller, the faster, the first named; never luck."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from lib.cli.__main__ import app
from lib.cli.report import seed_overrides
from lib.errors import InputError
from lib.report.index import recipe_table, run_table, write_all_index
from lib.select.choice import outdated, read_analysis, select, write_analysis
from lib.settings import Settings
from lib.statistics.intervals import paired_score_interval
from tests.select.conftest import TALK, Make, right, test_rows

pytestmark = pytest.mark.usefixtures("forked_children")


def of(content: dict, key: str, name: str) -> dict:
    return next(entry for entry in content[key] if name in (entry.get("run"), *entry.get("runs", [])))


def test_the_better_run_is_taken_however_large_and_slow(make: Make) -> None:
    make("small", right(200, range(60)), rank=8, adapter_bytes=100, seconds=10)
    make("good", right(200, range(10)), rank=64, adapter_bytes=9000, seconds=900)
    content = select(["small", "good"])
    assert content["chosen"]["run"] == "good" and content["metric"] == "accuracy"
    behind = of(content, "recipes", "small")
    assert behind["verdict"] == "worse" and behind["difference"] == pytest.approx(-0.25)
    exact = paired_score_interval(50, 0, 200)
    assert behind["difference_interval"] == pytest.approx(exact.to_json()), "one pair: no correction"
    assert behind["p"] <= 2e-4 and binomtest(0, 50, 0.5).pvalue < 2e-4
    assert of(content, "runs", "good")["samples_per_second"] == pytest.approx(60 / 900, abs=1e-3)


def test_a_resumed_training_shows_its_loss_and_the_rate_of_its_rest_which_does_not_decide(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    values = right(100, range(10))
    make("whole", values, rank=1, seconds=100)
    make("resumed", values, rank=2, seconds=10, resumed=6)
    content = select(["whole", "resumed"])
    shown = of(content, "runs", "resumed")
    assert shown["training_loss"] == 1 / 8 and shown["tokens_per_second"] == 100
    assert shown["samples_per_second"] == pytest.approx(30 * 2 * 0.4 / 10)
    assert content["chosen"]["run"] == "whole"
    assert not app(["select", "whole", "resumed"], standalone_mode=False)
    assert "training loss" in (out := capsys.readouterr().out) and "2.40" in out and "0.1250" in out


def test_a_difference_that_the_rows_cannot_show_goes_to_the_smaller_file(make: Make) -> None:
    make("leading", right(200, range(10)), rank=64, file=5_000_000, adapter_bytes=100)
    make("smaller", right(200, range(8, 20)), rank=8, file=4_000_000, adapter_bytes=900)
    content = select(["leading", "smaller"])
    assert of(content, "recipes", "smaller")["verdict"] == "cannot tell"
    assert content["chosen"]["run"] == "smaller" and "smallest recommended GGUF" in content["text"]
    assert of(content, "recipes", "leading")["verdict"] == "leader", "its estimate is higher all the same"


def test_then_the_adapter_then_speed_then_the_order_in_which_they_were_named(make: Make) -> None:
    values = right(100, range(10))
    make("a", values, rank=1, adapter_bytes=1000, seconds=100)
    make("b", values, rank=2, adapter_bytes=1005, seconds=80)
    make("c", values, rank=3, adapter_bytes=1009, seconds=78)
    make("d", values, rank=4, adapter_bytes=1500, seconds=1)
    content = select(["a", "c", "b", "d"])
    assert content["chosen"]["run"] == "c", "d is larger, a is slower, b is as fast but named later"
    assert select(["b", "a", "c"])["chosen"]["run"] == "b"
    assert [reason.split(" have ")[-1] for reason in content["chosen"]["reasons"][1:3]] == [
        "the smallest adapter",
        "the fastest training",
    ]


def test_speeds_of_different_devices_do_not_decide(make: Make) -> None:
    make("cpu", right(50), rank=1, seconds=100)
    make("gpu", right(50), rank=2, seconds=1, device="cuda:0")
    content = select(["cpu", "gpu"])
    assert content["chosen"]["run"] == "cpu" and content["speed"] == {"comparable": False, "devices": ["cpu", "cuda:0"]}


def test_seeds_of_one_recipe_count_together_and_the_luckiest_is_not_taken(make: Make) -> None:
    for seed, wrong in ((42, range(20)), (43, range(16)), (44, range(24))):
        make(f"r-s{seed}", right(200, wrong), seed=seed)
    make("other", right(200, range(100)), rank=64)
    content = select(["r-s42", "r-s43", "r-s44", "other"])
    recipe = of(content, "recipes", "r-s42")
    means = [0.9, 0.92, 0.88]
    assert recipe["runs"] == ["r-s42", "r-s43", "r-s44"] and recipe["n_seeds"] == 3
    assert recipe["mean"] == pytest.approx(np.mean(means)) and recipe["seed_range"] == pytest.approx([0.88, 0.92])
    assert recipe["seed_sd"] == pytest.approx(np.std(means, ddof=1))
    assert content["chosen"]["run"] == "r-s42", "no seed is shown to be better: the first, not the highest"
    assert "standard deviation 0.0200" in content["text"]


def test_a_wide_spread_of_seeds_widens_the_interval(make: Make) -> None:
    for seed, wrong in ((1, range(0)), (2, range(150)), (3, range(90))):
        make(f"shaky-{seed}", right(300, wrong), seed=seed)
    make("steady", right(300, range(200, 260)), rank=64)
    content = select(["shaky-1", "shaky-2", "shaky-3", "steady"])
    behind = next(r for r in content["recipes"] if r["verdict"] != "leader")
    low, high = behind["difference_interval"]
    assert behind["verdict"] == "cannot tell" and low < -0.4 and high > 0.4


def test_a_seed_that_failed_is_not_taken(make: Make) -> None:
    make("r-1", right(100, range(70)), seed=1)
    make("r-2", right(100, range(5)), seed=2)
    assert select(["r-1", "r-2"])["chosen"]["run"] == "r-2"


def test_only_rows_that_all_hold_and_none_has_trained_on(make: Make) -> None:
    rows = test_rows(60)
    moved = [{**row, "id": f"x{i}"} for i, row in enumerate(reversed(rows[20:]))]
    seen = [{**row, "id": f"y{i}", "label": 1 - row["label"]} for i, row in enumerate(test_rows(5, split="train"))]
    flagged = [{**row, "leaked": i == 3} for i, row in enumerate(rows)]
    make("one", right(65), rows=[*flagged, *seen], rank=1)
    make("two", right(45, range(10)), rows=[*moved, *seen], rank=2)
    content = select(["one", "two"])
    assert content["rows"]["n"] == 40 and content["rows"]["leak_free"]
    assert content["rows"]["left_out"] == {
        "not in every run": 20,
        "used by a training": 5,
        "flagged by a leak audit": 0,
    }
    assert of(content, "runs", "two")["metric"] == pytest.approx(0.75), "matched by content, not by place or id"
    assert "other data product" in of(content, "runs", "two")["unlike_first"]


def test_flagged_rows_are_left_out(make: Make) -> None:
    rows = [{**row, "leaked": i < 15} for i, row in enumerate(test_rows(50))]
    make("one", right(50, range(15, 20)), rows=rows, rank=1)
    make("two", right(50, range(10)), rows=rows, rank=2)
    content = select(["one", "two"])
    assert content["rows"]["n"] == 35 and content["rows"]["left_out"]["flagged by a leak audit"] == 15
    assert of(content, "runs", "two")["metric"] == 1.0


def test_losses_of_answers(make: Make) -> None:
    draw = np.random.default_rng(0)
    difficulty = draw.uniform(1, 4, 150)
    make("high", (difficulty + draw.normal(0.2, 0.1, 150)).tolist(), task=TALK, rank=1, adapter_bytes=10)
    make("low", difficulty.tolist(), task=TALK, rank=2)
    content = select(["high", "low"])
    behind = of(content, "recipes", "high")
    assert content["metric"] == "answer_loss" and content["chosen"]["run"] == "low" and behind["verdict"] == "worse"
    assert 0.15 < behind["difference_interval"][0] < behind["difference"] < behind["difference_interval"][1] < 0.25


def test_tiny_difference_of_losses_does_not_decide(make: Make) -> None:
    draw = np.random.default_rng(1)
    difficulty = draw.uniform(1, 4, 100)
    make("large", difficulty.tolist(), task=TALK, rank=1, adapter_bytes=5000)
    make("small", (difficulty + draw.normal(1e-5, 0.05, 100)).tolist(), task=TALK, rank=2, adapter_bytes=50)
    assert select(["large", "small"])["chosen"]["run"] == "small"


def test_no_interval_is_told_where_there_is_none(make: Make, tmp_path: Path) -> None:
    """One group of rows, as of one source text: no limits, no verdict, and JSON that every reader takes."""
    for talk in (False, True):
        rows = [{**row, "group": 0} for row in test_rows(20, talk)]
        values = [0.5] * 20 if talk else right(20)
        worse = list(np.linspace(0.8, 0.9, 20)) if talk else right(20, range(12))
        task = {"task": TALK} if talk else {}
        make(f"a{talk}", values, rows=rows, seed=1, **task)
        make(f"b{talk}", values, rows=rows, seed=2, **task)
        make(f"c{talk}", worse, rows=rows, rank=4, **task)
        analysis = select([f"a{talk}", f"b{talk}", f"c{talk}"])
        assert [r["interval"] for r in analysis["recipes"] + analysis["runs"]] == [None] * 5
        assert of(analysis, "recipes", f"c{talk}")["difference_interval"] is None
        assert of(analysis, "recipes", f"c{talk}")["verdict"] == "cannot tell"
        assert "no interval: too few groups of rows" in analysis["text"]
        json.dumps(analysis, allow_nan=False)
        for shown in (run_table(analysis), recipe_table(analysis)):
            assert "nan" not in str(shown.rows) and "inf" not in str(shown.rows)


def test_intervals_of_recipes_that_are_all_right_have_a_width(make: Make) -> None:
    for seed in (1, 2):
        make(f"all-{seed}", right(50), seed=seed)
        make(f"too-{seed}", right(50), seed=seed, rank=4)
    content = select(["all-1", "all-2", "too-1", "too-2"])
    single = of(content, "runs", "all-1")["interval"]
    assert of(content, "recipes", "all-1")["interval"] == pytest.approx(single) and single[0] < 0.95
    low, high = of(content, "recipes", "too-1")["difference_interval"]
    assert low < -0.03 and high > 0.03


def test_refusals_in_one_sentence(make: Make) -> None:
    make("labels", right(30))
    make("talk", [2.0] * 30, task=TALK)
    make("talk8", [2.0] * 30, task=TALK, tokens=8, rank=2)
    make("again", right(30, [2]))
    make("away", right(30), rows=test_rows(30, split="elsewhere"))
    unfinished = make("unfinished", right(30))
    unfinished.manifest.remove("unfinished", "evaluation")
    stale = make("stale", right(30))
    stale.manifest.remove("stale", "adapter")
    make("stale2", right(30))
    for names, words in (
        (["labels"], "at least two runs"),
        (["labels", "labels"], "run 'labels' twice"),
        (["labels", "again"], "runs 'labels' and 'again' have the same data, training parameters and train_seed (42)"),
        (["labels", "lables"], "did you mean labels?"),
        (["labels", "talk"], "run 'talk' a dialogue"),
        (["talk", "talk8"], "different numbers of tokens"),
        (["labels", "away"], "share 0 test rows"),
        (["labels", "unfinished"], "run notebooks/03_evaluate.ipynb first"),
        (["labels", "stale"], "run notebooks/02_finetune.ipynb first"),
    ):
        with pytest.raises(InputError, match="Found: ") as caught:
            select(names)
        assert words in str(caught.value), names


def test_an_evaluation_of_another_adapter_is_refused(make: Make) -> None:
    make("one", right(30))
    run = make("two", right(30), rank=2)
    run.produce("adapter", lambda work: (work.folder / "adapter_model.safetensors").write_bytes(b"new"), {"seed": 9})
    with pytest.raises(InputError, match="evaluation of run 'two' was made from another adapter"):
        select(["one", "two"])


def test_written_shown_in_the_index_and_marked_when_outdated(make: Make, home: Path) -> None:
    make("one", right(60, range(3)), rank=1)
    make("two", right(60, range(9)), rank=2)
    analysis, reports = select(["one", "two"]), home / "reports"
    reports.mkdir()
    assert "Which run?" not in write_all_index(reports).read_text(encoding="utf-8")
    path = write_analysis(analysis, reports)
    assert json.loads(path.read_text(encoding="utf-8")) == read_analysis(reports) == analysis
    text = write_all_index(reports).read_text(encoding="utf-8")
    assert "Which run?" in text and "one ★" in text and "never decides" in text and "outdated" not in text
    make("two", right(60), rank=3, seed=43)
    assert outdated(analysis) == ["two"]
    assert "outdated: two" in write_all_index(reports).read_text(encoding="utf-8")
    path.write_text('{"format": 0}', encoding="utf-8")
    assert read_analysis(reports) is None


def test_the_command(make: Make, home: Path, tmp_path: Path) -> None:
    make("one", right(60, range(3)), rank=1)
    make("two", right(60, range(40)), rank=2)

    def workbook(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "lib.cli", "select", *arguments], capture_output=True, text=True, timeout=120
        )

    answer = workbook("one", "two", "--json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["chosen"]["run"] == "one"
    assert (home / "reports" / "model_analysis.json").is_file()
    assert "one ★" in (home / "reports" / "index.html").read_text(encoding="utf-8")
    answer = workbook("one", "two", "--out", str(tmp_path / "elsewhere"))
    assert "Taken: run one" in answer.stdout and "one ★" in answer.stdout
    assert (tmp_path / "elsewhere" / "model_analysis.json").is_file()
    answer = workbook("one", "tow")
    assert answer.returncode == 2 and "did you mean two?" in answer.stderr and not answer.stdout


def test_seeds_make_sibling_runs_that_share_the_split() -> None:
    own = seed_overrides(Settings(run_name="mine", seed=5), 3)
    assert own == [{"run_name": f"mine-s{seed}", "train_seed": seed} for seed in (5, 6, 7)]
    assert seed_overrides(Settings(train_seed=0), 2)[0] == {"run_name": "quick-s0", "train_seed": 0}
    with pytest.raises(InputError, match=r"adapter 'best-of:a,b'.*without one there is no seed"):
        seed_overrides(Settings(adapter="best-of:a,b"), 3)
    with pytest.raises(InputError, match="finetuning_type 'none'"):
        seed_overrides(Settings(finetuning_type="none"), 3)
