"""A GGUF file unpacked is the file's own model: tensors, configuration, tokenizer; and nothing is left of a failure."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lib.errors import InputError
from lib.models import unpack as models_unpack
from lib.models.gguf_file import read_tensors
from lib.models.inspect import inspect
from lib.models.loading import load_model, load_tokenizer
from lib.models.unpack import asked_in, identity, is_identity, notes_of, plain_name, unpack
from lib.models.unpack_source import Keys, config_of, generation_of, read_source, transformers_config
from lib.runs.files import sha256_file
from lib.stages.convert import convert
from tests.models import packed

each = pytest.mark.parametrize("name", packed.MODELS)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def expected(path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor by the gguf library's reader, names by its table, Llama's rows put back one by one."""
    reader = gguf.GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items()}
    kind = keys["general.architecture"]
    heads = {"attn_q": keys[f"{kind}.attention.head_count"], "attn_k": keys[f"{kind}.attention.head_count_kv"]}
    number = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[kind]
    table = gguf.get_tensor_name_map(number, keys[f"{kind}.block_count"]).mapping
    originals = load_file(path.parent / f"{path.name.partition('.')[0]}-original/model.safetensors").keys()
    found = {}
    for tensor in reader.tensors:
        stem, _, suffix = tensor.name.rpartition(".")
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        count = heads.get(stem.rpartition(".")[2], 0) if kind == "llama" else 0
        if count:
            half = len(values) // count // 2
            order = [h * 2 * half + 2 * j + i for h in range(count) for i in range(2) for j in range(half)]
            values = values[order]
        names = {f"{key}.{suffix}" for key, (_, ours) in table.items() if ours == stem}
        (theirs,) = names & originals
        found[theirs] = values.to(dtype)
    return found


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((a.view(torch.uint8) == b.view(torch.uint8)).all())


@each
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tensor_is_the_librarys_dequantization_rounded_once(
    name: str, dtype: str, packed_files: dict[str, Path], tmp_path: Path
) -> None:
    record = unpack(packed_files[name], tmp_path / "model", dtype)
    found, wanted = load_file(tmp_path / "model/model.safetensors"), expected(packed_files[name], DTYPES[dtype])
    assert found.keys() == wanted.keys()
    assert all(same_bits(found[key], wanted[key]) for key in wanted)
    assert record["main_type"] == "Q4_1" and sum(record["types"].values()) == sum(t.numel() for t in found.values())
    assert record["sha256"] == sha256_file(packed_files[name]) and record["dtype"] == dtype
    assert json.loads((tmp_path / "model/unpacked.json").read_text()) == record
    assert record["cost"][dtype] == pytest.approx(0, abs=1e-3) and record["cost"]["float32"] == 0


@each
def test_logits_equal_those_of_transformers_own_reading(
    name: str, packed_files: dict[str, Path], tmp_path: Path
) -> None:
    unpack(packed_files[name], tmp_path / "model", "float32")
    ours = load_model(tmp_path / "model", "float32", device="cpu")
    told = {"head_dim": 32} if name == "qwen3" else {}  # transformers 5.17 takes 128 whatever attention.key_length says
    theirs = AutoModelForCausalLM.from_pretrained(
        packed_files[name].parent, gguf_file=packed_files[name].name, dtype=torch.float32, **told
    ).eval()
    ids = torch.arange(3, 120)[None]
    with torch.inference_mode():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-4


@each
def test_folder_to_gguf_to_folder_is_bit_equal(
    name: str, packed_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "load_check", lambda *_: "")
    unpack(packed_files[name], tmp_path / "model")
    convert.convert(tmp_path / "model", tmp_path / "model.gguf", "f16")
    unpack(tmp_path / "model.gguf", tmp_path / "again", "float16")
    files = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    different = [f for f in files if (tmp_path / "model" / f).read_bytes() != (tmp_path / "again" / f).read_bytes()]
    assert different == ["unpacked.json"]


@each
def test_configuration_equals_the_originals(name: str, packed_files: dict[str, Path], tmp_path: Path) -> None:
    unpack(packed_files[name], tmp_path / "model")
    original = packed_files[name].parent / f"{name}-original"
    found, wanted = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "model", original))
    same = set(wanted) - {"torch_dtype"}
    assert {key: found[key] for key in same} == {key: wanted[key] for key in same}
    sampling = json.loads((tmp_path / "model/generation_config.json").read_text())
    assert (sampling["temperature"], sampling["top_k"], sampling["repetition_penalty"]) == (0.7, 20, 1.1)
    assert load_tokenizer(tmp_path / "model").chat_template == load_tokenizer(original).chat_template


ROPES = [
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 32.0},
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 8192},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 6.0}
    | {"original_max_position_embeddings": 1024},
]


@pytest.mark.parametrize("scaling", ROPES, ids=lambda s: f"{s['rope_type']}-{s['factor']:g}")
def test_rope_scaling_comes_back(scaling: dict, tmp_path: Path) -> None:
    options = {"kind": "llama", "width": 256, "head_dim": 64, "rope_theta": 500000.0, "rope_scaling": scaling}
    path = packed.make(tmp_path, "rope", options)
    assert read_source(path).config["rope_scaling"] == scaling


def test_other_factors_of_rotary_frequencies_are_refused(tmp_path: Path) -> None:
    options = {"kind": "llama", "width": 256, "head_dim": 64, "rope_theta": 500000.0, "rope_scaling": ROPES[2]}
    path = packed.make(
        tmp_path, "rope", options, tensors=lambda arrays: arrays["rope_freqs.weight"].__imul__(np.float32(1.1))
    )
    with pytest.raises(InputError, match="not those of Llama 3"):
        read_source(path)


def replaced(key: str, old: int, new: int) -> Callable[[bytes], bytes]:
    """An unsigned 32-bit value of the header replaced."""

    def change(pairs: bytes) -> bytes:
        before, after = (packed.text(key) + struct.pack("<II", 4, value) for value in (old, new))
        assert before in pairs
        return pairs.replace(before, after)

    return change


def named(old: str, new: str) -> Callable[[bytes], bytes]:
    """A string of the header replaced by one of the same kind."""
    return lambda pairs: pairs.replace(packed.text(old), packed.text(new))


REFUSED = {
    "another architecture": ({"change": named("qwen2", "gemma")}, "architecture 'gemma'"),
    "another pre-tokenizer": (
        {
            "change": lambda b: b.replace(
                packed.text("tokenizer.ggml.pre") + struct.pack("<I", 8) + packed.text("qwen2"),
                packed.text("tokenizer.ggml.pre") + struct.pack("<I", 8) + packed.text("tekken"),
            )
        },
        "rules 'tekken'",
    ),
    "no merges": ({"change": named("tokenizer.ggml.merges", "tokenizer.ggml.morges")}, "no merges"),
    "no vocabulary": ({"change": named("tokenizer.ggml.tokens", "tokenizer.ggml.tokons")}, "no tokens"),
    "experts": ({"change": named("qwen2.context_length", "qwen2.expert_count")}, "expert_count 4096"),
    "no context": ({"change": named("qwen2.context_length", "qwen2.context_longth")}, "no key qwen2.context_length"),
    "another width": ({"change": replaced("qwen2.feed_forward_length", 96, 128)}, r"of shape \(96, 64\)"),
    "more blocks": ({"change": replaced("qwen2.block_count", 2, 3)}, "lacks 12 tensors"),
    "billions of blocks": ({"change": replaced("qwen2.block_count", 2, 2**31)}, "blocks, 26 tensors"),
    "a tensor more": ({"tensors": lambda a: a.update(odd=np.zeros(3, np.float32))}, "also has 1 tensors"),
    "a tensor less": ({"tensors": lambda a: a.pop("output_norm.weight")}, "lacks 1 tensors"),
    "NaN": ({"tensors": lambda a: a["output_norm.weight"].fill(np.nan)}, "NaN or infinity in tensor model.norm"),
    "a tokenizer transformers would read otherwise": (
        {
            "change": lambda b: b.replace(
                packed.text("tokenizer.ggml.pre") + struct.pack("<I", 8) + packed.text("qwen2"),
                packed.text("tokenizer.ggml.pre") + struct.pack("<I", 8) + packed.text("smollm"),
            )
        },
        "a qwen2 model with the tokenizer rules 'smollm'",
    ),
    "older linear scaling": ({"more": {"qwen2.rope.scale_linear": 4.0}}, "rope.scale_linear 4.0"),
    "an attention factor": ({"more": {"qwen2.rope.scaling.attn_factor": 1.5}}, "attn_factor 1.5"),
    "YaRN's attention factor": ({"more": {"qwen2.rope.scaling.yarn_attn_factor": 1.5}}, "yarn_attn_factor 1.5"),
    "a context that no folder may have": ({"more": {"qwen2.context_length": 2**31}}, "max_position_embeddings is 2147"),
    "layers that guess": ({"more": {"qwen2.nextn_predict_layers": 1}}, "nextn_predict_layers 1"),
    "other bounds of YaRN": ({"more": {"qwen2.rope.scaling.yarn_beta_fast": 8.0}}, "yarn_beta_fast 8.0"),
    "part of YaRN": ({"more": {"qwen2.rope.scaling.yarn_ext_factor": 0.5}}, "yarn_ext_factor 0.5"),
    "an embedding without dimensions": (
        {"tensors": lambda a: a.update({"token_embd.weight": np.float32(1).reshape(())})},
        "tokens, 0 rows of embedding",
    ),
    "a template that is no text": (
        {"more": {"tokenizer.chat_template.tool": 1}},
        "chat_template.tool' with a value of",
    ),
    "a template named by NUL": ({"more": {"tokenizer.chat_template.\0": "x"}}, "a chat template as text"),
    "a template named by a path": ({"more": {"tokenizer.chat_template.a/b": "x"}}, "a chat template as text"),
    "infinity": ({"tensors": lambda a: a["output_norm.weight"].fill(np.inf)}, "NaN or infinity in tensor model.norm"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, packed_files: dict[str, Path], tmp_path: Path) -> None:
    changes, match = REFUSED[case]
    path = packed.repack(packed_files["qwen2"].parent / "qwen2-f32.gguf", tmp_path / "odd.gguf", **changes)
    with pytest.raises(InputError, match=match):
        unpack(path, tmp_path / "model")
    assert [entry.name for entry in tmp_path.iterdir()] == ["odd.gguf"]


def test_split_cut_and_unknown_files_are_refused(packed_files: dict[str, Path], tmp_path: Path) -> None:
    whole = packed_files["llama"].read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:-4000])
    with pytest.raises(InputError, match="ends at byte"):
        unpack(tmp_path / "cut.gguf", tmp_path / "model")
    (tmp_path / "split.gguf").write_bytes(
        whole.replace(packed.text("llama.context_length"), packed.text("split.count"))
        + b"\0" * 64  # the key became shorter: the data still begins where it is looked for, or later
    )
    with pytest.raises(InputError, match="one of 4096 parts"):
        unpack(tmp_path / "split.gguf", tmp_path / "model")
    last = read_tensors(packed_files["llama"])[-1]  # another one would move those behind it, which is refused first
    at = whole.index(packed.text(last.name)) + len(packed.text(last.name)) + 4 + 8 * len(last.shape)
    (tmp_path / "type.gguf").write_bytes(whole[:at] + struct.pack("<I", packed.Q.I16) + whole[at + 4 :])
    with pytest.raises(InputError, match="of type I16"):
        unpack(tmp_path / "type.gguf", tmp_path / "model")
    with pytest.raises(InputError, match="starts with GGUF"):
        unpack(packed_files["llama"].parent / "llama-original/config.json", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_quantized_vectors_and_factors_behind_the_end(packed_files: dict[str, Path], tmp_path: Path) -> None:
    whole = packed_files["qwen2"].read_bytes()
    name = packed.text("output_norm.weight")
    at = whole.index(name) + len(name) + 4 + 8
    (tmp_path / "vector.gguf").write_bytes(whole[:at] + struct.pack("<I", packed.Q.Q8_0) + whole[at + 4 :])
    with pytest.raises(InputError, match=r"output_norm\.weight has rows of 1, blocks of 32|at byte \d+ of the data"):
        read_source(tmp_path / "vector.gguf")
    options = {"kind": "llama", "width": 256, "head_dim": 64, "rope_theta": 500000.0, "rope_scaling": ROPES[2]}
    path = packed.make(tmp_path, "rope", options)
    whole, name = path.read_bytes(), packed.text("rope_freqs.weight")
    at = whole.index(name) + len(name) + 4 + 8 + 4
    path.write_bytes(whole[:at] + struct.pack("<Q", 2**63) + whole[at + 8 :])
    with pytest.raises(InputError, match=r"rope_freqs\.weight' at byte 9223372036854775808 of the data"):
        read_source(path)


@pytest.mark.parametrize("alignment", ["32", [32], 32.0, -32, 0, 24])
def test_an_alignment_that_is_no_power_of_two_is_refused(
    packed_files: dict[str, Path], tmp_path: Path, alignment: object
) -> None:
    path = packed.repack(
        packed_files["qwen2"].parent / "qwen2-f32.gguf", tmp_path / "odd.gguf", more={"general.alignment": alignment}
    )
    with pytest.raises(InputError, match=r"general\.alignment"):
        read_source(path)
    assert "general.alignment" in " ".join(inspect(path)["problems"])


def test_keys_that_change_nothing_are_taken(packed_files: dict[str, Path], tmp_path: Path) -> None:
    more = {"qwen2.rope.scale_linear": 1.0, "qwen2.rope.scaling.attn_factor": 1.0}
    more |= {"qwen2.rope.scaling.yarn_ext_factor": -1.0, "tokenizer.chat_template.tool.use": "x"}
    whole = packed_files["qwen2"].parent / "qwen2-f32.gguf"
    unpack(packed.repack(whole, tmp_path / "m.gguf", more=more), tmp_path / "model")
    assert (tmp_path / "model/additional_chat_templates/tool.use.jinja").read_text() == "x"


@pytest.mark.parametrize("number", [2**32 - 1, -1, 512_000])
def test_ids_that_name_no_token_are_left_out(packed_files: dict[str, Path], tmp_path: Path, number: int) -> None:
    more = {f"tokenizer.ggml.{key}_token_id": number for key in ("padding", "eot")}
    whole = packed_files["llama"].parent / "llama-f32.gguf"
    record = unpack(packed.repack(whole, tmp_path / "m.gguf", more=more), tmp_path / "model")
    said = [f"{key}_token_id {number} names no token of the vocabulary" for key in ("padding", "eot")]
    assert record.get("left_out", []) == (said if number == 512_000 else [])
    for notes in (notes_of(record), inspect(tmp_path / "m.gguf")["notes"]):
        assert [note for note in notes if "names no token" in note] == record.get("left_out", [])
    assert "pad_token_id" not in read_source(tmp_path / "m.gguf").config
    generation = json.loads((tmp_path / "model/generation_config.json").read_text())
    assert type(generation["eos_token_id"]) is int and "pad_token_id" not in generation
    load_model(tmp_path / "model", "float32", device="cpu")


def test_no_temperature_is_greedy(packed_files: dict[str, Path]) -> None:
    metadata = read_source(packed_files["qwen2"]).metadata | {"general.sampling.temp": 0.0}
    found = generation_of(metadata)
    assert found["do_sample"] is False and "temperature" not in found
    metadata["general.sampling.top_p"] = float("nan")
    assert "top_p" not in generation_of(metadata)
    impossible = {"top_p": 7.0, "min_p": 9.0, "top_k": 40.5, "penalty_repeat": -1.0}
    for key, value in (impossible | {"top_k": -5}).items():
        metadata[f"general.sampling.{key}"] = value
    assert not {"top_p", "min_p", "top_k", "repetition_penalty"} & generation_of(metadata).keys()
    metadata |= {"general.sampling.top_k": 40, "general.sampling.min_p": 0.0}
    assert generation_of(metadata).items() >= {"top_k": 40, "min_p": 0.0}.items()


def test_a_tensor_at_another_place_is_refused(packed_files: dict[str, Path], tmp_path: Path) -> None:
    """Its bytes are those of another tensor, or shifted: llama.cpp refuses it too."""
    data = bytearray(packed_files["llama"].read_bytes())
    place = data.index(b"blk.0.attn_k.weight") + len(b"blk.0.attn_k.weight") + 4 + 2 * 8 + 4
    offset = int.from_bytes(data[place : place + 8], "little")
    for other in (offset + 32, offset + 8, 0):
        data[place : place + 8] = other.to_bytes(8, "little")
        (tmp_path / "odd.gguf").write_bytes(data)
        with pytest.raises(InputError, match=r"'blk.0.attn_k.weight' at byte \d+ of the data, where \d+ is next"):
            unpack(tmp_path / "odd.gguf", tmp_path / "out")
        assert "attn_k" in inspect(tmp_path / "odd.gguf")["problems"][0]


def test_a_key_given_twice_is_refused(packed_files: dict[str, Path], tmp_path: Path) -> None:
    twice = packed_files["llama"].read_bytes().replace(b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id")
    (tmp_path / "twice.gguf").write_bytes(twice)
    with pytest.raises(InputError, match=r"key 'tokenizer.ggml.eos_token_id' twice"):
        unpack(tmp_path / "twice.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope.freq_base", v) for v in (1e300, 1e-300, 0.5)]
    + [("attention.layer_norm_rms_epsilon", v) for v in (1e300, 1e-300, 3e38)],
)
def test_numbers_that_float32_or_a_model_cannot_have(packed_files: dict[str, Path], key: str, value: float) -> None:
    source = read_source(packed_files["llama"])
    with pytest.raises(InputError, match=f"llama.{key}"):
        config_of(Keys(source.metadata | {f"llama.{key}": value}, source.path), 512, True, {}, None)


def test_a_model_of_infinite_numbers_is_refused(packed_files: dict[str, Path], tmp_path: Path) -> None:
    def large(tensors: dict[str, np.ndarray]) -> None:
        tensors["blk.0.ffn_norm.weight"][:] = 1e38

    path = packed.repack(packed_files["llama"].parent / "llama-f32.gguf", tmp_path / "large.gguf", tensors=large)
    with pytest.raises(InputError, match="computes numbers that are not finite"):
        unpack(path, tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists()


def test_a_configuration_that_transformers_refuses(packed_files: dict[str, Path]) -> None:
    source = read_source(packed_files["llama"])
    keys = Keys(source.metadata | {"llama.attention.head_count": 3, "llama.attention.head_count_kv": 1}, source.path)
    keys.metadata.update({f"llama.{key}": 16 for key in ("attention.key_length", "rope.dimension_count")})
    keys.metadata["llama.attention.value_length"] = 16
    with pytest.raises(InputError, match="3 heads, 1 of keys and values, 64 wide"):
        config_of(keys, 512, True, {}, None)
    with pytest.raises(InputError, match="that transformers does not take"):
        transformers_config(source.config | {"num_attention_heads": 3}, source.path)


def test_what_cannot_be_read_is_not_blamed_on_the_output(packed_files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file .*gone\.gguf"):
        unpack(tmp_path / "gone.gguf", tmp_path / "model")
    with pytest.raises(InputError, match="already exists"):
        unpack(packed_files["llama"], ".")


def test_a_later_part_of_a_split_file(packed_files: dict[str, Path], tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "none")
    writer.kv_data[0].clear()
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match="one of 3 parts"):
        read_source(tmp_path / "part.gguf")


def test_weights_too_large_for_float16(packed_files: dict[str, Path], tmp_path: Path) -> None:
    def enlarge(arrays: dict[str, np.ndarray]) -> None:
        arrays["output_norm.weight"][3] = 70000.0

    path = packed.repack(packed_files["qwen2"].parent / "qwen2-f32.gguf", tmp_path / "large.gguf", tensors=enlarge)
    record = unpack(path, tmp_path / "model")
    assert record["dtype"] == "bfloat16" and record["dtype_asked"] == "auto" and "float16" not in record["cost"]
    with pytest.raises(InputError, match=r"holds a weight of size 70000.*--dtype auto \(gguf_dtype: auto\)"):
        unpack(path, tmp_path / "half", "float16")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["large.gguf", "model"]


def test_nothing_of_a_failure_gets_the_final_name(
    packed_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lib.models.unpack.write_tokenizer", fail)
    with pytest.raises(InputError, match="No space left"):
        unpack(packed_files["llama"], tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.txt").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        unpack(packed_files["llama"], tmp_path / "model")


def test_too_little_memory_leaves_the_cost_unmeasured(
    packed_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.runs.machine.available_memory", lambda: 1 << 20)
    record = unpack(packed_files["llama"], tmp_path / "model")
    assert record["cost"] is None and record["cost_note"].startswith("not measured: the weights in float32 need")


def test_names_and_identity() -> None:
    record = {"main_type": "Q4_1", "source": "x.gguf", "sha256": "ab" * 32, "dtype_asked": "auto", "off_grid": False}
    record |= {"version": 7}
    assert notes_of(record) == ("weights dequantized from Q4_1 (x.gguf)",)
    assert notes_of(record | {"main_type": "F16"}) == ("weights read from F16 (x.gguf)",)
    assert identity(record) == f"sha256:{'ab' * 8}+v7" and asked_in(identity(record)) == {}
    asked = record | {"dtype_asked": "bfloat16", "off_grid": True, "seed": 3, "scales": [0.8, 1.25]}
    assert identity(asked) == f"sha256:{'ab' * 8}+v7+bfloat16+off-grid-3-0.8-1.25"
    assert is_identity(identity(asked)) and not is_identity("sha256:" + "ab" * 8) and not is_identity("main+v2")
    assert asked_in(identity(asked)) == {"gguf_dtype": "bfloat16", "gguf_off_grid": True}
    assert notes_of(asked)[1] == "channels rescaled so that they leave the source's grid"
    assert asked_in("main+off-grid") == {}
    names = ["SmolLM2-135M-Instruct.Q4_1.gguf", "m-q4_k_m.gguf", "m-F16.gguf", "Qwen/Qwen2", "plain.gguf"]
    assert [plain_name(name) for name in names] == ["SmolLM2-135M-Instruct", "m", "m", "Qwen/Qwen2", "plain"]
    assert models_unpack.CHOICES[0] == "auto"
