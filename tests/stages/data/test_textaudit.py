"""The audit of characters against what Python's own tables and other decoders say."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path

import pytest

from lib.stages.data.text_audit import (
    KINDS,
    SIMPLIFIED,
    TRADITIONAL,
    audit_texts,
    is_rare,
    kind_of,
    script_of,
)

LATIN, GBK, ENTITY, TAG, RARE = (KINDS[name]["what"] for name in ("latin", "gbk", "entity", "tag", "rare"))


def found(*texts: str) -> dict[str, dict]:
    return {line["what"]: line for line in audit_texts({"train": texts})["findings"]}


@pytest.mark.parametrize(
    ("character", "kind"),
    [
        *[("，", 0), ("…", 0), ("Ａ", 1), ("１", 1), ("ｱ", 2), ("\u3000", 3), ("\u00a0", 3), ("①", 4), ("㎏", 4)],
        *[("⑴", 4), ("ﬁ", 5), ("Ⅳ", 5), ("℃", 5), ("²", 6), ("½", 6), ("⼈", 7), ("\uf90a", 7), ("\u200b", 9)],
        *[("\ufeff", 9), ("\u2028", 9), ("\u2029", 9)],
        *[(c, 9) for c in "\U000e0041\u206a\ufff9\u115f\u2800\U0001d173\u3164\uffa0\u034f"],
        *[("\u202e", 10), ("\x07", 11), ("\ue000", 12), ("\ufe0f", 13), ("\u0301", 14), ("\ufffd", 15)],
    ],
)
def test_every_kind(character: str, kind: int) -> None:
    assert kind_of(character) == list(KINDS)[kind]
    (line,) = found(f"前{character}后").values()
    assert line["what"] == KINDS[kind_of(character)]["what"] and (line["train"], line["characters"]) == (1, 1)


@pytest.mark.parametrize(
    ("text", "entities"),
    [
        *[
            (text, 1)
            for text in ("&nbsp;", "很好&nbsp再来", "&quot", "&#8203", "&#xa0;", "＆nbsp；", "&hellip;", "&amp;nbsp;")
        ],
        *[(text, 0) for text in ("R&D;x", "AT&T", "&hellip", "a&copy=1", "&copy2020", "&NBSP;", "A & B；", "Q&A")],
    ],
)
def test_entities_are_those_of_html(text: str, entities: int) -> None:
    lines = found(f"{text}。")
    assert lines.get(ENTITY, {"train": 0})["train"] == entities


def test_written_format_characters_are_no_hidden_ones() -> None:
    assert [kind_of(c) for c in "\u0600\u06dd"] == ["", ""]


def test_what_nfkc_changes_has_a_kind_and_plain_text_none() -> None:
    """Oracle: unicodedata over the whole basic plane."""
    for code in [*range(0x20, 0xD800), *range(0xE000, 0x10000)]:
        character = chr(code)
        if unicodedata.normalize("NFKC", character) != character:
            assert kind_of(character), hex(code)
    assert not any(map(kind_of, "一二三，abc 123\n\t这說".replace("，", "")))


def test_rows_and_characters_are_counted_apart() -> None:
    audit = audit_texts({"train": ["Ａ１Ａ", "无", ""], "test": ["Ｂ\u200b"]})
    wide, hidden = audit["findings"]
    assert (wide["train"], wide["test"], wide["characters"], wide["most frequent"][:4]) == (1, 1, 4, "Ａ ×2")
    assert (hidden["train"], hidden["test"]) == (0, 1) and "⟨U+200B⟩" in hidden["example"]
    assert (audit["rows"], audit["changed_by_nfkc"], audit["changed_beyond_punctuation"]) == (4, 2, 2)
    assert audit_texts({"train": ["好，"]})["changed_by_nfkc"] == 1
    assert audit_texts({"train": ["好，"]})["changed_beyond_punctuation"] == 0


@pytest.mark.parametrize("codec", ["latin-1", "cp1252"])
def test_text_read_as_latin_is_recognized_by_reading_it_back(codec: str) -> None:
    rng, seen = random.Random(0), 0
    for _ in range(200):
        text = "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(5))
        try:
            broken = text.encode().decode(codec)
        except UnicodeDecodeError:  # five bytes are no character of Windows-1252
            continue
        seen += 1
        assert found(broken)[LATIN]["train"] == 1
    assert seen >= 20
    assert LATIN not in found("café à la carte, naïve, “quoted” – ½ ± °C, ééé")


def test_html_and_lost_characters() -> None:
    lines = found("a&nbsp;b &amp c &#21306; &unknown;", "x<br/>y <p class='a'>z</p> <think>1<2>0</think>", "锟斤拷")
    assert lines[ENTITY]["characters"] == len("&nbsp;") + len("&amp") + len("&#21306;")
    assert lines[TAG]["most frequent"].count("×1") == 3
    assert lines[GBK]["train"] == 1


def test_a_text_in_a_wrong_encoding_consists_of_rare_characters() -> None:
    text = "酒店的地理位置很好，服务员态度也不错，下次还会再来住的，就是早餐少了一点。"
    traditional = "飯店的地理位置很好，服務員態度也不錯，下次還會再來住的，就是早餐少了一點。"
    assert RARE not in found(text, traditional, "硬盘已运行" + "咔" * 20 + "响个不停，很有节奏")
    broken = traditional.replace("，", "").replace("。", "").encode("big5").decode("gbk", "replace")
    assert found(broken)[RARE]["train"] == 1
    assert is_rare("媪") and not is_rare("的") and not is_rare("說")


def test_scripts() -> None:
    simplified, traditional = "这个学习压力让我觉得难过", "這個學習壓力讓我覺得難過"
    assert {script_of(c) for c in "这学压觉难过"} == {SIMPLIFIED}
    assert {script_of(c) for c in "這學壓覺難過"} == {TRADITIONAL}
    assert {script_of(c) for c in "我的中a，"} == {0}
    audit = audit_texts({"train": [simplified, traditional, simplified + traditional, "我的", ""]})
    (line,) = audit["scripts"]
    assert {key: line[key] for key in ("simplified", "traditional", "mixed", "neither", "rows")} == {
        "simplified": 1,
        "traditional": 1,
        "mixed": 1,
        "neither": 2,
        "rows": 5,
    }
    assert 0.4 < line["share of traditional forms"] < 0.6


def test_reviews_as_they_are(shared_data: Path) -> None:
    """Counted by hand in the file: four reviews read in a wrong encoding, three with entities."""
    import csv

    with (shared_data / "chnsenticorp_htl_all" / "ChnSentiCorp_htl_all.csv").open(encoding="utf-8-sig") as file:
        lines = found(*[row["review"] for row in csv.DictReader(file)])
    assert lines[RARE]["train"] == 4 and lines[ENTITY]["train"] == 3
