"""An adapter that was not trained here: adopted when it fits, said on every page, refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.errors import InputError
from lib.models.adapters import read_adapter, shape_of
from lib.models.base_model import base_of
from lib.models.merge_plan import check_fit
from lib.report import finetune_page
from lib.runs.files import read_json
from lib.runs.run import Run
from lib.stages.finetune.stage import finetune
from tests.stages.finetune.conftest import tiny_settings
from tests.support.hub_fixture import hub  # noqa: F401
from tests.support.hub_server import Hub


@pytest.fixture
def foreign(runs: Callable[[str], Run], tmp_path: Path) -> Path:
    """An adapter outside of any run, for the offline base of the test's data."""
    source, folder = runs("straight").require("adapter").path, tmp_path / "foreign"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(source / name, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/other-base"}))
    return folder


def test_adopted_and_said(runs: Callable[[str], Run], foreign: Path) -> None:
    run = runs("fresh")
    result = finetune(tiny_settings(adapter=str(foreign)), run)
    product = result.product
    assert (
        product.made
        and (product.path / "adapter_model.safetensors").read_bytes()
        == (foreign / "adapter_model.safetensors").read_bytes()
    )
    assert product.entry.facts["adopted"]["id"] == str(foreign) and product.entry.facts["method"] == "LoRA"
    assert read_json(product.path / "adapter_config.json")["base_model_name_or_path"] != "org/other-base"
    assert result.adopted["ranks"] == {"4": result.adopted["modules"]} and result.steps == 0
    stamps = run.stamps()
    assert any(
        stamp.startswith("nothing was trained in this run: the adapter (folder foreign) was") for stamp in stamps
    )
    assert any("names org/other-base as its base model; here it is put on offline" in stamp for stamp in stamps)
    for shown in ("card", "memory", "advice", "curves", "chosen", "speed", "resource_use", "learned"):
        text = getattr(finetune_page, shown)(result).data
        assert text.strip() and "trained on" not in text
    assert "Nothing was trained" in finetune_page.learned(result).data


@pytest.mark.parametrize(("revision", "said"), [("", False), ("an-older-commit", True), ("own", False)])
def test_one_trained_on_another_base_of_equal_shape_is_stamped(
    revision: str, said: bool, runs: Callable[[str], Run], foreign: Path
) -> None:
    run = runs("fresh")
    base = base_of(run)
    config = read_json(foreign / "adapter_config.json")
    (foreign / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base.path)}))
    record = {"base": {"id": "offline", "revision": base.revision if revision == "own" else revision}}
    (foreign / "training.json").write_text(json.dumps(record))
    finetune(tiny_settings(adapter=str(foreign)), run)
    assert any("was trained on an-older-commit of its base" in stamp for stamp in run.stamps()) == said


def test_skipped_while_the_adapter_is_the_same(runs: Callable[[str], Run], foreign: Path) -> None:
    settings = tiny_settings(adapter=str(foreign))
    assert finetune(settings, runs("fresh")).product.made
    assert not finetune(tiny_settings(adapter=str(foreign), learning_rate=1.0e-5), runs("fresh")).product.made
    tensors = load_file(foreign / "adapter_model.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, foreign / "adapter_model.safetensors")
    assert finetune(settings, runs("fresh")).product.made


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "README.md"])
def test_a_file_beside_its_weights_that_changed_alone(runs: Callable[[str], Run], foreign: Path, name: str) -> None:
    """Its template, or what it says of the base that it was trained on: adopted again, and said."""
    contents = {
        "chat_template.jinja": "{{ messages }}",
        "tokenizer_config.json": '{"chat_template": "{{ messages }}"}',
        "README.md": "load_in_4bit: true",
    }
    settings = tiny_settings(adapter=str(foreign))
    assert finetune(settings, runs("fresh")).product.made
    (foreign / name).write_text(contents[name])
    result = finetune(settings, runs("fresh"))
    assert result.product.made and (name == "README.md" or any("its chat template" in note for note in result.notes))


def test_other_tokens_of_an_adopted_adapter_are_refused(runs: Callable[[str], Run], foreign: Path) -> None:
    settings = tiny_settings(adapter=str(foreign))
    assert finetune(settings, runs("fresh")).product.made
    (foreign / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "<new>": 1}}}')
    with pytest.raises(InputError, match="its tokenizer has other tokens than the base's"):
        finetune(settings, runs("fresh"))


@pytest.mark.parametrize("place", ["", "modelscope:"])
def test_adopted_from_a_hub(hub: Hub, runs: Callable[[str], Run], foreign: Path, place: str) -> None:  # noqa: F811
    commit = hub.add("models", "org/lora", {path.name: path.read_bytes() for path in foreign.iterdir()})
    result = finetune(tiny_settings(adapter=f"{place}org/lora"), runs("fresh"))
    assert result.adopted["id"] == f"{place}org/lora"
    assert result.adopted["revision"] == commit or result.adopted["revision"].startswith("sha256:")


PEFT_CARD = """---
library_name: peft
---
## Training procedure

The following `bitsandbytes` quantization config was used during training:
- quant_method: QuantizationMethod.BITS_AND_BYTES
- _load_in_8bit: False
- _load_in_4bit: {four}
"""


@pytest.mark.parametrize(
    ("name", "content", "method", "words"),
    [
        ("README.md", PEFT_CARD.format(four=True), "QLoRA", "a 4-bit base (its model card)"),
        ("README.md", "```yaml\nadapter: qlora\nload_in_4bit: true\n```", "QLoRA", "a 4-bit base (its model card)"),
        ("README.md", PEFT_CARD.format(four=False), "LoRA", "no 4-bit base (its model card)"),
        ("README.md", "A LoRA.", "LoRA", "not known"),
        ("training.json", '{"method": "QLoRA (NF4) r=4, alpha=32 on 7 linear layers"}', "QLoRA", "(training.json)"),
    ],
)
def test_what_it_was_trained_on_is_said_where_its_files_tell(
    runs: Callable[[str], Run], foreign: Path, name: str, content: str, method: str, words: str
) -> None:
    from lib.runs import machine

    (foreign / name).write_text(content)
    result = finetune(tiny_settings(adapter=str(foreign)), runs("fresh"))
    works = machine.bitsandbytes_problem() is None
    assert result.product.entry.facts["method"] == (method if works else "LoRA")
    assert words in result.adopted["trained_on"] and words in finetune_page.card(result).data
    assert any("trained on a 4-bit base, which does not work" in note for note in result.notes) == (
        method == "QLoRA" and not works
    )


def test_a_4_bit_base_that_does_not_work_here_is_said(runs, foreign: Path, monkeypatch) -> None:
    monkeypatch.setattr("lib.runs.machine.bitsandbytes_problem", lambda: "not on this machine")
    (foreign / "README.md").write_text(PEFT_CARD.format(four=True))
    result = finetune(tiny_settings(adapter=str(foreign)), runs("fresh"))
    assert result.product.entry.facts["method"] == "LoRA"
    assert any("which does not work here (not on this machine): 16 bits instead" in note for note in result.notes)


def test_one_trained_on_another_gguf_file_is_refused(runs: Callable[[str], Run], foreign: Path) -> None:
    config = json.loads((foreign / "adapter_config.json").read_text())
    revision = f"sha256:{'ab' * 8}+v2+off-grid-3-0.8-1.25"
    (foreign / "adapter_config.json").write_text(json.dumps({**config, "revision": revision}))
    with pytest.raises(InputError, match=r"the weights it was trained on.*gguf_off_grid: true"):
        finetune(tiny_settings(adapter=str(foreign)), runs("fresh"))
    assert not (runs("fresh").folder / "adapter").exists()


def test_later_stages_take_it_as_their_own(runs: Callable[[str], Run], foreign: Path) -> None:
    from lib.stages.merge.stage import merge

    settings, run = tiny_settings(adapter=str(foreign)), runs("fresh")
    finetune(settings, run)
    merged = merge(settings, run)
    assert merged.product.made and merged.check.mean_kld < 1e-4


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace the adapter's tensors whose names end so; None removes."""
    path = folder / "adapter_model.safetensors"
    stored = load_file(path)
    for ending, tensor in tensors.items():
        (name,) = [name for name in stored if name.endswith(ending.replace("__", "."))][:1]
        stored.pop(name)
        if tensor is not None:
            stored[name] = tensor
    save_file(stored, path)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"q_proj__lora_A__weight": torch.zeros(4, 63)}, r"q_proj: A \(4, 63\) and B .* base weight \(64, 64\)"),
        ({"q_proj__lora_B__weight": torch.zeros(64, 5)}, r"q_proj: A \(4, 64\) and B \(64, 5\)"),
        ({"q_proj__lora_B__weight": None}, "q_proj lacks lora_B"),
        ({"q_proj__lora_B__weight": torch.full((64, 4), float("-inf"))}, "NaN or infinity"),
    ],
)
def test_what_does_not_fit_is_refused(
    runs: Callable[[str], Run], foreign: Path, tensors: dict[str, torch.Tensor | None], words: str
) -> None:
    change(foreign, **tensors)
    with pytest.raises(InputError, match=words):
        finetune(tiny_settings(adapter=str(foreign)), runs("fresh"))
    assert not (runs("fresh").folder / "adapter").exists() and not list(runs("fresh").folder.glob(".adapter*"))


def test_other_kinds_of_adapters_are_refused(runs: Callable[[str], Run], foreign: Path) -> None:
    config = json.loads((foreign / "adapter_config.json").read_text())
    (foreign / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(InputError, match="peft_type 'IA3'"):
        finetune(tiny_settings(adapter=str(foreign)), runs("fresh"))


def test_the_public_adapter_fits_its_shape(shared_data: Path, tmp_path: Path) -> None:
    """A published LoRA for Qwen2.5-0.5B against random weights of that shape (narrow feed-forward, few tokens)."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    adapter = shared_data / "qwen2.5-0.5b-lora-sft"
    shape = shape_of(read_adapter(adapter))
    assert (shape.rank, shape.alpha, shape.ranks, shape.modules) == (8, 32, {8: 48}, 48)
    assert shape.targets == ["q_proj", "v_proj"] and shape.base == "Qwen/Qwen2.5-0.5B"
    real = json.loads((shared_data / "qwen2.5-0.5b-instruct" / "config.json").read_text())
    for layers in (24, 2):
        config = Qwen2Config(**{**real, "num_hidden_layers": layers, "intermediate_size": 16, "vocab_size": 64})
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / f"base{layers}")
    assert check_fit(adapter, tmp_path / "base24") == shape
    with pytest.raises(InputError, match=r"LoRA on model\.layers\.\d+\..*, which the base does not have"):
        check_fit(adapter, tmp_path / "base2")


def with_tokenizer(run: Run, folder: Path) -> dict:
    """The run's tokenizer laid beside an adapter; its tokenizer.json."""
    for path in (run.require("data").path / "tokenizer").iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    return json.loads((folder / "tokenizer.json").read_text())


def test_a_template_of_its_own_is_stamped(runs: Callable[[str], Run], foreign: Path) -> None:
    run = runs("fresh")
    with_tokenizer(run, foreign)
    (foreign / "chat_template.jinja").write_text("[{{ messages[0].content }}]")
    result = finetune(tiny_settings(adapter=str(foreign)), run)
    assert any("its chat template is not the base's" in note for note in result.notes)


def test_the_same_tokenizer_is_no_difference(runs: Callable[[str], Run], foreign: Path) -> None:
    run = runs("fresh")
    with_tokenizer(run, foreign)
    assert not any(
        "tokens" in note or "template" in note for note in finetune(tiny_settings(adapter=str(foreign)), run).notes
    )


def test_tokens_of_its_own_are_refused(runs: Callable[[str], Run], foreign: Path) -> None:
    run = runs("fresh")
    content = with_tokenizer(run, foreign)
    content["added_tokens"].append({**content["added_tokens"][-1], "id": 10**6, "content": "<情感>"})
    (foreign / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"other tokens than the base's \(1: <情感>(?s:.)*workbook merge"):
        finetune(tiny_settings(adapter=str(foreign)), run)


def test_names_of_a_state_dict_are_adopted_as_peft_writes_them(runs: Callable[[str], Run], foreign: Path) -> None:
    path = foreign / "adapter_model.safetensors"
    original = load_file(path)
    save_file({f"module.{name.replace('.weight', '.default.weight')}": original[name] for name in original}, path)
    product = finetune(tiny_settings(adapter=str(foreign)), runs("fresh")).product
    adopted = load_file(product.path / path.name)
    assert adopted.keys() == original.keys() and all(torch.equal(adopted[name], original[name]) for name in original)
