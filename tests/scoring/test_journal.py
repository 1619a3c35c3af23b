"""Scores that are kept as they come: killed, damaged and foreign files; the rest is computed as if nothing happened."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lib.errors import InputError
from lib.runs.files import write_json
from lib.scoring import llama_backend, torch_backend
from lib.scoring.backend import SCORED, Keep, keeping, kept_peak_memory_mib, model_hash
from lib.scoring.llama_backend import LlamaCppBackend
from lib.scoring.log_probabilities import Scores, score_rows
from lib.scoring.torch_backend import TransformersBackend
from tests.scoring import tiny

ROWS = tiny.rows(30)
CHILD = """
import json, sys, time
from pathlib import Path
import torch
from lib.models.loading import load_model, load_tokenizer
from lib.prompts.tasks import task_from_json
from lib.scoring import llama_backend, torch_backend
from lib.scoring.backend import Keep
from lib.scoring.llama_backend import LlamaCppBackend
from lib.scoring.log_probabilities import score_rows
from lib.scoring.torch_backend import TransformersBackend
folder, kind, path, task = sys.argv[1:]
torch.set_num_threads(1)
torch_backend._PASS["cpu"], llama_backend._TOKENS_ON_CPU = 4096, 2048
def slowly(run):
    return lambda *a, **k: (time.sleep(0.15), run(*a, **k))[1]
TransformersBackend._run = slowly(TransformersBackend._run)
LlamaCppBackend._run = slowly(LlamaCppBackend._run)
backend = (
    LlamaCppBackend(Path(folder) / "tiny-F32.gguf", 192, n_threads=1) if kind == "gguf"
    else TransformersBackend(load_model(Path(folder), dtype="float32", device="cpu"), 4)
)
task, rows = task_from_json(json.loads(Path(task).read_text())), json.loads(Path(path).with_name("rows").read_text())
score_rows(backend, load_tokenizer(Path(folder)), task, rows, "scoring", Keep(Path(path), "m"))
"""


@pytest.fixture(autouse=True)
def _full_batches(monkeypatch):
    """Batches of four (eight in llama.cpp), whatever the lengths: these tests count them."""
    monkeypatch.setitem(torch_backend._PASS, "cpu", 4096)
    monkeypatch.setattr(llama_backend, "_TOKENS_ON_CPU", 2048)


def open_backend(small, kind: str = "folder"):
    if kind == "gguf":
        return LlamaCppBackend(small.gguf, 192, n_threads=1)
    return TransformersBackend(small.model, 4)


def score(small, keep: Keep | None = None, rows=ROWS, kind: str = "folder") -> Scores:
    return score_rows(open_backend(small, kind), small.tokenizer, small.task, rows, "scoring", keep)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Counted:
    """Counts the batches that a backend computes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[int] = []
        for kind in (TransformersBackend, LlamaCppBackend):
            monkeypatch.setattr(kind, "_run", self._counting(kind._run))

    def _counting(self, run):
        def counted(backend, batch, shared=0):
            self.batches.append(len(batch))
            return run(backend, batch, shared)

        return counted


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_killed_and_continued_at_the_next_batch(small, tmp_path, kind, counted, capsys):
    """A real SIGKILL in the middle; the same question again computes only the batches that lack."""
    path = tmp_path / "scores"
    write_json(tmp_path / "task", small.task.to_json())
    write_json(tmp_path / "rows", ROWS)
    command = [sys.executable, "-c", CHILD, str(small.folder), kind, str(path), str(tmp_path / "task")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=Path(__file__).resolve().parents[2])
    deadline = time.monotonic() + 100
    while not (path.exists() and path.read_bytes().count(b"\n") > 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = sum(len(line["rows"]) for line in lines(path)[1:])
    batch = 8 if kind == "gguf" else 4
    assert 8 <= kept < 30 and kept % batch == 0
    found = score(small, Keep(path, "m"), kind=kind)
    assert f"scoring ({kept} rows already scored)" in capsys.readouterr().err
    assert sum(counted.batches) == 30 - kept
    np.testing.assert_array_equal(found.log_probs, score(small, kind=kind).log_probs)
    assert sorted(row for line in lines(path)[1:] for row in line["rows"]) == sorted(found.ids)


def test_header_and_rows_of_the_file(small, tmp_path):
    scores = score(small, Keep(tmp_path / "scores", "abc"))
    header, *rows = lines(tmp_path / "scores")
    assert header.keys() == {"format", "model", "rows", "prompts", "labels", "settings"}
    assert header["model"] == "abc" and header["settings"]["batch_size"] == 4
    assert sum(len(row["rows"]) for row in rows) == 30 and max(len(row["rows"]) for row in rows) == 4
    by_id = {name: value for row in rows for name, value in zip(row["rows"], row["values"], strict=True)}
    assert by_id.keys() == set(scores.ids)
    assert [by_id[name] for name in scores.ids] == scores.log_probs.tolist()
    assert scores.seconds > sum(row["seconds"] for row in rows) > 0


@pytest.mark.parametrize("tail", [b'{"rows": ["ro', b"\x00\x00\x00\n", b"[]\n", b'{"rows": ["a"]}\n'], ids=repr)
def test_what_is_cut_off_or_damaged_is_dropped(small, tmp_path, tail, counted):
    path = tmp_path / "scores"
    expected = score(small, Keep(path, "m"))
    whole = path.read_bytes()
    pieces = whole.split(b"\n")
    path.write_bytes(b"\n".join(pieces[:3]) + b"\n" + tail)  # the header, two batches, and what a crash left
    counted.batches.clear()
    found = score(small, Keep(path, "m"))
    assert sum(counted.batches) == 22, "two batches of four are taken"
    np.testing.assert_array_equal(found.log_probs, expected.log_probs)
    assert [line["rows"] for line in lines(path)[1:]] == [json.loads(line)["rows"] for line in pieces[1:-1]]


def _each(change):
    return lambda kept: [kept[0], *(change(line) for line in kept[1:])]


EDITED = {
    "twice": lambda kept: [kept[0], kept[1], *kept[1:]],
    "exchanged": lambda kept: [kept[0], kept[2], kept[1], *kept[3:]],
    "one lost": lambda kept: [kept[0], *kept[2:]],
    "positive": _each(lambda line: line | {"values": [[5.0, 3.0] for _ in line["values"]]}),
    "texts": _each(lambda line: line | {"values": [["a", "b"] for _ in line["values"]]}),
    "no numbers": _each(lambda line: line | {"values": [[float("nan")] * 2 for _ in line["values"]]}),
    "short": _each(lambda line: line | {"values": line["values"][:3]}),
    "null": _each(lambda line: line | {"values": None}),
    "three labels": _each(lambda line: line | {"values": [[*value, -1.0] for value in line["values"]]}),
    "other rows": _each(lambda line: line | {"rows": ["zz"] * len(line["rows"])}),
}


@pytest.mark.parametrize("change", EDITED.values(), ids=EDITED)
def test_a_batch_counts_only_for_its_rows_and_as_log_probabilities(small, tmp_path, change):
    path = tmp_path / "scores"
    expected = score(small, Keep(path, "m"))
    path.write_text("".join(json.dumps(line) + "\n" for line in change(lines(path))))
    np.testing.assert_array_equal(score(small, Keep(path, "m")).log_probs, expected.log_probs)
    assert [row for line in lines(path)[1:] for row in line["rows"]] == sorted(expected.ids, key=_place(path))


def _place(path):
    order = [row for line in lines(path)[1:] for row in line["rows"]]
    return order.index


def test_what_stands_behind_a_finished_journal_is_cut_off(small, tmp_path, counted):
    path = tmp_path / "scores"
    score(small, Keep(path, "m"))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"rows": ["ro')
    counted.batches.clear()
    score(small, Keep(path, "m"))
    assert counted.batches == [] and path.read_bytes() == whole
    assert kept_peak_memory_mib(path) > 0


def test_finished_scores_need_no_forward_pass(small, tmp_path, counted):
    first = score(small, Keep(tmp_path / "scores", "m"))
    counted.batches.clear()
    again = score(small, Keep(tmp_path / "scores", "m"))
    assert counted.batches == []
    np.testing.assert_array_equal(first.log_probs, again.log_probs)
    assert again.seconds >= 0.5 * first.seconds


OTHERS = {
    "model": "another model",
    "rows": "other rows",
    "text": "other prompts",
    "prompt": "other prompts",
    "batch": "other settings",
}


@pytest.mark.parametrize("change, words", OTHERS.items(), ids=OTHERS)
def test_another_question_begins_anew_and_says_so(small, tmp_path, change, words, counted, capsys):
    from dataclasses import replace

    path = tmp_path / "scores"
    score(small, Keep(path, "m"))
    counted.batches.clear()
    capsys.readouterr()
    rows, task, backend = [dict(row) for row in ROWS], small.task, open_backend(small)
    if change == "rows":
        rows[3]["id"] = "other"
    if change == "text":
        rows[3]["text"] += "好"
    if change == "prompt":
        task = replace(task, system_prompt="你是别人。")
    if change == "batch":
        backend.batch_size = 5
    model = "other" if change == "model" else "m"
    found = score_rows(backend, small.tokenizer, task, rows, "scoring", Keep(path, model))
    said = capsys.readouterr().err
    assert "begun anew: what was kept is of" in said and words in said
    assert sum(counted.batches) == 30 and len(lines(path)) == 1 + len(counted.batches)
    np.testing.assert_array_equal(
        found.log_probs, score_rows(backend, small.tokenizer, task, rows, "scoring").log_probs
    )


def test_a_file_that_is_no_journal_is_begun_anew(small, tmp_path):
    (tmp_path / "scores").write_text("not JSON\nat all\n")
    score(small, Keep(tmp_path / "scores", "m"))
    assert len(lines(tmp_path / "scores")) == 1 + 8


def test_two_processes_do_not_write_one_file(small, tmp_path):
    keep = Keep(tmp_path / "scores", "m")
    with keeping(keep, "scoring", SCORED, [], [], {}), pytest.raises(InputError, match="another process writes"):
        score(small, keep)


def test_several_sequences_a_prompt(small, tmp_path, counted, monkeypatch):
    """Answer words of several tokens: rows count once, and an interruption between their sequences changes nothing."""
    prompts, answers = [[7, *range(i, i + 9)] for i in range(1, 12)], [[300], [301, 17, 40], [302, 9, 5]]
    backend = open_backend(small)
    expected = backend.label_log_probs(prompts, answers)
    names = [str(i) for i in range(11)]
    asked = (Keep(tmp_path / "s", "m"), "scoring", SCORED, names, prompts, backend.settings)
    with keeping(*asked, labels=answers) as work:
        backend.label_log_probs(prompts, answers, work)
        assert work.progress.done == 11
    kept = (tmp_path / "s").read_bytes().split(b"\n")
    assert len(kept) == 1 + 6 + 1
    (tmp_path / "s").write_bytes(b"\n".join(kept[:3]) + b"\n")
    with keeping(*asked, labels=answers) as work:
        assert work.found == "3 rows already scored"
        found = backend.label_log_probs(prompts, answers, work)
    np.testing.assert_array_equal(found, expected)
    assert work.progress.done == 11


def test_hash_of_a_model(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "w.safetensors").write_bytes(b"1")
    (tmp_path / "b.gguf").write_bytes(b"1")
    first = model_hash(tmp_path / "a")
    assert first != model_hash(tmp_path / "b.gguf") and first != model_hash(tmp_path / "a", tmp_path / "b.gguf")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "w.safetensors").symlink_to(tmp_path / "a" / "w.safetensors")
    assert model_hash(tmp_path / "link") == first
    (tmp_path / "a" / "w.safetensors").write_bytes(b"2")
    assert model_hash(tmp_path / "a") != first
