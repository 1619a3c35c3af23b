"""A .gguf file in place of a base model: unpacked once, found again, told apart, said on every page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from lib.cli.__main__ import app
from lib.errors import InputError
from lib.models.base_model import choose_base, refuse_other_folder, refuse_other_weights, resolve_base, unpacking_of
from lib.models.inspect import inspect
from lib.models.unpack import RANGE, SEED, VERSION
from lib.models.unpack_source import read_source
from lib.report.weights_page import unpacked as card
from lib.runs.files import sha256_file
from lib.settings import Settings
from lib.stages.data.stage import base_parameters
from lib.stages.evaluate.standalone import ModelOptions, find_model
from lib.stages.finetune.memory import _config
from lib.stages.finetune.stage import write_config
from tests.models import packed
from tests.models.real import SMOLLM2, needs_smollm2


def test_unpacked_once_and_reused(
    packed_files: dict[str, Path], home: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve_base(str(packed_files["qwen2"]))
    assert first.path.is_relative_to(home / ".cache/unpacked") and first.id == str(packed_files["qwen2"])
    assert first.revision.startswith("sha256:") and first.notes == ("weights dequantized from Q4_1 (qwen2.Q4_1.gguf)",)
    assert "qwen2.Q4_1.gguf: unpacked into" in capsys.readouterr().err
    monkeypatch.setattr("lib.models.unpack.unpack_into", lambda *_: pytest.fail("made twice"))
    assert resolve_base(str(packed_files["qwen2"])) == first
    assert "unpacked before, found in" in capsys.readouterr().err
    copy = resolve_base(shutil.copy(packed_files["qwen2"], home / "copy.gguf"))
    assert (copy.path, copy.revision) == (first.path, first.revision)
    assert copy.notes == ("weights dequantized from Q4_1 (copy.gguf)",)


def test_a_file_that_changes_while_it_is_unpacked(
    packed_files: dict[str, Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash that names the folder must be that of the file that was unpacked."""
    path = Path(shutil.copy(packed_files["llama"], home / "a.gguf"))

    def late(file: Path) -> object:
        shutil.copy(packed_files["qwen2"], path)
        return read_source(file)

    with monkeypatch.context() as patch:
        patch.setattr("lib.models.unpack.read_source", late)
        with pytest.raises(InputError, match="changed while it was read"):
            resolve_base(str(path))
    assert resolve_base(str(packed_files["llama"])).revision.startswith(
        f"sha256:{sha256_file(packed_files['llama'])[:16]}"
    )


@pytest.mark.parametrize(
    "template", ["{% for %}", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"]
)
def test_a_template_that_cannot_be_rendered(
    packed_files: dict[str, Path], home: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.prompts.templates.SECONDS", 3.0)
    source = packed_files["qwen2"].parent / "qwen2-f32.gguf"
    path = packed.repack(source, home / "bad.gguf", more={"tokenizer.chat_template": template})
    for ask in (
        lambda: choose_base(Settings(base_model=str(path))),
        lambda: _config(str(path)),
        lambda: find_model(str(path), ModelOptions()),
    ):
        with pytest.raises(InputError, match="chat template cannot be rendered"):
            ask()


def test_other_dtype_or_grid_is_another_base(packed_files: dict[str, Path], home: Path) -> None:
    path = str(packed_files["llama"])
    plain, wide, off = (
        resolve_base(path),
        resolve_base(path, gguf_dtype="float32"),
        resolve_base(path, "main", "auto", True),
    )
    assert len({base.path for base in (plain, wide, off)}) == len({base.revision for base in (plain, wide, off)}) == 3
    assert off.revision == f"{plain.revision}+off-grid-{SEED}-{RANGE[0]}-{RANGE[1]}" and len(off.notes) == 2
    assert plain.revision.endswith(f"+v{VERSION}")
    (home / "adapter").mkdir()
    (home / "adapter/training.json").write_text(json.dumps({"base": {"revision": off.revision}}))
    assert unpacking_of(home / "adapter") == {"gguf_off_grid": True} and unpacking_of(home) == {}
    (home / "copied").mkdir()
    write_config(home / "copied", {"r": 4}, off)
    assert unpacking_of(home / "copied") == {"gguf_off_grid": True}
    assert json.loads((home / "copied/adapter_config.json").read_text())["base_model_name_or_path"] == path
    (home / "foreign").mkdir()
    for adapter, base in (("adapter", off), ("copied", off), ("foreign", plain)):
        refuse_other_weights(home / adapter, base)
    for adapter, base in (("adapter", plain), ("copied", wide), ("foreign", off)):
        with pytest.raises(InputError, match="the weights it was trained on"):
            refuse_other_weights(home / adapter, base)
    (home / "plain folder").mkdir()
    for adapter, folder in (("adapter", off.path), ("foreign", plain.path), ("foreign", home / "plain folder")):
        refuse_other_folder(home / adapter, folder)
    write_config(home / "foreign", {"r": 4}, plain)
    for folder in (wide.path, home / "plain folder"):  # as fine or finer, and the model that was quantized
        refuse_other_folder(home / "foreign", folder)
    other = resolve_base(str(packed_files["qwen2"])).path
    refused = [("adapter", plain.path), ("adapter", home / "plain folder"), ("foreign", off.path), ("foreign", other)]
    for adapter, folder in refused:
        with pytest.raises(InputError, match="the weights it was trained on"):
            refuse_other_folder(home / adapter, folder)
    lines = card(off.facts)
    assert lines["channels rescaled by"].startswith("0.8 to 1.25") and "float16" in lines["cost of rounding"]
    assert card({}) == {}


def test_settings_that_do_not_fit_are_refused(packed_files: dict[str, Path], home: Path) -> None:
    with pytest.raises(InputError, match="base_model offline, which is no GGUF file"):
        choose_base(Settings(gguf_off_grid=True))
    with pytest.raises(InputError, match=r"no file .*gone\.gguf"):
        resolve_base("gone.gguf")
    with pytest.raises(InputError, match="make smollm2"):
        resolve_base(".cache/smollm2/gone.gguf")
    with pytest.raises(InputError, match=r"no file .*gone\.gguf.*make smollm2"):
        _config(".cache/smollm2/gone.gguf")
    gone = Settings(base_model="gone.gguf", fallbacks=[{"base_model": "offline"}], gguf_off_grid=True)
    base, notes = choose_base(gone)
    assert base is None and "gone.gguf could not be had" in notes[0]
    with pytest.raises(InputError, match=r"fallback .* SHA-256"):
        fallback = {"base_model": str(packed_files["llama"]), "sha256": "0" * 64}
        choose_base(Settings(base_model="gone.gguf", fallbacks=[fallback]))


def test_inspect_asks_what_unpacking_asks(packed_files: dict[str, Path], tmp_path: Path) -> None:
    assert any(note.startswith("can be a base model") for note in inspect(packed_files["qwen3"])["notes"])
    odd = tmp_path / "odd.gguf"
    odd.write_bytes(packed_files["qwen3"].read_bytes().replace(b"qwen3.context_length", b"qwen3.context_longth"))
    assert any("no base model" in note and "context_length" in note for note in inspect(odd)["notes"])


def test_a_file_without_template_is_no_base_of_a_run(packed_files: dict[str, Path], home: Path) -> None:
    path = packed.repack(
        packed_files["qwen2"].parent / "qwen2-f32.gguf", home / "plain.gguf", more={"tokenizer.chat_template": ""}
    )
    assert "no base_model, workbook unpack only: no chat template" in inspect(path)["notes"]
    settings = Settings(run_name="x", base_model=str(path))
    for ask in (lambda: choose_base(Settings(base_model=str(path))), lambda: base_parameters(settings)):
        with pytest.raises(InputError, match=r"plain\.gguf has no chat template"):
            ask()
    assert not (home / ".cache").exists()


def test_the_key_holds_how_a_fallback_is_unpacked() -> None:
    settings = Settings(run_name="x", base_model="org/model", fallbacks=[{"base_model": "m.GGUF"}])
    assert base_parameters(settings) == {"gguf_dtype": "auto", "gguf_off_grid": False}
    assert base_parameters(Settings(run_name="x", base_model="org/model")) == {}


def test_an_adapter_is_checked_with_its_own_variant(packed_files: dict[str, Path], home: Path) -> None:
    off = resolve_base(str(packed_files["qwen2"]), gguf_off_grid=True)
    (home / "adapter").mkdir()
    tensors = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(1, 64)}
    save_file(tensors, home / "adapter/adapter_model.safetensors")
    write_config(home / "adapter", {"peft_type": "LORA", "r": 1}, off)
    find_model(str(home / "adapter"), ModelOptions())
    assert [path.name for path in (home / ".cache/unpacked").iterdir() if path.is_dir()] == [off.path.name]


def test_the_command(packed_files: dict[str, Path], tmp_path: Path) -> None:
    run = CliRunner()
    result = run.invoke(app, ["unpack", str(packed_files["llama"]), str(tmp_path / "m"), "--off-grid", "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["off_grid"] and record["types"].keys() == {"Q4_1", "Q8_0", "F32"}
    shutil.rmtree(tmp_path / "m")
    result = run.invoke(app, ["unpack", str(packed_files["llama"]), str(tmp_path / "m"), "--dtype", "bfloat16"])
    assert "weights dequantized from Q4_1" in result.stdout and "cost of rounding: bfloat16" in result.stdout
    assert run.invoke(app, ["unpack", str(packed_files["llama"]), str(tmp_path / "m")]).exit_code == 2


def test_merging_into_a_gguf_file(packed_files: dict[str, Path], home: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = resolve_base(str(packed_files["qwen2"]))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base.path), LoraConfig(target_modules=["q_proj"]))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    command = ["merge", "--base-model", str(packed_files["qwen2"]), "--adapter", str(tmp_path / "adapter")]
    result = CliRunner().invoke(app, [*command, "--output-dir", str(tmp_path / "merged"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["tensors_changed"] == 2
    assert "the local model `qwen2.Q4_1.gguf`" in (tmp_path / "merged/README.md").read_text()


@needs_smollm2
def test_a_real_file_can_be_a_base() -> None:
    found = inspect(SMOLLM2)
    assert found["problems"] == [] and "its Q4_1 weights are turned back into numbers" in " ".join(found["notes"])
