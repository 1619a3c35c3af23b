"""The product `evaluation`, made and skipped; models of every kind judged apart."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from lib.errors import InputError
from lib.runs.files import read_json, write_json
from lib.scoring import torch_backend
from lib.scoring.log_probabilities import Scores, score_rows
from lib.scoring.torch_backend import TransformersBackend
from lib.settings import Settings
from lib.stages.evaluate.results import BASE, FINETUNED, FLOOR, LabelEvaluation
from lib.stages.evaluate.stage import evaluate
from lib.stages.evaluate.standalone import ModelOptions, evaluate_models, score_in_child
from tests.scoring import tiny
from tests.stages.evaluate.conftest import save_adapter, test_rows

pytestmark = pytest.mark.usefixtures("forked_children")

SETTINGS = Settings(dtype="float32", per_device_eval_batch_size=8)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_product(run, small, labels):
    result = evaluate(SETTINGS, run)
    assert result.product.made
    direct = score_rows(TransformersBackend(small.model, 8), small.tokenizer, small.task, test_rows(), "scoring")
    saved = Scores.load(result.product.path / "scores-base.jsonl")
    np.testing.assert_allclose(saved.log_probs, direct.log_probs, atol=1e-5)
    tuned = result.models[FINETUNED].scores
    assert np.abs(tuned.log_probs - direct.log_probs).max() > 0.1
    assert list(result.floor) == ["all", "leak_free", "seen_pattern", "unseen_pattern"]
    assert result.models[BASE].reports["all"].accuracy.estimate == direct.correct.mean()
    assert result.models[BASE].reports["leak_free"].n == 39
    assert result.models[BASE].reports["unseen_pattern"].n == 14
    assert result.floor["all"].accuracy.estimate == 0.75
    assert result.majority_share == 0.5
    floor = np.array([i % 4 != 0 for i in range(40)])
    comparison = result.comparisons["all"][FLOOR]
    assert comparison.gains == int((tuned.correct & ~floor).sum())
    assert comparison.losses == int((~tuned.correct & floor).sum())
    assert set(result.comparisons) == {"all", "leak_free"} and set(result.comparisons["all"]) == {BASE, FLOOR}
    metrics = result.product.entry.metrics
    assert metrics["accuracy_finetuned"] == tuned.correct.mean() and metrics["accuracy_linear_floor"] == 0.75
    assert metrics["n"] == 40
    assert result.product.entry.facts["dtype"] == "float32"


def test_skipped_gives_the_same_result(run):
    first = evaluate(SETTINGS, run)
    second = evaluate(SETTINGS, run)
    assert not second.product.made
    assert json.dumps(second.to_json()) == json.dumps(first.to_json())
    assert json.loads(json.dumps(first.to_json())) == read_json(first.product.path / "evaluation.json")
    assert len(second.accuracies()) == 3 and {p["n"] for p in second.accuracies("unseen_pattern")} == {14}
    assert sum(map(sum, second.models[BASE].reports["leak_free"].confusion)) == 39


def test_adapter_is_needed(run):
    run.manifest.remove(run.name, "adapter")
    with pytest.raises(InputError, match="02_finetune"):
        evaluate(SETTINGS, run)


def here(function: str, argument: dict, what: str) -> dict:
    """In place of `run_child`: importing torch once more for every kind of model takes too long for a test."""
    assert function == "lib.stages.evaluate.standalone:score_in_child" and what.startswith("evaluating")
    return score_in_child(json.loads(json.dumps(argument, default=str)))


@pytest.mark.parametrize("kind", ["folder", "adapter", "gguf"])
def test_any_model(small, tmp_path, kind, monkeypatch):
    if kind != "gguf":
        monkeypatch.setattr("lib.stages.evaluate.standalone.run_child", here)
    model = {"folder": small.folder, "adapter": tmp_path / "adapter", "gguf": small.gguf}[kind]
    reference = small.model
    if kind == "adapter":
        save_adapter(small, model)
        from peft import PeftModel

        reference = PeftModel.from_pretrained(tiny.make_model(), model)
    rows = test_rows()
    options = ModelOptions(dtype="auto" if kind == "gguf" else "float32", n_threads=1)
    answer = evaluate_models([model], rows, small.task, {"source": "here"}, options=options)
    direct = score_rows(TransformersBackend(reference), small.tokenizer, small.task, rows, "scoring")
    assert answer["data"] == {"source": "here", "n": 40, "labels": ["负面", "正面"]}
    (entry,) = answer["models"]
    assert entry["model"] == str(model)
    assert entry["n"] == 40 and entry["accuracy"] == direct.correct.mean()
    assert entry["leak_free"]["n"] == 39
    assert np.sum(entry["confusion"]) == 40 and set(entry["per_class"]) == {"负面", "正面"}
    low, high = entry["accuracy_interval"]
    assert low < entry["accuracy"] < high
    assert entry["seconds_per_sample"] > 0 and entry["peak_memory_mib"] > 50
    json.dumps(answer, allow_nan=False)


def test_rows_without_audit_have_no_leak_free_part(small):
    rows = [{key: row[key] for key in ("id", "text", "label")} for row in test_rows()]
    scores = score_rows(TransformersBackend(small.model), small.tokenizer, small.task, rows, "scoring")
    assert LabelEvaluation.of_model(scores, rows, small.task, {"note": ""})["leak_free"] is None


def test_unusable_models(small, tmp_path, monkeypatch):
    (tmp_path / "page.gguf").write_text("<html></html>")
    (tmp_path / "empty").mkdir()
    adapter = tmp_path / "adapter"
    save_adapter(small, adapter)
    config = read_json(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", {**config, "base_model_name_or_path": None})
    cases = {
        "none.gguf": "no file",
        "page.gguf": "HTML",
        "empty": "no config.json",
        "adapter": "does not name its base",
        "../nowhere/model": "no folder",
    }
    monkeypatch.setattr("lib.stages.evaluate.standalone.run_child", here)
    for name, problem in cases.items():
        with pytest.raises(InputError, match=problem):
            evaluate_models([tmp_path / name], test_rows()[:2], small.task)


def test_answer_words_of_several_tokens_are_told(small, monkeypatch):
    monkeypatch.setattr("lib.stages.evaluate.standalone.run_child", here)
    for words, note in ((("负面", "正面"), ""), (("负面", "差劲透顶"), "so a longer word has more to lose")):
        task = replace(small.task, label_names=words)
        (entry,) = evaluate_models([small.folder], test_rows()[:4], task, options=ModelOptions(dtype="float32"))[
            "models"
        ]
        assert entry["note"].endswith(note) and bool(entry["note"]) == bool(note)


def test_a_file_that_makes_llama_cpp_abort_is_an_error(small, tmp_path):
    """A file whose header contradicts its tensors: llama.cpp refuses it or ends the process; both are reported."""
    data = small.gguf.read_bytes()
    key = b"qwen2.attention.head_count"
    at = data.index(key) + len(key) + 4
    assert data[at] == 4
    path = tmp_path / "bad.gguf"
    path.write_bytes(data[:at] + b"\x00" + data[at + 1 :])
    with pytest.raises(InputError, match=r"ended by signal|cannot load|cannot open"):
        evaluate_models([path], test_rows(), small.task)


def test_no_rows(small):
    with pytest.raises(InputError, match="no rows"):
        evaluate_models([small.gguf], [], small.task)


def test_a_base_in_four_bits_is_another_model(tmp_path):
    from lib.stages.evaluate.standalone import keep_of

    (tmp_path / "weights").write_bytes(b"w")
    asked = {"keep": str(tmp_path / "kept.jsonl"), "path": str(tmp_path / "weights"), "adapter": None}
    full, again, in_4bit = (keep_of(asked | {"load_in_4bit": b}) for b in (False, False, True))
    assert full == again and full.model != in_4bit.model
    assert keep_of(asked | {"keep": None}) is None


def test_interrupted_evaluation_continues(run, monkeypatch, capsys):
    """Stopped in the second model: the first one's rows and the finished batches of the second are not run again."""
    monkeypatch.setitem(torch_backend._PASS, "cpu", 4096)  # batches of eight, whatever the lengths
    expected = evaluate(SETTINGS, run)
    before = {name: model.scores.log_probs for name, model in expected.models.items()}
    run_batch, batches = TransformersBackend._run, []

    def stopping(backend, batch, shared=0):
        batches.append(len(batch))
        if len(batches) == 8:
            raise KeyboardInterrupt
        return run_batch(backend, batch, shared)

    monkeypatch.setattr(TransformersBackend, "_run", stopping)
    again = SETTINGS.model_copy(update={"force": True})
    with pytest.raises(KeyboardInterrupt):
        evaluate(again, run)
    assert batches == [8] * 8 and (run.folder / "evaluation").is_dir()
    capsys.readouterr()
    found = evaluate(again, run)
    said = capsys.readouterr().err
    assert "the base model (40 rows already scored)" in said
    assert "the fine-tuned model (16 rows already scored)" in said
    assert len(batches) == 8 + 3
    for name, values in before.items():
        np.testing.assert_array_equal(found.models[name].scores.log_probs, values)
    names = {path.name for path in found.product.path.iterdir()}
    assert names == {"evaluation.json", "scores-base.jsonl", "scores-finetuned.jsonl"}
    assert found.scoring == {BASE: "", FINETUNED: ""}
