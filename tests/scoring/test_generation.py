"""Written answers: greedy as transformers' own generate, llama.cpp as transformers, draws as the probabilities say."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lib.errors import InputError
from lib.models.gguf_tokenizer import token_bytes
from lib.runs.machine import llama_cpp_problem
from lib.scoring.generation import Sampling, end_ids, pick, write
from lib.scoring.torch_backend import TransformersBackend
from tests.scoring.conftest import Tiny

PROMPTS = ["房间很干净", "服务不好，但是早餐方便。", "贵"]


def prompt_ids(small: Tiny) -> list[list[int]]:
    return [small.tokenizer(text)["input_ids"] for text in PROMPTS]


def test_greedy_is_what_transformers_generates(small: Tiny) -> None:
    import torch

    for ids in prompt_ids(small):
        found = write(TransformersBackend(small.model).new_text(), ids, 24, ends=())
        given = torch.tensor([ids])
        plain = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        wanted = small.model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=24, **plain)
        assert found.ids == wanted[0, len(ids) :].tolist()
        assert (found.ended, found.steps) == (False, 24)
        assert 0 < found.first_token_seconds < found.seconds and found.tokens_per_second > 0


def test_an_end_token_ends_it_and_is_no_part_of_it(small: Tiny) -> None:
    ids = prompt_ids(small)[0]
    whole = write(TransformersBackend(small.model).new_text(), ids, 10, ends=()).ids
    end = whole[4]
    found = write(TransformersBackend(small.model).new_text(), ids, 10, ends={end})
    assert found.ended and found.ids == whole[: whole.index(end)] and found.steps == len(found.ids) + 1
    at_once = write(TransformersBackend(small.model).new_text(), ids, 10, ends={whole[0]})
    assert (at_once.ids, at_once.ended, at_once.tokens_per_second) == ([], True, None)
    assert small.tokenizer.convert_tokens_to_ids("<|im_end|>") in end_ids(small.tokenizer)


@pytest.mark.skipif(llama_cpp_problem() is not None, reason="llama-cpp-python does not work here")
def test_llama_cpp_writes_the_same(small: Tiny) -> None:
    from lib.scoring.llama_backend import LlamaCppBackend

    drawn = Sampling(seed=3)
    with LlamaCppBackend(small.gguf, 64, 1, cache_type="f32", flash_attention=False) as backend:
        for ids in prompt_ids(small):
            for sampling in (None, drawn):
                wanted = write(TransformersBackend(small.model).new_text(), ids, 16, (), sampling)
                assert write(backend.new_text(), ids, 16, (), sampling).ids == wanted.ids
        with pytest.raises(InputError, match="context"):
            write(backend.new_text(), [1] * 60, 8, ())
        assert [backend.piece(i) for i in range(100, 200)] == token_bytes(small.tokenizer, range(100, 200))


def test_draws_follow_the_probabilities_within_top_p() -> None:
    logits = np.log(np.array([0.05, 0.5, 0.15, 0.3]))
    rng = np.random.default_rng(0)
    drawn = [pick(logits, Sampling(1.0, 0.75), rng) for _ in range(4000)]
    assert set(drawn) == {1, 3}  # 0.5 + 0.3 reach 0.75
    assert drawn.count(1) / len(drawn) == pytest.approx(0.5 / 0.8, abs=0.03)
    warm = [pick(logits, Sampling(0.5, 1.0), rng) for _ in range(4000)]
    squares = np.exp(2 * logits) / np.exp(2 * logits).sum()
    assert np.bincount(warm, minlength=4) / len(warm) == pytest.approx(squares, abs=0.03)
    assert {pick(logits, Sampling(1.0, 0.1), rng) for _ in range(50)} == {1} == {pick(logits, None, None)}
    with pytest.raises(InputError, match="not numbers"):
        pick(np.array([np.nan, 1.0]), None, None)


def test_one_seed_one_answer(small: Tiny) -> None:
    ids = prompt_ids(small)[1]
    first, again, other = (
        write(TransformersBackend(small.model).new_text(), ids, 20, (), Sampling(2.0, 1.0, seed)).ids
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_bytes_of_tokens_are_the_decoded_text(small: Tiny) -> None:
    rng = random.Random(0)
    size = len(small.tokenizer)
    for _ in range(50):
        ids = [rng.randrange(size) for _ in range(30)]
        raw = b"".join(token_bytes(small.tokenizer, ids))
        assert raw.decode("utf-8", "replace") == small.tokenizer.decode(ids, skip_special_tokens=False)
    text = "早餐😀很好，é\n"
    assert b"".join(token_bytes(small.tokenizer, small.tokenizer(text)["input_ids"])) == text.encode()
    assert token_bytes(small.tokenizer, [size + 5]) == [b""]


def test_bytes_of_sentencepiece_tokens_and_of_others() -> None:
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE, WordLevel
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "▁我": 1, "们": 2, "<0xF0>": 3, "<0x9F>": 4, "<0x98>": 5, "<0x80>": 6}
    raw = Tokenizer(BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    assert token_bytes(tokenizer, [1, 2, 3, 4, 5, 6]) == [
        " 我".encode(),
        "们".encode(),
        b"\xf0",
        b"\x9f",
        b"\x98",
        b"\x80",
    ]
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(InputError, match="decodes by nothing"):
        token_bytes(words, [0])
