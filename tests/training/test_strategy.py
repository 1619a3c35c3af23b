"""The doctor's advice on training: sizes from the model's shape, the least change that fits, no promise of offload."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lib.cli import strategy as shown
from lib.cli.app import app
from lib.errors import InputError
from lib.training import memory, strategy
from tests.training.conftest import tiny_settings

HALF_BILLION = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
GIB = 2**30


@pytest.fixture
def model(tmp_path: Path) -> str:
    """The shape of Qwen2.5-0.5B; no weights."""
    (tmp_path / "config.json").write_text(json.dumps(HALF_BILLION))
    return str(tmp_path)


@pytest.fixture(autouse=True)
def one_skeleton_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test asks many times for the same model."""
    monkeypatch.setattr(strategy, "_skeleton", functools.cache(strategy._skeleton))


def machine(patch: pytest.MonkeyPatch, free: float, kind: str = "cpu", devices: int = 1) -> None:
    patch.setattr(strategy, "_machine", lambda: (kind, int(free * GIB), devices))
    patch.setattr("lib.device.bitsandbytes_problem", lambda: None)


def settings(**changes):
    return tiny_settings(**{"dtype": "bfloat16", "lora_r": 16, "per_device_train_batch_size": 4, **changes})


def test_sizes_are_those_of_the_shape(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 100, "cuda")
    found = strategy.recommend(settings(max_seq_length=128, lora_dropout=0.0), model)
    assert found.weights == 494_032_768  # of the published model
    # r × (inputs + outputs) of q, k, v, o, gate, up, down, 24 times
    adapter = 24 * 16 * (2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864))
    plan = found.plans[0]
    assert plan.estimate.adapter == plan.estimate.gradients == 4 * adapter == plan.estimate.optimizer / 2
    assert plan.estimate.weights == 2 * found.weights and plan.estimate.process == 0
    positions = 4 * strategy.ANSWER_TOKENS
    shape = memory.Shape(
        *(357_898_112, 136_134_656, adapter, 24, 896, 4864, 128, 151936, 4, 128, strategy.ANSWER_TOKENS, 2),
        *(False, False, False),
    )
    assert plan.estimate == memory.estimate(shape) and plan.estimate.logits == positions * 151936 * 12
    assert found.chosen is plan and plan.changes == {}


def test_the_least_change_that_fits(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = settings(max_seq_length=512, per_device_train_batch_size=8)
    machine(monkeypatch, 1000, "cuda")
    needs = [plan.need / GIB for plan in strategy.recommend(asked, model).plans]
    names = [plan.name for plan in strategy.recommend(asked, model).plans]
    assert names == [
        *("as the parameter file says", "one row a forward pass", "gradient checkpointing", "QLoRA"),
        "QLoRA with gradient checkpointing",
    ]
    assert needs[0] > needs[1] > needs[2] > needs[4]
    for index in (0, 1, 2, 4):
        machine(monkeypatch, needs[index] / 0.9 + 0.001, "cuda")
        assert strategy.recommend(asked, model).chosen.name == names[index]
    machine(monkeypatch, needs[1] / 0.9 + 0.001, "cuda")
    changes = strategy.recommend(asked, model).chosen.changes
    assert changes == {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}  # the same updates
    machine(monkeypatch, 0.1, "cuda")
    none = strategy.recommend(asked, model)
    assert none.chosen is None and "none of these fits" in shown.as_text(none, asked)


def test_several_gpus_train_together_and_processors_do_not(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 80, "cuda", devices=2)
    found = strategy.recommend(settings(), model)
    assert found.chosen.changes == {"num_processes": 2} and found.chosen.need == found.plans[1].need  # on each
    assert "data parallel on 2 processes" in shown.as_text(found, settings())
    machine(monkeypatch, 80)
    found = strategy.recommend(settings(num_processes=2), model)
    asked = found.plans[0]
    assert not asked.fits and asked.need == 2 * asked.estimate.total


def test_at_the_command_line(model: str) -> None:
    answer = CliRunner().invoke(app, ["doctor", "--model", model, "-p", "lora_r=8", "--json"])
    found = json.loads(answer.stdout)
    assert answer.exit_code == 0 and found["model"] == model and found["plans"][0]["estimate"]["adapter"] == 17_596_416
    text = CliRunner().invoke(app, ["doctor", "params/quick.yaml"]).stdout
    assert "Strategy for offline: 3 M weights" in text and "Recommended: LoRA in a single process" in text
    assert "Offload" in text and "not something this workbook does" in text
    refused = CliRunner().invoke(app, ["doctor", "--model", model, "-p", "lora_r=-1"])
    assert refused.exit_code == 2


def test_a_model_that_is_not_here_is_not_fetched() -> None:
    with pytest.raises(InputError, match=r"no config\.json of nobody/nothing on this machine"):
        strategy.recommend(settings(), "nobody/nothing")
