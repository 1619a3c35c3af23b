"""What rounding costs is measured and refused where it spoils the adapter; the stage publishes only what passed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lib.errors import InputError
from lib.progress import PROGRESS_FILE_VARIABLE
from lib.report import weights_page
from lib.report.display import rows_of
from lib.runs.run import Run
from lib.scoring.perplexity import kl_divergence
from lib.settings import Settings
from lib.stages.merge.proof import prove_merge
from lib.stages.merge.stage import merge
from lib.stages.merge.verify import KLD_FLOOR, KLD_SHARE, FormatCost, MergeCheck, _Reference, _refuse, check_merge
from lib.stages.merge.weights import merge_folders
from tests import tiny_run

pytestmark = pytest.mark.usefixtures("forked_children")


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("merge")
    tiny_run.make_base(folder / "base", request.param)
    tiny_run.make_adapter(folder / "base", folder / "adapter")
    merge_folders(folder / "base", folder / "adapter", folder / "merged")
    return folder, request.param


PROMPTS = [[3 + (7 * i * k) % 400 for i in range(20)] for k in range(1, 7)]


@pytest.fixture(scope="module")
def right(merged: tuple[Path, str]) -> MergeCheck:
    """The check of the right merge."""
    folder, dtype = merged
    return check_merge(folder / "base", folder / "adapter", folder / "merged", PROMPTS, dtype)


def test_right_merge_passes(right: MergeCheck) -> None:
    check, dtype = right, right.dtype
    assert check.positions == 48
    assert check.max_abs_log_prob < (1e-4 if dtype == "float32" else 0.2)
    assert check.argmax_agreement > 0.9
    assert check.effect_kld > 100 * check.mean_kld  # the adapter does something, and merging keeps it


@pytest.mark.parametrize("mistake", ["not merged", "twice", "half", "transposed", "one tensor"])
def test_wrong_merge_is_refused(merged: tuple[Path, str], mistake: str, tmp_path: Path) -> None:
    """By the proof always, by its answers where the mistake is a large one."""
    folder, dtype = merged
    shutil.copytree(folder / "merged", tmp_path / "wrong")
    path = tmp_path / "wrong" / "model.safetensors"
    right, base = load_file(path), load_file(folder / "base" / "model.safetensors")
    wrong = {name: tensor.clone() for name, tensor in right.items()}
    for name in wrong:
        delta = right[name].float() - base[name].float()
        if mistake in ("not merged", "twice", "half"):
            factor = {"not merged": 0.0, "twice": 2.0, "half": 0.5}[mistake]
            wrong[name] = (base[name].float() + factor * delta).to(right[name].dtype)
        elif mistake == "transposed" and "q_proj.weight" in name:
            wrong[name] = (base[name].float() + delta.T).to(right[name].dtype).contiguous()
    if mistake == "one tensor":
        name = "model.layers.1.mlp.down_proj.weight"
        wrong[name] = base[name]
    save_file(wrong, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"is not base \+ adapter: \d of"):
        prove_merge(folder / "base", folder / "adapter", tmp_path / "wrong")
    if mistake in ("not merged", "twice", "half"):
        with pytest.raises(InputError, match=r"does not answer as base \+ adapter.*nats"):
            check_merge(folder / "base", folder / "adapter", tmp_path / "wrong", PROMPTS, dtype)


def distributions(model: torch.nn.Module) -> torch.Tensor:
    """Log-probabilities at the last eight positions of every prompt, by plain transformers; float64."""
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids])).logits[0, -8:].double().log_softmax(-1) for ids in PROMPTS])


def test_costs_agree_with_plain_transformers(merged: tuple[Path, str], right: MergeCheck) -> None:
    """Each format: peft's merge_and_unload of the float32 model, cast and widened again, its answers by torch."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    (folder, dtype), check = merged, right
    assert sorted(cost.dtype for cost in check.costs) == ["bfloat16", "float16", "float32"] and not check.left_out
    assert [cost.dtype for cost in check.costs if cost.written] == [dtype]

    def base() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)

    tuned = distributions(PeftModel.from_pretrained(base(), folder / "adapter"))
    effect = (tuned.exp() * (tuned - distributions(base()))).sum(-1).mean()
    assert check.effect_kld == pytest.approx(float(effect), rel=1e-4)
    for cost in check.costs:
        sums = PeftModel.from_pretrained(base(), folder / "adapter").merge_and_unload()
        state = {name: value.to(getattr(torch, cost.dtype)) for name, value in sums.state_dict().items()}
        rounded = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        rounded.load_state_dict(state)  # casting the module would round the rotary frequencies, too
        rounded = distributions(rounded)
        kld = (tuned.exp() * (tuned - rounded)).sum(-1)
        likely = torch.maximum(tuned, rounded) > np.log(1e-4)
        assert cost.mean_kld == pytest.approx(float(kld.mean()), rel=0.02, abs=2e-10)
        assert cost.max_abs_log_prob == pytest.approx(float((tuned - rounded)[likely].abs().max()), rel=0.02, abs=1e-5)
        same = tuned.argmax(-1) == rounded.argmax(-1)
        assert cost.argmax_agreement == float(same.double().mean())
        assert cost.answer_agreement == float(same[7::8].double().mean())
    by_name = {cost.dtype: cost.mean_kld for cost in check.costs}
    assert by_name["float32"] < by_name["float16"] < by_name["bfloat16"] / 10  # 3 bits more: 64 times in variance


def test_weights_beyond_float16_are_left_out(tmp_path: Path) -> None:
    tiny_run.make_base(tmp_path / "base", "bfloat16")
    path = tmp_path / "base" / "model.safetensors"
    stored = load_file(path)
    stored["model.layers.0.self_attn.k_proj.bias"][0] = 70_000.0
    save_file(stored, path, metadata={"format": "pt"})
    tiny_run.make_adapter(tmp_path / "base", tmp_path / "adapter")
    merge_folders(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    check = check_merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", PROMPTS, "bfloat16")
    assert list(check.left_out) == ["float16"] and [cost.dtype for cost in check.costs] == ["bfloat16", "float32"]
    assert "float16 was not measured: a weight is larger than 65,504." in weights_page.merge_reading(check)
    with pytest.raises(InputError, match="float16, which ends at 65,504"):
        merge_folders(tmp_path / "base", tmp_path / "adapter", tmp_path / "half", dtype="float16")


def test_formats_that_memory_does_not_allow_are_named(merged: tuple[Path, str], monkeypatch) -> None:
    folder, dtype = merged
    monkeypatch.setattr("lib.stages.merge.verify.affordable_dtype", lambda folder: "bfloat16")
    check = check_merge(folder / "base", folder / "adapter", folder / "merged", PROMPTS, dtype)
    assert check.computed_in == "bfloat16" and [cost.written for cost in check.costs] == [True]
    assert set(check.left_out) == {"float32", "float16", "bfloat16"} - {dtype}
    assert "do not fit into memory" in weights_page.merge_reading(check)


def test_a_model_with_large_logits_passes_where_fixed_limits_refused(tmp_path: Path) -> None:
    """Sharp distributions as trained models have them: rounding moves rare tokens by whole nats, and little is lost."""
    tiny_run.make_base(tmp_path / "base", "bfloat16")
    path = tmp_path / "base" / "model.safetensors"
    stored = load_file(path)
    stored["model.norm.weight"] *= 32  # log-probabilities of 40 nats and more
    save_file(stored, path, metadata={"format": "pt"})
    tiny_run.make_adapter(tmp_path / "base", tmp_path / "adapter")
    small = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    small = {name: tensor * (0.1 if "lora_B" in name else 1) for name, tensor in small.items()}
    save_file(small, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    merge_folders(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    prove_merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    check = check_merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", PROMPTS, "bfloat16")
    assert check.max_abs_log_prob > 0.25  # the old limit for bfloat16
    assert check.mean_kld > 2e-4 + 0.01 * check.effect_kld  # the other one
    assert check.mean_kld < KLD_SHARE * check.effect_kld


def checked(mean: float, effect: float, arithmetic: str = "float32", half: float = 1e-6) -> MergeCheck:
    """A check with these figures; float16 would cost `half`."""
    costs = [
        FormatCost(name, name == "bfloat16", kld, 0.1, 1.0, 1.0)
        for name, kld in (("bfloat16", mean), ("float32", 1e-12), ("float16", half))
    ]
    limit = max(KLD_FLOOR[arithmetic], KLD_SHARE * effect)
    return MergeCheck("bfloat16", arithmetic, 12, 96, 0.1, mean, 1.0, 1.0, effect, 0.5, limit, tuple(costs), {}, 0.0)


@pytest.mark.parametrize(
    ("mean", "effect", "arithmetic", "passes"),
    [
        (0.0028, 0.37, "float32", True),  # the real run
        (0.0369, 0.37, "float32", True),
        (0.0371, 0.37, "float32", False),
        (9e-4, 1e-5, "float32", True),  # an adapter that does nearly nothing
        (1.1e-3, 1e-5, "float32", False),
        (9e-3, 1e-5, "bfloat16", True),
        (1.1e-2, 1e-5, "bfloat16", False),
        (float("nan"), 0.37, "float32", False),
    ],
)
def test_the_limit_on_both_sides(mean: float, effect: float, arithmetic: str, passes: bool) -> None:
    check = checked(mean, effect, arithmetic)
    if passes:
        _refuse(check, Path("merged"))
        return
    with pytest.raises(InputError, match="set merge_dtype: float16, which would cost 1e-06 nats"):
        _refuse(check, Path("merged"))


def test_the_page_recommends_a_far_better_format() -> None:
    said = weights_page.merge_reading(checked(0.0028, 0.37, half=0.00007))
    assert "Rounding to bfloat16 costs 0.0028 nats, 0.76 % of the 0.37 nats" in said
    assert "float16, in the same bytes, would cost 40 times less (7e-05 nats): **set `merge_dtype: float16`**." in said
    assert "set `merge_dtype" not in weights_page.merge_reading(checked(0.0028, 0.37, half=0.0012))
    assert "too little to matter" in weights_page.merge_reading(checked(0.00028, 0.37, half=0.00007))
    assert "would cost 2.0 times more" in weights_page.merge_reading(checked(0.0028, 0.37, half=0.0056))
    table = weights_page.costs(checked(0.0028, 0.37))
    assert [row["number_format"].split(" ")[0] for row in table] == [
        "bfloat16",
        "float32",
        "float16",
        "the",
    ]
    assert table[0]["share_of_effect"] == pytest.approx(0.0028 / 0.37) and table[-1]["kld"] == 0.37


def test_kl_divergence_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5]]).log().numpy(), torch.tensor([[0.25, 0.75]]).log().numpy()
    assert kl_divergence(p, q)[0] == pytest.approx(0.5 * (0.6931472 - 0.4054651), abs=1e-6)  # ½ln2 + ½ln⅔
    assert kl_divergence(p, p)[0] == 0.0


def test_flat_distributions_are_compared_at_their_top() -> None:
    """An untrained model with a large vocabulary gives no token a probability above 1e-4."""
    flat = np.full((3, 20_000), -np.log(20_000.0), np.float32)
    other = flat.copy()
    other[:, 0] += 0.25
    cost = _Reference(flat, flat, np.array([2])).cost("float32", other)
    assert cost.max_abs_log_prob == pytest.approx(0.25)


def test_stage(home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_run.make_base(tmp_path / "base", "bfloat16")
    run = tiny_run.make_run(tmp_path / "base")
    result = merge(Settings(), run)
    assert result.product.made
    assert result.report.tensors_changed == 6
    assert result.check.prompts == 12
    assert result.proof.tensors_summed == 6 and result.proof.dtype == "BF16"
    assert f"All {result.report.parameters:,} weights were computed again" in weights_page.proof(result.proof)
    names = set(result.files)
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "README.md"} <= names
    assert not [path for path in result.product.path.iterdir() if path.name not in names]
    front = yaml.safe_load((result.product.path / "README.md").read_text().split("---\n")[1])
    assert front["language"] == "zh"
    assert "base_model" not in front  # a local folder is no hub model
    assert "not a result" in (result.product.path / "README.md").read_text()
    again = merge(Settings(), run)
    assert not again.product.made
    assert (again.report, again.proof, again.check) == (result.report, result.proof, result.check)
    card = (result.product.path / "README.md").read_text()
    assert f"{result.proof.weights_summed:,} summed" in card and "what rounding to bfloat16 costs" in card
    other = merge(Settings(merge_dtype="float16"), run)
    assert other.product.made and other.report.dtype == "float16" and other.proof.dtype == "F16"
    assert other.check.mean_kld < result.check.mean_kld / 10
    assert load_file(other.product.path / "model.safetensors")["model.norm.weight"].dtype == torch.float16
    assert ".part" not in (result.product.path / "merge.json").read_text()  # no temporary path


def test_stage_publishes_nothing_when_the_check_fails(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lib.stages.merge import weights as merge_weights

    tiny_run.make_base(tmp_path / "base")
    run = tiny_run.make_run(tmp_path / "base")
    right = merge_weights.apply_update
    monkeypatch.setattr(merge_weights, "apply_update", lambda weight, update, rows: right(weight, update, rows) * 1.1)
    with pytest.raises(InputError, match="is not base \\+ adapter: 6 of"):
        merge(Settings(), run)
    assert not (run.folder / "merged").exists()
    assert "merged" not in run.manifest.entries()


@pytest.fixture
def nf4_run(home: Path, tmp_path: Path) -> Run:
    from lib.runs.machine import bitsandbytes_problem

    if problem := bitsandbytes_problem():
        pytest.skip(problem)
    tiny_run.make_base(tmp_path / "base", "bfloat16")
    return tiny_run.make_run(tmp_path / "base", method="QLoRA")


def test_stage_measures_both_merges_against_the_trained_model(nf4_run: Run) -> None:
    result = merge(Settings(), nf4_run)
    assert result.nf4 is not None and result.merge_base == "original"
    trained, original, dequantized = result.nf4.results
    assert [row.model for row in result.nf4.results] == ["adapter on the NF4 base", "original", "dequantized"]
    assert trained.kld == [0.0, 0.0, 0.0] and trained.label_agreement[0] == trained.same_top == 1.0
    assert trained.rows == 16 and trained.positions == 64 and trained.size_mb is None
    assert 0 < dequantized.kld[0] < 0.1 * original.kld[0]  # the trained weights but for the rounding of the sum
    assert result.nf4.closer == "dequantized" and result.nf4.difference[2] < 0
    words = weights_page.nf4_reading(result)
    assert "dequantized** base is closer" in words and "into the **original** base" in words
    assert len(rows_of("merge.nf4", result.nf4.results)) == 3
    assert merge(Settings(), nf4_run).nf4 == result.nf4
    assert not list(result.product.path.glob(".*"))


def test_merge_into_the_dequantized_base(nf4_run: Run, tmp_path: Path) -> None:
    """The published weights are NF4's plus the update, bit for bit as bitsandbytes turns NF4 back."""
    import bitsandbytes as bnb

    result = merge(Settings(merge_base="dequantized"), nf4_run)
    assert result.product.entry.facts["merge_base"] == "dequantized"
    assert "rounded to NF4" in (result.product.path / "README.md").read_text()
    weights = load_file(tmp_path / "base" / "model.safetensors")
    merged = load_file(result.product.path / "model.safetensors")
    untouched = "model.layers.0.self_attn.k_proj.weight"
    packed, state = bnb.functional.quantize_4bit(
        weights[untouched], blocksize=64, quant_type="nf4", compress_statistics=True
    )
    assert torch.equal(merged[untouched], bnb.functional.dequantize_4bit(packed, state))
    assert not torch.equal(merged[untouched], weights[untouched])
    assert torch.equal(merged["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])


def test_nf4_is_silent(tmp_path: Path) -> None:
    """What bitsandbytes says at its import would land on the page; so in a process that has not imported it."""
    from lib.runs.machine import bitsandbytes_problem

    if problem := bitsandbytes_problem():
        pytest.skip(problem)
    tiny_run.make_base(tmp_path / "base", "bfloat16")
    code = "import sys; from pathlib import Path; from lib.stages.merge.nf4 import dequantize_base\n"
    code += "dequantize_base(Path(sys.argv[1]), Path(sys.argv[2]))"
    log = tmp_path / "progress.txt"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "base"), str(tmp_path / "out")],
        env={**os.environ, PROGRESS_FILE_VARIABLE: str(log)},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stderr == done.stdout == "" and "back into 16 bits" in log.read_text()


def test_dequantized_needs_an_nf4_adapter(home: Path, tmp_path: Path) -> None:
    tiny_run.make_base(tmp_path / "base", "bfloat16")
    with pytest.raises(InputError, match="not trained on an NF4 base"):
        merge(Settings(merge_base="dequantized"), tiny_run.make_run(tmp_path / "base"))
