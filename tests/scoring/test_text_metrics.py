"""Numbers of generated texts against oracles: brute force, sacrebleu itself, the reader of training's think blocks."""

from __future__ import annotations

import random
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from sacrebleu.metrics import CHRF
from scipy.stats import t

from lib.errors import InputError
from lib.prompts.templates import read_block, split_thinking
from lib.runs.files import PROJECT
from lib.scoring.text_metrics import (
    BROKEN,
    UNFINISHED,
    WRITTEN,
    chrf_signature,
    common_length,
    longest_loop,
    measure,
    read_stream,
    repeated_share,
    rouge_l,
    summarise,
    units,
)
from lib.scoring.word_lists import SHIPPED_TERMS, prompt_set, read_prompts, read_terms
from lib.settings import load
from lib.statistics.intervals import paired_score_interval, wilson
from lib.statistics.paired import clustered_mean


def cut(raw: bytes, rng: random.Random) -> list[bytes]:
    """Bytes in pieces of 1 to 4, as byte-level tokens cut them."""
    pieces, at = [], 0
    while at < len(raw):
        size = rng.randrange(1, 5)
        pieces.append(raw[at : at + size])
        at += size
    return pieces


def test_a_stream_that_cuts_characters_is_intact_and_one_that_loses_bytes_is_not() -> None:
    rng = random.Random(0)
    text = "你好，a😀𠮷é！" * 3
    raw = text.encode()
    for _ in range(20):
        pieces = cut(raw, rng)
        found = read_stream(pieces)
        ends = [len(b"".join(pieces[: i + 1])) for i in range(len(pieces))]
        inside = sum(raw[end : end + 1] and 0x80 <= raw[end] < 0xC0 for end in ends if end < len(raw))
        assert (found.text, found.problem, found.split) == (text, "", inside)
    assert not read_stream([]).problem
    assert read_stream(["好".encode()[:2]]).problem == UNFINISHED
    assert read_stream(["好".encode()[:2], b"a"]).problem == BROKEN
    assert read_stream([b"\xff", "好".encode()]).text == "\ufffd好"
    assert read_stream(["坏\ufffd".encode()]).problem == WRITTEN
    assert read_stream(["好".encode()[:2]]).text == "\ufffd"


def test_terms_longest_first_bounded_and_folded(tmp_path: Path) -> None:
    path = tmp_path / "terms.txt"
    path.write_text("# mine\n密码\n密码学\tcryptography\nAES\nAES-GCM\n", encoding="utf-8")
    terms = read_terms(str(path))
    assert len(terms) == 4
    assert terms.found("密码学与ＡＥＳ算法") == {"密码学", "AES"}
    assert terms.found("Cryptography, aes-gcm; CAESAR; AESX") == {"密码学", "AES-GCM"}
    assert terms.found("") == terms.held("") == set()
    assert terms.held("aes-gcm; CAESAR; AESX") == {"AES-GCM", "AES"} and terms.held("CAESAR; AESX") == set()
    assert read_terms("") is None


@pytest.mark.parametrize("name", SHIPPED_TERMS)
def test_shipped_terms_are_found_in_themselves(name: str) -> None:
    terms = read_terms(name)
    assert len(terms) >= 100
    for form, term in terms.forms.items():
        assert terms.found(f"关于{form}。") == {term}, form


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"# only\n\n", "nothing but comments"),
        ("甲\t乙\n丙\t乙\n".encode(), "belongs to '甲' and to '丙'"),
        ("中文".encode("gb18030"), "not UTF-8"),
    ],
)
def test_bad_lists_are_refused_in_words(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "terms.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_terms(str(path))
    with pytest.raises(InputError, match="no file"):
        read_terms(str(tmp_path / "absent.txt"))


@pytest.mark.parametrize(
    ("profile", "name"),
    [("crypto-qwen3-4b-thinking", "cryptography"), ("counselling-qwen2.5-0.5b", "counselling"), ("quick", "")],
)
def test_a_run_asks_the_prompts_of_its_domain_or_none(profile: str, name: str) -> None:
    settings = load(PROJECT / "params" / f"{profile}.yaml")
    assert prompt_set(settings) == name
    assert prompt_set(settings.model_copy(update={"prompts_file": "general"})) == "general"


def test_prompts_shipped_and_own(tmp_path: Path) -> None:
    assert read_prompts("") == []
    shipped = read_prompts("counselling")
    assert len(shipped) == 5 and len({entry["prompt"] for entry in shipped}) == 5
    path = tmp_path / "prompts.txt"
    path.write_text("什么是AES？\t一种分组密码。\n你好\n", encoding="utf-8")
    assert read_prompts(str(path)) == [
        {"prompt": "什么是AES？", "reference": "一种分组密码。"},
        {"prompt": "你好", "reference": ""},
    ]
    path.write_text("a\tb\tc", encoding="utf-8")
    with pytest.raises(InputError, match="3 parts"):
        read_prompts(str(path))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", "\tParis\nWhat?\tYes", "line 1 begins with a TAB"),
        ("p.txt", "What?\tYes\n \tno question", "line 2 begins with a TAB"),
        ("q.jsonl", '{"prompt": "What is 2+2?", "reference": "4"}', "as JSON or a table"),
        ("q.txt", '{"prompt": "a"}\n{"prompt": "b"}', "as JSON or a table"),
        ("q.txt", '[{"prompt":"a"},\n{"prompt":"b"}]', "as JSON or a table"),
        ("q.csv", "prompt,reference\nWhat is 2+2?,4", "as JSON or a table"),
        ("q.tsv", "Question\tAnswer\nWhat is 2+2?\t4", "as JSON or a table"),
        ("p.txt", "good\nFirst.\\nSecond", "line 2: prompt: .* no line end"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(tmp_path: Path, name: str, content: str, words: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        read_prompts(str(path))
    if "good" not in content and "Question" not in content:
        with pytest.raises(InputError, match=words):
            read_terms(str(path))


def test_lines_end_where_they_are_seen_to_and_comments_are_counted(tmp_path: Path, capsys) -> None:
    unseen = "a\u2028b\x85c\x0cd\x1ee\x0bf"
    (tmp_path / "p.txt").write_bytes(f"{unseen}\r\n#1: what?\r# note\n{{1}} is\n[x] done\t\t{{}}".encode())
    read = [(entry["prompt"], entry["reference"]) for entry in read_prompts(str(tmp_path / "p.txt"))]
    assert read == [(unseen, ""), ("{1} is", ""), ("[x] done", "{}")]
    assert "3 lines; left out as comments, which begin with #: 2" in capsys.readouterr().err


def brute_force_lcs(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    @cache
    def length(i: int, j: int) -> int:
        if i == len(one) or j == len(other):
            return 0
        if one[i] == other[j]:
            return 1 + length(i + 1, j + 1)
        return max(length(i + 1, j), length(i, j + 1))

    return length(0, 0)


def test_rouge_l_against_brute_force() -> None:
    rng = random.Random(1)
    for _ in range(200):
        one, other = (tuple(rng.choices("甲乙丙丁", k=rng.randrange(12))) for _ in range(2))
        common = brute_force_lcs(one, other)
        assert common_length(list(one), list(other)) == common
        expected = 2 * common / (len(one) + len(other)) if common else 0.0
        assert rouge_l("，".join(one), "".join(other)) == pytest.approx(expected)
    assert units("用AES-256加密，ＯＫ!") == ["用", "aes", "256", "加", "密", "ok"]
    assert rouge_l("", "甲") == rouge_l("甲", "") == rouge_l("", "") == 0.0


def test_repetition_against_brute_force() -> None:
    rng = random.Random(2)
    for _ in range(100):
        text = "".join(rng.choices("ab", k=rng.randrange(40)))
        wanted = 0
        for start in range(len(text)):
            for size in range(1, len(text) // 3 + 1):
                unit = text[start : start + size]
                end = start + size
                while end < len(text) and text[end] == unit[(end - start) % size]:
                    end += 1
                if end - start >= 3 * size:
                    wanted = max(wanted, end - start)
        assert longest_loop(text) == wanted, text
    assert longest_loop("很难过 " * 4) == 12 and longest_loop("没有重复") == 0
    assert repeated_share("abcdabcd") == pytest.approx(1 / 5) and repeated_share("abc") == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "<think>想</think>答",
        "<thinking>\n想\n</thinking>\n\n答",
        "<think></think>答",
        "<think>想</think>",
        "<think>想",
        "想</think>答",
        "先<think>想</think>答",
        "<think>想<think>再</think></think>答",
        "<think>想</thinking>答",
        "<think>想</think>答<think>又</think>",
        "答",
    ],
)
def test_a_complete_block_is_one_that_training_would_accept(text: str) -> None:
    block = read_block(text)
    try:
        reasoning, answer = split_thinking(text)
    except ValueError:
        assert not block.complete
    else:
        assert block.complete == bool(reasoning)
        assert block.answer == answer
    steps = [*block.parts, block.complete]
    assert steps == sorted(steps, reverse=True)


def measured(text: str, reference: str = "好的，先休息。", thinking: bool = False, **given: object) -> dict:
    stream, rest = read_stream([text.encode()]), ("我很焦虑，失眠。", reference, read_terms("counselling"), thinking)
    return measure(stream, bool(given.pop("ended", True)), *rest, opening=str(given.pop("opening", "")))


def test_an_answer_keeps_a_term_that_stands_inside_a_longer_one() -> None:
    stream = read_stream(["密钥管理很重要".encode()])
    row = measure(stream, True, "什么是密钥管理？", "密钥要保密。", read_terms("cryptography"), False)
    assert row["terms"] == [1, 1] and row["question_terms"] == [1, 1]
    stream = read_stream(["密钥要保密".encode()])
    row = measure(stream, True, "", "密钥管理", read_terms("cryptography"), False)
    assert row["terms"] == [0, 1], "the longer term is not kept by a part of it"


def test_a_measured_answer() -> None:
    row = measured("焦虑时先放松", "焦虑和失眠时，先放松。")
    assert row["chrf"] == CHRF().sentence_score("焦虑时先放松", ["焦虑和失眠时，先放松。"]).score
    assert row["terms"] == [2, 3] and row["question_terms"] == [1, 2]
    assert (row["stopped"], row["intact"], row["empty"], row["think"]) == (True, True, False, None)
    thought = measured("想一想</think>焦虑", "<think>理由</think>焦虑", thinking=True, opening="<think>")
    assert thought["think"] is True and thought["rouge_l"] == 1.0 and thought["chrf"] == pytest.approx(100)
    lost = measured("<think>想到一半", thinking=True, ended=False)
    assert (lost["think"], lost["empty"], lost["chrf"], lost["stopped"]) == (False, True, 0.0, False)
    assert lost["think_parts"] == [True, False, False, False]
    assert measured("  ")["empty"] is True and measured("\ufffd")["intact"] is False
    assert re.search(r"nrefs:1.*nc:6\|nw:0.*version:2\.", chrf_signature())


def test_summary_of_two_models() -> None:
    base = [measured("好", ended=False), measured("焦虑", "焦虑、失眠"), measured("我", "睡眠"), measured("")]
    tuned = [measured("好的，先休息。"), measured("焦虑、失眠", "焦虑、失眠"), measured("我", "睡眠"), measured("")]
    found = {e["key"]: e for e in summarise({"base": base, "fine-tuned": tuned}, [0, 1, 2, 3], "base")}
    assert "think" not in found
    stopped = found["stopped"]
    assert stopped["models"]["base"] == {"estimate": 0.75, "interval": wilson(3, 4).to_json()}
    assert stopped["differences"] == {
        "fine-tuned": {"estimate": 0.25, "interval": paired_score_interval(0, 1, 4).to_json()}
    }
    terms = found["terms"]  # the first and last reference hold no term
    assert (terms["n"], terms["wanted"]) == (2, 3)
    assert terms["models"]["base"] == {"estimate": pytest.approx(1 / 3), "interval": None}
    chrf = found["chrf"]
    change = [two["chrf"] - one["chrf"] for one, two in zip(base, tuned, strict=True)]
    wanted = clustered_mean(change)
    assert chrf["differences"]["fine-tuned"] == {"estimate": wanted.estimate, "interval": wanted.to_json()}
    low, high = chrf["models"]["base"]["interval"]
    assert 0 <= low <= chrf["models"]["base"]["estimate"] <= high <= 100
    copies = {e["key"]: e for e in summarise({"base": base, "fine-tuned": tuned}, [0, 0, 1, 1], "base")}
    assert copies["chrf"]["models"]["base"]["interval"] is copies["empty"]["models"]["base"]["interval"] is None


def test_rows_that_all_agree_are_not_certain() -> None:
    """A bootstrap of equal values would be an interval of no width."""
    rows = [measured("好", "焦虑、失眠") for _ in range(5)]
    found = {e["key"]: e for e in summarise({"a": rows, "b": rows}, range(5), "a")}
    assert found["terms"]["models"]["a"] == {"estimate": 0.0, "interval": wilson(0, 5).to_json()}  # 10 terms in 5 pairs
    assert found["terms"]["differences"]["b"]["interval"] == paired_score_interval(0, 0, 5).to_json()
    assert found["loop"]["models"]["a"] == {"estimate": 0.0, "interval": None}
    assert found["chrf"]["differences"]["b"] == {"estimate": 0.0, "interval": None}


def test_terms_are_shares_of_all_terms_in_their_rows() -> None:
    """Oracle: the ratio estimator's standard error by its formula (Cochran 1977, § 6.4), rows as units."""
    texts = ["焦虑、失眠、压力", "焦虑", "失眠、压力", "压力、焦虑、失眠", "焦虑、压力"]
    kept = [["焦虑"], ["焦虑"], [], ["压力", "焦虑", "失眠"], ["压力"]]
    less = [["焦虑"], [], [], ["压力", "焦虑"], ["压力"]]
    one = [measured("、".join(own), text) for own, text in zip(kept, texts, strict=True)]
    two = [measured("、".join(own), text) for own, text in zip(less, texts, strict=True)]
    found = {e["key"]: e for e in summarise({"a": one, "b": two}, range(5), "a")}["terms"]
    assert found["models"]["a"]["estimate"] == pytest.approx(6 / 11) and found["wanted"] == 11
    low, high = found["models"]["a"]["interval"]
    assert low < wilson(6, 11).low and high > wilson(6, 11).high  # terms of one row go together
    change, sizes = np.array([0, -1, 0, -1, 0]), np.array([3, 1, 2, 3, 2])
    mean = change.sum() / sizes.sum()
    error = np.sqrt(np.sum((change - mean * sizes) ** 2) * 5 / 4) / sizes.sum()
    half = t.ppf(0.975, 4) * error
    assert found["differences"]["b"]["estimate"] == pytest.approx(mean)
    assert found["differences"]["b"]["interval"] == pytest.approx([mean - half, mean + half])


@pytest.mark.parametrize("n", [5, 12, 20])
def test_intervals_cover_on_few_rows(n: int) -> None:
    """Simulated answers: the truth lies inside about as often as promised, also of differences with many zeros."""
    rng, inside, count = np.random.default_rng(0), np.zeros(2), 300
    plain = {"stopped": True, "intact": True, "empty": False, "think": None, "terms": None, "question_terms": None}
    for _ in range(count):
        models = {
            name: [
                {**plain, "rouge_l": 0.0, "loop": 0, "chrf": chrf, "repetition": repeated}
                for chrf, repeated in zip(
                    rng.gamma(4, 3, n), np.where(rng.random(n) < 0.5, 0, rng.beta(1, 3, n)), strict=True
                )
            ]
            for name in ("a", "b")
        }
        found = {e["key"]: e for e in summarise(models, range(n), "a")}
        asked = ((found["chrf"]["models"]["a"], 12.0), (found["repetition"]["differences"]["b"], 0.0))
        for i, (entry, truth) in enumerate(asked):
            inside[i] += entry["interval"] is None or entry["interval"][0] <= truth <= entry["interval"][1]
    assert (inside / count > 0.9).all(), inside / count


def test_copies_are_no_evidence() -> None:
    """Each row three times over: the same estimate, and (but for clusters - 1 for rows - 1) the same interval."""
    one = [measured("好", ended=i % 2 == 0) for i in range(6)]
    two = [measured("好", ended=i % 3 == 0) for i in range(6)]
    models, copies = {"a": one, "b": two}, {"a": one * 3, "b": two * 3}
    alone = {e["key"]: e for e in summarise(models, range(6), "a")}["stopped"]
    tripled = {e["key"]: e for e in summarise(copies, [*range(6)] * 3, "a")}["stopped"]
    assert tripled["models"]["b"]["interval"] == pytest.approx(alone["models"]["b"]["interval"], abs=0.03)
    assert tripled["differences"]["b"]["interval"] == pytest.approx(alone["differences"]["b"]["interval"], abs=0.03)
