"""LoRA adapters as GGUF: equal to the official script's, and in llama.cpp to the merged model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.cli.models import examine
from lib.errors import InputError
from lib.models.base_model import refuse_without_template
from lib.models.gguf_file import check_model_gguf, read_metadata, read_tensors
from lib.models.gguf_tokenizer import tokenizer_from_gguf
from lib.models.unpack import unpacked
from lib.runs.machine import llama_cpp_problem
from lib.scoring.llama_backend import LlamaCppBackend
from lib.stages.convert import official
from lib.stages.convert.adapter import SCRIPT, convert_adapter
from lib.stages.convert.convert import convert
from lib.stages.merge.weights import merge_folders
from tests.stages.convert.convertible import CARD, write_model
from tests.tiny_gguf import noise

needs_llama_cpp = pytest.mark.skipif(llama_cpp_problem() is not None, reason="llama-cpp-python does not work here")
KINDS = ("qwen2", "qwen3", "llama")
MODULES = {"qwen2": ("q_proj", "k_proj", "down_proj"), "qwen3": ("q_proj", "o_proj"), "llama": ("q_proj", "k_proj")}


def base_of(folder: Path, kind: str, **options: Any) -> Path:
    return write_model(folder / kind, kind=kind, dtype="float32", **options)


def write_adapter(base: Path, folder: Path, modules: tuple[str, ...], rank: int = 4, **config: Any) -> Path:
    """An adapter as peft stores it, with equal numbers on every machine."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {}
    ranks = config.get("rank_pattern", {})
    with safe_open(base / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and module.endswith(modules):
                rows, columns = file.get_slice(name).get_shape()
                r = ranks.get(module.rpartition(".")[2], rank)
                embedding = module.endswith("embed_tokens")
                ends = ("embedding_A", "embedding_B") if embedding else ("A.weight", "B.weight")
                rows, columns = (columns, rows) if embedding else (rows, columns)
                for end, shape, seed in zip(ends, ((r, columns), (rows, r)), (1, 2), strict=True):
                    values = noise(shape, seed + len(tensors), 0.3)
                    tensors[f"base_model.model.{module}.lora_{end}"] = torch.from_numpy(np.ascontiguousarray(values))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    stored = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 8, "bias": "none"}
    stored |= {"target_modules": sorted(modules), "base_model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct", **config}
    (folder / "adapter_config.json").write_text(json.dumps(stored))
    (folder / "README.md").write_text(CARD)
    return folder


def official_file(adapter: Path, base: Path, output: Path, outtype: str) -> bytes:
    """What the script in llama-cpp-python's own sources makes of an adapter."""
    if (sources := official.kept_sources()) is None:
        pytest.skip("the set-up has kept no converter of llama.cpp")
    arguments = [str(adapter), "--base", str(base), "--outtype", outtype, "--outfile", str(output)]
    command = [sys.executable, str(sources / SCRIPT), *arguments]
    subprocess.run(command, cwd=sources, check=True, capture_output=True, timeout=300)
    return output.read_bytes()


@pytest.mark.parametrize(("kind", "outtype"), [("qwen2", "f16"), ("qwen3", "q8_0"), ("llama", "f32")])
def test_equal_to_the_official_script_byte_for_byte(kind: str, outtype: str, tmp_path: Path) -> None:
    base = base_of(tmp_path, kind)
    adapter = write_adapter(base, tmp_path / "adapter", MODULES[kind], rank_pattern={"q_proj": 2})
    report = convert_adapter(adapter, base, tmp_path / "ours.gguf", outtype)
    assert (report.pairs, report.lora_alpha, report.converter) == (2 * len(MODULES[kind]), 8, "")
    assert (tmp_path / "ours.gguf").read_bytes() == official_file(adapter, base, tmp_path / "theirs.gguf", outtype)


def log_probs(model: Path, adapter: Path | None = None) -> np.ndarray:
    """Of every next token of a fixed text (positions, vocabulary), from llama.cpp."""
    from llama_cpp import Llama

    options = {"n_ctx": 64, "logits_all": True, "verbose": False, "type_k": 0, "type_v": 0, "flash_attn": False}
    loaded = Llama(str(model), lora_path=str(adapter) if adapter else None, **options)
    loaded.eval([5, 77, 130, 9, 201, 18])
    logits = np.array(loaded.scores[:6], np.float64)
    loaded.close()
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


SCALINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "alphas by module": {"alpha_pattern": {"q_proj": 32}, "rank_pattern": {"k_proj": 2}},
    "alpha 0 in one module": {"alpha_pattern": {"q_proj": 0}},
    "alpha 0": {"lora_alpha": 0},
}


@needs_llama_cpp
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_in_llama_cpp_it_answers_as_the_merged_model(kind: str, scaling: str, tmp_path: Path) -> None:
    if kind != "llama" and scaling.startswith("alpha 0"):
        pytest.skip("once is enough")
    base = base_of(tmp_path, kind, tied=kind != "llama")
    modules = (*MODULES[kind], "k_proj", *(("embed_tokens", "lm_head") if kind == "llama" else ()))
    adapter = write_adapter(base, tmp_path / "adapter", modules, **SCALINGS[scaling])
    assert "llama.cpp opened the file" in convert_adapter(adapter, base, tmp_path / "adapter.gguf").loaded
    convert(base, tmp_path / "base.gguf", "f32")
    merge_folders(base, adapter, tmp_path / "merged", "float32", "base")
    convert(tmp_path / "merged", tmp_path / "merged.gguf", "f32")
    merged = log_probs(tmp_path / "merged.gguf")
    beside = log_probs(tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    assert np.abs(beside - merged).max() < 1e-4
    changed = np.abs(merged - log_probs(tmp_path / "base.gguf")).max()
    assert (changed == 0) if scaling == "alpha 0" else (changed > 0.01)


def test_what_takes_models_refuses_it_and_inspect_describes_it(tmp_path: Path) -> None:
    base = base_of(tmp_path, "qwen2")
    convert_adapter(write_adapter(base, tmp_path / "adapter", ("q_proj",)), base, tmp_path / "adapter.gguf")
    found = examine(tmp_path / "adapter.gguf")
    assert not found["problems"] and (found["lora_alpha"], found["pairs"]) == (8, 2)
    path = tmp_path / "adapter.gguf"
    asks = (LlamaCppBackend, unpacked, tokenizer_from_gguf, lambda p: refuse_without_template(str(p)))
    for ask in asks:
        with pytest.raises(InputError, match="is a LoRA adapter, not a model"):
            ask(path)
    assert check_model_gguf(convert_base(base, tmp_path)) == tmp_path / "base.gguf"


def convert_base(base: Path, folder: Path) -> Path:
    convert(base, folder / "base.gguf", "f32")
    return folder / "base.gguf"


def test_what_a_gguf_adapter_cannot_say_is_refused(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    base = base_of(tmp_path, "qwen2")
    adapter = write_adapter(base, tmp_path / "adapter", ("o_proj",), use_dora=True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    lengths = {
        name.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(64) for name in tensors if "_A" in name
    }
    save_file(tensors | lengths, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match="more than low-rank pairs") as caught:
        convert_adapter(adapter, base, tmp_path / "out.gguf")
    assert "workbook merge" in caught.value.do and not (tmp_path / "out.gguf").exists()


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    adapter = write_adapter(base_of(tmp_path, "qwen2"), tmp_path / "adapter", ("q_proj",))
    with pytest.raises(InputError, match="q_proj"):
        convert_adapter(adapter, base_of(tmp_path, "qwen3"), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_another_family_goes_to_the_official_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its alpha is the one that makes up for rsLoRA, which the script does not know."""
    base = base_of(tmp_path, "llama")
    adapter = write_adapter(base, tmp_path / "adapter", ("q_proj",), use_rslora=True)
    own = convert_adapter(adapter, base, tmp_path / "own.gguf")
    if (sources := official.kept_sources()) is None:
        pytest.skip("the set-up has kept no converter of llama.cpp")
    report = convert_adapter(adapter, base, tmp_path / "theirs.gguf", checkout=sources)
    assert report.converter.startswith(SCRIPT) and report.lora_alpha == own.lora_alpha == 8 * 2
    first, second = (read_tensors(tmp_path / f"{name}.gguf") for name in ("own", "theirs"))
    assert [(t.name, t.shape) for t in first] == [(t.name, t.shape) for t in second]
    assert read_metadata(tmp_path / "theirs.gguf")["general.type"] == "adapter"
    odd = write_adapter(base, tmp_path / "odd", ("q_proj", "k_proj"), alpha_pattern={"q_proj": 3})
    with pytest.raises(InputError, match="alpha_pattern"):
        convert_adapter(odd, base, tmp_path / "odd.gguf", checkout=sources)
    assert not (tmp_path / "odd.gguf").exists()
