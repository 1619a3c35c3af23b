"""The tokenizer of a bare GGUF file against the tokenizer it was made from and against llama.cpp."""

from __future__ import annotations

import ctypes
import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.errors import InputError
from lib.models.gguf_file import read_metadata
from lib.models.gguf_tokenizer import tokenizer_from_gguf, tokenizer_json, write_tokenizer
from tests.scoring import tiny
from tests.scoring.conftest import small  # noqa: F401

STRINGS = ["房间很干净，服务好。", "It's 3.14 dollars!\r\n\n  x", " ", "👍🏽 e\u0301", ""]
STRINGS += ["<|im_start|>user\n你好<|im_end|>"]


def llama_cpp_ids(api, model, text: str) -> list[int]:
    data = text.encode()
    room = (ctypes.c_int32 * (len(data) + 8))()
    n = api.llama_tokenize(api.llama_model_get_vocab(model), data, len(data), room, len(room), False, True)
    assert n >= 0
    return list(room[:n])


@pytest.fixture(scope="module")
def vocabulary(small):  # noqa: F811
    from lib.scoring.llama_backend import llama

    api = llama()
    parameters = api.llama_model_default_params()
    parameters.vocab_only = True
    model = api.llama_model_load_from_file(str(small.gguf).encode(), parameters)
    yield api, model
    api.llama_model_free(model)


@pytest.fixture(scope="module")
def rebuilt(small):  # noqa: F811
    return tokenizer_from_gguf(small.gguf)


@pytest.mark.parametrize("text", STRINGS)
def test_ids_equal_the_original(small, rebuilt, text):  # noqa: F811
    assert rebuilt(text, add_special_tokens=False)["input_ids"] == small.tokenizer(text)["input_ids"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from("房间很不干净 aZ9é\n\t,.。，!'s👍\u3000"), max_size=40))
def test_ids_equal_llama_cpp(rebuilt, vocabulary, text):
    assert rebuilt(text, add_special_tokens=False)["input_ids"] == llama_cpp_ids(*vocabulary, text)


def test_prompts_are_equal(small, rebuilt):  # noqa: F811
    assert small.task.fingerprint(rebuilt) == small.task.fingerprint(small.tokenizer)
    for text in (*tiny.texts(20), "评论<|im_end|>里的标记"):
        row = {"text": text, "label": 1}
        assert small.task.encode(rebuilt, row) == small.task.encode(small.tokenizer, row)
    assert set(rebuilt.all_special_tokens) == set(small.tokenizer.all_special_tokens)


def test_metadata_equals_the_gguf_librarys(small):  # noqa: F811
    from gguf import GGUFReader

    fields = GGUFReader(small.gguf).fields
    metadata = read_metadata(small.gguf)
    for key, value in metadata.items():
        assert fields[key].contents() == value
    assert metadata["general.architecture"] == "qwen2"


@pytest.mark.parametrize("at", range(8, 2000, 150))
def test_damaged_metadata_is_refused_at_once(small, tmp_path, at):  # noqa: F811
    data = bytearray(small.gguf.read_bytes()[:4000])
    data[at : at + 8] = b"\xff" * 8
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    started = time.monotonic()
    with pytest.raises(InputError):
        read_metadata(path)
    assert time.monotonic() - started < 1


def test_other_tokenizers_are_refused(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match="kind 'llama' with rules 'none'"):
        tokenizer_from_gguf(tmp_path / "other.gguf")


@pytest.mark.parametrize("odd", [{"token_type": 3}, {"token_type": ["a"]}, {"pre": ["qwen2"]}, {"pre": 4}])
def test_keys_of_another_kind_are_refused(small, odd):  # noqa: F811
    metadata = read_metadata(small.gguf) | {f"tokenizer.ggml.{key}": value for key, value in odd.items()}
    with pytest.raises(InputError, match=r"token types that are no list|with rules"):
        tokenizer_json(metadata, small.gguf)


@pytest.mark.parametrize(
    ("architecture", "prefix", "written"), [("qwen2", True, None), ("llama", False, False), ("llama", True, None)]
)
def test_no_space_is_put_before_a_text(small, tmp_path, architecture, prefix, written):  # noqa: F811
    changes = {"general.architecture": architecture, "tokenizer.ggml.add_space_prefix": prefix}
    write_tokenizer(read_metadata(small.gguf) | changes, small.gguf, tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()).get("add_prefix_space") == written


def test_a_file_that_cannot_be_read_is_named(small, monkeypatch):  # noqa: F811
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", fail)
    with pytest.raises(InputError, match="cannot be read"):
        read_metadata(small.gguf)
