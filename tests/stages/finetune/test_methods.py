"""Ways of training that peft and transformers have: each trains, resumes exactly and merges as peft merges."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.neftune import activate_neftune

from lib.errors import InputError
from lib.models.base_model import base_of
from lib.models.loading import load_model, load_tokenizer
from lib.models.merge_plan import plan_merge
from lib.prompts.tasks import read_task
from lib.runs.files import read_json, read_jsonl
from lib.runs.machine import bitsandbytes_problem
from lib.settings import yaml_value
from lib.stages.finetune.batches import Collator
from lib.stages.finetune.layout import answer_loss, choose_layout
from lib.stages.finetune.lora_init import TakenOut
from lib.stages.finetune.memory import advice, estimate
from lib.stages.finetune.session import _new_model
from lib.stages.finetune.stage import finetune, made_with
from lib.stages.finetune.trainer import AnswerTrainer, training_arguments
from lib.stages.merge.nf4 import dequantize_base
from lib.stages.merge.proof import prove_merge
from lib.stages.merge.stage import merge
from lib.stages.merge.weights import merge_folders
from tests.stages.finetune.conftest import interrupted, make_data, tiny_settings

ONE = {"per_device_train_batch_size": 4, "num_train_epochs": 1.0, "warmup_steps": 0.0}
"""A single update of four rows."""


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter_model.safetensors")


def test_weights_decay_and_long_gradients_are_cut(runs, tmp_path: Path) -> None:
    """One update: AdamW takes lr · decay · A off A beside its step; a gradient of no length moves nothing."""
    found = {}
    for name, changes in {"plain": {}, "decayed": {"weight_decay": 0.5}, "cut": {"max_grad_norm": 1e-14}}.items():
        run = runs(name)
        make_data(run, train=4, validation=4)
        settings = tiny_settings(**ONE, **changes)
        found[name] = weights(finetune(settings, run).product.path)
    begun = {name: p.detach().numpy() for name, p in _new_model(base_of(run), settings, "float32").named_parameters()}
    rate = settings.learning_rate
    for name, plain in found["plain"].items():
        first = begun[name.replace(".weight", ".default.weight")]
        np.testing.assert_allclose(plain - found["decayed"][name], 0.5 * rate * first, atol=1e-8)
        moved = "lora_B" in name  # the gradient of A is 0 while B is
        assert np.abs(found["cut"][name] - first).max() < 1e-4 * rate
        assert (np.abs(plain - first).max() > 1e-4 * rate) == moved
    assert training_arguments(tmp_path, 8, tiny_settings(max_grad_norm=0.0)).max_grad_norm == math.inf


def test_older_trainings_stay_what_they_are(runs) -> None:
    """Keys that came later are named where they are not the default: nothing is trained anew for their sake."""
    entry = finetune(tiny_settings(), runs("straight")).product.entry
    assert "weight_decay" not in entry.parameters and made_with(entry.parameters)["weight_decay"] == 0.0
    assert not runs("straight").is_current("adapter", entry.parameters | {"weight_decay": 0.1}, ("data",))


METHODS: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "Gaussian": {"init_lora_weights": "gaussian"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "fast PiSSA": {"init_lora_weights": "pissa_niter_16", "use_rslora": True},
    "OLoRA": {"init_lora_weights": "olora"},
    "PiSSA with DoRA": {"init_lora_weights": "pissa", "use_dora": True},
    "NEFTune": {"neftune_noise_alpha": 5.0},
    "LoRA+": {"loraplus_lr_ratio": 4.0, "weight_decay": 0.01},
}
"""Settings of every way of training an adapter, by its name."""


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[AnswerTrainer]:
    """The trainers that were made, the last one last."""
    made: list[AnswerTrainer] = []
    original = AnswerTrainer.__init__

    def keep(self, *arguments, **options) -> None:
        original(self, *arguments, **options)
        made.append(self)

    monkeypatch.setattr(AnswerTrainer, "__init__", keep)
    return made


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What peft makes of both, with nothing of the workbook."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_is_merged_as_peft_merges_it_and_answers_as_it_was_trained(
    method: str, runs, tmp_path: Path, trainers: list[AnswerTrainer]
) -> None:
    run, changes = runs("fresh"), METHODS[method]
    result, base = finetune(tiny_settings(num_train_epochs=1.0, save_steps=4, **changes), run), base_of(run).path
    assert all(f"{key}: {yaml_value(changes[key])}" in result.method for key in changes.keys() - {"weight_decay"})
    chosen = result.product.path / "checkpoints" / f"checkpoint-{result.chosen_step}"
    for name, adapter in {"product": result.product.path, "checkpoint": chosen}.items():
        report = merge_folders(base, adapter, tmp_path / name)
        assert report.tensors_changed == 7
        prove_merge(base, adapter, tmp_path / name)
        found, expected = load_torch(tmp_path / name / "model.safetensors"), merged_by_peft(base, adapter)
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    merge_folders(base, result.product.path, tmp_path / "wide", "float32")
    trained = trainers[-1].model.eval()
    trainers[-1]._load_from_checkpoint(str(chosen))
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    with torch.no_grad():
        own = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.float32)(ids).logits
        torch.testing.assert_close(own, trained(input_ids=ids).logits, rtol=0, atol=1e-4)
        assert (own - AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("method", [*METHODS, "LoftQ"])
def test_an_interrupted_training_ends_as_if_it_had_not_been(method: str, runs, monkeypatch) -> None:
    if method == "LoftQ" and (problem := bitsandbytes_problem()):
        pytest.skip(problem)
    settings = tiny_settings(**METHODS.get(method, LOFTQ))
    expected = finetune(settings, runs("fresh"))
    shutil.copytree(runs("fresh").folder / "data", runs("again").folder / "data")
    (runs("again").folder / "manifest.json").write_text((runs("broken").folder / "manifest.json").read_text())
    interrupted(settings, runs("again"))
    result = finetune(settings, runs("again"))
    assert result.resumed_from == 6
    for name, tensor in weights(result.product.path).items():
        assert np.array_equal(tensor, weights(expected.product.path)[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_that_of_transformers_and_peft(method: str, runs) -> None:
    """Loss and gradients at the answers alone, packed, beside the model's own loss of padded rows."""
    run = runs("fresh")
    settings = tiny_settings(lora_dropout=0.0, **METHODS[method])
    data = run.require("data").path
    task, tokenizer = read_task(data), load_tokenizer(data / "tokenizer")
    rows = [task.encode(tokenizer, row) for row in read_jsonl(data / "train.jsonl")[:6]]
    model = _new_model(base_of(run), settings, "float32")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    alpha = settings.neftune_noise_alpha
    collate, layout = choose_layout(model, rows, 0, "of the noise" if alpha else None)
    assert layout == "padded to the longest of like length (of the noise)" if alpha else layout.startswith("packed")
    if alpha:
        activate_neftune(model, alpha)
    padded = Collator(0)(rows)
    torch.manual_seed(7)
    plain = model(**{key: padded[key] for key in ("input_ids", "attention_mask", "labels")}).loss
    plain.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.manual_seed(7)
    total, count = answer_loss(model, collate(rows))
    (total / count).backward()
    assert abs(total.item() / count - plain.item()) < 1e-5
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"init_lora_weights": "olora", "use_rslora": True}])
def test_what_is_stored_is_what_peft_converts(changes: dict[str, Any], runs, tmp_path: Path) -> None:
    model = _new_model(base_of(runs("fresh")), tiny_settings(**{"init_lora_weights": "pissa", **changes}), "float32")
    taken = TakenOut.of(model)
    model.save_pretrained(tmp_path / "initial")
    for parameter in taken.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "own")
    taken.store(tmp_path / "own")
    model.save_pretrained(tmp_path / "peft", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    own, theirs = ({**weights(tmp_path / name)} for name in ("own", "peft"))
    assert own.keys() == theirs.keys() and all(np.array_equal(own[name], theirs[name]) for name in own)
    keys = ("r", "lora_alpha", "init_lora_weights", "use_rslora")
    configs = [read_json(tmp_path / name / "adapter_config.json") for name in ("own", "peft")]
    assert [configs[0][key] for key in keys] == [configs[1][key] for key in keys] and configs[0]["r"] == 8


def test_checkpoints_of_another_pair_are_not_gone_on_from(runs, monkeypatch) -> None:
    settings = tiny_settings(init_lora_weights="pissa")
    interrupted(settings, runs("fresh"))
    monkeypatch.setattr(TakenOut, "same", lambda *_: False)  # as on a machine whose decomposition differs
    result = finetune(settings, runs("fresh"))
    assert result.resumed_from is None and "another part of the base" in result.messages[0]


def test_a_rank_beyond_the_smallest_layer_has_no_beginning(runs) -> None:
    with pytest.raises(InputError, match="lora_r: 64, and a layer has rank 32"):
        finetune(tiny_settings(init_lora_weights="pissa", lora_r=64), runs("fresh"))


def test_with_lora_plus_b_learns_so_many_times_as_fast(runs, trainers: list[AnswerTrainer]) -> None:
    """Of one update, in which A has no gradient: AdamW's first step is the learning rate wherever there is one."""
    found = {}
    for ratio in (0.0, 4.0):
        run = runs(f"ratio-{ratio:.0f}")
        make_data(run, train=4, validation=4)
        found[ratio] = weights(finetune(tiny_settings(**ONE, loraplus_lr_ratio=ratio), run).product.path)
    rates = {group["lr"] / group["initial_lr"] for group in trainers[-1].optimizer.param_groups}
    assert len(rates) == 1, "one schedule for all"
    for name in found[0.0]:
        times = 4 if "lora_B" in name else 1
        np.testing.assert_allclose(found[4.0][name], times * found[0.0][name], rtol=1e-5)


def test_noise_on_embeddings_is_drawn_while_training_alone(runs, trainers: list[AnswerTrainer]) -> None:
    result = finetune(tiny_settings(neftune_noise_alpha=5.0), runs("fresh"))
    assert "(the noise of NEFTune" in result.layout
    first = next(row["loss"] for row in result.history if "loss" in row)
    plain = finetune(tiny_settings(), runs("straight"))
    assert plain.layout.startswith("packed") and first != pytest.approx(plain.history[0]["loss"], abs=1e-4)
    trainer = trainers[-1]
    trainer._load_from_checkpoint(str(result.product.path / "checkpoints" / f"checkpoint-{result.chosen_step}"))
    judged = {row["step"]: row["eval_loss"] for row in result.history if "eval_loss" in row}
    assert trainer._validation_loss() == judged[result.chosen_step]


WHOLE = {"finetuning_type": "full", "learning_rate": 1e-3}


def test_every_weight_is_trained_and_taken_over(runs, tmp_path: Path, trainers: list[AnswerTrainer]) -> None:
    """Adapter and merge in one: the trained float32 weights, rounded once into the base's format."""
    run = runs("fresh")
    result, base = finetune(tiny_settings(**WHOLE), run), base_of(run).path
    assert result.whole and result.method == "full" and result.trainable_share == 1.0 and run.whole
    assert "lora_r" not in result.product.entry.parameters
    trained = load_torch(result.product.path / "model.safetensors")
    before = load_torch(base / "model.safetensors")
    assert trained.keys() == before.keys() and all(t.dtype == torch.float32 for t in trained.values())
    assert all((t != before[name].float()).any() for name, t in trained.items())
    merged = merge(tiny_settings(), run)
    found = load_torch(merged.product.path / "model.safetensors")
    assert all(torch.equal(found[name], t.to(before[name].dtype)) for name, t in trained.items())
    assert merged.whole and merged.proof.weights_summed == 0 and merged.report.tensors_changed == len(trained)
    assert merged.check.effect_kld > 10 * merged.check.mean_kld
    trainers[-1]._load_from_checkpoint(str(result.product.path / "checkpoints" / f"checkpoint-{result.chosen_step}"))
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    with torch.no_grad():
        own = AutoModelForCausalLM.from_pretrained(result.product.path, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(own, trainers[-1].model.eval()(input_ids=ids).logits, rtol=0, atol=1e-4)


def test_an_interrupted_training_of_every_weight_ends_as_if_it_had_not_been(runs, monkeypatch) -> None:
    expected = load_torch(finetune(tiny_settings(**WHOLE), runs("straight")).product.path / "model.safetensors")
    interrupted(tiny_settings(**WHOLE), runs("fresh"))
    result = finetune(tiny_settings(**WHOLE), runs("fresh"))
    assert result.resumed_from == 6
    found = load_torch(result.product.path / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_of_a_whole_model_is_that_of_transformers(dtype: str, runs) -> None:
    run = runs("fresh")
    data = run.require("data").path
    task, tokenizer = read_task(data), load_tokenizer(data / "tokenizer")
    rows = [task.encode(tokenizer, row) for row in read_jsonl(data / "train.jsonl")[:6]]
    model = _new_model(base_of(run), tiny_settings(**WHOLE), dtype)
    assert next(model.parameters()).dtype == torch.float32
    padded = Collator(0)(rows)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        plain = model(**{key: padded[key] for key in ("input_ids", "attention_mask", "labels")}).loss
    plain.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    collate, layout = choose_layout(model, rows, 0)
    assert layout.startswith("packed")
    total, count = answer_loss(model, collate(rows))
    (total / count).backward()
    assert abs(total.item() / count - plain.item()) < (1e-5 if dtype == "float32" else 2e-2)
    for name, parameter in model.named_parameters():
        if dtype == "float32":
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


def test_another_model_is_not_taken_for_the_trained_one(runs, tmp_path: Path) -> None:
    base = base_of(runs("fresh")).path
    tensors = load_torch(base / "model.safetensors")
    other = shutil.copytree(base, tmp_path / "other")
    save_file({n: t for n, t in tensors.items() if "norm" not in n}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="differ in"):
        plan_merge(base, other)


@pytest.mark.parametrize("method", ["DoRA", "LoRA+"])
def test_variants_over_a_base_in_4_bits(method: str, runs, tmp_path: Path) -> None:
    """Trained on NF4, merged into the weights of the base as peft merges it."""
    if problem := bitsandbytes_problem():
        pytest.skip(problem)
    run, changes = runs("fresh"), {"load_in_4bit": True, "dtype": "auto", "num_train_epochs": 1.0, "save_steps": 4}
    result, base = finetune(tiny_settings(**changes, **METHODS[method]), run), base_of(run).path
    assert result.method.startswith("QLoRA (NF4)") and result.product.entry.facts["method"] == "QLoRA"
    merge_folders(base, result.product.path, tmp_path / "merged")
    found, expected = load_torch(tmp_path / "merged" / "model.safetensors"), merged_by_peft(base, result.product.path)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


LOFTQ = {"load_in_4bit": True, "dtype": "auto", "init_lora_weights": "loftq", "merge_base": "dequantized"}


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True, "lora_alpha": 3}, {"use_dora": True}])
def test_loftq_begins_with_what_4_bits_took(changes: dict[str, Any], runs) -> None:
    """s·B·A is the best of its rank for W − Q, by the theorem of Eckart and Young; and trains on from there."""
    if problem := bitsandbytes_problem():
        pytest.skip(problem)
    import bitsandbytes as bnb

    base = base_of(runs("fresh"))
    model, wide = (
        _new_model(base, tiny_settings(**LOFTQ, **changes), "float32"),
        load_torch(base.path / "model.safetensors"),
    )
    layers = {name: m for name, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    for name, layer in layers.items():
        rounded = layer.get_base_layer().weight
        lost = (
            wide[f"{name}.weight"].float() - bnb.functional.dequantize_4bit(rounded.data, rounded.quant_state).float()
        )
        rest = lost - layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        tail = np.linalg.svd(lost.numpy(), compute_uv=False)[4:]
        assert rest.norm().item() == pytest.approx(math.sqrt((tail**2).sum()), rel=1e-4)
        if changes.get("use_dora"):
            told = layer.lora_magnitude_vector["default"].weight
            torch.testing.assert_close(told, (wide[f"{name}.weight"].float() - rest).norm(dim=1), rtol=1e-2, atol=1e-3)
    assert len(layers) == 7


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}])
def test_loftq_is_merged_into_the_rounded_base_alone(changes: dict[str, Any], runs, tmp_path: Path, trainers) -> None:
    if problem := bitsandbytes_problem():
        pytest.skip(problem)
    run, settings = (
        runs("fresh"),
        tiny_settings(**LOFTQ | {"dtype": "float32"}, num_train_epochs=1.0, save_steps=4, **changes),
    )
    result, base = finetune(settings, run), base_of(run).path
    assert 'init_lora_weights: "loftq"' in result.method
    with pytest.raises(InputError, match="belongs to a base rounded to 4 bits"):
        merge_folders(base, result.product.path, tmp_path / "refused")
    with pytest.raises(InputError, match="makes up for a rounding"):
        merge(tiny_settings(), run)
    merged = merge(settings, run)
    assert merged.nf4 is None and merged.merge_base == "dequantized"
    rounded = dequantize_base(base, tmp_path / "rounded")
    found, expected = (
        load_torch(merged.product.path / "model.safetensors"),
        merged_by_peft(rounded, result.product.path),
    )
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    again = load_model(base, dtype="float32", load_in_4bit=True, adapter=result.product.path)
    trainers[-1]._load_from_checkpoint(str(result.product.path / "checkpoints" / f"checkpoint-{result.chosen_step}"))
    with torch.no_grad():  # as peft loads it over the base in 4 bits
        torch.testing.assert_close(
            again(ids).logits, trainers[-1].model.eval()(input_ids=ids).logits, rtol=0, atol=1e-4
        )


def test_loftq_without_4_bit_layers_is_refused_before_the_training(runs, monkeypatch) -> None:
    monkeypatch.setattr("lib.runs.machine.bitsandbytes_problem", lambda: "none here")
    with pytest.raises(InputError, match="4-bit layers do not work here"):
        finetune(tiny_settings(**LOFTQ), runs("fresh"))


QAT = {**WHOLE, "qat": "int4"}


def in_steps(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in steps of each 32 weights, of which the largest is 7.5, and the steps: in float32, by the inverse of
    the step, which decides whether 7.5 is rounded to 7 or 8."""
    groups = weight.detach().float().reshape(-1, 32)
    step = groups.abs().amax(-1, keepdim=True) / 7.5
    return groups * (1 / step), step


def as_int4(weight: torch.Tensor) -> torch.Tensor:
    """A matrix as torchao's symmetric int4 rounds it: −8 to 7 are there."""
    steps, step = in_steps(weight)
    return (steps.round().clamp(-8, 7) * step).reshape(weight.shape)


def test_matrices_are_rounded_on_their_way_through_the_model(runs) -> None:
    """The loss is that of the rounded model, and a matrix gets the gradient that the rounded one would get, but none
    where a weight of 7.5 steps was cut to 7."""
    run = runs("fresh")
    data = run.require("data").path
    task, tokenizer = read_task(data), load_tokenizer(data / "tokenizer")
    rows = [task.encode(tokenizer, row) for row in read_jsonl(data / "train.jsonl")[:6]]
    model, rounded = (_new_model(base_of(run), tiny_settings(**changes), "float32") for changes in (QAT, WHOLE))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    matrices = [name for name, p in rounded.named_parameters() if p.dim() == 2 and "embed" not in name]
    assert len(matrices) == 7
    for name, parameter in rounded.named_parameters():
        if name in matrices:
            parameter.data = as_int4(parameter)
    for each in (model, rounded):
        total, count = answer_loss(each, choose_layout(each, rows, 0)[0](rows))
        (total / count).backward()
        each.total = total.item()
    assert model.total == pytest.approx(rounded.total, rel=1e-4)
    found, expected = (dict(each.named_parameters()) for each in (model, rounded))
    for name in found:
        gradient = expected[name].grad
        if name in matrices:
            cut = in_steps(before[name])[0].round() > 7
            gradient = gradient.masked_fill(cut.reshape(gradient.shape), 0)
        torch.testing.assert_close(found[name].grad, gradient, rtol=5e-3, atol=1e-4)
        assert torch.equal(found[name], before[name])


def test_a_model_trained_rounded_is_stored_as_it_was_before_the_rounding(runs, monkeypatch) -> None:
    """Stored and continued exactly; the loss that a checkpoint is chosen by is the rounded model's."""
    expected = finetune(tiny_settings(**QAT), runs("straight"))
    assert expected.method == 'full (qat: "int4")' and expected.product.entry.parameters["qat"] == "int4"
    interrupted(tiny_settings(**QAT), runs("fresh"))
    result = finetune(tiny_settings(**QAT), runs("fresh"))
    assert result.resumed_from == 6
    first, second = (load_torch(each.product.path / "model.safetensors") for each in (expected, result))
    base = load_torch(base_of(runs("fresh")).path / "model.safetensors")
    assert first.keys() == base.keys() and all(torch.equal(t, second[name]) for name, t in first.items())
    matrix = first["model.layers.0.mlp.up_proj.weight"]
    assert (matrix - as_int4(matrix)).abs().max() > 1e-3
    merged = load_torch(merge(tiny_settings(), runs("fresh")).product.path / "model.safetensors")
    assert all(torch.equal(merged[name], t.to(base[name].dtype)) for name, t in second.items())


def test_rows_that_are_no_whole_groups_are_not_rounded(runs, monkeypatch) -> None:
    monkeypatch.setattr("lib.stages.finetune.layout.GROUP", 48)
    with pytest.raises(InputError, match="64 weights, which are no whole number of groups of 48"):
        finetune(tiny_settings(**QAT), runs("fresh"))


def test_the_memory_of_a_whole_model_is_reckoned_with(runs) -> None:
    whole, lora = (tiny_settings(finetuning_type=kind, dtype="float32") for kind in ("full", "lora"))
    models = [_new_model(base_of(runs("fresh")), settings, "float32") for settings in (whole, lora)]
    found, usual = (estimate(model, asked, 40, 4) for model, asked in zip(models, (whole, lora), strict=True))
    total = sum(p.numel() for p in models[0].parameters())
    assert found["weights"] == usual["weights"] == 4 * total and found["adapter"] == 0
    assert found["gradients"] == 4 * total and found["optimizer"] == 8 * total
    half = estimate(models[0], whole.model_copy(update={"dtype": "bfloat16"}), 40, 4)
    assert half["weights"] == 6 * total, "the trained weights, and a copy for the products"
    assert "finetuning_type: lora" in advice(2 * total, total, whole, True)
