"""The doctor's advice on training: sizes from the model's shape, the least change that fits, no promise of offload."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lib.cli import doctor
from lib.cli.__main__ import app
from lib.errors import InputError
from lib.settings import check
from lib.stages.finetune import memory as finetune_memory
from tests.stages.finetune.conftest import tiny_settings

pytestmark = pytest.mark.usefixtures("forked_children")

SMALL = {"long": False, "family": None, "disk_total": 1, "disk_free": 2, "rows": None, "time": "minutes"}
"""What a run takes that any machine has."""
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


@pytest.fixture
def small(tmp_path: Path) -> str:
    """Two layers of it."""
    (tmp_path / "config.json").write_text(json.dumps({**HALF_BILLION, "num_hidden_layers": 2}))
    return str(tmp_path)


@pytest.fixture(autouse=True)
def one_skeleton_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test asks many times for the same model."""
    monkeypatch.setattr(finetune_memory, "_skeleton", functools.cache(finetune_memory._skeleton))


def machine(patch: pytest.MonkeyPatch, free: float, kind: str = "cpu", devices: int = 1) -> None:
    patch.setattr(finetune_memory, "_machine", lambda: (kind, int(free * GIB), devices))
    patch.setattr("lib.runs.machine.bitsandbytes_problem", lambda: None)


def settings(**changes):
    return tiny_settings(**{"dtype": "bfloat16", "lora_r": 16, "per_device_train_batch_size": 4, **changes})


def chosen(found: dict) -> dict | None:
    """The plan that is recommended."""
    return next((plan for plan in found["plans"] if plan["name"] == found["recommended"]), None)


def test_sizes_are_those_of_the_shape(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 100, "cuda")
    found = finetune_memory.recommend(settings(max_seq_length=128, lora_dropout=0.0), model)
    assert found["weights"] == 494_032_768  # of the published model
    # r × (inputs + outputs) of q, k, v, o, gate, up, down, 24 times
    adapter = 24 * 16 * (2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864))
    plan = found["plans"][0]
    parts = plan["estimate"]
    assert parts["adapter"] == parts["gradients"] == 4 * adapter == parts["optimizer"] / 2
    assert parts["weights"] == 2 * found["weights"] and parts["process"] == 0
    assert parts["logits"] == 4 * finetune_memory.ANSWER_TOKENS * 151936 * 12
    # bytes a token that a layer keeps: 16 × hidden, 6 × key/value and intermediate in 16 bits, two norms in float32
    assert parts["activations"] == 4 * 128 * 24 * (2 * (16 * 896 + 6 * 128 + 6 * 4864) + 16 * 896)
    assert chosen(found) is plan and plan["changes"] == {}


def test_the_least_change_that_fits(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = settings(max_seq_length=512, per_device_train_batch_size=8)
    machine(monkeypatch, 1000, "cuda")
    needs = [plan["need"] / GIB for plan in finetune_memory.recommend(asked, model)["plans"]]
    names = [plan["name"] for plan in finetune_memory.recommend(asked, model)["plans"]]
    assert names == [
        *("as the parameter file says", "one row a forward pass", "gradient checkpointing", "QLoRA"),
        "QLoRA with gradient checkpointing",
    ]
    assert needs[0] > needs[1] > needs[2] > needs[4]
    for index in (0, 1, 2, 4):
        machine(monkeypatch, needs[index] / 0.9 + 0.001, "cuda")
        assert chosen(finetune_memory.recommend(asked, model))["name"] == names[index]
    machine(monkeypatch, needs[1] / 0.9 + 0.001, "cuda")
    changes = chosen(finetune_memory.recommend(asked, model))["changes"]
    assert changes == {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}  # the same updates
    machine(monkeypatch, 0.1, "cuda")
    none = finetune_memory.recommend(asked, model)
    assert chosen(none) is None and "none of these fits" in doctor.strategy_text(none, asked, SMALL)


def test_several_gpus_train_together_with_the_same_updates(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 80, "cuda", devices=2)
    found = finetune_memory.recommend(settings(gradient_accumulation_steps=4), small)
    assert chosen(found)["changes"] == {"num_processes": 2, "gradient_accumulation_steps": 2}
    assert chosen(found)["need"] == found["plans"][1]["need"]  # on each
    assert "data parallel on 2 processes" in doctor.strategy_text(found, settings(), SMALL)
    assert chosen(finetune_memory.recommend(settings(), small))["changes"] == {
        "num_processes": 2,
        "per_device_train_batch_size": 2,
    }
    odd = settings(per_device_train_batch_size=3)
    assert "an update of 6 rows, not 3" in doctor.strategy_text(finetune_memory.recommend(odd, small), odd, SMALL)
    machine(monkeypatch, 80, "cuda")
    found = finetune_memory.recommend(settings(num_processes=2), small)  # a GPU too few
    assert not found["plans"][0]["fits"] and chosen(found)["name"] == "a single process"
    assert chosen(found)["changes"] == {"num_processes": 1, "gradient_accumulation_steps": 2}


def test_a_base_that_fits_no_single_gpu_is_shared_out(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 80, "cuda", devices=4)
    name = "4 processes that share out the frozen layers"
    plans = {plan["name"]: plan for plan in finetune_memory.recommend(settings(), model)["plans"]}
    whole, shared = plans["4 processes, one on each GPU"], plans[name]
    assert shared["changes"] == {**whole["changes"], "fsdp": "full_shard"}
    assert shared["estimate"]["weights"] < whole["estimate"]["weights"]
    machine(monkeypatch, (shared["need"] + whole["need"]) / 2 / 0.9 / GIB, "cuda", devices=4)
    assert chosen(finetune_memory.recommend(settings(), model))["name"] == name
    asked = settings(num_processes=2, fsdp="full_shard")
    for plan in finetune_memory.recommend(asked, model)["plans"]:  # what is proposed is no contradiction
        check({**asked.model_dump(exclude_defaults=True), **plan["changes"]}, "in the plan")


def test_processes_on_a_processor_share_its_memory(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = settings(num_processes=2)
    machine(monkeypatch, 80)
    found = finetune_memory.recommend(asked, small)
    assert chosen(found) is found["plans"][0] and chosen(found)["need"] == 2 * chosen(found)["estimate"]["total"]
    assert "LoRA in 2 processes. Nothing needs to be changed." in doctor.strategy_text(found, asked, SMALL)
    machine(monkeypatch, 0.6 * chosen(found)["need"] / 0.9 / GIB)
    found = finetune_memory.recommend(asked, small)
    assert chosen(found)["changes"] == {"num_processes": 1, "gradient_accumulation_steps": 2}
    assert all(plan["need"] == plan["estimate"]["total"] for plan in found["plans"][1:])
    machine(monkeypatch, 80, "mps")
    assert chosen(finetune_memory.recommend(asked, small))["name"] == "a single process"


@pytest.mark.parametrize("targets", ["foo", "lm_head", "q_proj,k_prj", "q_proj,self_attn", "model.embed_tokens,q_proj"])
def test_targets_that_a_training_refuses_are_refused(small: str, targets: str) -> None:
    answer = CliRunner().invoke(app, ["doctor", "--model", small, "-p", f"target_modules={targets}"])
    assert answer.exit_code == 2 and "all-linear" in answer.stderr


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
    with pytest.raises(InputError, match="nobody/nothing"):
        finetune_memory.recommend(settings(), "nobody/nothing")
