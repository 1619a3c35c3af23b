"""Prompts that must be cut: any text fits, its beginning is what is kept, and no text can close its own turn."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.models.loading import load_tokenizer
from lib.models.offline_base import TokenizerRecipe, train_tokenizer
from lib.prompts.conversations import escape
from lib.prompts.tasks import ClassificationTask

NAMES = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
PIECES = st.sampled_from(
    (*NAMES, "<|im_<|im_end|>end|>", "<|im_", "end|>", "<", "房间很好", "e\u0301", "👨‍👩‍👧", "\n", " ", "x")
)
TEXTS = st.lists(PIECES | st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=150).map("".join)
QWEN = "qwen2.5-0.5b-instruct"


@pytest.fixture(scope="module", params=["offline", QWEN])
def tokenizer(request, tmp_path_factory: pytest.TempPathFactory):
    if request.param == QWEN:
        folder = request.getfixturevalue("shared_data") / QWEN
        if not (folder / "tokenizer.json").is_file():
            pytest.skip(f"no {folder}")
        return load_tokenizer(folder)
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["房间很干净，服务也好。"] * 5, ["负面", "正面"], folder, TokenizerRecipe(vocabulary=512))
    return load_tokenizer(folder)


def _tokens(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _task(tokenizer, room: int) -> ClassificationTask:
    """A task whose prompt leaves the text this many tokens."""
    task = ClassificationTask(("负面", "正面"), "你是助手。", "判断：\n{text}\n好吗", 10_000)
    answer = max(len(_tokens(tokenizer, name)) for name in task.label_names) + 1
    frame = len(_tokens(tokenizer, task.prompt(tokenizer, {"text": ""})))
    return replace(task, max_seq_length=frame + room + answer)


@pytest.mark.parametrize("text", ["<|im_end|>" * 300, "<|im_end|>房间很好" * 60, "👨‍👩‍👧<|endoftext|>" * 80])
def test_a_text_full_of_special_names_is_cut(tokenizer, text: str) -> None:
    found = _task(tokenizer, 60).encode(tokenizer, {"text": text})
    assert found.truncated
    assert found.prompt_ids.count(tokenizer.eos_token_id) == 2  # those of the two turns


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.integers(1, 80))
def test_any_text_fits_and_closes_no_turn(tokenizer, text: str, room: int) -> None:
    task = _task(tokenizer, room)
    found = task.encode(tokenizer, {"text": text})
    frame = task.prompt(tokenizer, {"text": ""})
    special = set(tokenizer.all_special_ids)
    assert len(found.prompt_ids) <= len(_tokens(tokenizer, frame)) + room
    assert [i for i in found.prompt_ids if i in special] == [i for i in _tokens(tokenizer, frame) if i in special]
    before, after = task.prompt(tokenizer, {"text": "\ue000"}).split("\ue000")
    shown = tokenizer.decode(found.prompt_ids, clean_up_tokenization_spaces=False)
    whole = unicodedata.normalize("NFC", before + escape(tokenizer, text) + after)
    if not found.truncated:
        assert shown == whole
        return
    safe = escape(tokenizer, text)
    kept = shown.removeprefix(before).removesuffix(after)
    assert kept in {unicodedata.normalize("NFC", safe[:n]) for n in range(len(safe) + 1)}


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=400), st.integers(1, 80))
def test_texts_without_names_are_cut_where_they_always_were(tokenizer, text: str, room: int) -> None:
    """The rule of the first reports: as many tokens of the text as there is room, fewer until the prompt fits."""
    task = _task(tokenizer, room)
    most = len(_tokens(tokenizer, task.prompt(tokenizer, {"text": ""}))) + room
    ids, keep = _tokens(tokenizer, task.prompt(tokenizer, {"text": text})), room
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    while len(ids) > most:
        cut = text[: offsets[keep][0]] if keep < len(offsets) else text
        ids = _tokens(tokenizer, task.prompt(tokenizer, {"text": cut}))
        keep -= max(1, len(ids) - most)
    assert task.encode(tokenizer, {"text": text}).prompt_ids == ids


def test_the_tokens_of_answer_words_are_told(tokenizer) -> None:
    def task(*names: str) -> ClassificationTask:
        return ClassificationTask(names, "你是助手。", "判断：{text}", 100)

    assert task("负面", "正面").note(tokenizer) == ""
    equal, unequal = ("x" * 3 + "y", "zq" * 3), ("正面", "差劲透顶了吧")
    counts = [len(ids) for ids in task(*unequal).answer_words(tokenizer)]
    assert counts[0] == 1 < counts[1]
    note = task(*unequal).note(tokenizer)
    assert f"正面 1, 差劲透顶了吧 {counts[1]};" in note and "exact sum" in note and "more to lose" in note
    same = [len(ids) for ids in task(*equal).answer_words(tokenizer)]
    assert ("more to lose" in task(*equal).note(tokenizer)) == (same[0] != same[1])
