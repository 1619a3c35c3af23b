"""What is refused before loading, and why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lib.errors import InputError
from lib.hub import fetching
from lib.models.base_model import check_model_folder, resolve_base
from lib.models.loading import load_model, load_tokenizer


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def test_whole_folder_passes_and_is_fingerprinted(model: Path) -> None:
    check_model_folder(model)
    base = resolve_base(str(model))
    assert base.path == model and not base.offline and base.revision.startswith("sha256:")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    assert resolve_base(str(model)).revision != base.revision


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", LFS, "Git LFS pointer"),
        ("config.json", "<!doctype html>", "web page"),
        ("config.json", '{"model_type": ', "damaged"),
        ("config.json", "[]", "no object"),
        ("config.json", '{"model_type": "no_such_kind"}', "no_such_kind"),
        ("config.json", '{"model_type": "x", "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}', "auto_map"),
        ("model.safetensors", None, "no weights"),
        ("model.safetensors", LFS, "Git LFS pointer"),
        ("model.safetensors", "\n<html></html>", "web page"),
        ("model.safetensors", "", "damaged"),
    ],
)
def test_unusable_folders_are_refused(model: Path, name: str, content: str | None, words: str) -> None:
    (model / name).unlink()
    if content is not None:
        (model / name).write_text(content)
    for use in (check_model_folder, load_model):
        with pytest.raises(InputError, match=words):
            use(model)


def test_pickle_only_is_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickled weights"):
        check_model_folder(model)


@pytest.mark.parametrize("cut", [1, 1000])
def test_truncated_weights_are_refused(model: Path, cut: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(InputError, match="damaged"):
        check_model_folder(model)


def test_loads_ready_for_evaluation(model: Path, capfd) -> None:
    loaded = load_model(model, "float32", device="cpu")
    assert not loaded.training and loaded.dtype == torch.float32
    assert loaded.config._attn_implementation == "sdpa"
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert load_model(model, "bfloat16", device="cpu").dtype == torch.bfloat16
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(model: Path, value: float) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"NaN or infinity in .*up_proj.weight"):
        load_model(model)


def test_missing_tensor_is_refused(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="lacks 1 tensors"):
        load_model(model)


def _adapter(model: Path, folder: Path) -> Path:
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(
        load_model(model), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    tuned.save_pretrained(folder)
    return folder


def test_adapter_is_put_on_top_in_float32(model: Path, tmp_path: Path) -> None:
    tuned = load_model(model, "bfloat16", adapter=_adapter(model, tmp_path / "adapter"), device="cpu")
    assert not tuned.training
    assert {p.dtype for name, p in tuned.named_parameters() if "lora" in name} == {torch.float32}
    with tuned.disable_adapter():
        pass


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 4}, "does not fit"),
        ({"target_modules": ["q_proj"]}, "disagree"),
        ({"target_modules": ["k_proj"]}, "disagree"),
    ],
)
def test_adapter_that_does_not_fit_is_refused(model: Path, tmp_path: Path, change: dict, words: str) -> None:
    folder = _adapter(model, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=words):
        load_model(model, adapter=folder)


@pytest.mark.parametrize(
    "options",
    [{"layer_replication": [[0, 1], [0, 1]]}, {"trainable_token_indices": [5], "modules_to_save": ["lm_head"]}],
    ids=str,
)
def test_adapter_that_is_built_and_cannot_be_computed_is_refused(model: Path, tmp_path: Path, options: dict) -> None:
    """peft saves and loads both, and neither answers."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    get_peft_model(load_model(model), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"the adapter .* does not fit"):
        load_model(model, adapter=tmp_path / "adapter")


def test_model_that_is_built_and_cannot_be_computed_is_refused(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "layer_types": ["linear_attention"]}))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(model)


def test_adapter_as_pickle_is_refused(model: Path, tmp_path: Path) -> None:
    folder = _adapter(model, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
        load_model(model, adapter=folder)


def test_four_bits_where_they_work_or_a_reason(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib.runs import machine

    if machine.bitsandbytes_problem() is None:
        loaded = load_model(model, load_in_4bit=True)
        assert type(loaded.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    monkeypatch.setattr(machine, "bitsandbytes_problem", lambda: "no such library")
    with pytest.raises(InputError, match="no such library"):
        load_model(model, load_in_4bit=True)


def test_tokenizer_problems_are_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/none", "a/b/c", "c:\\models\\qwen"])
def test_missing_local_folder_is_said_without_asking_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "fetch", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="no folder"):
        resolve_base(name)


def test_four_bit_layers_have_gradients_after_a_validation(tmp_path: Path) -> None:
    """bitsandbytes repacks 4-bit layers at their first forward pass in eval mode on some CPUs, without a way back."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from lib.runs.machine import bitsandbytes_problem

    if problem := bitsandbytes_problem():
        pytest.skip(f"4-bit layers do not work here: {problem}")
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 512}
    model = Qwen2ForCausalLM(Qwen2Config(**shape, num_attention_heads=4, num_key_value_heads=2)).bfloat16()
    model.save_pretrained(tmp_path / "m")
    loaded = load_model(tmp_path / "m", load_in_4bit=True, device="cpu")
    ids = torch.arange(64).view(2, 32)
    with torch.no_grad():
        loaded(ids)
    inputs = loaded.get_input_embeddings()(ids).detach().requires_grad_(True)
    loaded.train()
    loaded(inputs_embeds=inputs).logits.float().square().mean().backward()
    assert torch.isfinite(inputs.grad).all() and inputs.grad.abs().sum() > 0


@pytest.mark.parametrize("named", ["model.Q4_1.gguf", "Qwen/Qwen2.5-0.5B-Instruct"])
def test_adapter_is_put_on_without_looking_up_the_base_that_it_names(
    original: Path, tmp_path: Path, named: str, recwarn: pytest.WarningsRecorder
) -> None:
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(load_model(original, dtype="float32"), LoraConfig(r=2, target_modules=["q_proj"]))
    tuned.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": named}))
    recwarn.clear()
    load_model(original, dtype="float32", adapter=tmp_path / "adapter")
    assert [str(warning.message) for warning in recwarn] == []
