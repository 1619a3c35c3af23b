"""The offline base model: a real Qwen2 folder, reproducible, that has learned language and no label."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lib.models.base_model import check_model_folder
from lib.models.loading import load_model, load_tokenizer
from lib.models.offline_base import (
    BaseRecipe,
    TokenizerRecipe,
    documents,
    ensure_base,
    new_model,
    train_tokenizer,
    windows,
)
from lib.models.weights import open_weights
from lib.prompts.tasks import ClassificationTask
from lib.runs.files import HOME_VARIABLE

TEXTS = [
    f"{place}的{thing}{mark}，下次{again}来。"
    for place in ("酒店", "网店")
    for thing in ("早餐", "服务", "房间")
    for mark in ("不错", "糟糕", "一般")
    for again in ("再", "不再")
]
TASK = ClassificationTask(("负面", "正面"), "你是助手。", "判断：{text}", 96)
TINY = BaseRecipe(
    layers=1, hidden=64, intermediate=64, heads=2, kv_heads=1, window=32, batch=4, min_tokens=24_576, max_tokens=24_576
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """(base folder, tokenizer folder) in a home of this module."""
    place = tmp_path_factory.mktemp("base")
    (place / "tokenizer").mkdir()
    train_tokenizer(TEXTS, [*TASK.label_names], place / "tokenizer", TokenizerRecipe(512))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOME_VARIABLE, str(place))
        yield ensure_base(TEXTS, TASK, place / "tokenizer", TINY), place / "tokenizer"


def test_is_a_complete_model_folder(made) -> None:
    base, tokenizer = made
    check_model_folder(base)
    names = {path.name for path in base.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert names >= {"tokenizer_config.json", "chat_template.jinja"}
    assert (base / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    weights = open_weights(base)
    assert {tensor.dtype for tensor in weights.tensors.values()} == {"BF16"}
    assert "lm_head.weight" not in weights.tensors and "model.layers.0.self_attn.q_proj.bias" in weights.tensors
    config = json.loads((base / "config.json").read_text())
    assert config["model_type"] == "qwen2" and config["tie_word_embeddings"] and config["vocab_size"] == 512
    loaded = load_tokenizer(base)
    assert config["eos_token_id"] == loaded.eos_token_id and config["pad_token_id"] == loaded.pad_token_id


def test_widths_of_the_real_recipe_fill_k_quant_blocks() -> None:
    recipe = BaseRecipe()
    assert recipe.hidden % 256 == 0 and recipe.intermediate % 256 == 0
    assert recipe.hidden // recipe.heads * recipe.kv_heads * 2 % 256 == 0


def test_has_learned_language_and_answers_in_words(made) -> None:
    base, _ = made
    record = json.loads(base.with_name(f"{base.name}.json").read_text())
    assert record["facts"]["loss"] < 4.0  # nats a token; log(512) = 6.2 for a model that knows nothing
    model, tokenizer = load_model(base, "float32", device="cpu"), load_tokenizer(base)
    ids = TASK.encode(tokenizer, {"text": TEXTS[0]}).prompt_ids
    with torch.no_grad():
        probabilities = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
    first, second = (probabilities[answer[0]].item() for answer in TASK.answer_words(tokenizer))
    assert first + second > 0.5 and 0.2 < first / (first + second) < 0.8


def test_is_stored_and_made_anew_for_other_texts(made, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tokenizer = made
    stamp = (base / "model.safetensors").stat().st_mtime_ns
    assert ensure_base(TEXTS, TASK, tokenizer, TINY) == base
    assert (base / "model.safetensors").stat().st_mtime_ns == stamp
    short = replace(TINY, min_tokens=512, max_tokens=512)
    other = ensure_base(TEXTS, TASK, tokenizer, short)
    assert other != base and ensure_base(TEXTS[:-1], TASK, tokenizer, short) != other
    content = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(content[:-1])  # damaged: made again, bit for bit
    assert (ensure_base(TEXTS, TASK, tokenizer, short) / "model.safetensors").read_bytes() == content


def test_random_state_of_the_caller_is_untouched(made) -> None:
    _, tokenizer = made
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    ensure_base(TEXTS, TASK, tokenizer, replace(TINY, min_tokens=256, max_tokens=256))
    assert torch.equal(torch.rand(4), expected)


def test_documents_show_every_text_once_a_pass_with_random_answers(made) -> None:
    tokenizer = load_tokenizer(made[1])
    stream = documents(TEXTS, TASK, tokenizer, TINY)
    seen = [next(stream) for _ in range(50 * len(TEXTS))]
    first = seen[: len(TEXTS)]
    assert all(sum(text in one or text[: len(text) // 2] in one for one in first) >= 1 for text in TEXTS)
    framed = [one for one in seen if "判断：" in one]
    assert 0.7 * TINY.framed < len(framed) / len(seen) < 1.3 * TINY.framed + 0.01
    bad = [one for one in framed if "糟糕" in one]
    positive = sum("assistant\n正面" in one for one in bad) / len(bad)
    assert 0.35 < positive < 0.65  # a label would make it 0 or 1


def test_windows_respect_the_token_bounds(made) -> None:
    tokenizer = load_tokenizer(made[1])
    few = windows(TEXTS, TASK, tokenizer, TINY)
    assert few.shape[1] == TINY.window and len(few) % TINY.batch == 0
    assert TINY.min_tokens - TINY.window * TINY.batch < few.numel() <= TINY.max_tokens
    assert windows(TEXTS, TASK, tokenizer, replace(TINY, passes=100.0)).numel() == TINY.max_tokens


def test_embedding_rows_are_rounded_up_to_256(made) -> None:
    tokenizer = load_tokenizer(made[1])
    assert new_model(tokenizer, TINY).config.vocab_size == -(-len(tokenizer) // 256) * 256


def test_makes_a_folder_without_a_trace_outside(made) -> None:
    base, _ = made
    assert Path.cwd().joinpath("trainer_output").exists() is False
    assert {path.suffix for path in base.parent.iterdir()} <= {"", ".json", ".lock"}
