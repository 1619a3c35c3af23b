"""The language model inside a model that reads pictures, too: Qwen3.5 as it is on the hub, small and random."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from lib.errors import InputError
from lib.models.base_model import check_base_folder, resolve_base
from lib.models.configurations import shapes_of
from lib.models.inspect import inspect
from lib.models.language_model import known_shapes, language_model_of, name_alone, notes_of, text_configuration
from lib.models.weights import open_weights
from tests.tiny_run import make_tokenizer

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 512,
    "tie_word_embeddings": True,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "max_position_embeddings": 512,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.5,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
    "mtp_num_hidden_layers": 1,
}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}


def write_random(kind: Any, config: Any, folder: Path) -> None:
    """A model of that class with random weights that matter, and a tokenizer."""
    import torch

    torch.manual_seed(0)
    model = kind._from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    make_tokenizer(folder)


def write_qwen35(folder: Path, **changes: Any) -> Path:
    """A folder of the hub's form: `text_config`, tensors behind `language_model.`, visual and further layers."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    config = Qwen3_5Config(
        text_config={**TEXT, **changes},
        vision_config={**VISION, "num_position_embeddings": 16},
        tie_word_embeddings=True,
    )
    write_random(Qwen3_5ForConditionalGeneration, config, folder)
    weights = load_file(folder / "model.safetensors") | {"mtp.fc.weight": torch.ones(64, 128)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_gemma3(folder: Path) -> Path:
    """Gemma 3 with pictures, as transformers stores it: the text's tensors are named otherwise than Qwen3.5's."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {key: value for key, value in TEXT.items() if "linear" not in key and key not in ("rope_parameters",)}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**text, "sliding_window": 16},
        vision_config={**vision, "image_size": 32, "patch_size": 16},
        mm_tokens_per_image=4,
        tie_word_embeddings=True,
    )
    write_random(Gemma3ForConditionalGeneration, config, folder)
    return folder


def logits(*folders: Path) -> list[Any]:
    """Of the same ids, as transformers reads each folder."""
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.arange(24)[None] * 7 % 512
    with torch.no_grad():
        models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in folders]
        return [model(input_ids=ids).logits for model in models]


def test_gemma_3_answers_as_the_whole_model(tmp_path: Path, home: Path) -> None:
    import torch

    whole = write_gemma3(tmp_path / "whole")
    base = resolve_base(str(whole))
    assert json.loads((base.path / "config.json").read_text())["architectures"] == ["Gemma3ForCausalLM"]
    assert base.taken is not None and base.taken["left_out"].keys() == {"vision_tower", "multi_modal_projector"}
    first, second = logits(whole, base.path)
    assert first.std() > 0.1 and torch.equal(first, second)
    check_base_folder(whole)


@pytest.mark.parametrize("write", [write_qwen35, write_gemma3])
def test_a_folder_in_shards_is_taken_like_one_of_a_file(write: Any, tmp_path: Path, home: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    whole = write(tmp_path / "whole")
    sharded = tmp_path / "sharded"
    shutil.copytree(whole, sharded, ignore=shutil.ignore_patterns("*.safetensors*"))
    AutoModelForImageTextToText.from_pretrained(whole, dtype=torch.float32).save_pretrained(
        sharded, max_shard_size="100KB"
    )
    assert len(list(sharded.glob("*.safetensors"))) > 2
    taken = [resolve_base(str(folder)).path for folder in (whole, sharded)]
    one, many = (open_weights(folder) for folder in taken)
    assert one.tensors.keys() == many.tensors.keys()
    assert all(torch.equal(t.tensor(), many.tensors[name].tensor()) for name, t in one.tensors.items())
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match="index"):
        check_base_folder(sharded)


def test_names_of_the_parts() -> None:
    assert name_alone("model.language_model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert name_alone("language_model.model.norm.weight") == "model.norm.weight"
    assert name_alone("language_model.lm_head.weight") == name_alone("lm_head.weight") == "lm_head.weight"
    for other in ("model.visual.blocks.0.attn.qkv.weight", "vision_tower.x.weight", "mtp.fc.weight"):
        assert name_alone(other) is None


def test_it_answers_as_the_whole_model(tmp_path: Path, home: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    whole = write_qwen35(tmp_path / "whole")
    base = resolve_base(str(whole))
    assert base.path != whole and base.id == str(whole)
    record = base.taken
    assert record is not None and record["left_out"]["mtp"] == 1 and record["left_out"]["visual"] > 5
    assert base.notes == notes_of(record) and "tensors left out: mtp (1), visual" in base.notes[0]
    config = json.loads((base.path / "config.json").read_text())
    assert config["architectures"] == ["Qwen3_5ForCausalLM"] and "mtp_num_hidden_layers" not in config
    assert {name.split(".")[1] for name in open_weights(base.path).tensors} == {"embed_tokens", "layers", "norm"}
    ids = torch.arange(24)[None] * 7 % 512
    first, second = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(input_ids=ids).logits
        for path in (whole, base.path)
    )
    assert torch.equal(first, second)
    before = (base.path / "model.safetensors").stat().st_mtime_ns
    assert resolve_base(str(whole)).path == base.path  # made once
    assert (base.path / "model.safetensors").stat().st_mtime_ns == before


def test_a_base_that_changed_is_taken_again(tmp_path: Path, home: Path) -> None:
    whole = write_qwen35(tmp_path / "whole")
    before = resolve_base(str(whole))
    tokenizer = json.loads((whole / "tokenizer_config.json").read_text())
    (whole / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"model_max_length": 100}))
    after = resolve_base(str(whole))
    assert after.path != before.path


@pytest.mark.parametrize(
    "lacks", ["model.language_model.norm.weight", "model.language_model.layers.3.mlp.up_proj.weight"]
)
def test_a_tensor_that_is_missing_is_named(lacks: str, tmp_path: Path, home: Path) -> None:
    from safetensors.torch import load_file, save_file

    whole = write_qwen35(tmp_path / "whole")
    weights = load_file(whole / "model.safetensors")
    del weights[lacks]
    save_file(weights, whole / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=name_alone(lacks) or ""):
        language_model_of(whole)
    assert not [path for path in (home / ".cache" / "language-models").glob("text-*") if path.is_dir()]


def test_an_unknown_language_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'zebra'"):
        text_configuration({"text_config": {"model_type": "zebra"}}, tmp_path)
    plain = {"model_type": "qwen2", "hidden_size": 8}
    assert text_configuration(plain, tmp_path) == plain


def test_sizes_of_any_family(tmp_path: Path, home: Path) -> None:
    taken = resolve_base(str(write_qwen35(tmp_path / "whole"))).path
    config = json.loads((taken / "config.json").read_text())
    with pytest.raises(KeyError):
        shapes_of(config)
    assert known_shapes(config) == {name: tensor.shape for name, tensor in open_weights(taken).tensors.items()}
    with pytest.raises(KeyError):
        known_shapes({"model_type": "zebra"})


def rewritten(folder: Path, change: Any) -> Path:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file({name: value.clone() for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def doubled(weights: dict[str, Any]) -> None:
    weights["language_model.model.norm.weight"] = weights["model.language_model.norm.weight"]


def longer(weights: dict[str, Any]) -> None:
    import torch

    weights["model.language_model.layers.0.mlp.up_proj.weight"] = torch.zeros(100, 64)


@pytest.mark.parametrize(("change", "words"), [(doubled, "are one tensor"), (longer, r"up_proj\.weight .*\(100, 64\)")])
def test_inspect_doctor_and_a_run_refuse_the_same(change: Any, words: str, tmp_path: Path, home: Path) -> None:
    whole = rewritten(write_qwen35(tmp_path / "whole"), change)
    for ask in (lambda: check_base_folder(whole), lambda: resolve_base(str(whole))):
        with pytest.raises(InputError, match=words):
            ask()
    assert any(re.search(words, problem) for problem in inspect(whole)["problems"])


def test_inspect_names_what_is_left_out(tmp_path: Path, home: Path) -> None:
    found = inspect(write_qwen35(tmp_path / "whole"))
    assert not found["problems"] and any("tensors left out: mtp (1), visual" in note for note in found["notes"])


def test_an_output_matrix_that_a_tied_model_does_not_read_is_left_out(tmp_path: Path, home: Path) -> None:
    import torch

    whole = rewritten(
        write_qwen35(tmp_path / "whole"), lambda weights: weights.update({"lm_head.weight": torch.ones(512, 64)})
    )
    base = resolve_base(str(whole))
    assert "lm_head.weight" not in open_weights(base.path).tensors
    assert base.taken is not None and base.taken["left_out"]["lm_head"] == 1
