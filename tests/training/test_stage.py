"""The stage from data product to adapter, interruptions included."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from lib.errors import InputError
from lib.run import open_run
from lib.training import checkpoints, finetune
from lib.training.trainer import AnswerTrainer
from tests.training.conftest import make_data, tiny_settings


def weights(folder) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter_model.safetensors")


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


@pytest.fixture
def stop_before(monkeypatch: pytest.MonkeyPatch):
    """Makes training die (as Ctrl-C would) when it is about to compute the loss of the n-th update from now."""
    original = AnswerTrainer.compute_loss

    def arm(updates: int | None) -> None:
        left = [updates]

        def compute(self, *arguments, **options):
            if left[0] is not None:
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
            return original(self, *arguments, **options)

        monkeypatch.setattr(AnswerTrainer, "compute_loss", compute)

    return arm


def test_makes_the_adapter_and_skips_it_the_second_time(run, capfd) -> None:
    result = finetune(tiny_settings(), run)
    output = capfd.readouterr()
    assert output.out == ""
    assert "Failed" not in output.err and "Warning" not in output.err
    assert result.steps == 8 and result.product.made and result.resumed_from is None
    assert result.method == "LoRA r=4, alpha=16 on 7 linear layers"
    # r × (inputs + outputs) of q, k, v, o, gate, up, down: hidden 64, key/value 32, intermediate 64
    assert result.trainable == 4 * (128 + 96 + 96 + 128 + 128 + 128 + 128)
    assert 0 < result.trainable_share < 0.2
    tensors = weights(result.product.path)
    assert len(tensors) == 14 and all(tensor.dtype == np.float32 for tensor in tensors.values())
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    losses = [row["loss"] for row in result.history if "loss" in row]
    assert len(losses) == 8 and losses[-1] < losses[0]
    judged = {row["step"]: row["eval_loss"] for row in result.history if "eval_loss" in row}
    assert sorted(judged) == [2, 4, 6, 8]
    assert judged[result.chosen_step] == min(judged.values())
    chosen = result.product.path / "checkpoints" / f"checkpoint-{result.chosen_step}"
    assert same(tensors, weights(chosen))
    assert "validation loss" in (result.product.path / "training.log").read_text()
    assert result.throughput > 0 and result.estimate["total"] > 0
    again = finetune(tiny_settings(), run)
    assert not again.product.made and again.history == result.history and again.trainable == result.trainable


def test_interrupted_training_ends_with_the_same_weights(home, small_base, stop_before) -> None:
    straight, broken = open_run("straight"), open_run("broken")
    for one in (straight, broken):
        make_data(one)
    expected = finetune(tiny_settings(), straight)
    stop_before(5)  # checkpoints 2 and 4 are there, update 5 is lost
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny_settings(), broken)
    assert "adapter" not in broken.manifest.entries()
    stop_before(None)
    result = finetune(tiny_settings(), broken)
    assert result.resumed_from == 4
    assert same(weights(result.product.path), weights(expected.product.path))
    last = "checkpoints/checkpoint-8"
    assert same(weights(result.product.path / last), weights(expected.product.path / last))
    strip = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in result.history]
    assert strip == [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in expected.history]


@pytest.mark.parametrize(
    "damage", ["truncated optimizer", "no rng", "no record", "flipped bit", "empty folder", "staged only"]
)
def test_damaged_newest_checkpoint_is_passed_over(home, small_base, stop_before, damage: str) -> None:
    run = open_run("damaged")
    make_data(run)
    stop_before(7)  # checkpoints 4 and 6 are kept
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny_settings(), run)
    folder = run.folder / ".adapter.part" / "checkpoints"
    newest = folder / "checkpoint-6"
    if damage == "truncated optimizer":
        content = (newest / "optimizer.pt").read_bytes()
        (newest / "optimizer.pt").write_bytes(content[: len(content) // 2])
    elif damage == "no rng":
        (newest / "rng_state.pth").unlink()
    elif damage == "no record":
        (newest / checkpoints.RECORD).unlink()
    elif damage == "flipped bit":
        content = bytearray((newest / "adapter_model.safetensors").read_bytes())
        content[-1] ^= 1
        (newest / "adapter_model.safetensors").write_bytes(content)
    elif damage == "empty folder":
        (folder / "checkpoint-7").mkdir()
    else:
        (folder / ".staged").mkdir(exist_ok=True)
        shutil.copytree(newest, folder / ".staged" / "checkpoint-7")
    stop_before(None)
    result = finetune(tiny_settings(), run)
    whole = damage in ("empty folder", "staged only")
    assert result.resumed_from == (6 if whole else 4)
    assert len(result.messages) == (0 if damage == "staged only" else 1)
    straight = open_run("straight")
    make_data(straight)
    expected = finetune(tiny_settings(), straight)
    assert same(weights(result.product.path), weights(expected.product.path))


def test_other_parameters_start_afresh(run, stop_before) -> None:
    stop_before(5)
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny_settings(), run)
    stop_before(None)
    assert finetune(tiny_settings(lora_r=2), run).resumed_from is None


def test_accumulation_gives_the_same_updates(home, small_base) -> None:
    adapters = []
    for name, rows, parts in (("whole", 16, 1), ("parts", 4, 4)):
        run = open_run(name)
        make_data(run)
        changes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": parts, "lora_dropout": 0.0}
        adapters.append(finetune(tiny_settings(**changes), run))
    for key, value in weights(adapters[0].product.path).items():
        np.testing.assert_allclose(value, weights(adapters[1].product.path)[key], atol=2e-4)
    first, second = ([row["eval_loss"] for row in one.history if "eval_loss" in row] for one in adapters)
    assert first == pytest.approx(second, abs=1e-4)


def test_diverging_training_is_refused_and_leaves_no_product(run) -> None:
    with pytest.raises(InputError, match="learning_rate"):
        _with_broken_loss(run)
    assert "adapter" not in run.manifest.entries()


def _with_broken_loss(run) -> None:
    with pytest.MonkeyPatch.context() as patch:
        original = AnswerTrainer.compute_loss
        patch.setattr(AnswerTrainer, "compute_loss", lambda *a, **k: original(*a, **k) * math.nan)
        finetune(tiny_settings(), run)


@pytest.mark.parametrize("targets", ["lm_head", "q_proj, embed_tokens", "no_such_layer"])
def test_unusable_target_modules_are_refused(run, targets: str) -> None:
    with pytest.raises(InputError, match="target_modules"):
        finetune(tiny_settings(target_modules=targets), run)


def test_four_bits_or_a_note(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib import device

    monkeypatch.setattr(device, "bitsandbytes_problem", lambda: "not on this machine")
    result = finetune(tiny_settings(load_in_4bit=True, dtype="auto"), run)
    assert result.method.startswith("LoRA ")
    assert any("not on this machine" in note for note in result.notes) and result.notes == run.stamps()


def test_four_bits_where_they_work(run) -> None:
    from lib import device

    if problem := device.bitsandbytes_problem():
        pytest.skip(problem)
    result = finetune(tiny_settings(load_in_4bit=True, dtype="auto", num_train_epochs=1.0), run)
    assert result.method.startswith("QLoRA") and result.product.entry.facts["method"] == "QLoRA"
    assert result.total - result.trainable == 512 * 64 + 64 * 64 * 2 + 64 * 32 * 2 + 64 * 64 * 3 + 3 * 64 + 64 + 64


def test_adapter_can_be_loaded_and_names_its_base(run) -> None:
    from lib.models.loading import base_of, load_model

    result = finetune(tiny_settings(), run)
    config = json.loads((result.product.path / "adapter_config.json").read_text())
    base = base_of(run)
    assert config["base_model_name_or_path"] == str(base.path)
    assert load_model(base.path, "float32", adapter=result.product.path).training is False
