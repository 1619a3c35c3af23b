"""The self-check refuses wrong merges, and the stage publishes only what passed it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lib.errors import InputError
from lib.merging import merge
from lib.merging.checking import _compare, check_merge
from lib.merging.folder import merge_folders
from lib.plots import rows
from lib.progress import PROGRESS_FILE_VARIABLE
from lib.run import Run
from lib.scoring.divergence import kl_divergence
from lib.settings import Settings
from tests import tiny_run


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("merge")
    tiny_run.make_base(folder / "base", request.param)
    tiny_run.make_adapter(folder / "base", folder / "adapter")
    merge_folders(folder / "base", folder / "adapter", folder / "merged")
    return folder, request.param


PROMPTS = [[3 + (7 * i * k) % 400 for i in range(20)] for k in range(1, 7)]


def test_right_merge_passes(merged: tuple[Path, str]) -> None:
    folder, dtype = merged
    check = check_merge(folder / "base", folder / "adapter", folder / "merged", PROMPTS, dtype)
    assert check.positions == 48
    assert check.max_abs_log_prob < (1e-4 if dtype == "float32" else 0.2)
    assert check.argmax_agreement > 0.9
    assert check.effect_kld > 100 * check.mean_kld  # the adapter does something, and merging keeps it


@pytest.mark.parametrize("mistake", ["not merged", "twice", "half", "transposed", "one tensor"])
def test_wrong_merge_is_refused(merged: tuple[Path, str], mistake: str, tmp_path: Path) -> None:
    folder, dtype = merged
    merge_folders(folder / "base", folder / "adapter", tmp_path / "wrong")
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
    with pytest.raises(InputError, match=r"differs from base \+ adapter.*nats"):
        check_merge(folder / "base", folder / "adapter", tmp_path / "wrong", PROMPTS, dtype)


def test_kl_divergence_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5]]).log().numpy(), torch.tensor([[0.25, 0.75]]).log().numpy()
    assert kl_divergence(p, q)[0] == pytest.approx(0.5 * (0.6931472 - 0.4054651), abs=1e-6)  # ½ln2 + ½ln⅔
    assert kl_divergence(p, p)[0] == 0.0


def test_flat_distributions_are_compared_at_their_top() -> None:
    """An untrained model with a large vocabulary gives no token a probability above 1e-4."""
    flat = np.full((3, 20_000), -np.log(20_000.0), np.float32)
    other = flat.copy()
    other[:, 0] += 0.25
    check = _compare(flat, flat, other, "float32", "float32", 1, 0.0)
    assert check.max_abs_log_prob == pytest.approx(0.25)


def test_stage(home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_run.make_base(tmp_path / "base", "bfloat16")
    run = tiny_run.make_run(tmp_path / "base")
    result = merge(Settings(), run)
    assert result.product.made
    assert result.report.tensors_changed == 6
    assert result.check.prompts == 12
    names = set(result.files)
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "README.md"} <= names
    assert not [path for path in result.product.path.iterdir() if path.name not in names]
    front = yaml.safe_load((result.product.path / "README.md").read_text().split("---\n")[1])
    assert front["language"] == "zh"
    assert "base_model" not in front  # a local folder is no hub model
    assert "not a result" in (result.product.path / "README.md").read_text()
    again = merge(Settings(), run)
    assert not again.product.made
    assert (again.report, again.check) == (result.report, result.check)
    assert ".part" not in (result.product.path / "merge.json").read_text()  # no temporary path


def test_stage_publishes_nothing_when_the_check_fails(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lib.merging import writing

    tiny_run.make_base(tmp_path / "base")
    run = tiny_run.make_run(tmp_path / "base")
    right = writing.apply_update
    monkeypatch.setattr(writing, "apply_update", lambda weight, update, rows: right(weight, update, rows) * 1.1)
    with pytest.raises(InputError, match="differs from base"):
        merge(Settings(), run)
    assert not (run.folder / "merged").exists()
    assert "merged" not in run.manifest.entries()


@pytest.fixture
def nf4_run(home: Path, tmp_path: Path) -> Run:
    from lib.device import bitsandbytes_problem

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
    words = rows.nf4_reading(result)
    assert "dequantized** base is closer" in words and "into the **original** base" in words
    assert len(rows.nf4_merges(result.nf4)) == 3
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
    from lib.device import bitsandbytes_problem

    if problem := bitsandbytes_problem():
        pytest.skip(problem)
    tiny_run.make_base(tmp_path / "base", "bfloat16")
    code = "import sys; from pathlib import Path; from lib.merging.nf4 import dequantize_base\n"
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
