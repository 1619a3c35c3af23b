"""Models that only llama.cpp's own converter knows: from the sources that the set-up keeps, behind the same gate."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lib.errors import InputError
from lib.pipeline.resources import conversion_problem
from lib.runs.manifest import version_of
from lib.scoring.llama_backend import LlamaCppBackend
from lib.stages.convert import official
from lib.stages.convert.official import SCRIPT, check_conversion, convert_folder, kept_sources, known_classes
from lib.stages.merge.weights import merge_folders
from scripts.keep_converter import keep
from tests.stages.convert.convertible import write_model

SMOL = "SmolLM3ForCausalLM"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A small Qwen2 whose config.json names a class that our converter does not know."""
    folder = write_model(tmp_path / "model", card=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [SMOL], "model_type": "smollm3"}))
    return folder


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources whose script copies a prepared file, where the set-up would have put them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "quantization-workbook" / f"llama.cpp-{version_of('llama_cpp_python')}"
    (folder / "conversion").mkdir(parents=True)
    table = f'TEXT_MODEL_MAP = {{"{SMOL}": "smollm3"}}\nMMPROJ_MODEL_MAP = {{"LlavaModel": "llava"}}\n'
    (folder / "conversion" / "__init__.py").write_text(table)
    own = write_model(tmp_path / "own", card=True)
    convert_folder(own, tmp_path / "prepared.gguf")
    copy = f"shutil.copyfile({str(tmp_path / 'prepared.gguf')!r}, sys.argv[sys.argv.index('--outfile') + 1])"
    (folder / SCRIPT).write_text(f"import shutil, sys\n{copy}\n")
    return folder


def test_a_class_that_ours_does_not_know_goes_to_the_kept_script(
    foreign: Path, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kept_sources() == sources and known_classes(sources) == {SMOL}
    assert "is known only then" in check_conversion(foreign)[0]
    report = convert_folder(foreign, tmp_path / "out.gguf")
    assert report.converter == f"{SCRIPT} of llama-cpp-python {version_of('llama_cpp_python')}"
    assert (report.tensors, report.tokens) == (26, 300) and sum(report.types.values()) == 26
    assert "the workbook's own converter found a SmolLM3ForCausalLM model" in capsys.readouterr().err
    config = json.loads((foreign / "config.json").read_text())
    assert conversion_problem(config) is None
    assert "BloomForCausalLM" in conversion_problem(config | {"architectures": ["BloomForCausalLM"]})


def test_what_neither_knows_is_refused(foreign: Path, sources: Path, tmp_path: Path) -> None:
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(config | {"architectures": ["LlavaModel"]}))
    for ask in (check_conversion, lambda folder: convert_folder(folder, tmp_path / "out.gguf")):
        with pytest.raises(InputError, match="LlavaModel model in"):
            ask(foreign)


def test_without_the_sources_it_says_where_they_come_from(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    with pytest.raises(InputError, match=r"SmolLM3ForCausalLM model in .* run make where llama-cpp-python is compiled"):
        convert_folder(foreign, tmp_path / "out.gguf")


def with_file(folder: Path) -> None:
    (folder / "modeling_own.py").write_text("raise SystemExit('was run')")


def with_auto_map(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["own.Own", None]}}))


@pytest.mark.parametrize("change", [with_file, with_auto_map])
def test_code_of_a_folder_is_refused(change: Callable, foreign: Path, sources: Path, tmp_path: Path) -> None:
    """The official script trusts it."""
    change(foreign)
    for ask in (check_conversion, lambda folder: convert_folder(folder, tmp_path / "out.gguf")):
        with pytest.raises(InputError, match="brings code of its own"):
            ask(foreign)


def test_a_base_may_bring_code_that_its_merge_does_not(foreign: Path, sources: Path, tmp_path: Path) -> None:
    """transformers knows the class, so nothing of the folder runs; what 05 converts is the merged folder."""
    with_file(foreign)
    with_auto_map(foreign)
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}})
    )
    assert "is known only then" in check_conversion(foreign, as_base=True)[0]
    merge_folders(foreign, None, tmp_path / "merged", tokenizer="base")
    assert check_conversion(tmp_path / "merged")
    assert not [path for path in (tmp_path / "merged").iterdir() if "auto_map" in path.read_text(errors="replace")]


def test_the_converter_is_kept_out_of_the_sources(tmp_path: Path) -> None:
    inside = tmp_path / "llama_cpp_python-9" / "vendor" / "llama.cpp"
    for name in (SCRIPT, "conversion/__init__.py", "gguf-py/gguf/__init__.py", "src/llama.cpp", "LICENSE"):
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / name).write_text(name)
    with tarfile.open(tmp_path / "sources.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "llama_cpp_python-9", "llama_cpp_python-9")
    keep(tmp_path / "sources.tar.gz", tmp_path / "kept")
    kept = tmp_path / "kept"
    found = {path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file()}
    assert found == {SCRIPT, "conversion/__init__.py", "gguf-py/gguf/__init__.py", "LICENSE"}


@pytest.mark.parametrize("kind", ["smollm3", "granite"])
def test_a_real_conversion_answers_as_the_model(kind: str, shared_data: Path, tmp_path: Path) -> None:
    """Random weights of other families with Qwen2.5's tokenizer; the file of the official script in llama.cpp."""
    if kept_sources() is None:
        pytest.skip("the set-up has not kept llama.cpp's converter here (make, where llama-cpp-python is compiled)")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from lib.scoring.folders import open_folder

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    ids = {"vocab_size": 151936, "bos_token_id": None, "eos_token_id": 151645, "pad_token_id": 151643}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **heads, **ids))
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.normal_(0, 0.05)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(shared_data / "qwen2.5-0.5b-instruct").save_pretrained(tmp_path / "model")
    report = official.convert_folder(tmp_path / "model", tmp_path / "out.gguf", "f32")
    assert report.architecture == kind and report.pre_tokenizer == "qwen2" and report.tokens == 151936
    text = list(range(100, 160))
    exact = {"cache_type": "f32", "flash_attention": False, "n_outputs": 64}
    with LlamaCppBackend(tmp_path / "out.gguf", 128, 1, **exact) as backend:
        ours = backend.window_log_probs(text)
    with open_folder(tmp_path / "model") as backend:
        np.testing.assert_allclose(ours, backend.window_log_probs(text), atol=2e-3)
