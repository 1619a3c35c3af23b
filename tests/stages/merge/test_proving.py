"""The proof accepts every right merge and refuses every wrong one, by tensor and number of weights."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.errors import InputError
from lib.report import weights_page
from lib.runs.files import read_json, write_json
from lib.stages.merge.proof import prove_merge
from lib.stages.merge.weights import merge_folders
from tests.stages.merge.test_merge_folders import VARIANTS, peft_merged

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_right_merges_pass(
    variant: str, dtype: str, make_base: Callable, make_adapter: Callable, tmp_path: Path
) -> None:
    base = make_base(dtype)
    adapter = make_adapter(base, **VARIANTS[variant])
    report = merge_folders(base, adapter, tmp_path / "out")
    proof = prove_merge(base, adapter, tmp_path / "out")
    assert proof.tensors_summed + proof.tensors_copied == report.tensors_changed + report.tensors_copied
    assert proof.weights_summed + proof.weights_copied == report.parameters
    assert 0 < proof.nearest <= proof.weights_summed >= proof.decided
    if dtype != "float32":  # one right value for nearly every weight
        assert proof.decided > (0.93 if variant == "dora" else 0.99) * proof.weights_summed
        assert proof.nearest >= proof.decided


@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variant", ["lora", "trained tokens", "modules to save"])
def test_another_format_is_rounded_once(
    variant: str, wanted: str, make_base: Callable, make_adapter: Callable, tmp_path: Path
) -> None:
    """Trained tokens of a bfloat16 base once went by way of bfloat16."""
    base = make_base("bfloat16")
    adapter = make_adapter(base, **VARIANTS[variant])
    merge_folders(base, adapter, tmp_path / "out", dtype=wanted)
    proof = prove_merge(
        base, adapter, tmp_path / "out", {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[wanted]
    )
    assert proof.dtype == {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[wanted]
    if wanted != "bfloat16":
        with pytest.raises(InputError, match="should be BF16"):
            prove_merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_untied_models_and_embeddings(saved: str, make_base: Callable, make_adapter: Callable, tmp_path: Path) -> None:
    tied = make_base("bfloat16", tied=True, shards=3)
    adapter = make_adapter(tied, modules_to_save=[saved])
    merge_folders(tied, adapter, tmp_path / "untied")
    assert prove_merge(tied, adapter, tmp_path / "untied").tensors_summed == 6
    base = make_base("bfloat16", tied=False)
    adapter = make_adapter(base, target_modules=["q_proj", saved])
    merge_folders(base, adapter, tmp_path / "out")
    assert prove_merge(base, adapter, tmp_path / "out").tensors_summed == 3


def test_peft_own_merge_passes(make_base: Callable, make_adapter: Callable, tmp_path: Path) -> None:
    """Other code, the same sums: what peft writes is right, too."""
    base = make_base("bfloat16")
    adapter = make_adapter(base, target_modules="all-linear", use_rslora=True)
    merge_folders(base, adapter, tmp_path / "out")
    theirs = peft_merged(base, adapter)
    rewrite(tmp_path / "out", lambda name, tensor: theirs[name].contiguous())
    prove_merge(base, adapter, tmp_path / "out")


def rewrite(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Change the merged weights."""
    path = folder / "model.safetensors"
    stored = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file({name: change(name, tensor) for name, tensor in stored.items()}, path, metadata={"format": "pt"})


@pytest.fixture
def merged(make_base: Callable, make_adapter: Callable, tmp_path: Path) -> tuple[Path, Path, Path]:
    base = make_base("bfloat16")
    adapter = make_adapter(base)
    merge_folders(base, adapter, tmp_path / "out")
    return base, adapter, tmp_path / "out"


def refused(merged: tuple[Path, Path, Path]) -> tuple[int, dict[str, int]]:
    """How many tensors the refusal counts, and the wrong weights of those it names."""
    with pytest.raises(InputError, match="is not base \\+ adapter") as caught:
        prove_merge(*merged)
    text = str(caught.value)
    named = re.findall(r"(\S+) \(([\d,]+) of [\d,]+ weights are not", text)
    return int(re.search(r"(\d+) of \d+ tensors are wrong", text)[1]), {k: int(v.replace(",", "")) for k, v in named}


def test_one_tensor_that_was_not_merged(merged: tuple[Path, Path, Path]) -> None:
    base = load_file(merged[0] / "model.safetensors")
    rewrite(merged[2], lambda name, tensor: base[name] if name == DOWN else tensor)
    count, named = refused(merged)
    assert count == 1 and list(named) == [DOWN] and named[DOWN] > 0.5 * 64 * 96


def test_one_weight_that_differs_by_one_step(merged: tuple[Path, Path, Path]) -> None:
    """Two thousandths of its value; no prompt would show it."""

    def step(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == DOWN:
            tensor.view(torch.int16)[3, 5] += 1
        return tensor

    rewrite(merged[2], step)
    assert refused(merged) == (1, {DOWN: 1})


def test_one_bit_of_a_copied_tensor(merged: tuple[Path, Path, Path]) -> None:
    def flip(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == "model.norm.weight":
            tensor.view(torch.int16)[7] ^= 1
        return tensor

    rewrite(merged[2], flip)
    assert refused(merged) == (1, {"model.norm.weight": 1})


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0, 1.01])
def test_wrong_scaling(merged: tuple[Path, Path, Path], factor: float, tmp_path: Path) -> None:
    """The adapter's configuration says another alpha than was merged with."""
    other = tmp_path / "other"
    shutil.copytree(merged[1], other)
    config = read_json(other / "adapter_config.json")
    write_json(other / "adapter_config.json", config | {"lora_alpha": 8 * factor})
    wrong = tmp_path / "wrong"
    merge_folders(merged[0], other, wrong)
    count, named = refused((merged[0], merged[1], wrong))
    assert count == 6 and min(named.values()) > 100


def test_scaling_is_pefts_own(make_base: Callable, make_adapter: Callable, tmp_path: Path, monkeypatch) -> None:
    """A mistake in the merge's own reading of the patterns is found: the proof reads them with peft."""
    base = make_base("bfloat16")
    adapter = make_adapter(base, alpha_pattern={"v_proj": 5})
    with monkeypatch.context() as patched:
        patched.setattr("lib.models.merge_plan._pattern", lambda patterns, module, default: default)
        merge_folders(base, adapter, tmp_path / "out")
    count, named = refused((base, adapter, tmp_path / "out"))
    assert count == 2 and all("v_proj" in name for name in named)


def test_swapped_a(merged: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The A of one layer used for the same matrix of another."""
    other = tmp_path / "other"
    shutil.copytree(merged[1], other)
    path = other / "adapter_model.safetensors"
    stored = load_file(path)
    names = [f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight" for i in (0, 1)]
    stored[names[0]], stored[names[1]] = stored[names[1]].clone(), stored[names[0]].clone()
    save_file(stored, path, metadata={"format": "pt"})
    merge_folders(merged[0], other, tmp_path / "wrong")
    count, named = refused((merged[0], merged[1], tmp_path / "wrong"))
    assert count == 2 and all("q_proj" in name for name in named)


@pytest.mark.parametrize("through", ["product", "float16", "sum of bfloat16"])
def test_rounded_twice(merged: tuple[Path, Path, Path], through: str) -> None:
    """B·A rounded before it is added (peft on a bfloat16 adapter of old), or the sum by way of float16."""
    base = load_file(merged[0] / "model.safetensors")
    lora = load_file(merged[1] / "adapter_model.safetensors")

    def twice(name: str, tensor: torch.Tensor) -> torch.Tensor:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in lora:
            return tensor
        delta = 2.0 * lora[f"{module}.lora_B.weight"] @ lora[f"{module}.lora_A.weight"]
        if through == "product":
            return (base[name].float() + delta.bfloat16().float()).bfloat16()
        if through == "float16":
            return (base[name].float() + delta).half().bfloat16()
        return base[name] + delta.bfloat16()

    rewrite(merged[2], twice)
    count, named = refused(merged)
    assert count == 6 and min(named.values()) > 50


def test_what_rounding_leaves(merged: tuple[Path, Path, Path], make_adapter: Callable, tmp_path: Path) -> None:
    """Slope and set-back weights against NumPy in float64; an adapter of small numbers is mostly rounded away."""
    base, _, _ = merged
    small = Path(shutil.copytree(make_adapter(base), tmp_path / "adapter"))
    path = small / "adapter_model.safetensors"
    lora = {name: tensor * (0.004 if "lora_B" in name else 1) for name, tensor in load_file(path).items()}
    save_file(lora, path, metadata={"format": "pt"})
    merge_folders(base, small, tmp_path / "small")
    found = {}
    for dtype in ("bfloat16", "float16"):
        merge_folders(base, small, tmp_path / dtype, dtype=dtype)
        found[dtype] = prove_merge(base, small, tmp_path / dtype, {"bfloat16": "BF16", "float16": "F16"}[dtype])
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "bfloat16" / "model.safetensors")
    kept = change = back = 0.0
    for name in before:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in lora:
            a, b = (lora[f"{module}.lora_{role}.weight"].double().numpy() for role in "AB")
            delta, stored = 2.0 * b @ a, (after[name].double() - before[name].double()).numpy()
            kept, change = kept + (stored * delta).sum(), change + (delta * delta).sum()
            back += (stored == 0).sum()
    assert found["bfloat16"].kept == pytest.approx(kept / change, rel=1e-9)
    assert found["bfloat16"].set_back == back > 0.5 * found["bfloat16"].weights_summed
    assert found["bfloat16"].kept < 0.9 < found["float16"].kept
    words = weights_page.survival(found["bfloat16"])
    assert f"leaves {100 * kept / change:.1f} % of the adapter's change" in words and "are the base's again" in words


def test_nan_missing_and_reshaped_tensors(merged: tuple[Path, Path, Path]) -> None:
    right = load_file(merged[2] / "model.safetensors")

    def poison(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return torch.full_like(tensor, float("nan")) if name == DOWN else tensor

    rewrite(merged[2], poison)
    assert refused(merged) == (1, {DOWN: 64 * 96})
    path = merged[2] / "model.safetensors"
    save_file({name: t for name, t in right.items() if name != DOWN}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"lacks tensor {DOWN}"):
        prove_merge(*merged)
    save_file({name: t.T.contiguous() if name == DOWN else t for name, t in right.items()}, path)
    with pytest.raises(InputError, match=r"is BF16 \(96, 64\), and should be"):
        prove_merge(*merged)


def test_the_bound_holds_for_every_order_of_the_sum(
    make_base: Callable, make_adapter: Callable, tmp_path: Path
) -> None:
    """float32 sums in four orders, written as float32: each is within the bound, and one ulp grid is not enough."""
    base = make_base("float32")
    adapter = make_adapter(base, r=16, lora_alpha=24)
    merge_folders(base, adapter, tmp_path / "out")
    weights = load_file(base / "model.safetensors")
    lora = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    module = f"base_model.model.{name.removesuffix('.weight')}"
    a, b = (lora[f"{module}.lora_{role}.weight"].numpy() for role in "AB")
    generator = np.random.default_rng(0)
    for _ in range(4):
        total = np.zeros((len(b), a.shape[1]), np.float32)
        for k in generator.permutation(16):
            total = total + np.outer(b[:, k], a[k])  # float32 products and sums
        result = torch.from_numpy(total * np.float32(1.5) + weights[name].numpy())
        rewrite(tmp_path / "out", lambda other, tensor, result=result: result if other == name else tensor)
        prove_merge(base, adapter, tmp_path / "out")
    far = result + 8 * 2.0**-24 * 16 * result.abs()
    rewrite(tmp_path / "out", lambda other, tensor: far if other == name else tensor)
    assert refused((base, adapter, tmp_path / "out"))[0] == 1
