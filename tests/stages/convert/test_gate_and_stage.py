"""The gate stops a GGUF that answers differently, and the stage publishes only what passed it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.errors import InputError
from lib.runs.machine import llama_cpp_problem
from lib.settings import Settings
from lib.stages.convert.convert import convert
from lib.stages.convert.gate import EXACT, HARD_STRINGS, GateReport, _label_facts, _refuse, compare_tokens, gate
from lib.stages.convert.stage import export, model_name
from tests import tiny_run

pytestmark = [
    pytest.mark.skipif(llama_cpp_problem() is not None, reason="llama-cpp-python does not work here"),
    pytest.mark.usefixtures("forked_children"),
]

ROWS = tiny_run.rows(16, "validation", 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "base"
    tiny_run.make_base(folder)
    return folder


@pytest.fixture(scope="module")
def gguf(model: Path) -> Path:
    path = model.parent / "model-F32.gguf"
    convert(model, path, "f32")
    return path


def run_gate(model: Path, path: Path, limit_kld: float = 1e-3):
    return gate(model, path, tiny_run.TASK, ROWS, limit_kld, 0.99)


def test_float32_answers_alike(model: Path, gguf: Path) -> None:
    report = run_gate(model, gguf, 1e-6)
    assert report.max_kld < 1e-6
    assert report.exact_limit == EXACT * report.log_prob_range > report.max_log_prob_difference > 0
    assert report.max_label_difference < 1e-3
    assert report.label_agreement == report.same_top == 1.0
    assert report.rows == 16
    assert report.positions > 200


def test_float32_of_a_model_with_large_logits(model: Path, tmp_path: Path) -> None:
    """A trained model's log-probabilities reach 40 nats: 1e-4 for all refused SmolLM2's right file (1.6e-4)."""
    large = Path(shutil.copytree(model, tmp_path / "large"))
    tensors = load_file(large / "model.safetensors")
    tensors["model.norm.weight"] *= 64
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    convert(large, tmp_path / "x.gguf", "f32")
    report = run_gate(large, tmp_path / "x.gguf")
    assert 1e-4 < report.max_log_prob_difference < report.exact_limit
    tensors["model.layers.1.self_attn.q_proj.weight"][5] *= 1.001  # one row of one matrix, a thousandth
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"does not answer.*Δ log p\| of .* for float32"):
        run_gate(large, tmp_path / "x.gguf")


def test_labels_are_compared_where_they_are_no_near_ties() -> None:
    """Rows decided by less than 0.1 nats may flip, others not."""
    merged = np.log([[0.5, 0.5], [0.51, 0.49], [0.9, 0.1], [0.2, 0.8]])
    gguf = np.log([[0.49, 0.51], [0.49, 0.51], [0.8, 0.2], [0.3, 0.7]])
    facts = _label_facts(merged, gguf, "float32")
    assert (facts["label_agreement"], facts["clear_rows"], facts["clear_agreement"]) == (0.5, 2, 1.0)
    gguf[3] = np.log([0.6, 0.4])
    assert _label_facts(merged, gguf, "float32")["clear_agreement"] == 0.5
    assert _label_facts(merged[:2], gguf[:2], "float32")["clear_agreement"] is None
    merged[1] = np.log([0.6, 0.4])  # by 0.4 nats: clear in float32, not in bfloat16
    assert [_label_facts(merged, gguf, kind)["clear_rows"] for kind in ("float32", "bfloat16")] == [3, 2]


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, True),
        ({"mean_kld": 0.99e-3}, True),
        ({"mean_kld": 1.01e-3}, False),
        ({"mean_kld": float("nan")}, False),
        ({"label_agreement": 0.97, "clear_agreement": 0.99}, True),  # near ties flipped
        ({"clear_agreement": 0.98}, False),
        ({"clear_agreement": None}, True),
        ({"exact_limit": 1e-3, "max_log_prob_difference": 0.9e-3}, True),
        ({"exact_limit": 1e-3, "max_log_prob_difference": 1.1e-3}, False),
    ],
)
def test_limits_on_both_sides(model: Path, gguf: Path, changes: dict, passes: bool) -> None:
    values = {"texts": 1, "tokens": 1, "prompts": 1, "windows": 1, "positions": 1, "mean_kld": 1e-5, "max_kld": 1e-5}
    values |= {"same_top": 1.0, "rows": 4, "label_agreement": 1.0, "clear_rows": 2, "clear_agreement": 1.0}
    values |= {"max_label_difference": 0.0, "max_log_prob_difference": 0.0, "log_prob_range": 40.0}
    values |= {"exact_limit": None, "computed_in": "float32", "limit_kld": 1e-3, "limit_agreement": 0.99}
    report = GateReport(**values | changes, seconds=0.0)
    if passes:
        _refuse(report, gguf)
        return
    with pytest.raises(InputError, match="does not answer"):
        _refuse(report, gguf)


def test_q8_0_and_bfloat16_may_cost_their_rounding(model: Path, gguf: Path, tmp_path: Path, monkeypatch) -> None:
    convert(model, tmp_path / "q8.gguf", "q8_0")
    assert run_gate(model, tmp_path / "q8.gguf").limit_kld == pytest.approx(1e-2)
    assert run_gate(model, gguf).limit_kld == 1e-3
    monkeypatch.setattr("lib.stages.convert.gate.affordable_dtype", lambda folder: "bfloat16")
    report = run_gate(model, gguf)
    assert report.computed_in == "bfloat16" and report.exact_limit is None and report.limit_kld == pytest.approx(1e-2)


@pytest.mark.parametrize(("outtype", "limit"), [("f16", 1e-5), ("bf16", 1e-3), ("q8_0", 1e-2)])
def test_other_types(model: Path, outtype: str, limit: float, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    convert(model, path, outtype)
    assert 0 < run_gate(model, path, limit).mean_kld < limit


def test_other_weights_are_stopped(model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"  # rotated as for another rope layout: a classic converter bug
    tensors[name] = torch.roll(tensors[name], 8, 0)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    convert(other, tmp_path / "x.gguf", "f32")
    with pytest.raises(InputError, match="does not answer as the merged model"):
        run_gate(model, tmp_path / "x.gguf")


def test_other_tokenizer_is_stopped(model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    content = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"] = content["model"]["merges"][:40]
    (other / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    convert(other, tmp_path / "x.gguf", "f32")
    with pytest.raises(InputError, match="into other tokens"):
        run_gate(model, tmp_path / "x.gguf")


def test_offline_tokenizer_on_hard_strings(model: Path, gguf: Path) -> None:
    from lib.models.loading import load_tokenizer

    tokenizer = load_tokenizer(model)
    assert compare_tokens(tokenizer, gguf, [*HARD_STRINGS, *tiny_run.texts(200, 9)]) > 1000


def test_nan_fails(model: Path, gguf: Path) -> None:
    with pytest.raises(InputError, match="does not answer"):
        run_gate(model, gguf, float("nan"))


def test_stage(home: Path, tmp_path: Path) -> None:
    from lib.stages.merge.stage import merge

    tiny_run.make_base(tmp_path / "base", "bfloat16")
    run = tiny_run.make_run(tmp_path / "base")
    merge(Settings(), run)
    result = export(Settings(), run)
    assert result.product.made
    assert result.path.name == "base-tiny-F16.gguf"
    metadata = dict(result.metadata)
    assert metadata["general.architecture"] == "qwen2"
    assert metadata["tokenizer.ggml.pre"] == "qwen2"
    assert metadata["general.name"] == "base tiny"
    assert result.conversion.types == {"F16": 15, "F32": 11}
    assert sum(result.conversion.types.values()) == result.conversion.tensors
    assert result.gate.label_agreement == 1.0
    again = export(Settings(), run)
    assert not again.product.made
    assert (again.conversion, again.gate, again.metadata) == (result.conversion, result.gate, result.metadata)
    assert "parameters changed: outtype" in export(Settings(outtype="bf16"), run).product.message


def test_stage_publishes_nothing_that_fails_the_gate(home: Path, tmp_path: Path) -> None:
    from lib.stages.merge.stage import merge

    tiny_run.make_base(tmp_path / "base", "float32")
    run = tiny_run.make_run(tmp_path / "base")
    merge(Settings(), run)
    with pytest.raises(InputError, match="does not answer"):
        export(Settings(outtype="q8_0", gate_max_kld=1e-12), run)
    assert not (run.folder / "gguf").exists()


@pytest.mark.parametrize(
    ("base", "run", "name"),
    [
        ("offline", "quick", "Offline-base-quick"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "chn", "Qwen2.5-0.5B-Instruct-chn"),
        ("../models/My Model/", "a", "My-Model-a"),
    ],
)
def test_names(base: str, run: str, name: str) -> None:
    assert model_name(base, run) == name
