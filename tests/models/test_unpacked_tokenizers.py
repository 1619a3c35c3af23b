"""Tokenizers out of GGUF files cut texts as llama.cpp does with the same file, whatever their rules are called."""

from __future__ import annotations

import json
import struct
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from lib.errors import InputError
from lib.models.gguf_file import read_metadata
from lib.models.gguf_tokenizer import RULES, same_vocabulary, tokenizer_from_gguf, tokenizer_json
from lib.models.loading import load_tokenizer
from lib.models.unpack import unpack
from lib.stages.convert.gate import HARD_STRINGS, gguf_token_ids
from lib.stages.convert.tokenizer import CHECK_TEXT
from tests.models import packed
from tests.models.real import SMOLLM2, needs_smollm2

TEXTS = [
    *HARD_STRINGS,
    CHECK_TEXT,
    "房间很干净，2023年12月31日 12345.67",
    "😀😃 🏳️\u200d🌈 1️⃣ ½ Ⅷ ²³ ٣٤٥ 1,000,000",
    "  12  34\n\n5 \t6 hello tHE'Ll 123456",
    " \u0085 \u2028 x <|im_start|>12<|endoftext|> ",
]
KEY = packed.text("tokenizer.ggml.pre") + struct.pack("<I", 8)


@pytest.mark.parametrize("rules", RULES)
def test_ids_equal_llama_cpps(rules: str, packed_files: dict[str, Path], tmp_path: Path) -> None:
    path = packed.repack(
        packed_files["llama"].parent / "llama-f32.gguf",
        tmp_path / "m.gguf",
        change=lambda pairs: pairs.replace(KEY + packed.text("qwen2"), KEY + packed.text(rules)),
    )
    normal = RULES[rules]["normalizer"] is not None  # llama.cpp leaves the texts as they are
    texts = [unicodedata.normalize("NFC", text) for text in TEXTS] if normal else TEXTS
    wanted = gguf_token_ids(path, texts)
    bare = tokenizer_from_gguf(path)
    unpack(path, tmp_path / "model")
    saved = load_tokenizer(tmp_path / "model")
    for tokenizer in (bare, saved):
        assert [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts] == wanted
    assert set(bare.all_special_tokens) == set(saved.all_special_tokens) and same_vocabulary(path, saved)


def test_rules_differ_where_they_should(packed_files: dict[str, Path]) -> None:
    """The small vocabulary has a merge of two digits, so numbers tell the rules apart."""
    metadata, found = read_metadata(packed_files["llama"]), {}
    for rules in ("qwen2", "llama-bpe", "smollm"):
        made = tokenizer_json({**metadata, "tokenizer.ggml.pre": rules}, packed_files["llama"])
        found[rules] = Tokenizer.from_str(json.dumps(made)).encode("x 12", add_special_tokens=False).tokens
    assert found["qwen2"] == ["x", "Ġ", "1", "2"] == found["smollm"] and found["llama-bpe"] == ["x", "Ġ", "12"]


def test_a_start_token_before_every_text(packed_files: dict[str, Path], tmp_path: Path) -> None:
    flag = packed.text("tokenizer.ggml.add_bos_token") + struct.pack("<I?", 7, False)
    start = packed.text("tokenizer.ggml.add_bos_token")
    source = packed_files["llama"].parent / "llama-f32.gguf"

    def starts(pairs: bytes) -> bytes:
        assert flag in pairs
        return pairs.replace(flag, flag[:-1] + b"\1")

    unpack(packed.repack(source, tmp_path / "start.gguf", change=starts), tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    assert tokenizer("he")["input_ids"] == [264, *tokenizer("he", add_special_tokens=False)["input_ids"]]

    def ends(pairs: bytes) -> bytes:
        return pairs.replace(*(start.replace(b"bos", b"eos") + struct.pack("<I?", 7, value) for value in (False, True)))

    with pytest.raises(InputError, match="ends every text with the end token"):
        unpack(packed.repack(source, tmp_path / "end.gguf", change=ends), tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda b: b.replace(packed.text("h e"), packed.text("q e")), "merge 'q e' of parts that are no tokens"),
        (lambda b: b.replace(packed.text("Q"), packed.text("R"), 1), "the token 'R' 2 times"),
    ],
)
def test_damaged_vocabularies(
    change: Callable[[bytes], bytes], match: str, packed_files: dict[str, Path], tmp_path: Path
) -> None:
    path = packed.repack(packed_files["llama"].parent / "llama-f32.gguf", tmp_path / "odd.gguf", change=change)
    with pytest.raises(InputError, match=match):
        tokenizer_from_gguf(path)


@needs_smollm2
def test_the_real_file() -> None:
    tokenizer = tokenizer_from_gguf(SMOLLM2)
    found = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert found == gguf_token_ids(SMOLLM2, TEXTS)
    assert tokenizer("2023")["input_ids"] == [34, 32, 34, 35]  # single digits
