"""The offline tokenizer: Qwen2's structure, bytes for everything, words in one token."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.models.loading import load_tokenizer
from lib.models.offline_base import TokenizerRecipe, ensure_tokenizer, train_tokenizer
from lib.prompts.tasks import ClassificationTask

TEXTS = ["房间很干净，服务也好。", "早餐一般，价格太贵！！", "性价比高 yes 123", "质量差，再也不来了。\n退货"] * 5
WORDS = ["负面", "正面", "你是情感分析助手。"]
TASK = ClassificationTask(("负面", "正面"), "你是情感分析助手。", "判断：\n{text}", 128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, WORDS, made, TokenizerRecipe(vocabulary=512))
    return made


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return load_tokenizer(folder)


def test_structure_is_qwen2s(folder: Path, shared_data: Path) -> None:
    ours = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    theirs = json.loads((shared_data / "qwen2.5-0.5b-instruct" / "tokenizer.json").read_text(encoding="utf-8"))
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        assert ours[part] == theirs[part], part
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert [token["content"] for token in ours["added_tokens"]] == names
    assert [{**token, "id": 0} for token in ours["added_tokens"]] == [
        {**token, "id": 0} for token in theirs["added_tokens"][:3]
    ]


def test_loads_as_qwen2_with_its_ends(tokenizer) -> None:
    assert type(tokenizer).__name__ == "Qwen2Tokenizer"
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<|endoftext|>", "<|im_end|>", None)
    assert len(tokenizer) <= 512 and max(tokenizer.get_vocab().values()) == len(tokenizer) - 1


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_in_nfc(tokenizer, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == unicodedata.normalize("NFC", text)


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=200, deadline=None)
def test_splits_where_qwen2_splits(tokenizer, shared_data: Path, text: str) -> None:
    theirs = _qwen(shared_data)
    ours = tokenizer.backend_tokenizer
    assert ours.pre_tokenizer.pre_tokenize_str(text) == theirs.pre_tokenizer.pre_tokenize_str(text)


def _qwen(shared_data: Path, cache: dict = {}):  # noqa: B006 - loading its 7 MB once is enough
    from tokenizers import Tokenizer

    if not cache:
        cache["it"] = Tokenizer.from_file(str(shared_data / "qwen2.5-0.5b-instruct" / "tokenizer.json"))
    return cache["it"]


def test_words_are_single_tokens(tokenizer) -> None:
    assert [len(ids) for ids in TASK.answer_words(tokenizer)] == [1, 1]
    assert (
        len(tokenizer("你是情感分析助手", add_special_tokens=False)["input_ids"]) <= 4
    )  # 24 bytes, tokens of at most 9


def test_the_small_files_are_those_of_the_class(tokenizer, folder: Path, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    ours, theirs = (json.loads((place / "tokenizer_config.json").read_text()) for place in (folder, tmp_path))
    assert {**theirs, **ours} == theirs
    assert (folder / "chat_template.jinja").read_bytes() == (tmp_path / "chat_template.jinja").read_bytes()


def test_template_frames_each_turn_once(tokenizer) -> None:
    prompt = TASK.prompt(tokenizer, {"text": "好"})
    assert prompt == (
        "<|im_start|>system\n你是情感分析助手。<|im_end|>\n<|im_start|>user\n判断：\n好<|im_end|>\n<|im_start|>assistant\n"
    )
    closed = [{"role": "user", "content": "好<|im_end|>"}]
    assert tokenizer.apply_chat_template(closed, tokenize=False) == "<|im_start|>user\n好<|im_end|>\n"
    alone = [{"role": "user", "content": "好"}, {"role": "assistant", "content": "正面"}]
    text = tokenizer.apply_chat_template(alone, tokenize=False)
    assert text == "<|im_start|>user\n好<|im_end|>\n<|im_start|>assistant\n正面<|im_end|>\n"
    assert TASK.encode(tokenizer, {"text": "好", "label": 1}).loss_ids == [
        TASK.answer_words(tokenizer)[1][0],
        tokenizer.eos_token_id,
    ]


def test_stored_once_equal_every_time(home: Path) -> None:
    first = ensure_tokenizer(TEXTS, WORDS)
    content, made = (first / "tokenizer.json").read_bytes(), (first / "tokenizer.json").stat().st_mtime_ns
    assert ensure_tokenizer(TEXTS, WORDS) == first
    assert (first / "tokenizer.json").stat().st_mtime_ns == made
    assert ensure_tokenizer(TEXTS[1:], WORDS) != first and ensure_tokenizer(TEXTS, WORDS[1:]) != first
    (first / "tokenizer.json").write_bytes(content[:100])  # damaged: made again, the same bytes
    assert (ensure_tokenizer(TEXTS, WORDS) / "tokenizer.json").read_bytes() == content


def test_killed_in_between_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib.models import offline_base

    def half(texts, words, folder, recipe) -> None:
        (folder / "tokenizer.json").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(offline_base, "train_tokenizer", half)
        with pytest.raises(KeyboardInterrupt):
            ensure_tokenizer(TEXTS, WORDS)
    assert [p.name for p in (home / "runs" / "_offline").iterdir() if not p.name.endswith(".lock")] == []
    assert load_tokenizer(ensure_tokenizer(TEXTS, WORDS))


def test_no_token_is_longer_than_three_chinese_characters(tokenizer) -> None:
    """Whole clauses as tokens are too rare to learn from (docs/LOG.md)."""
    special = set(tokenizer.all_special_ids)
    assert max(len(token) for token, index in tokenizer.get_vocab().items() if index not in special) <= 9


def test_a_text_without_end_is_used_in_part(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's time grows with the square of the longest piece; the store's key is that of the part."""
    from lib.models import offline_base

    seen: list[list[str]] = []
    monkeypatch.setattr(offline_base, "train_tokenizer", lambda texts, *_: seen.append(texts))
    texts = ["你好。"] * 3
    first = offline_base.ensure_tokenizer([*texts, "答" * 100_000], ["你是助手。"])
    assert offline_base.ensure_tokenizer([*texts, "答" * 50_000], ["你是助手。"]) == first
    assert [max(map(len, used)) for used in seen] == [offline_base.LONGEST]
