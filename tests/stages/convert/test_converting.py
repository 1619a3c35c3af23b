"""convert() equals the official converter byte for byte; what it cannot convert it refuses and leaves nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.errors import InputError
from lib.models import gguf_file
from lib.models.gguf_file import rope_factors
from lib.models.weights import StoredTensor, open_weights
from lib.stages.convert import convert as convert_convert
from lib.stages.convert import tensors as convert_tensors
from lib.stages.convert import tokenizer
from lib.stages.convert.convert import convert, metadata_table, verify
from lib.stages.convert.official import convert_officially
from lib.stages.convert.tensors import PlannedTensor, encode
from lib.stages.convert.tokenizer import Tokenizer, has_qwen2_structure, read_tokenizer, recognise
from tests.stages.convert.convertible import official, write_model

MODELS = {
    "Small-Qwen2-v1.0": {"card": True},
    "Small-Qwen3": {"kind": "qwen3", "tied": False, "shards": 3, "dtype": "float32"},
    "Odd-Width": {"width": 80, "tied": False, "dtype": "float16"},
    "Long-Context": {
        "kind": "qwen3",
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    },
    "Small-Llama": {"kind": "llama", "tied": False, "head_dim": 16, "shards": 2},
    "Llama-3-Like": {
        "kind": "llama",
        "start": "<|endoftext|>",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 2048,
        },
    },
}
# SHA-256 of the output of convert_hf_to_gguf.py from the llama.cpp inside llama-cpp-python 0.3.36 (vendor/llama.cpp),
# with transformers 5.17.0, made by `convertible.official(checkout, model, output, outtype)`, which runs
#   python -c "$OFFICIAL" MODEL --outtype TYPE --outfile OUT
# in the checkout; remade by these tests when WORKBOOK_LLAMA_CPP names a checkout.
GOLDEN = {
    ("Small-Qwen2-v1.0", "f32"): "ada9dc7d92fb5cdc742eb2c5c45a82faca8008f00149b6ec1534b7a5110bb6dd",
    ("Small-Qwen2-v1.0", "f16"): "9835085bac50575873c8f71099a4c22bf367436608046cdf9c9dae8ed4e0d51e",
    ("Small-Qwen2-v1.0", "bf16"): "1a25062cb95d7858b64b45638161acbe866f5950b5e96ccf9b0563045853dfe2",
    ("Small-Qwen2-v1.0", "q8_0"): "80d30f3dff0bfa53f017d9122723c6151a49fb1b888d26b75f8a70b3541aa702",
    ("Small-Qwen3", "f32"): "2db204bc172c7e2636b0873fdda638b9c8ed895252f6499dbf646bd612076999",
    ("Small-Qwen3", "f16"): "742fa3a8852ddc7ac4d59444c126cfe82a218866ddd6b2c66f125b2f24ad05fa",
    ("Small-Qwen3", "bf16"): "fb9afeb449be12797fb55e81008a3c8fdba4ecd616f1a36acb09efccc33a1079",
    ("Small-Qwen3", "q8_0"): "3e3d9730756aca03d345b07818d86ca0285658ef6ac3a4be077aaf07c70f6970",
    ("Odd-Width", "f32"): "10c28dbbde2a361472989aa4eacfedf6ad06c587403d5db9fa549822410cecce",
    ("Odd-Width", "f16"): "60a1021a0cb73cc4d266bec79d79729d5b45d8d09e48175b18b5eaf8b59ff267",
    ("Odd-Width", "bf16"): "ead17e5675d8ff52abe494afc5d24be39a380653340e0dd295dd5c264a4e10ee",
    ("Odd-Width", "q8_0"): "1748b78db713a826d33ba65a115eb0b94c4ad8369a942dcabc618c88df9d1d6c",
    ("Small-Llama", "f32"): "49a0d23f09214f366d57d953584271739670300a6146a52745a082159e896b1b",
    ("Small-Llama", "f16"): "05f6007385f3bdfcefab17404e7cc0747d71e178a84a27b0d690b8ea787dc14f",
    ("Small-Llama", "bf16"): "a3cb33f7473bf7a76ae30311395251271bd2f53bcef2b1314f00692ca4697c28",
    ("Small-Llama", "q8_0"): "16de1ceb1f7ade4e138c638cfdc27384a1b6cf6eac5f5cf683e94d199f70edeb",
    ("Llama-3-Like", "f32"): "761b9d1ea5642e94ea99145ce6cee420b400c214816f91233907af769a152b1f",
    ("Llama-3-Like", "f16"): "0bc6d6df1a3baea8ee276055d5e9d58db0ff192c47a363fb468b48136d91c5a0",
    ("Llama-3-Like", "bf16"): "4a674d9753478078d084e03b65e310debe0a217a26a651ff1edc130aabd6753d",
    ("Llama-3-Like", "q8_0"): "996f499ade2f2184cad734689c8f8d3129b62ad309d1cd277044144ed053ea8f",
    ("Long-Context", "bf16"): "55d3499ad189d1615b376fa0651f33a2266fbc9160f03ce80db9ffc2125ba86c",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = write_model(tmp_path_factory.mktemp("models") / name, **MODELS[name])
        return made[name]

    return make


@pytest.fixture
def no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the check in llama.cpp's own process, which takes seconds."""
    monkeypatch.setattr(convert_convert, "load_check", lambda path: "not tried")


@pytest.fixture
def copy(model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A private copy of a good model, to be damaged."""
    return Path(shutil.copytree(model("Small-Qwen2-v1.0"), tmp_path / "model"))


def checkout() -> Path:
    folder = os.environ.get("WORKBOOK_LLAMA_CPP")
    if not folder:
        pytest.skip("WORKBOOK_LLAMA_CPP does not name a checkout of llama.cpp")
    return Path(folder)


@pytest.mark.parametrize(("name", "outtype"), GOLDEN)
def test_equals_the_official_converter(
    name: str, outtype: str, model: Callable[[str], Path], tmp_path: Path, no_load: None
) -> None:
    output = tmp_path / "out.gguf"
    report = convert(model(name), output, outtype)
    assert hashlib.sha256(output.read_bytes()).hexdigest() == GOLDEN[name, outtype]
    assert report.bytes_after == output.stat().st_size
    assert report.padding_tokens == 300 - 268


@pytest.mark.parametrize(("name", "outtype"), GOLDEN)
def test_golden_hashes_are_the_official_ones(
    name: str, outtype: str, model: Callable[[str], Path], tmp_path: Path
) -> None:
    official(checkout(), model(name), tmp_path / "official.gguf", outtype)
    assert hashlib.sha256((tmp_path / "official.gguf").read_bytes()).hexdigest() == GOLDEN[name, outtype]


@pytest.mark.parametrize("name", ["qwen2.5-0.5b-instruct", "qwen3-4b-thinking-2507"])
def test_real_tokenizers(name: str, shared_data: Path, tmp_path: Path, no_load: None) -> None:
    """Real Qwen tokenizers: recognised by the check text; equal to the official file where one can be made."""
    config = json.loads((shared_data / name / "config.json").read_text())
    kind = config["model_type"]
    folder = write_model(tmp_path / name, kind=kind, tied=True, vocab_size=config["vocab_size"])
    (folder / "chat_template.jinja").unlink()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.zeros(config["vocab_size"], 64, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shared_data / name / file, folder / file)
    report = convert(folder, tmp_path / "out.gguf", "f16")
    assert (report.pre_tokenizer, report.recognised) == ("qwen2", "the ids of llama.cpp's check text")
    assert report.tokens == config["vocab_size"]
    if os.environ.get("WORKBOOK_LLAMA_CPP"):
        official(checkout(), folder, tmp_path / "official.gguf", "f16", patched=False)
        assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "official.gguf").read_bytes()


@pytest.mark.parametrize(("size", "factor"), [(64, 32.0), (128, 8.0)])
def test_rope_factors_of_llama_3(size: int, factor: float) -> None:
    """Bit for bit those of transformers, whose inverse frequencies are the plain ones divided by these."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    config = LlamaConfig(hidden_size=4 * size, num_attention_heads=4, max_position_embeddings=131072)
    config.rope_parameters = rope
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / (500000.0 ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    factors = rope_factors({"rope_parameters": rope, "head_dim": size})
    assert factors is not None and factors.dtype == np.float32
    np.testing.assert_allclose(plain.numpy() / factors, scaled.numpy(), rtol=3e-7)
    assert rope_factors({"rope_theta": 1e6, "head_dim": size}) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p["single"].append({"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}),
        lambda p: p["single"].pop(0),
        lambda p: p["pair"].pop(),
        lambda p: p["single"][0]["SpecialToken"].update(id="<|im_end|>"),
    ],
)
def test_unusual_templates(change: Callable[[dict], object], tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", **MODELS["Llama-3-Like"])
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(stored["post_processor"]["processors"][1])
    (folder / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    refused(folder, tmp_path, "post-processor TemplateProcessing|the tokenizer in")


def test_sentencepiece(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", **MODELS["Small-Llama"])
    (folder / "tokenizer.model").write_bytes(b"")
    refused(folder, tmp_path, "SentencePiece tokenizer")


def test_official_script(copy: Path, tmp_path: Path) -> None:
    """--llama-cpp DIR: the script's file is published; its failure leaves nothing and says why."""
    folder = tmp_path / "checkout"
    with pytest.raises(InputError, match=r"no convert_hf_to_gguf\.py"):
        convert_officially(copy, tmp_path / "out.gguf", "f16", folder)
    folder.mkdir()
    made = tmp_path / "made.gguf"
    convert(copy, made, "f16")
    script = folder / "convert_hf_to_gguf.py"
    script.write_text(f"import shutil, sys\nshutil.copyfile({str(made)!r}, sys.argv[sys.argv.index('--outfile') + 1])")
    report = convert_officially(copy, tmp_path / "out.gguf", "f16", folder)
    assert (tmp_path / "out.gguf").read_bytes() == made.read_bytes()
    assert report.architecture == "qwen2" and report.tensors == 26 and str(folder) in report.converter
    for text, match in (
        ("import no_such_module_", "ModuleNotFoundError.*its requirements"),
        ("import sys; sys.exit('Model X is not supported')", "Model X is not supported"),
        ("import sys; open(sys.argv[sys.argv.index('--outfile') + 1], 'wb').write(b'GGUF')", "llama.cpp refuses|last"),
    ):
        script.write_text(text)
        (tmp_path / "output").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=match):
            convert_officially(copy, tmp_path / "output" / "out.gguf", "f16", folder)
        assert not list((tmp_path / "output").iterdir())


def test_metadata(model: Callable[[str], Path], tmp_path: Path, no_load: None) -> None:
    convert(model("Small-Qwen2-v1.0"), tmp_path / "out.gguf", "f16", name="My model")
    table = dict(metadata_table(tmp_path / "out.gguf"))
    assert table["general.name"] == "My model"
    assert table["general.sampling.penalty_repeat"].startswith("1.1")
    assert table["general.base_model.0.name"] == "Qwen2.5 0.5B Instruct"
    assert table["tokenizer.ggml.tokens"] == "300 values"
    assert table["tokenizer.ggml.eos_token_id"] == "266"
    assert table["tokenizer.ggml.bos_token_id"] == "264"
    assert all(len(value) <= 60 for value in table.values())


def test_verify_notices_a_wrong_file(model: Callable[[str], Path], tmp_path: Path, no_load: None) -> None:
    path = tmp_path / "out.gguf"
    convert(model("Small-Qwen3"), path, "f16")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    verify(path, types)
    for wrong in (
        {**types, "output.weight": "BF16"},
        {key: types[key] for key in types if key != "output.weight"},
        {**types, "more.weight": "F16"},
    ):
        with pytest.raises(RuntimeError, match=r"[12] tensors differ"):
            verify(path, wrong)
    whole = path.read_bytes()
    for content in (whole[:-32], whole + bytes(32)):
        path.write_bytes(content)
        with pytest.raises(RuntimeError, match="last tensor ends"):
            verify(path, types)


def test_llama_cpp_opens_the_result(model: Callable[[str], Path], tmp_path: Path) -> None:
    from lib.runs.machine import llama_cpp_problem

    report = convert(model("Odd-Width"), tmp_path / "out.gguf", "q8_0")
    assert ("opened" in report.loaded) == (llama_cpp_problem() is None)
    assert report.float16_fallback
    assert report.types["F16"] == len(report.float16_fallback)


def test_llama_cpp_refusal_reaches_the_user(copy: Path, tmp_path: Path) -> None:
    from lib.runs.machine import llama_cpp_problem

    if problem := llama_cpp_problem():
        pytest.skip(problem)
    bias = "model.layers.0.self_attn.q_proj.bias"
    edit(copy, lambda tensors: tensors.update({bias: tensors[bias][:-2].clone()}))
    refused(copy, tmp_path, "llama.cpp refuses|the process for")


def reconfigure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(folder: Path, tmp_path: Path, match: str, outtype: str = "f16") -> None:
    (tmp_path / "output").mkdir(exist_ok=True)
    with pytest.raises(InputError, match=match):
        convert(folder, tmp_path / "output" / "out.gguf", outtype)
    assert not list((tmp_path / "output").iterdir())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
            "Qwen2ForCausalLM, Qwen3ForCausalLM, Llama",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized weights"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1234.0}}}, "under 'full_attention', and a qwen2 model"),
        ({"rope_scaling": {"sliding_attention": {"rope_type": "default"}}}, "under 'sliding_attention'"),
        ({"head_dim": 32}, "head_dim 32"),
        ({"num_hidden_layers": 3}, "says 3 layers, the weights have 2"),
        ({"num_hidden_layers": 1}, "says 1 layers, the weights have 2"),
        ({"tie_word_embeddings": False}, r"lacks 1 tensors .*lm_head.weight"),
        ({"vocab_size": 301}, "vocab_size is 301, .* shape .300, 64"),
        ({"vocab_size": 200}, "vocab_size is 200"),
    ],
)
def test_configuration(changes: dict, match: str, copy: Path, tmp_path: Path) -> None:
    reconfigure(copy, **changes)
    refused(copy, tmp_path, match)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
"""What every program computes alike; of the keys below llama.cpp takes none out of a file."""


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"attention_factor": 2.0}, "attention_factor 1.139"),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, "attention_factor or mscale"),
        ({"truncate": False}, "truncate False"),
        ({"beta_fast": 16}, "beta_fast 16"),
        ({"beta_slow": 2.0}, "beta_slow 2.0"),
        ({"factor": None}, "rope type yarn without factor"),
        ({"attention_factor": 1.138629, "beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale": 1.0}, None),
    ],
)
def test_keys_of_yarn_that_a_file_cannot_say(
    keys: dict, match: str | None, copy: Path, tmp_path: Path, no_load: None
) -> None:
    reconfigure(copy, rope_scaling=YARN | keys)
    if match:
        refused(copy, tmp_path, match)
    else:
        convert(copy, tmp_path / "fine.gguf")


@pytest.mark.parametrize(
    "change",
    [
        {"added_tokens_decoder": {}},
        {"eos_token": "nosuch"},
        {"bos_token": "<|never|>"},
        {"split_special_tokens": True},
        {"bos_token": {"content": "<|endoftext|>", "lstrip": False}},
    ],
    ids=str,
)
def test_tokens_that_transformers_reads_otherwise(change: dict, copy: Path, tmp_path: Path) -> None:
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(copy, tmp_path, "for transformers|split_special_tokens|has to be either str")


@pytest.mark.parametrize("change", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"content": "\u2581x"}])
def test_added_tokens_that_gguf_cannot_say(change: dict, copy: Path, tmp_path: Path, no_load: None) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (copy / name).read_text(encoding="utf-8")
        decoded = json.loads(text, object_hook=lambda o: o | change if o.get("content") == "<tool_call>" else o)
        (copy / name).write_text(json.dumps(decoded))
    found = convert(copy, tmp_path / "out.gguf").unsaid
    assert len(found) == 1 and found[0].startswith(change.get("content", "<tool_call>"))


def test_more_tokens_than_rows(copy: Path, tmp_path: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:266].clone()

    edit(copy, cut)
    reconfigure(copy, vocab_size=266)
    refused(copy, tmp_path, "token id 267, but the embedding has 266 rows")


@pytest.mark.parametrize(
    ("value", "outtype", "match"),
    [
        (1e5, "f16", r"weight of size 99840 .*; F16 ends at 65504.*"),
        (-7e4, "f16", "use outtype bf16"),
        (9e6, "q8_0", "Q8_0 ends at"),
        (float("nan"), "bf16", "NaN or infinity"),
        (float("-inf"), "f32", "NaN or infinity"),
    ],
)
def test_values_the_type_cannot_hold(value: float, outtype: str, match: str, copy: Path, tmp_path: Path) -> None:
    edit(copy, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[5:6].fill_(value))
    refused(copy, tmp_path, match, outtype)


def test_large_values_fit_bfloat16(copy: Path, tmp_path: Path, no_load: None) -> None:
    edit(copy, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[5:6].fill_(1e5))
    assert convert(copy, tmp_path / "out.gguf", "bf16").types["BF16"] == 15


def test_damaged_files(copy: Path, tmp_path: Path) -> None:
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    for content, match in (
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<html>", "web page"),
        (whole[:-1], "damaged"),
    ):
        weights.write_bytes(content)
        refused(copy, tmp_path, match)
    weights.unlink()
    refused(copy, tmp_path, "no weights")
    (copy / "pytorch_model.bin").write_bytes(b"PK")
    refused(copy, tmp_path, "pickled weights")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [None, b"{", b"[]", b"\xff\xfe"])
def test_missing_or_damaged_json(file: str, content: bytes | None, copy: Path, tmp_path: Path) -> None:
    if content is None:
        (copy / file).unlink()
    else:
        (copy / file).write_bytes(content)
    refused(copy, tmp_path, file)


def test_texts_of_a_model_card_are_as_they_are_written(copy: Path, tmp_path: Path, no_load: None) -> None:
    front = "version: 2.10\nlicense: 2024-01-01\nauthor: [a, 2]\nfinetune: {a: b}\nlanguage: [no, on]\ntags: [1]\n"
    front += "base_model: [{name: 7, author: {a: b}}, org/Model-1B]\ndescription:\nmodel_name: 2024\n"
    (copy / "README.md").write_text(f"---\n{front}---\n# x\n")
    convert(copy, tmp_path / "x.gguf")
    said = gguf_file.read_metadata(tmp_path / "x.gguf")
    found = {key.removeprefix("general."): value for key, value in said.items() if key.startswith("general.")}
    wanted = {"version": "2.10", "license": "2024-01-01", "author": "a, 2", "languages": ["no", "on"], "tags": ["1"]}
    wanted |= {"name": "2024", "base_model.count": 2, "base_model.0.name": "7", "base_model.1.name": "Model 1B"}
    assert {key: found.get(key) for key in wanted} == wanted
    assert not {"finetune", "description", "base_model.0.author"} & found.keys()


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"temperature": "0.7"}, "temperature is '0.7'"),
        ({"top_k": 2**31}, "top_k is 2147483648"),
        ({"top_k": True}, "top_k is True"),
        ({"top_p": 1e300}, r"top_p is 1e\+300"),
        ({"repetition_penalty": [1]}, r"repetition_penalty is \[1\]"),
        ({"sequence": 3}, "sequence is 3"),
        ({"top_k": 50.0, "temperature": 1, "repetition_penalty": 1.5, "do_sample": True}, None),
    ],
)
def test_sampling_of_another_kind(values: dict, match: str | None, copy: Path, tmp_path: Path, no_load: None) -> None:
    (copy / "generation_config.json").write_text(json.dumps(values))
    if match:
        refused(copy, tmp_path, f"generation_config.json: {match}")
        return
    convert(copy, tmp_path / "x.gguf")
    said = gguf_file.read_metadata(tmp_path / "x.gguf")
    found = [said[f"general.sampling.{key}"] for key in ("top_k", "temp", "penalty_repeat")]
    assert found == [50, 1.0, 1.5] and type(found[0]) is int


def test_damaged_model_card(copy: Path, tmp_path: Path) -> None:
    (copy / "README.md").write_text("---\na: [1\n---\n")
    refused(copy, tmp_path, r"README\.md")


def test_a_card_whose_aliases_never_end_is_refused(copy: Path, tmp_path: Path) -> None:
    levels = [f"a{i}: &a{i}\n  <<: [" + ", ".join([f"*a{i - 1}"] * 9) + "]\n" for i in range(1, 12)]
    keys = ", ".join(f"k{i}: 1" for i in range(10))
    (copy / "README.md").write_text("---\na0: &a0 {" + keys + "}\n" + "".join(levels) + "---\n")
    refused(copy, tmp_path, "more than 8 aliases")


@pytest.mark.parametrize(
    "odd", [{"model": None}, {"model": []}, {"added_tokens": [{"id": -5, "content": "<|endoftext|>", "special": True}]}]
)
def test_a_tokenizer_of_odd_values_is_refused(copy: Path, tmp_path: Path, odd: dict) -> None:
    path = copy / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **odd}), encoding="utf-8")
    refused(copy, tmp_path, "the tokenizer in")


def tokenizer_of(folder: Path) -> Tokenizer:
    stored, settings = (json.loads((folder / f"{name}.json").read_text()) for name in ("tokenizer", "tokenizer_config"))
    return read_tokenizer(folder, stored, settings)


def test_unknown_pre_tokenizer(copy: Path) -> None:
    assert recognise(tokenizer_of(copy))[0] == "qwen2"
    path = copy / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace(r"|\\p{N}|", r"|\\p{N}{1,3}|"), encoding="utf-8")
    (copy / "config.json").unlink()  # for a Qwen2 model transformers puts Qwen2's own pattern back
    config = copy / "tokenizer_config.json"
    config.write_text(config.read_text().replace("Qwen2Tokenizer", "PreTrainedTokenizerFast"))
    with pytest.raises(InputError, match="splits text in an unknown way"):
        recognise(tokenizer_of(copy))


def same_both_ways(folder: Path, monkeypatch: pytest.MonkeyPatch, plain: bool = True) -> None:
    """What the tokenizers library alone reads is what transformers reads; `plain`: the short way was taken."""
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "_transformers", lambda folder: pytest.fail("not the short way"))
        short = tokenizer_of(folder) if plain else None
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "_is_plain", lambda *_: False)
        whole = tokenizer_of(folder)
    if short is not None:
        assert short.vocabulary == whole.vocabulary
        assert short.check_ids == whole.check_ids
        assert sorted(short.added, key=lambda t: t.id) == sorted(whole.added, key=lambda t: t.id)
        assert has_qwen2_structure(whole.backend)


@pytest.mark.parametrize("name", ["qwen1.5-0.5b-chat", "qwen2.5-0.5b-instruct", "qwen3-4b-thinking-2507"])
def test_real_tokenizers_without_transformers(name: str, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same_both_ways(shared_data / name, monkeypatch)


def test_small_tokenizer_without_transformers(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same_both_ways(copy, monkeypatch)


@pytest.mark.parametrize(
    "change",
    [
        {"additional_special_tokens": ["<tool_call>"]},
        {"eos_token": "<|new|>"},
        {"add_bos_token": True},
        {"tokenizer_class": "LlamaTokenizerFast"},
        {"added_tokens_decoder": {"264": {"content": "<|other|>", "special": True}}},
        {"added_tokens_decoder": {}},
        {"bos_token": {"content": "<|endoftext|>", "lstrip": False}},
        {"clean_up_tokenization_spaces": True},
    ],
)
def test_settings_that_only_transformers_can_judge(change: dict, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    asked = []
    monkeypatch.setattr(tokenizer, "_transformers", lambda folder: asked.append(folder))
    tokenizer_of(copy)
    assert asked == [copy]


@pytest.mark.parametrize("name", MODELS)
def test_config_without_transformers(
    name: str, model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_load: None
) -> None:
    """A complete config.json needs no defaults: the file is the same without transformers' reading of it."""
    convert(model(name), tmp_path / "short.gguf", "f32")
    monkeypatch.setattr(convert_tensors, "_plain_config", lambda folder: None)
    convert(model(name), tmp_path / "long.gguf", "f32")
    assert (tmp_path / "short.gguf").read_bytes() == (tmp_path / "long.gguf").read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.update(normalizer={"type": "NFKC"}),
        lambda b: b["model"].update(ignore_merges=True),
        lambda b: b["model"].update(byte_fallback=True),
        lambda b: b["model"].update(type="Unigram"),
        lambda b: b["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
        lambda b: b["pre_tokenizer"]["pretokenizers"][0].update(invert=True),
        lambda b: b["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        lambda b: b["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True),
        lambda b: b["pre_tokenizer"]["pretokenizers"].pop(),
        lambda b: b.update(pre_tokenizer=None),
    ],
)
def test_structure_of_qwen2(change: Callable[[dict], object], copy: Path) -> None:
    backend = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    assert has_qwen2_structure(backend)
    change(backend)
    assert not has_qwen2_structure(backend)


def test_output_paths(copy: Path, tmp_path: Path) -> None:
    for name, match in (("out.bin", "ends in .gguf"), ("folder.gguf", "is a folder")):
        (tmp_path / "folder.gguf").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=match):
            convert(copy, tmp_path / name, "f16")
    (copy / "link.gguf").symlink_to(copy / "model.safetensors")
    before = (copy / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="is an input file"):
        convert(copy, copy / "link.gguf", "f16")
    assert (copy / "model.safetensors").read_bytes() == before
    with pytest.raises(InputError, match="outtype 'q4_0'"):
        convert(copy, tmp_path / "out.gguf", "q4_0")


def test_previous_file_survives_a_failure(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_bytes(b"precious")
    edit(copy, lambda tensors: tensors["model.norm.weight"].fill_(float("inf")))
    with pytest.raises(InputError, match="NaN or infinity"):
        convert(copy, tmp_path / "out.gguf", "f16")
    assert (tmp_path / "out.gguf").read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.gguf"]


def test_disk_full(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    refused(copy, tmp_path, "free on the disk")


def test_slabs_do_not_change_the_bytes(
    model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_load: None
) -> None:
    convert(model("Small-Qwen2-v1.0"), tmp_path / "whole.gguf", "q8_0")
    monkeypatch.setattr("lib.models.gguf_file.SLAB", 200)
    convert(model("Small-Qwen2-v1.0"), tmp_path / "slabs.gguf", "q8_0")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "slabs.gguf").read_bytes()


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_rounding_equals_the_gguf_library(stored: str, kind: str) -> None:
    """Arbitrary bit patterns, subnormals and ties among them; gguf.quants rounds as llama.cpp's C code does."""
    draw = np.random.default_rng(7)
    bits = torch.from_numpy(draw.integers(0, 2**16, 64 * 256, dtype=np.uint16).view(np.int16))
    values = bits.view(torch.bfloat16).to(torch.float64)
    values = torch.cat([values, torch.from_numpy(draw.normal(0, 1, 64 * 256))])
    values = values[values.abs() < 6e4].to(getattr(torch, stored))
    slab = values[: len(values) // 64 * 64].reshape(-1, 64)
    wanted = gguf.quants.quantize(slab.to(torch.float32).numpy(), gguf.GGMLQuantizationType[kind])
    bits = slab.view(torch.uint16) if stored == "bfloat16" else slab
    source = StoredTensor(
        "w",
        {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}[stored],
        slab.shape,
        Path(),
        0,
        0,
    )
    planned = PlannedTensor("w", gguf.GGMLQuantizationType[kind], tuple(slab.shape), 0, source)
    assert encode(planned, bits.reshape(-1).numpy(), source.dtype).tobytes() == wanted.tobytes()


def test_weights_are_mapped_not_read(model: Callable[[str], Path]) -> None:
    weights = open_weights(model("Small-Qwen3"))
    tensor = weights.tensors["model.embed_tokens.weight"]
    assert isinstance(tensor.raw(), np.memmap)
    assert tensor.tensor().shape == (300, 64)
    assert [path.name for path in weights.files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_an_output_that_is_there_is_no_input_that_is_not_yet(tmp_path: Path) -> None:
    """`merge --gguf OUT.gguf` converts weights while they are written; OUT.gguf may be there from an earlier time."""
    from types import SimpleNamespace

    from lib.stages.convert.convert import check_output

    (tmp_path / "out.gguf").write_bytes(b"old")
    check_output(tmp_path / "out.gguf", SimpleNamespace(files=[tmp_path / "not-yet.safetensors"]), "f16")
    with pytest.raises(InputError, match="is an input file"):
        check_output(tmp_path / "out.gguf", SimpleNamespace(files=[tmp_path / "out.gguf"]), "f16")


@pytest.mark.parametrize("given", ["null", '"BPE"', "[]"])
def test_a_tokenizer_whose_model_is_no_object(given: str, copy: Path, tmp_path: Path) -> None:
    (copy / "tokenizer.json").write_text(f'{{"version": "1.0", "added_tokens": [], "model": {given}}}')
    refused(copy, tmp_path, "model is no object")
