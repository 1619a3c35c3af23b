"""The stage from data product to adapter, interruptions included."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lib.errors import InputError
from lib.runs import machine, manifest
from lib.stages.finetune import checkpoints as finetune_checkpoints
from lib.stages.finetune.stage import finetune
from lib.stages.finetune.trainer import AnswerTrainer
from tests.stages.finetune.conftest import die_after, make_data, tiny_settings


def weights(folder) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter_model.safetensors")


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def untimed(history: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in history]


def test_finished_training_is_described_and_skipped(runs) -> None:
    result = finetune(tiny_settings(), runs("straight"))
    assert not result.product.made
    assert result.steps == 8 and result.resumed_from is None
    assert result.method == "LoRA r=4, alpha=32 on 7 linear layers"
    # r × (inputs + outputs) of q, k, v, o, gate, up, down: hidden 64, key/value 32, intermediate 64
    assert result.trainable == 4 * (128 + 96 + 96 + 128 + 128 + 128 + 128)
    assert 0 < result.trainable_share < 0.2
    tensors = weights(result.product.path)
    assert len(tensors) == 14 and all(tensor.dtype == np.float32 for tensor in tensors.values())
    assert all(tensor.any() for tensor in tensors.values())
    losses = [row["loss"] for row in result.history if "loss" in row]
    assert len(losses) == 8 and losses[-1] < losses[0]
    judged = {row["step"]: row["eval_loss"] for row in result.history if "eval_loss" in row}
    assert len([row for row in result.history if "eval_loss" in row]) == 4 and sorted(judged) == [2, 4, 6, 8]
    assert judged[result.chosen_step] == min(judged.values())
    assert same(tensors, weights(result.product.path / "checkpoints" / f"checkpoint-{result.chosen_step}"))
    assert "validation loss" in (result.product.path / "training.log").read_text()
    assert result.throughput > 0 and result.estimate["total"] > 0 and result.advice == []
    assert not list(result.product.path.rglob("training_args.bin"))


def test_training_again_gives_the_same_weights_and_prints_nothing_odd(runs, capfd) -> None:
    result = finetune(tiny_settings(), runs("fresh"))
    printed = capfd.readouterr()
    assert printed.out == ""
    assert all(line.startswith(("tokenizing", "fine-tuning")) for line in printed.err.splitlines())
    assert same(weights(result.product.path), weights(runs("straight").folder / "adapter"))


def test_interrupted_training_ends_as_if_it_had_not_been(runs) -> None:
    assert "adapter" not in runs("broken").manifest.entries()
    result, expected = finetune(tiny_settings(), runs("broken")), finetune(tiny_settings(), runs("straight"))
    assert result.resumed_from == 6
    assert same(weights(result.product.path), weights(expected.product.path))
    last = "checkpoints/checkpoint-8"
    assert same(weights(result.product.path / last), weights(expected.product.path / last))
    assert untimed(result.history) == untimed(expected.history)


@pytest.mark.parametrize(
    "damage", ["truncated optimizer", "no rng", "no record", "flipped bit", "empty folder", "staged only"]
)
def test_damaged_newest_checkpoint_is_passed_over(runs, damage: str) -> None:
    run = runs("broken")
    folder = run.folder / ".adapter.part" / "checkpoints"
    newest = folder / "checkpoint-6"
    if damage == "truncated optimizer":
        content = (newest / "optimizer.pt").read_bytes()
        (newest / "optimizer.pt").write_bytes(content[: len(content) // 2])
    elif damage == "no rng":
        (newest / "rng_state.pth").unlink()
    elif damage == "no record":
        (newest / finetune_checkpoints.RECORD).unlink()
    elif damage == "flipped bit":
        content = bytearray((newest / "adapter_model.safetensors").read_bytes())
        content[-1] ^= 1
        (newest / "adapter_model.safetensors").write_bytes(content)
    elif damage == "empty folder":
        (folder / "checkpoint-7").mkdir()
    else:
        shutil.copytree(newest, folder / ".staged" / "checkpoint-7")
    result = finetune(tiny_settings(), run)
    assert result.resumed_from == (6 if damage in ("empty folder", "staged only") else 4)
    assert len(result.messages) == (0 if damage == "staged only" else 1)
    assert same(weights(result.product.path), weights(runs("straight").folder / "adapter"))


def test_other_parameters_start_afresh(runs) -> None:
    assert finetune(tiny_settings(lora_r=2), runs("broken")).resumed_from is None


@pytest.mark.parametrize(
    ("changes", "now", "words"),
    [
        (
            {"dtype": "auto"},
            {"compute_dtype": lambda _: ("bfloat16", "here")},
            "float32 on cpu, and now it is bfloat16",
        ),
        ({}, {}, "bfloat16 on cpu over a base in 4 bits, and now it is float32 on cpu"),
        ({}, {}, "unknown number format"),
    ],
)
def test_another_number_format_starts_afresh_and_says_so(runs, monkeypatch, changes, now, words: str) -> None:
    """The machine changed under the same parameters: the record must be true of all updates."""
    run = runs("broken")
    record = run.folder / ".adapter.part" / "checkpoints" / finetune_checkpoints.ARITHMETIC_RECORD
    assert json.loads(record.read_text()) == {"dtype": "float32", "in_4bit": False, "device": "cpu"}
    request = record.parents[1] / manifest.NOTE
    request.write_text(
        request.read_text().replace('"dtype": "float32"', f'"dtype": "{changes.get("dtype", "float32")}"')
    )
    if "4 bits" in words:
        record.write_text('{"dtype": "bfloat16", "in_4bit": true, "device": "cpu"}')
    elif "unknown" in words:
        record.write_text("[]")
    for name, function in now.items():
        monkeypatch.setattr(machine, name, function)
    result = finetune(tiny_settings(**changes), run)
    assert result.resumed_from is None and words in result.messages[0]
    assert words in (result.product.path / "training.log").read_text()
    if not now:
        assert same(weights(result.product.path), weights(runs("straight").folder / "adapter"))


def test_accumulation_gives_the_same_updates(runs) -> None:
    results = []
    for name, batch, parts in (("fresh", 16, 1), ("straight", 4, 4)):
        changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": parts, "lora_dropout": 0.0}
        results.append(finetune(tiny_settings(**changes, num_train_epochs=1.0), runs(name)))
    for key, value in weights(results[0].product.path).items():
        np.testing.assert_allclose(value, weights(results[1].product.path)[key], atol=2e-4)
    first, second = ([row["eval_loss"] for row in one.history if "eval_loss" in row] for one in results)
    assert first == pytest.approx(second, abs=1e-4)


@pytest.mark.parametrize(("learning_rate", "learns"), [(5e-3, True), (1e-60, False)])
def test_a_single_update_changes_the_weights_or_a_note_says_that_it_did_not(runs, learning_rate, learns) -> None:
    run = runs("one")
    make_data(run, train=4, validation=4)
    one = {"per_device_train_batch_size": 4, "num_train_epochs": 1.0, "learning_rate": learning_rate}
    result = finetune(tiny_settings(**one), run)
    assert result.steps == 1 and any("adapter is zero" in note for note in result.notes) != learns
    tensors = weights(result.product.path)
    assert all(tensors[name].any() for name in tensors if "lora_A" in name or learns)


def test_diverging_training_is_refused_and_leaves_no_product(runs, monkeypatch: pytest.MonkeyPatch) -> None:
    original = AnswerTrainer.compute_loss
    monkeypatch.setattr(AnswerTrainer, "compute_loss", lambda *a, **k: original(*a, **k) * math.nan)
    with pytest.raises(InputError, match="learning_rate"):
        finetune(tiny_settings(), runs("fresh"))
    assert "adapter" not in runs("fresh").manifest.entries()


@pytest.mark.parametrize("targets", ["lm_head", "q_proj, embed_tokens", "no_such_layer", "q_proj,no_such_layer"])
def test_unusable_target_modules_are_refused(runs, targets: str) -> None:
    with pytest.raises(InputError, match="target_modules"):
        finetune(tiny_settings(target_modules=targets), runs("fresh"))


def test_training_that_cannot_fit_is_refused(runs, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    class Small:
        total = 1 << 20

    monkeypatch.setattr(psutil, "virtual_memory", Small)
    monkeypatch.setattr("lib.runs.machine.available_memory", lambda: 1 << 20)
    with pytest.raises(InputError, match="per_device_train_batch_size: 1 with gradient_accumulation_steps: 16"):
        finetune(tiny_settings(), runs("fresh"))


def test_lora_with_a_note_where_four_bits_do_not_work(runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.runs.machine.bitsandbytes_problem", lambda: "not on this machine")
    run = runs("fresh")
    result = finetune(tiny_settings(load_in_4bit=True, dtype="auto", num_train_epochs=0.5), run)
    assert result.method.startswith("LoRA ")
    assert any("not on this machine" in note for note in result.notes) and result.notes == run.stamps()


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_four_bits_where_they_work(runs, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Computed in what the parameters say, for a device without bfloat16 too."""
    if problem := machine.bitsandbytes_problem():
        pytest.skip(problem)
    seen, original = set(), AnswerTrainer.compute_loss

    def compute(self, model, *arguments, **options):
        seen.update(m.compute_dtype for m in model.modules() if hasattr(m, "compute_dtype"))
        return original(self, model, *arguments, **options)

    monkeypatch.setattr(AnswerTrainer, "compute_loss", compute)
    result = finetune(tiny_settings(load_in_4bit=True, dtype=dtype, num_train_epochs=0.5), runs("fresh"))
    assert result.dtype == machine.compute_dtype(dtype)[0] and [f"torch.{result.dtype}"] == [str(d) for d in seen]
    assert result.method.startswith("QLoRA") and result.product.entry.facts["method"] == "QLoRA"
    assert result.total - result.trainable == 512 * 64 + 64 * 64 * 2 + 64 * 32 * 2 + 64 * 64 * 3 + 64 + 64 + 3 * 64


def test_adapter_names_its_base_and_can_be_loaded(runs) -> None:
    from lib.models.loading import load_model

    folder = runs("straight").folder / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert load_model(Path(config["base_model_name_or_path"]), "float32", adapter=folder).training is False


def test_death_at_once_leaves_no_product(runs, monkeypatch: pytest.MonkeyPatch) -> None:
    die_after(0, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny_settings(), runs("fresh"))
    assert "adapter" not in runs("fresh").manifest.entries()


def test_the_machine_is_sampled_into_product_and_manifest(runs) -> None:
    result = finetune(tiny_settings(), runs("straight"))
    assert result.samples and all(sample["rss_mib"] > 0 for sample in result.samples)
    found = result.product.entry.facts["resources"]
    assert found["samples"] == len(result.samples)
    assert found["rss_mib_max"] == max(sample["rss_mib"] for sample in result.samples)
    assert not list(result.product.path.glob("*.live"))


def test_four_bits_with_conversations(runs) -> None:
    """QLoRA where the loss stands on several answers of a row: every tensor is trained, the validation loss falls."""
    from lib.models import offline_base
    from lib.prompts.tasks import ConversationTask
    from lib.runs.files import write_json, write_jsonl
    from tests.stages.finetune.conftest import rows

    if problem := machine.bitsandbytes_problem():
        pytest.skip(problem)
    task, run = ConversationTask("dialogue", "你是助手。", 128), runs("talk")

    def talk(row: dict) -> dict:
        turns = [("user", row["text"]), ("assistant", "很满意。"), ("user", "为什么？"), ("assistant", "因为服务好。")]
        return {"id": row["id"], "messages": [{"role": role, "content": text} for role, text in turns]}

    def build(work) -> None:
        made = {name: [talk(row) for row in rows(24, seed, name)] for seed, name in enumerate(("train", "validation"))}
        for name, content in made.items():
            write_jsonl(work.folder / f"{name}.jsonl", content)
        write_json(work.folder / "task.json", task.to_json())
        (work.folder / "tokenizer").mkdir()
        texts = [message["content"] for row in made["train"] for message in row["messages"]]
        offline_base.train_tokenizer(
            texts, ["你是助手。"], work.folder / "tokenizer", offline_base.TokenizerRecipe(512)
        )
        work.facts |= {"base_model": "offline", "base_revision": "", "offline_base": True}

    run.produce("data", build, {})
    settings = tiny_settings(
        task="dialogue", system_prompt="", dataset="talks.jsonl", load_in_4bit=True, dtype="auto", save_steps=1
    )
    result = finetune(settings, run)
    assert result.method.startswith("QLoRA (NF4)") and result.product.entry.facts["method"] == "QLoRA"
    losses = [row["eval_loss"] for row in result.history if "eval_loss" in row]
    assert len(losses) == result.steps == 4 and losses[-1] < losses[0]
    assert all(value.any() and np.isfinite(value).all() for value in weights(result.product.path).values())
