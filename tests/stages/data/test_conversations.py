"""Rows without labels: every form read, damaged rows counted, splits by group, real dialogues where they are."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from lib.errors import InputError
from lib.models.loading import load_tokenizer
from lib.prompts.tasks import ConversationTask, read_task
from lib.prompts.templates import end_of_turn
from lib.report.data_page import page_of
from lib.runs.run import open_run
from lib.settings import Settings, check
from lib.stages.data.stage import prepare

SYSTEM = "你是心理咨询师。"
SPLITS = ("train", "validation", "test")
WORDS = ["学习", "压力", "睡眠", "朋友", "父母", "考试", "工作", "孤独", "计划", "运动", "音乐", "休息"]


def sentence(rng: random.Random, length: int = 6) -> str:
    return "".join(rng.choices(WORDS, k=length)) + "。"


def dialogues(count: int, seed: int = 0) -> list[dict]:
    """Rows {"messages"} of one to three exchanges, all openings different."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        turns = [(role, sentence(rng)) for _ in range(rng.randint(1, 3)) for role in ("user", "assistant")]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return rows


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def settings(source: Path, **values) -> Settings:
    given = {"run_name": "t", "task": "dialogue", "system_prompt": SYSTEM, "max_seq_length": 512}
    return check({**given, "dataset": str(source), **values}, "the test")


def test_product_of_dialogues(home: Path) -> None:
    rows = dialogues(60)
    rows[0]["messages"].insert(0, {"role": "system", "content": "自己的系统提示。"})
    copies = [rows[5], {"messages": [rows[6]["messages"][0], {"role": "assistant", "content": "另一个回答。"}]}]
    damaged = [
        {"messages": [{"role": "user", "content": "只有问题"}]},
        {"messages": [*rows[8]["messages"][:1], {"role": "system", "content": "中间"}, *rows[8]["messages"][1:]]},
        {"messages": [{"role": "user", "content": "空"}, {"role": "assistant", "content": "  "}]},
    ]
    open_end = {"messages": [*rows[7]["messages"], {"role": "user", "content": "还有一件事"}]}
    result = prepare(settings(write(home / "d.jsonl", [*rows, *copies, *damaged, open_end])), open_run("t"))
    assert result.floor == {} and result.task == ConversationTask("dialogue", SYSTEM, 512)
    flow = {line["step"]: line["rows"] for line in result.flow if line["split"] == "all"}
    assert flow["read"] == 66
    assert flow["dropped: no assistant turn"] == flow["dropped: an empty turn"] == 1
    assert flow["dropped: roles not in turn (user first, then assistant)"] == 1
    assert flow["dropped: copy of an earlier row"] == 2  # the copy, and the row that lost its open end
    assert result.changes["changed: last turn without an answer removed"] == 1
    splits = {name: result.rows(name) for name in ("train", "validation", "test")}
    everything = [row for part in splits.values() for row in part]
    assert len(everything) == 61 and all(splits.values())
    groups = {name: {row["group"] for row in part} for name, part in splits.items()}
    assert not groups["train"] & groups["test"] and not groups["train"] & groups["validation"]
    same = [row["group"] for row in everything if row["messages"][1] == rows[6]["messages"][0]]
    assert len(same) == 2 and len(set(same)) == 1
    systems = [row["messages"][0] for row in everything]
    assert {m["role"] for m in systems} == {"system"}
    assert sorted({m["content"] for m in systems}) == sorted([SYSTEM, "自己的系统提示。"])
    assert set(everything[0]) == {"id", "messages", "group", "leaked"}
    marked = [piece["text"] for piece in result.example["pieces"] if piece["loss"]]
    assert "".join(marked).count("<|im_end|>") == result.example["turns"] / 2
    assert result.product.entry.facts["task"] == "dialogue" and len(result.product.entry.facts["prompt_hash"]) == 64
    assert not prepare(settings(home / "d.jsonl"), open_run("t")).product.made


def test_given_splits_keep_their_rows_and_flag_leaks(home: Path) -> None:
    folder = home / "source"
    folder.mkdir()
    train, test = dialogues(30, 1), dialogues(12, 2)
    test[3] = {"messages": [train[4]["messages"][0], {"role": "assistant", "content": "别的回答。"}]}
    test[5]["messages"] = [{"role": "user", "content": "嗯"}, *train[9]["messages"][1:2]]
    write(folder / "train.jsonl", train)
    write(folder / "test.jsonl", test)
    write(folder / "dev.jsonl", dialogues(10, 3))
    result = prepare(settings(folder), open_run("t"))
    rows = result.rows("test")
    assert [i for i, row in enumerate(rows) if row["leaked"]] == [3] and len(rows) == 12
    compared = {line["compared"]: line["or near-duplicate"] for line in result.overlaps if line["also in"] == "train"}
    assert compared == {"opening": 1, "whole row": 0}


def test_a_validation_split_that_becomes_the_test_split_is_noted(home: Path) -> None:
    folder = home / "source"
    folder.mkdir()
    write(folder / "train.jsonl", dialogues(30, 1))
    write(folder / "dev.jsonl", dialogues(10, 3))
    result = prepare(settings(folder), open_run("t"))
    assert len(result.rows("test")) == 10
    assert any("its validation split is the test split" in note for note in result.product.entry.notes)
    page = page_of(result)
    assert "Copies of openings" in page.copies().data and "whole turns" in page.length_table().data


def test_alpaca_with_thinking(home: Path) -> None:
    rng = random.Random(3)
    rows = [
        {
            "instruction": f"解释{sentence(rng, 3)}",
            "input": sentence(rng, 2) if i % 2 else "",
            "output": f"<thinking>\n先想{i}\n</thinking>\n\n答案{sentence(rng, 2)}",
            "system": "你是密码学专家。" if i % 3 else "",
            "difficulty": i % 5,
        }
        for i in range(40)
    ]
    bad = [
        "<thinking>没有结束",
        "<thinking></thinking>答",
        "<thinking>想</thinking>",
        "没有思考",
        "<think>a<think>b</think></think>c",
    ]
    rows += [{"instruction": f"坏{text}", "input": "", "output": text, "system": "", "difficulty": 1} for text in bad]
    path = write(home / "alpaca.jsonl", rows)
    result = prepare(settings(path, task="instruction", thinking=True), open_run("t"))
    steps = [line["step"] for line in result.flow]
    for reason in ("thinking not closed", "no answer after the thinking"):
        assert f"dropped: {reason}" in steps
    assert "dropped: thinking nested, repeated or crossed" in steps
    used = sum(len(result.rows(name)) for name in SPLITS)
    assert result.changes == {
        "changed: thinking brought into the base model's form (tags, white space)": used - 2,
        "changed: empty thinking blocks removed": 1,
        "changed: tags that a turn asks for, named as the base model writes them": 1,  # in a question
        "rows without reasoning: learned as answers without it": 2,
    }
    row = next(row for row in result.rows("train") if row["difficulty"] == 1)
    system, _, answer = row["messages"]
    assert system["content"] in ("你是密码学专家。", SYSTEM)
    assert answer["content"].startswith("<think>\n先想") and "\n</think>\n\n答案" in answer["content"]
    with pytest.raises(InputError, match="thinking: true"):
        prepare(settings(path, task="instruction", run_name="u"), open_run("u"))


def test_rows_without_reasoning_beside_rows_with_it(home: Path) -> None:
    """`thinking: true` trains both, each asked for as the template asks for it; the page says how many are plain."""
    rng = random.Random(5)
    rows = [
        {"instruction": sentence(rng, 6), "output": f"<think>\n想{i}\n</think>\n\n答" if i % 4 == 0 else f"答{i}"}
        for i in range(80)
    ]
    path, run = write(home / "mixed.jsonl", rows), open_run("t")
    result = prepare(settings(path, task="instruction", thinking=True), run)
    used = [row for name in SPLITS for row in result.rows(name)]
    assert len(used) == 80 and sum("</think>" in row["messages"][-1]["content"] for row in used) == 20
    assert result.changes["rows without reasoning: learned as answers without it"] == 60
    task, tokenizer = read_task(result.product.path), load_tokenizer(result.product.path / "tokenizer")
    for row in used:
        encoded, answer = task.encode(tokenizer, row), row["messages"][-1]["content"]
        assert tokenizer.decode(encoded.loss_ids) == answer + end_of_turn(tokenizer)
        asked = task.prompt(tokenizer, row)
        assert tokenizer(asked, add_special_tokens=False)["input_ids"] == encoded.prompt_ids
    plain = write(home / "plain.jsonl", [row for row in rows if "</think>" not in row["output"]])
    with pytest.raises(InputError, match="no answer with reasoning, and thinking: true"):
        prepare(settings(plain, task="instruction", thinking=True, run_name="p"), open_run("p"))


def test_many_rows_that_do_not_fit_are_said_on_every_page(home: Path) -> None:
    rng = random.Random(6)
    rows = [{"instruction": sentence(rng, 6), "output": sentence(rng, 60 if i % 2 else 3)} for i in range(60)]
    run = open_run("t")
    prepare(settings(write(home / "d.jsonl", rows), task="instruction", max_seq_length=80), run)
    assert any("rows of train were left out" in note and "first exchange over 80" in note for note in run.stamps())


def test_rows_with_one_instruction_are_compared_by_their_input(home: Path) -> None:
    """A long instruction and a short question: nearly equal as texts, and still different questions."""
    rng = random.Random(8)
    shared = (
        "你是一位资深的密码学专家，请根据下面的题目逐步推理和计算，先给出完整的思考过程，再给出结论，并说明所用的定理。"
    )
    rows = [{"instruction": shared, "input": f"{sentence(rng, 4)}", "output": sentence(rng, 8)} for _ in range(40)]
    rows += [{**rows[i], "output": sentence(rng, 8)} for i in range(3)]  # the same question, another answer
    rows.append({"instruction": "这一条指令只有一个输入", "input": rows[7]["input"], "output": "答"})
    result = prepare(settings(write(home / "i.jsonl", rows), task="instruction"), open_run("t"))
    made = [row for name in SPLITS for row in result.rows(name)]
    groups: dict[int, list[str]] = {}
    for row in made:
        groups.setdefault(row["group"], []).append(row["messages"][1]["content"])
    assert len(made) == 44 and len(groups) == 41
    assert sorted(map(len, groups.values()))[-4:] == [1, 2, 2, 2]
    assert all(content.startswith((shared, "这一条")) for contents in groups.values() for content in contents)


def test_alpaca_history_is_earlier_turns(home: Path) -> None:
    rng = random.Random(5)
    rows = [{"instruction": f"问{sentence(rng)}", "output": f"答{sentence(rng)}", "history": []} for _ in range(30)]
    rows[3]["history"] = [["先问", "先答"], ["再问", "再答"]]
    rows[4]["history"] = None
    bad = [[["只有问题"]], [["a", "b", "c"]], [["问", None]]]
    rows += [{"instruction": f"坏{i}", "output": "答", "history": history} for i, history in enumerate(bad)]
    rows += [{"instruction": "空", "output": "答", "history": [["问", " "]]}]
    result = prepare(settings(write(home / "h.jsonl", rows), task="instruction"), open_run("t"))
    flow = {line["step"]: line["rows"] for line in result.flow}
    assert flow["dropped: history that is no list of [question, answer]"] == 3 and flow["dropped: an empty turn"] == 1
    made = {row["messages"][-1]["content"]: row["messages"] for split in SPLITS for row in result.rows(split)}
    assert len(made) == 30
    long = [(m["role"], m["content"]) for m in made[rows[3]["output"]]]
    expected = [("system", SYSTEM), ("user", "先问"), ("assistant", "先答"), ("user", "再问"), ("assistant", "再答")]
    assert long == [*expected, ("user", rows[3]["instruction"]), ("assistant", rows[3]["output"])]


def test_alpaca_history_of_another_form_is_refused(home: Path) -> None:
    rows = [{"instruction": f"问{i}", "output": "答", "history": "问：前 答：后"} for i in range(20)]
    with pytest.raises(InputError, match=r"history that is no list of \[question, answer\]"):
        prepare(settings(write(home / "h.jsonl", rows), task="instruction"), open_run("t"))


def test_the_characters_of_the_rows_are_audited(home: Path) -> None:
    rows = dialogues(40, 9)
    rows[0]["messages"][1]["content"] += "Ａ\u200b&nbsp;"
    rows[2]["messages"].insert(0, {"role": "system", "content": "自己的\u2060提示"})
    rows[1]["messages"][0]["content"] = "這個學習壓力讓我覺得很難過。"
    audit = prepare(settings(write(home / "a.jsonl", rows)), open_run("t")).text_audit
    found = {line["what"]: line for line in audit["findings"]}
    assert audit["rows"] == 40 and audit["changed_beyond_punctuation"] == 1
    for what in ("full-width letters", "zero-width", "HTML entities"):
        (line,) = [line for name, line in found.items() if name.startswith(what)]
        assert line["train"] + line["validation"] + line["test"] == 1 + (what == "zero-width")  # its own system turn
    assert sum(line["traditional"] + line["mixed"] for line in audit["scripts"]) == 1


def test_long_rows_are_cut_or_dropped_with_a_count(home: Path) -> None:
    rows = dialogues(60, 4)
    rng = random.Random(5)
    for row in rows[:20]:
        row["messages"] += [{"role": r, "content": sentence(rng, 40)} for r in ("user", "assistant")]
    rows += [{"messages": [{"role": "user", "content": sentence(rng, 200)}, {"role": "assistant", "content": "好"}]}]
    result = prepare(settings(write(home / "d.jsonl", rows), max_seq_length=96), open_run("t"))
    task = read_task(result.product.path)
    from lib.models.loading import load_tokenizer

    tokenizer = load_tokenizer(result.product.path / "tokenizer")
    used = [row for name in ("train", "validation", "test") for row in result.rows(name)]
    encoded = [task.encode(tokenizer, row) for row in used]
    assert max(len(e.ids) for e in encoded) <= 96
    assert sum(e.turns_cut for e in encoded) == sum(line["turns cut"] for line in result.length_table) > 0
    assert sum(line["rows"] for line in result.flow if "first exchange over 96 tokens" in line["step"]) >= 1


def test_rows_whose_thinking_does_not_fit_are_dropped_with_their_own_reason(home: Path) -> None:
    rng = random.Random(6)
    rows = dialogues(40, 6)
    for i, row in enumerate(rows):
        row["messages"][-1]["content"] = f"<think>{sentence(rng, 300 if i < 5 else 2)}</think>答{i}"
    chosen = settings(write(home / "d.jsonl", rows), thinking=True, max_seq_length=160)
    result = prepare(chosen, open_run("t"))
    dropped = [
        line["rows"] for line in result.flow if line["step"].endswith("no answer with its reasoning within 160 tokens")
    ]
    assert sum(dropped) == 5
    table = {line["split"]: line for line in result.length_table}
    for name in SPLITS:
        answers = sum(len(row["messages"]) // 2 for row in result.rows(name))
        assert table[name]["answers learned"] == len(
            result.rows(name)
        )  # the last of each row, the only one that thinks
        assert table[name]["answers learned"] + table[name]["answers only read"] == answers


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": 1}], "messages"),
        ([{"messages": [{"role": "robot", "content": "a"}]}] * 3, "robot"),
        ([{"messages": [{"role": "user", "content": "a"}]}] * 3, "no usable conversation"),
        (dialogues(4), "at least 5"),
        (
            [{"instruction": f"请按同样的要求逐步推理并且回答下面的问题：{i}", "output": f"{i}"} for i in range(9)],
            "9 have nearly one",
        ),
    ],
)
def test_refused(home: Path, rows: list[dict], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(settings(write(home / "d.jsonl", rows)), open_run("t"))


def test_a_split_without_rows_is_refused_with_its_reason(home: Path) -> None:
    rows = dialogues(20, 7)
    rng = random.Random(7)
    for row in rows:
        reasoning = "".join(chr(0x4E00 + rng.randrange(3000)) for _ in range(300))
        row["messages"][-1]["content"] = f"<think>{reasoning}</think>答"
    with pytest.raises(InputError, match=r"no usable row \(\d+ rows dropped: no answer with its reasoning within 64"):
        prepare(settings(write(home / "d.jsonl", rows), thinking=True, max_seq_length=64), open_run("t"))


def test_contradictions() -> None:
    with pytest.raises(InputError, match="sample corpus"):
        check({"task": "dialogue"}, "the test")
    with pytest.raises(InputError, match="thinking must be false"):
        check({"thinking": True}, "the test")
    for task in ("dialogue", "instruction"):  # the default of the other task must not slip in
        with pytest.raises(InputError, match="set system_prompt for task"):
            check({"task": task, "dataset": "x.jsonl"}, "the test")
        assert check({"task": task, "dataset": "x.jsonl", "system_prompt": ""}, "the test").system_prompt == ""


def test_cpsycoun_dialogues(home: Path, shared_data: Path) -> None:
    result = prepare(settings(shared_data / "cpsycoun" / "CPsyCounE_45.jsonl", max_seq_length=2048), open_run("t"))
    rows = [row for name in ("train", "validation", "test") for row in result.rows(name)]
    assert len(rows) == 45 and len({row["topic"] for row in rows}) == 9
    assert all([m["role"] for m in row["messages"][:3]] == ["system", "user", "assistant"] for row in rows)
    assert not any(message["content"].startswith(("求助者", "支持者")) for row in rows for message in row["messages"])


def test_smile_dialogues(home: Path, shared_data: Path) -> None:
    lines = (shared_data / "smile_chat" / "smile_student_3000.jsonl").read_text(encoding="utf-8").splitlines()[:300]
    path = home / "smile.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    result = prepare(settings(path, max_seq_length=1024), open_run("t"))
    raw = [json.loads(line)["messages"] for line in lines]
    open_ends = sum(m[-1]["role"] == "client" for m in raw)
    assert 0 < result.changes["changed: last turn without an answer removed"] <= open_ends
    odd = sum(any(a["role"] == b["role"] for a, b in itertools.pairwise(m)) for m in raw)
    assert sum(line["rows"] for line in result.flow if "roles not in turn" in line["step"]) == odd  # speakers in a text
    openings: dict[str, set[str]] = {}
    for name in ("train", "validation", "test"):
        for row in result.rows(name):
            openings.setdefault(row["messages"][1]["content"], set()).add(name)
    assert all(len(names) == 1 for names in openings.values())


def test_reference_answers_of_another_form_stop_the_run_before_it_trains(home: Path) -> None:
    rows = [
        {"instruction": "找出实体", "input": sentence(random.Random(i)), "output": '[{"type": "人", "text": "李明"}]'}
        for i in range(60)
    ]
    given = {"task": "instruction", "answer_metric": "entity_f1"}
    prepare(settings(write(home / "d.jsonl", rows), **given), open_run("t"))
    rows[7]["output"] = "人：李明"
    with pytest.raises(InputError, match=r"entity_f1, and 1 of 60 reference answers that list no entities.*人：李明"):
        prepare(settings(write(home / "d.jsonl", rows), **given), open_run("t"))
    prepare(settings(write(home / "d.jsonl", rows), task="instruction"), open_run("t"))


@pytest.mark.parametrize("name", ["sample-ner", "sample-qa"])
def test_the_corpora_with_answers_are_prepared(name: str, home: Path) -> None:
    given = {"task": "instruction", "max_train_rows": 300, "base_model": "offline"}
    result = prepare(settings(Path(name), **given), open_run("t"))
    facts = result.product.entry.facts
    assert facts["sample_data"] and facts["dataset"]["source"] == name and name in facts["source"]
    assert open_run("t").stamps() == ["offline base model, sample data: not a result about Qwen or real text"]
    test = result.rows("test")
    assert sum(row["leaked"] for row in test) < 0.1 * len(test), "made-up rows that are hardly copies of one another"
    assert len({row["group"] for row in test}) > 0.8 * len(test)
