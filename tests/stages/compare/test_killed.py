"""Stage 07 on conversations, killed with SIGKILL while files are scored and while they write: it goes on from there."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from lib.runs.files import read_json, read_jsonl, write_json, write_jsonl
from lib.runs.run import ProductDraft, Run, open_run
from lib.scoring.log_probabilities import AnswerScores
from lib.settings import Settings
from lib.stages.compare.stage import compare
from lib.stages.quantize.stage import quantize
from tests.stages.compare.conftest import WORDS, Ladder
from tests.support.killing import kill_at

pytestmark = pytest.mark.usefixtures("unmeasured_children", "forked_children")

SETTINGS = Settings(
    run_name="t", ladder=["Q2_K"], n_ctx=128, perplexity_tokens=512, n_threads=1, generated_rows=4, max_new_tokens=6
)
STAGE = """
import sys
from lib.stages.compare.stage import compare
from lib.runs.run import open_run
from lib.settings import Settings
compare(Settings.model_validate_json(sys.argv[1]), open_run("t"))
"""
SCORES = ("scores-F16.jsonl", "scores-Q2_K.jsonl")


def conversations(count: int) -> list[dict[str, Any]]:
    draw = random.Random(5)
    texts = ["".join(draw.choices(WORDS, k=draw.randint(4, 15))) for _ in range(2 * count)]
    return [
        {
            "id": f"test-{i:05d}",
            "messages": [
                {"role": role, "content": text}
                for role, text in (("system", "你是助手。"), ("user", texts[2 * i]), ("assistant", texts[2 * i + 1]))
            ],
            "group": i,
            "leaked": False,
        }
        for i in range(count)
    ]


@pytest.fixture
def run(ladder: Ladder, home: Path) -> Run:
    run = open_run("t")

    def data(work: ProductDraft) -> None:
        shutil.copytree(ladder.tokenizer_folder, work.folder / "tokenizer")
        write_jsonl(work.folder / "test.jsonl", conversations(16))
        write_jsonl(work.folder / "train.jsonl", conversations(4))
        task = {"task": "dialogue", "system_prompt": "你是助手。", "max_seq_length": 192, "thinking": False}
        write_json(work.folder / "task.json", task)

    run.produce("data", data, {})
    run.produce("gguf", lambda work: shutil.copyfile(ladder.reference, work.folder / "m-F16.gguf"), {}, ("data",))
    quantize(SETTINGS, run)
    run.produce("exports", lambda work: write_json(work.folder / "exports.json", {"made": [], "skipped": []}), {})
    return run


def untimed(folder: Path) -> list[dict]:
    """What was written, without its times."""
    rows = read_jsonl(folder / "generated.jsonl")
    for answer in (answer for row in rows for answer in row["answers"].values()):
        for key in ("first_token_seconds", "seconds", "tokens_per_second"):
            del answer[key]
    return rows


def test_killed_comparison_continues(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole = compare(SETTINGS, run)
    folder, part = whole.product.path, run.folder / ".comparison.part"
    scores = [AnswerScores.load(folder / name).log_probs.tolist() for name in SCORES]
    wrote = [read_json(folder / "written.json"), untimed(folder)]
    again = SETTINGS.model_copy(update={"force": True})
    command = [sys.executable, "-c", STAGE, again.model_dump_json()]
    kill_at(command, part, ".scores/measure_model/*.jsonl", 6, tmp_path / "slow")
    (first,) = (part / ".scores" / "measure_model").iterdir()
    scored = first.read_bytes()
    assert 6 <= scored.count(b"\n") - 1 < 16
    kill_at(command, part, ".scores/write_file/*.jsonl", 2, tmp_path / "slow")
    assert first.read_bytes().startswith(scored)
    (answers,) = (part / ".scores" / "write_file").iterdir()
    written = answers.read_bytes().count(b"\n") - 1
    assert 2 <= written < 4
    capsys.readouterr()
    found = compare(again, run)
    said = capsys.readouterr().err
    assert "m-F16.gguf: 16 rows already scored" in said and f"m-F16.gguf: {written} answers already written" in said
    assert [AnswerScores.load(folder / name).log_probs.tolist() for name in SCORES] == scores
    assert [read_json(folder / "written.json"), untimed(folder)] == wrote
    for old, new in zip(whole.files, found.files, strict=True):
        judged = ("answer_loss", "answer_ppl_interval", "answer_ratio", "p_holm", "verdict", "kld_mean", "ppl")
        assert {key: new[key] for key in judged} == {key: old[key] for key in judged}
    assert sorted(path.name for path in folder.iterdir()) == sorted(whole.product.entry.outputs)
    assert whole.product.entry.facts["found_done"] == {}
    assert found.product.entry.facts["found_done"] == {
        "F16": f"16 rows already scored, {written} answers already written",
        "Q2_K": "16 rows already scored",
    }
