"""Base models and adapters from local folders, the hub and ModelScope; fallbacks; models and adapters told apart."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib.errors import InputError
from lib.models.base_model import Base, choose_base, resolve_adapter, resolve_base
from lib.settings import Settings
from tests.support.hub_fixture import hub  # noqa: F401
from tests.support.hub_server import Hub

pytestmark = pytest.mark.usefixtures("forked_children")

PROJECT = Path(__file__).resolve().parents[2]
TARGETS = ("q_proj", "v_proj")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 with a LoRA beside it: model/, adapter/."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("original")
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    model = Qwen2ForCausalLM(Qwen2Config(**shape, num_attention_heads=2, num_key_value_heads=1))
    model.save_pretrained(folder / "model")
    get_peft_model(model, LoraConfig(r=2, target_modules=list(TARGETS), task_type="CAUSAL_LM")).save_pretrained(
        folder / "adapter"
    )
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "org/model"}))
    return folder


@pytest.fixture
def here(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "here"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def served(hub: Hub, original: Path) -> Hub:  # noqa: F811
    hub.add("models", "org/model", files(original / "model"))
    hub.add("models", "org/adapter", files(original / "adapter"))
    return hub


def test_three_forms_of_a_base(served: Hub, here: Path) -> None:
    from_hub = resolve_base("org/model")
    assert from_hub.revision == served.commit("models", "org/model") and from_hub.id == "org/model"
    from_modelscope = resolve_base("modelscope:org/model")
    local = resolve_base(str(here / "model"))
    assert from_modelscope.revision.startswith("sha256:") and local.revision.startswith("sha256:")
    weights = {base: (base.path / "model.safetensors").read_bytes() for base in (from_hub, from_modelscope, local)}
    assert len(set(weights.values())) == 1


def test_three_forms_of_an_adapter(served: Hub, here: Path) -> None:
    found = [resolve_adapter(name) for name in ("org/adapter", "modelscope:org/adapter", str(here / "adapter"))]
    assert len({(given.path / "adapter_model.safetensors").read_bytes() for given in found}) == 1
    assert found[0].revision == served.commit("models", "org/adapter")
    assert all(given.revision.startswith("sha256:") for given in found[1:])


@pytest.mark.parametrize("place", ["", "modelscope:", "here"])
def test_an_adapter_is_no_base_and_a_base_no_adapter(served: Hub, here: Path, place: str) -> None:
    name = str(here) + "/" if place == "here" else place + "org/"
    with pytest.raises(InputError, match=r"is a LoRA adapter \(rank 2, for org/model\).*set base_model to org/model"):
        resolve_base(name + "adapter")
    with pytest.raises(InputError, match="is a full model, not a LoRA adapter"):
        resolve_adapter(name + "model")


def test_names_deceive_nobody(here: Path) -> None:
    """An adapter renamed to model.safetensors, beside a model's configuration, is still an adapter."""
    adapter = here / "adapter"
    (adapter / "adapter_model.safetensors").rename(adapter / "model.safetensors")
    shutil.copy(here / "model" / "config.json", adapter)
    with pytest.raises(InputError, match="is a LoRA adapter"):
        resolve_base(str(adapter))
    shutil.copy(adapter / "adapter_config.json", here / "model")
    with pytest.raises(InputError, match="a whole model and an adapter beside it"):  # transformers would put it on
        resolve_base(str(here / "model"))
    with pytest.raises(InputError, match="is a full model"):
        resolve_adapter(str(here / "model"))


def test_what_is_no_adapter(here: Path, tmp_path: Path) -> None:
    adapter = here / "adapter"
    with pytest.raises(InputError, match="no folder"):
        resolve_adapter("./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no readable adapter_config\.json"):
        resolve_adapter(str(tmp_path / "empty"))
    (adapter / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=r"no readable adapter_model\.safetensors"):
        resolve_adapter(str(adapter))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(InputError, match="pickled adapter"):
        resolve_adapter(str(adapter))


def choose(base_model: str, fallbacks: list[dict] | tuple = ()) -> tuple[Base | None, tuple[str, ...]]:
    return choose_base(Settings(base_model=base_model, fallbacks=list(fallbacks)))


def test_fallbacks_are_taken_in_order_and_said(served: Hub, here: Path) -> None:
    base, notes = choose("org/model", [{"base_model": "offline"}])
    assert base is not None and base.id == "org/model" and notes == ()
    local = str(here / "model")
    base, notes = choose("org/gone", [{"dataset": "x/y"}, {"base_model": "./none"}, {"base_model": local}])
    assert base is not None and base.id == local and base.path == here / "model"
    assert notes == (
        "fallback: base model org/gone could not be had (is not there, or private); "
        "folder model was used instead of it",
    )
    served.faults.page = True
    base, notes = choose("org/other", [{"base_model": "offline"}])
    assert base is None and "could not be had" in notes[0]


def test_without_a_list_there_is_no_fallback(served: Hub) -> None:
    with pytest.raises(InputError, match="is not there, or private"):
        choose("org/gone", [{"dataset": "sample"}])


def test_all_fallbacks_failing_are_named(served: Hub) -> None:
    fallbacks = [{"base_model": "modelscope:org/gone"}, {"base_model": "./none"}]
    with pytest.raises(InputError, match=r"Fallbacks failed too: modelscope:org/gone is not there, .* no folder"):
        choose("org/gone", fallbacks)


def test_a_fallback_is_checked_by_its_hash(served: Hub, here: Path) -> None:
    local = str(here / "model")
    right = hashlib.sha256((here / "model" / "model.safetensors").read_bytes()).hexdigest()
    assert choose("org/gone", [{"base_model": local, "sha256": right}])[0].id == local
    with pytest.raises(InputError, match=f"SHA-256 {right}.*as the parameter file lists it"):
        choose("org/gone", [{"base_model": local, "sha256": "0" * 64}])


def test_a_present_but_damaged_base_is_no_reason_for_a_fallback(served: Hub, here: Path) -> None:
    path = here / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="damaged"):
        choose(str(here / "model"), [{"base_model": "offline"}])


def test_the_command_line_tells_them_apart(here: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lib.cli", "merge", "--output-dir", str(tmp_path / "out")]
    swapped = [*command, "--base-model", str(here / "adapter"), "--adapter", str(here / "model")]
    answer = subprocess.run(swapped, cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 2 and "is a LoRA adapter (rank 2, for org/model)" in answer.stderr
    twice = [*command, "--base-model", str(here / "model"), "--adapter", str(here / "model")]
    answer = subprocess.run(twice, cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 2 and "is a full model, not a LoRA adapter" in answer.stderr
    assert not (tmp_path / "out").exists()
