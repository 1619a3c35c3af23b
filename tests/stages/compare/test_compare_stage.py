"""The stage on a small run: products in, comparison out, skipped when nothing changed."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lib.errors import InputError
from lib.runs.files import write_json, write_jsonl
from lib.runs.run import ProductDraft, Run, open_run
from lib.settings import Settings
from lib.stages.compare.stage import ComparisonResult, compare
from lib.stages.quantize.stage import quantize
from lib.statistics.paired import holm
from tests.stages.compare.conftest import Ladder

pytestmark = pytest.mark.usefixtures("forked_children")


def make_run(ladder: Ladder) -> Run:
    run = open_run("t")

    def data(work: ProductDraft) -> None:
        shutil.copytree(ladder.tokenizer_folder, work.folder / "tokenizer")
        write_jsonl(work.folder / "test.jsonl", ladder.rows)
        write_json(work.folder / "task.json", ladder.task.to_json())
        work.facts["source"] = "generated rows"

    def gguf(work: ProductDraft) -> None:
        shutil.copyfile(ladder.reference, work.folder / "m-F16.gguf")

    run.produce("data", data, parameters={})
    run.produce("gguf", gguf, parameters={}, inputs=("data",))
    return run


def test_stage(ladder: Ladder, home: Path) -> None:
    run = make_run(ladder)
    settings = Settings(run_name="t", ladder=["Q8_0", "Q2_K"], n_ctx=128, perplexity_tokens=1024, n_threads=1)
    quantize(settings, run)
    with pytest.raises(InputError, match="06_quantize"):  # which makes the exports
        compare(settings, run)
    skipped = [{"format": "nf4", "reason": "bitsandbytes not installed"}]
    run.produce("exports", lambda w: write_json(w.folder / "exports.json", {"made": [], "skipped": skipped}), {})
    result = compare(settings, run)
    assert result.product.made and [e["type"] for e in result.files] == ["F16", "Q8_0", "Q2_K"]
    assert result.data["source"] == "generated rows" and result.reference == "F16"
    assert result.scores("Q8_0").ids == [row["id"] for row in ladder.rows]
    assert result.scores("Q8_0").correct.mean() == result.entry("Q8_0")["accuracy"]
    assert result.skipped == skipped
    entry = result.product.entry
    assert sorted(entry.outputs) == ["comparison.json", "scores-F16.jsonl", "scores-Q2_K.jsonl", "scores-Q8_0.jsonl"]
    assert entry.metrics["Q2_K"]["kld_mean"] > entry.metrics["Q8_0"]["kld_mean"] > 0
    assert entry.facts["recommended"] == result.recommendation["type"]
    again = compare(settings, run)
    assert not again.product.made and again.files == result.files and again.recommendation == result.recommendation
    assert again.entry("Q2_K")["retention"] is None and "03 was not run" in again.retention_note
    odds = np.random.default_rng(1).normal(0, 4, len(ladder.rows))
    base = replace(result.scores("F16"), log_probs=np.stack([-np.logaddexp(0, odds), -np.logaddexp(0, -odds)], axis=1))
    run.produce("evaluation", lambda w: base.save(w.folder / "scores-base.jsonl"), {}, ("data",))
    known = compare(settings, run)
    assert not known.product.made, "scores of 03 that come later need no file scored again"
    assert 0 < known.entry("Q2_K")["retention"] < 1.2 and known.entry("F16")["retention"] == 1
    assert "moved the 40 test rows" in known.retention_note
    lost = known.scores("F16").correct.mean() - base.correct.mean()
    assert again.fine_tuning_gain is None and known.fine_tuning_gain == pytest.approx(100 * lost)


def test_files_are_judged_on_the_rows_of_all_folds(ladder: Ladder, home: Path) -> None:
    """Two folds with the same model and other rows; a folder that fold 2 has not is judged on its own rows."""
    run = make_run(ladder)
    settings = Settings(run_name="t", ladder=["Q8_0", "Q2_K"], n_ctx=128, perplexity_tokens=1024, n_threads=1)
    halves = {1: ladder.rows[:22], 2: ladder.rows[22:]}

    def data(rows: list[dict], work: ProductDraft) -> None:
        shutil.copytree(ladder.tokenizer_folder, work.folder / "tokenizer")
        write_jsonl(work.folder / "test.jsonl", [{**row, "group": i} for i, row in enumerate(rows)])
        write_json(work.folder / "task.json", ladder.task.to_json())
        work.facts |= {"source": "generated rows", "folds": 2}

    whole = compare_whole(settings, run)
    run.produce("data", lambda work: data(halves[1], work), {"fold": 1})
    (second,) = run.other_folds()
    assert second.folder == run.folder / "fold-2" and not second.other_folds()
    second.produce("data", lambda work: data(halves[2], work), {"fold": 2})
    for one in (run, second):
        one.produce("gguf", lambda w: shutil.copyfile(ladder.reference, w.folder / "m-F16.gguf"), {}, inputs=("data",))
    quantize(settings, run)
    run.on_other_folds(quantize, settings)
    result = compare(settings, run)
    assert result.data["rows"] == 22 and result.own_scores("Q2_K").ids == [row["id"] for row in halves[1]]
    assert result.scores("Q2_K").ids == [row["id"] for row in ladder.rows]
    for name in ("F16", "Q8_0", "Q2_K"):
        found, expected = result.entry(name), whole.entry(name)
        assert found["folds"] == 2 and (found["n"], found["groups"]) == (40, 40)
        for key in ("accuracy", "macro_f1", "flips", "mcnemar_b", "mcnemar_c", "loss", "label_kld"):
            assert found[key] == pytest.approx(expected[key], abs=1e-3), key
    assert "cross-validated: 2 models; every one of the 40 rows" in result.product.entry.notes[-1]
    assert "With k = 2 folds D is multiplied" in result.recommendation["formulas"]
    p = [entry["p"] for entry in result.others]
    assert [entry["p_holm"] for entry in result.others] == holm(p), "over all files, whichever rows they are judged on"
    given = result.product.entry.parameters
    assert "folds" not in given and re.fullmatch("[0-9a-f]{16}", given["comparisons_of_folds"])
    assert result.entry("Q8_0")["own"]["n"] == 22
    assert "models trained like these lose on average" in result.recommendation["rule"]
    again = compare(settings, run)
    assert not again.product.made
    other = [{**row, "text": row["text"] + "贵"} for row in halves[2]]
    second.produce("data", lambda work: data(other, work), {"fold": 2, "other": True})
    with pytest.raises(InputError, match="'t, fold 2'"):  # its GGUF is of other data now
        second.require_current("gguf")


def compare_whole(settings: Settings, run: Run) -> ComparisonResult:
    quantize(settings, run)
    run.produce("exports", lambda w: write_json(w.folder / "exports.json", {"made": [], "skipped": []}), {})
    return compare(settings, run)
