"""merge_folders against peft's merge_and_unload (safe_merge=False) as the independent oracle."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lib.errors import InputError
from lib.models.merge_plan import plan_merge
from lib.stages.merge.weights import merge_folders
from tests import tiny_run


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(path)
    return tensors


def peft_merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=False)
    return dict(merged.state_dict())


def assert_same_bits(folder: Path, expected: dict[str, torch.Tensor], base: Path) -> int:
    found, original = read_all(folder), read_all(base)
    assert set(found) == set(original)
    changed = 0
    for name, tensor in found.items():
        assert tensor.dtype == original[name].dtype
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
        changed += not torch.equal(tensor, original[name])
    return changed


VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "all linear": {"target_modules": "all-linear"},
    "patterns": {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    "dora": {"use_dora": True},
    "lora bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "trained bias": {"bias": "all"},
    "modules to save": {"modules_to_save": ["norm"]},
    "trained tokens": {"trainable_token_indices": [300, 5, 9]},
    "trained tokens by name": {"trainable_token_indices": {"embed_tokens": [7]}, "target_modules": ["q_proj"]},
    "trained tokens by path": {"trainable_token_indices": {"model.embed_tokens": [7]}, "target_modules": ["q_proj"]},
    "a module of modules to save": {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]},
    "another of them": {"modules_to_save": ["self_attn"], "target_modules": ["up_proj"]},
    "one layer": {"layers_to_transform": [1]},
    "regular expression": {"target_modules": r".*\.1\.mlp\.(up|gate)_proj"},
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_peft_bit_for_bit(
    variant: str, dtype: str, make_base: Callable, make_adapter: Callable, tmp_path: Path
) -> None:
    base = make_base(dtype)
    adapter = make_adapter(base, **VARIANTS[variant])
    report = merge_folders(base, adapter, tmp_path / "out")
    changed = assert_same_bits(tmp_path / "out", peft_merged(base, adapter), base)
    assert changed == report.tensors_changed > 0
    assert report.tensors_changed + report.tensors_copied == len(read_all(base))
    assert report.dtype == dtype


@pytest.mark.parametrize(("target", "dtype"), [("lm_head", "bfloat16"), ("embed_tokens", "float32")])
def test_untied_head_and_embedding(
    target: str, dtype: str, make_base: Callable, make_adapter: Callable, tmp_path: Path
) -> None:
    # embed_tokens only in float32: there peft rounds B·A to bfloat16 first, which loses precision
    base = make_base(dtype, tied=False)
    adapter = make_adapter(base, target_modules=["q_proj", target])
    merge_folders(base, adapter, tmp_path / "out")
    assert assert_same_bits(tmp_path / "out", peft_merged(base, adapter), base) == 3


@pytest.mark.parametrize("tying", [False, True])
@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
@pytest.mark.parametrize("shards", [1, 3])
def test_saved_modules_of_a_tied_model(
    saved: list[str], tying: bool, shards: int, make_base: Callable, make_adapter: Callable, tmp_path: Path
) -> None:
    """The model is untied as peft unties it; with ensure_weight_tying it stays tied."""
    base = make_base("bfloat16", tied=True, shards=shards)
    adapter = make_adapter(base, modules_to_save=saved, ensure_weight_tying=tying)
    merge_folders(base, adapter, tmp_path / "out")
    still_tied = tying
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is still_tied
    mine, peers = read_all(tmp_path / "out"), peft_merged(base, adapter)
    assert ("lm_head.weight" in mine) is not still_tied
    for name, tensor in mine.items():
        assert torch.equal(tensor, peers[name]), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is still_tied


def test_trained_tokens_of_an_untied_head(make_base: Callable, make_adapter: Callable, tmp_path: Path) -> None:
    base = make_base("float32", tied=False)
    adapter = make_adapter(base, trainable_token_indices={"embed_tokens": [3], "lm_head": [8, 2]})
    merge_folders(base, adapter, tmp_path / "out")
    assert assert_same_bits(tmp_path / "out", peft_merged(base, adapter), base) == 8


def test_bfloat16_adapter_is_summed_in_float32(make_base: Callable, make_adapter: Callable, tmp_path: Path) -> None:
    base = make_base("bfloat16")
    adapter = make_adapter(base, dtype="bfloat16")
    merge_folders(base, adapter, tmp_path / "out")
    assert_same_bits(tmp_path / "out", peft_merged(base, adapter), base)


def test_shards_keep_their_layout(make_base: Callable, make_adapter: Callable, tmp_path: Path) -> None:
    base = make_base("bfloat16", shards=3)
    adapter = make_adapter(base)
    merge_folders(base, adapter, tmp_path / "out")
    names = [path.name for path in sorted(base.glob("*.safetensors*"))]
    assert len(names) > 3
    assert [path.name for path in sorted((tmp_path / "out").glob("*.safetensors*"))] == names
    assert_same_bits(tmp_path / "out", peft_merged(base, adapter), base)


def test_cast_rounds_the_sum_once(make_base: Callable, make_adapter: Callable, tmp_path: Path) -> None:
    base = make_base("float32")
    adapter = make_adapter(base)
    report = merge_folders(base, adapter, tmp_path / "out", dtype="bfloat16")
    exact = peft_merged(base, adapter)
    for name, tensor in read_all(tmp_path / "out").items():
        assert torch.equal(tensor, exact[name].to(torch.bfloat16)), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert report.bytes_merged * 2 == report.bytes_base


def test_transformers_loads_the_result_without_a_word(
    make_base: Callable, make_adapter: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM

    base = make_base("bfloat16", shards=3)
    merge_folders(base, make_adapter(base), tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    assert not caplog.records


def test_files_are_readable_by_the_group(make_base: Callable, make_adapter: Callable, tmp_path: Path) -> None:
    base = make_base()
    before = os.umask(0o002)
    try:
        merge_folders(base, make_adapter(base), tmp_path / "out")
    finally:
        os.umask(before)
    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o664, path.name


def test_output_must_be_new(make_base: Callable, make_adapter: Callable, tmp_path: Path) -> None:
    base = make_base()
    adapter = make_adapter(base)
    for taken in (base, adapter):
        with pytest.raises(InputError, match="new folder"):
            merge_folders(base, adapter, taken)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("x")
    with pytest.raises(InputError, match="already exists"):
        merge_folders(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "precious.txt").read_text() == "x"


def test_disk_full_is_refused_before_the_work(
    make_base: Callable, make_adapter: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base()
    adapter = make_adapter(base)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(InputError, match="free on the disk"):
        merge_folders(base, adapter, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_memory_stays_near_the_largest_changed_tensor(make_adapter: Callable, tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100_000,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).to(torch.float32).save_pretrained(tmp_path / "base")
    report = merge_folders(tmp_path / "base", make_adapter(tmp_path / "base"), tmp_path / "out")
    if report.peak_anonymous_mib is None:
        pytest.skip("the system does not tell anonymous memory")
    embedding = 100_000 * 256 * 4 / 2**20
    assert report.peak_anonymous_mib < 0.5 * embedding


def test_real_adapter(shared_data: Path, tmp_path: Path) -> None:
    """A published LoRA of Qwen2.5-0.5B (24 layers) on random weights of its attention's shapes."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=896,
        intermediate_size=32,  # the adapter touches q_proj and v_proj only
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=256,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    adapter = shared_data / "qwen2.5-0.5b-lora-sft"
    report = merge_folders(tmp_path / "base", adapter, tmp_path / "out")
    changed = assert_same_bits(tmp_path / "out", peft_merged(tmp_path / "base", adapter), tmp_path / "base")
    assert changed == report.tensors_changed == 48
    assert report.scalings == {"4": 48}
    assert report.bytes_adapter == 2_162_688  # 24 · 8 · (896 + 896 + 896 + 128) float32


def test_a_model_beside_an_adapter_does_not_take_its_place(tmp_path: Path) -> None:
    """Trainers leave both in one folder; what adapter_config.json stands in is an adapter."""
    tiny_run.make_base(tmp_path / "base")
    tiny_run.make_adapter(tmp_path / "base", tmp_path / "adapter")
    alone = plan_merge(tmp_path / "base", tmp_path / "adapter")
    shutil.copyfile(tmp_path / "base" / "model.safetensors", tmp_path / "adapter" / "model.safetensors")
    beside = plan_merge(tmp_path / "base", tmp_path / "adapter")
    assert beside.trained is None and beside.updates.keys() == alone.updates.keys()
