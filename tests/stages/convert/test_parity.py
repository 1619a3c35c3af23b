"""Token ids and prompts of transformers and llama.cpp, with the real Qwen tokenizers and templates."""

from __future__ import annotations

import csv
import functools
import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.errors import InputError
from lib.models.loading import load_tokenizer
from lib.prompts.tasks import ClassificationTask
from lib.runs.machine import llama_cpp_problem
from lib.stages.convert.convert import convert
from lib.stages.convert.gate import HARD_STRINGS, compare_prompts, compare_tokens, gguf_token_ids
from tests.stages.convert.convertible import write_model

pytestmark = pytest.mark.skipif(llama_cpp_problem() is not None, reason="llama-cpp-python does not work here")

NAMES = ("qwen2.5-0.5b-instruct", "qwen3-4b-thinking-2507", "qwen1.5-0.5b-chat")
TASK = ClassificationTask(("负面", "正面"), "你是情感分析助手。", "评论：{text}", 192)
TEXTS = st.lists(
    st.one_of(
        st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), max_size=12),
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12),
        st.sampled_from(["😀", "👩‍💻", "🇨🇳", "①", "ＡＢ", "\u3000", "\n\n", " 12 345", "it's", "…", "\u200b", "\t "]),
    ),
    max_size=8,
).map("".join)


def with_tokenizer(folder: Path, name: str, shared: Path) -> Path:
    """A model of one small layer with the real tokenizer, converted."""
    config = json.loads((shared / name / "config.json").read_text(encoding="utf-8"))
    model = write_model(folder / name, vocabulary=config["vocab_size"], width=16)
    (model / "chat_template.jinja").unlink()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shared / name / file, model / file)
    convert(model, folder / f"{name}.gguf", "f16")
    return folder / f"{name}.gguf"


@pytest.fixture(scope="module")
def made(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parity")
    return {name: with_tokenizer(folder, name, shared_data) for name in NAMES}


def test_all_vectors_of_llama_cpp(made: dict[str, Path], shared_data: Path) -> None:
    """The 47 strings of llama.cpp's own tokenizer test: its ids, ours and those of transformers are equal."""
    folder = shared_data / "qwen2-tokenizer-vectors"
    with (folder / "ggml-vocab-qwen2.gguf.inp").open(encoding="utf-8", newline="") as stream:
        texts = stream.read().split("\n__ggml_vocab_test__\n")
    lines = (folder / "ggml-vocab-qwen2.gguf.out").read_text(encoding="utf-8").split("\n")
    wanted = [[int(word) for word in line.split()] for line in lines[: len(texts)]]
    assert len(texts) == 47
    name = "qwen2.5-0.5b-instruct"
    tokenizer = load_tokenizer(made[name].with_suffix(""))
    assert gguf_token_ids(made[name], texts) == wanted
    for text, ids in zip(texts, wanted, strict=True):
        if unicodedata.is_normalized("NFC", text):  # transformers normalises, llama.cpp does not
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids


def test_every_row_of_chnsenticorp(made: dict[str, Path], shared_data: Path) -> None:
    texts = []
    for split in ("train", "dev", "test"):
        with (shared_data / "chnsenticorp" / f"{split}.tsv").open(encoding="utf-8", newline="") as stream:
            texts += [row[-1] for row in csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)]
    assert len(texts) > 11_000
    name = "qwen2.5-0.5b-instruct"
    assert compare_tokens(load_tokenizer(made[name].with_suffix("")), made[name], texts) > 500_000


@functools.cache
def loaded_once(folder: Path) -> Any:
    """A tokenizer for many examples."""
    return load_tokenizer(folder)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXTS, min_size=20, max_size=40))
def test_random_strings(texts: list[str], made: dict[str, Path]) -> None:
    path = made["qwen3-4b-thinking-2507"]
    compare_tokens(loaded_once(path.with_suffix("")), path, texts)


@pytest.mark.parametrize("name", NAMES)
def test_hard_strings_and_prompts(name: str, made: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(made[name].with_suffix(""))
    assert compare_tokens(tokenizer, made[name], HARD_STRINGS) > 100
    assert compare_prompts(tokenizer, made[name], TASK, [{"text": text} for text in HARD_STRINGS]) == len(HARD_STRINGS)


@pytest.mark.parametrize("file", ["Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "Qwen-QwQ-32B", "Qwen3-Coder"])
@pytest.mark.parametrize("thinking", [False, True])
def test_published_templates(file: str, thinking: bool, made: dict[str, Path], shared_data: Path) -> None:
    """Templates of Qwen in the renderer of transformers and in that of llama-cpp-python, thinking on and off."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    tokenizer = load_tokenizer(made[NAMES[0]].with_suffix(""))
    template = (shared_data / "qwen2-tokenizer-vectors" / f"{file}.jinja").read_text(encoding="utf-8")
    formatter = Jinja2ChatFormatter(template, eos_token="<|im_end|>", bos_token="")
    turns = [
        {"role": "system", "content": "你是助手。"},
        {"role": "user", "content": "你好 <b>&amp;</b>\n"},
        {"role": "assistant", "content": "<think>\n想\n</think>\n\n好"},
        {"role": "user", "content": "再说一遍 '\"😀"},
    ]
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
    wanted = tokenizer.apply_chat_template(turns, chat_template=template, **options)
    assert formatter(messages=turns, enable_thinking=thinking).prompt == wanted
    assert wanted.startswith("<|im_start|>system\n你是助手。")


def test_another_template_is_noticed(made: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(made[NAMES[0]].with_suffix(""))
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\\n", "assistant")
    with pytest.raises(InputError, match="renders another prompt"):
        compare_prompts(tokenizer, made[NAMES[0]], TASK, [{"text": "好"}])
