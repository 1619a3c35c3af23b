"""Files compared by their own processes, checked against the same numbers computed in this process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lib.errors import InputError
from lib.scoring.llama_backend import LlamaCppBackend
from lib.scoring.log_probabilities import Scores, score_rows
from lib.scoring.perplexity import positions
from lib.stages.compare.child import encode_rows
from lib.stages.compare.files import Comparison, compare_files
from lib.stages.quantize import llama_library, quantizer
from lib.statistics.paired import clustered_bootstrap_t
from tests import tiny_gguf
from tests.scoring.tiny import kl_table
from tests.stages.compare.conftest import Ladder

pytestmark = pytest.mark.usefixtures("forked_children")

KEYS = {
    *("type", "file", "bytes", "bits_per_weight", "n", "accuracy", "accuracy_interval", "macro_f1", "f1_interval"),
    *("leak_free", "flips", "mcnemar_b", "mcnemar_c", "mcnemar_p", "p_holm", "loss_limit", "accuracy_difference"),
    *("accuracy_difference_interval", "odds_change", "odds_change_interval", "kld_mean", "kld_median"),
    *("kld_p99", "kld_max", "same_top", "ppl", "ppl_uncertainty", "load_seconds", "prompt_tokens_per_second"),
    *("prompt_tokens_per_second_range", "generation_tokens_per_second", "generation_tokens_per_second_range"),
    *("peak_memory_mib", "verdict"),
}


@pytest.fixture(scope="module")
def compared(ladder: Ladder, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    output = tmp_path_factory.mktemp("compared")
    others = [ladder.copy, ladder.q8, ladder.q2]
    asked = Comparison(
        ladder.reference, others, ladder.rows, ladder.task, output, {"source": "rows"}, n_ctx=128, n_threads=1
    )
    return compare_files(asked), output


def entry(result: dict, name: str) -> dict:
    return next(e for e in result["files"] if e["type"] == name)


def test_comparison_json(compared: tuple[dict, Path]) -> None:
    result, output = compared
    assert json.loads((output / "comparison.json").read_text(encoding="utf-8")) == json.loads(json.dumps(result))
    names = [e["type"] for e in result["files"]]
    assert names == ["m-F16", "copy", "Q8_0", "Q2_K"] and result["reference"] == "m-F16"
    assert all(e.keys() >= KEYS and e.keys() == result["files"][0].keys() for e in result["files"])
    assert sorted(p.name for p in output.iterdir()) == ["comparison.json", *sorted(f"scores-{n}.jsonl" for n in names)]
    assert result["data"] == {"source": "rows", "rows": 40, "leak_free_rows": 30}
    assert result["conditions"]["window_tokens"] == 128 and result["notes"] == []
    assert result["recommendation"]["text"]
    for one in result["files"]:
        counts = one["confusion"]
        assert sum(map(sum, counts)) == 40
        assert (counts[0][0] + counts[1][1]) / 40 == pytest.approx(one["accuracy"])
        for place, scores in enumerate(one["per_class"].values()):
            assert scores["support"] == sum(counts[place])
            assert scores["recall"] == pytest.approx(counts[place][place] / scores["support"])


def test_the_reference_against_itself(compared: tuple[dict, Path]) -> None:
    copy = entry(compared[0], "copy")
    assert copy["flips"] == 0 and copy["odds_change"] == 0 and copy["mcnemar_p"] == 1
    assert copy["verdict"] != "worse" and copy["accuracy_difference"] == 0
    assert copy["same_top"] == 1 and abs(copy["kld_mean"]) < 1e-4  # the reference is kept in steps of 2⁻¹² nats
    # 32-bit sums beside 64-bit ones, as llama-perplexity has them with and without --kl-divergence
    assert copy["ppl"] == pytest.approx(entry(compared[0], "m-F16")["ppl"], rel=1e-6)


def test_fewer_bits_are_further_away(compared: tuple[dict, Path]) -> None:
    f16, q8, q2 = (entry(compared[0], name) for name in ("m-F16", "Q8_0", "Q2_K"))
    assert 0 == f16["kld_mean"] < q8["kld_mean"] < q2["kld_mean"] / 10
    assert q2["kld_median"] <= q2["kld_p99"] <= q2["kld_max"] and q2["kld_low"] < q2["kld_mean"] < q2["kld_high"]
    assert compared[0]["frontier"][0] == "Q2_K" and "Q8_0" in compared[0]["frontier"]
    assert q8["on_frontier"] and not f16["on_frontier"]


def test_sizes_are_those_of_the_header(compared: tuple[dict, Path], ladder: Ladder) -> None:
    description = quantizer.describe(llama_library.read_header(ladder.q2))
    q2 = entry(compared[0], "Q2_K")
    assert q2["bytes"] == description["bytes"]
    assert q2["bits_per_weight"] == pytest.approx(description["bits_per_weight"], rel=1e-12)


def test_speed_and_memory_are_measured(compared: tuple[dict, Path]) -> None:
    for e in compared[0]["files"]:
        for kind in ("prompt", "generation"):
            low, high = e[f"{kind}_tokens_per_second_range"]
            assert 0 < low <= e[f"{kind}_tokens_per_second"] <= high
            assert e[f"{kind}_runs"] >= 5
        low, high = e["load_seconds_range"]
        assert 0 < low <= e["load_seconds"] <= high and 3 <= e["load_runs"] <= 5
        assert 20 < e["peak_memory_mib"] < 1000


def test_scores_are_those_of_the_one_scorer(compared: tuple[dict, Path], ladder: Ladder) -> None:
    """The child's numbers, put back into the rows' order, are what score_rows gives in this process."""
    shuffled = ladder.rows[::-1]
    with LlamaCppBackend(ladder.q2, 192, 1) as backend:
        own = score_rows(backend, ladder.tokenizer, ladder.task, shuffled, "test")
    saved = Scores.load(compared[1] / "scores-Q2_K.jsonl")
    assert saved.ids == own.ids[::-1]
    np.testing.assert_allclose(saved.log_probs, own.log_probs[::-1], atol=1e-4)
    assert saved.correct.mean() == entry(compared[0], "Q2_K")["accuracy"]


def test_divergence_is_that_of_two_open_models(compared: tuple[dict, Path], ladder: Ladder) -> None:
    work = encode_rows(ladder.tokenizer, ladder.task, ladder.rows, 128, 8192)
    assert work.n_ctx == 128 and all(len(window) == 128 for window in work.windows)
    with LlamaCppBackend(ladder.reference, 128, 1) as first, LlamaCppBackend(ladder.q2, 128, 1) as second:
        table = kl_table(first, second, work.windows)
    q2 = entry(compared[0], "Q2_K")
    assert q2["n_tokens"] == table["n_tokens"] == len(work.windows) * 63
    for key in ("kld_mean", "kld_p99", "same_top", "ppl"):
        assert q2[key] == table[key]  # digit by digit, as `workbook perplexity` and the tool have it


def test_divergence_has_an_interval_over_groups_of_rows(compared: tuple[dict, Path], ladder: Ladder) -> None:
    work = encode_rows(ladder.tokenizer, ladder.task, ladder.rows, 128, 8192)
    with LlamaCppBackend(ladder.reference, 128, 1) as first, LlamaCppBackend(ladder.q2, 128, 1) as second:
        found = positions(first, second, work.windows, "t")
    assert len(work.documents) == len(found.kl)
    interval = entry(compared[0], "Q2_K")["kld_mean_interval"]
    if len(set(work.documents)) < 30:
        assert interval is None
    else:
        assert interval == clustered_bootstrap_t(found.kl, work.documents, 42).to_json()
    assert entry(compared[0], "m-F16")["kld_mean_interval"] is None


def test_every_scored_token_knows_its_row(ladder: Ladder) -> None:
    """One text a letter: the row of a token is seen in the token itself; copies of a row count as one document."""
    rows = [{**ladder.rows[0], "id": f"x{i}", "text": "ABCDEFGHIJ"[i] * 40, "group": min(i, 8)} for i in range(10)]
    work = encode_rows(ladder.tokenizer, ladder.task, rows, 64, 8192)
    size = len(work.windows[0])
    scored = [ladder.tokenizer.decode([token]) for window in work.windows for token in window[size // 2 + 1 :]]
    letters = {"ABCDEFGHIJ"[i]: min(i, 8) for i in range(10)}
    seen = [
        (letters[word.strip()[0]], number) for word, number in zip(scored, work.documents, strict=True) if word.strip()
    ]
    assert len(seen) > 20 and all(letter == number for letter, number in seen)


def test_held_out_text_begins_with_leak_free_rows(ladder: Ladder) -> None:
    work = encode_rows(ladder.tokenizer, ladder.task, ladder.rows, 64, 8192)
    text = ladder.tokenizer.decode(work.windows[0])
    free = "\n".join(row["text"] for row in ladder.rows if not row["leaked"])
    assert free.startswith(text[:40])


def test_short_text_gets_a_smaller_window(ladder: Ladder) -> None:
    work = encode_rows(ladder.tokenizer, ladder.task, ladder.rows, 4096, 8192)
    assert len(work.windows[0]) < 4096 and "4096" in work.notes[0]
    with pytest.raises(InputError, match=r"held-out text.* window of 64 tokens.*give more or longer rows"):
        encode_rows(ladder.tokenizer, ladder.task, ladder.rows[:1], 512, 8192)


def test_a_file_that_kills_llama_cpp_is_named(ladder: Ladder, tmp_path: Path) -> None:
    bad = tiny_gguf.with_number(ladder.q8, tmp_path / "bad.gguf", "qwen2.block_count", 0)
    output = tmp_path / "out"
    with pytest.raises(InputError, match=r"bad\.gguf .*SIGABRT"):
        compare_files(Comparison(ladder.reference, [bad], ladder.rows, ladder.task, output, n_ctx=64, n_threads=1))
    assert [path.name for path in output.iterdir()] == [".scores"], "what the next try need not compute again"


def test_files_of_another_vocabulary(ladder: Ladder, tmp_path: Path) -> None:
    other = tiny_gguf.write(tmp_path / "other-F16.gguf", layers=1)
    with pytest.raises(InputError, match="one model"):
        compare_files(
            Comparison(ladder.reference, [other], ladder.rows, ladder.task, tmp_path / "o", n_ctx=64, n_threads=1)
        )


@pytest.mark.parametrize("case", ["twice", "none", "missing", "no rows"])
def test_refused_before_any_work(ladder: Ladder, tmp_path: Path, case: str) -> None:
    others = {"twice": [ladder.q8, ladder.reference], "none": [], "missing": [tmp_path / "x.gguf"]}.get(
        case, [ladder.q8]
    )
    rows = [] if case == "no rows" else ladder.rows
    words = {"twice": "named twice", "none": "no file to compare", "missing": "no file", "no rows": "no rows"}[case]
    with pytest.raises(InputError, match=words):
        compare_files(Comparison(ladder.reference, others, rows, ladder.task, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_full_disk_is_refused(ladder: Ladder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, so that the disk can be made to look full."""
    from lib.stages.compare import child

    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 20}))
    work = encode_rows(ladder.tokenizer, ladder.task, ladder.rows, 64, 8192)
    with (
        LlamaCppBackend(ladder.reference, 64, 1) as backend,
        pytest.raises(InputError, match="reference's log-probabilities"),
    ):
        child.store(backend, {"windows": work.windows, "reference": str(tmp_path / "log-probs.f32")})
    assert not list(tmp_path.iterdir())
