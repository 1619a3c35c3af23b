"""Every form of a conversation, and cells that hold something else: counted, never a traceback, never code as text."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lib.errors import InputError
from lib.prompts.tasks import ConversationTask
from lib.prompts.templates import Message
from lib.runs.run import open_run
from lib.stages.data.cleaning import clean_split
from lib.stages.data.dialogues import clean_conversations
from lib.stages.data.stage import prepare
from tests.stages.data.test_conversations import SYSTEM, dialogues, settings, write

TASK = ConversationTask("dialogue", SYSTEM, 512)
TURNS = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
READ = [{"role": "system", "content": SYSTEM}, *TURNS]


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that all have all columns, as every reader gives them; values of any kind."""
    columns = dict.fromkeys(name for row in rows for name in row)
    return [columns | row for row in rows]


def read(*rows: dict[str, Any], task: ConversationTask = TASK) -> tuple[list[list[Message]], dict[str, int]]:
    made, counts = clean_conversations(table(rows), "x", task)
    return [row.messages for row in made], dict(counts)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"Messages": TURNS},
        {"messages": json.dumps(TURNS, ensure_ascii=False)},
        {"messages": [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in TURNS]},
        {"messages": [{**m, "from": None, "value": None} for m in TURNS]},
        {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]},
        {"dialogue": ["求助者：问", "支持者：答"]},
        {"dialogue": "求助者：问\n支持者：答\n"},
        {"Instruction": "问", "Output": "答"},
        {"instruction": "问", "output": "答", "history": "[]"},
    ],
)
def test_the_same_conversation_in_every_form(row: dict) -> None:
    assert read(row) == ([READ], {})


def test_a_system_column_is_the_system_turn_of_every_form() -> None:
    made, _ = read({"messages": TURNS, "system": "甲"}, {"messages": [{"role": "system", "content": "乙"}, *TURNS]})
    assert [messages[0]["content"] for messages in made] == ["甲", "乙"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        *[({"messages": cell}, "messages that are no list") for cell in ("你好", 5, TURNS[0], True, "{}")],
        *[
            ({"messages": [cell]}, "messages that are no list of turns with a role")
            for cell in ("你好", TURNS, 1, None)
        ],
        *[({"dialogue": [cell]}, "dialogue with turns that are no text") for cell in (1, {"speaker": "求助者"})],
        ({"dialogue": ["没有说话人"]}, "a turn without its speaker"),
        *[
            ({"messages": [TURNS[0], {"role": "assistant", "content": cell}]}, "content that is no text")
            for cell in ([{"type": "image_url", "image_url": "x"}], ["答"], {"text": "答"}, True)
        ],
        ({"instruction": "问", "output": ["答", 1]}, "content that is no text"),
        ({"instruction": "问", "output": "答", "history": '[["a"]]'}, "history that is no list of [question, answer]"),
    ],
)
def test_cells_of_another_kind_are_counted(row: dict, reason: str) -> None:
    assert read(row) == ([], {f"dropped: {reason}": 1})


def test_numbers_are_text_and_empty_cells_are_empty() -> None:
    made, counts = read({"instruction": 3, "output": 4.5}, {"instruction": "问", "output": float("nan")})
    assert [m["content"] for m in made[0][1:]] == ["3", "4.5"] and counts == {"dropped: an empty turn": 1}


def test_kept_values_can_be_written_as_json(home: Path) -> None:
    when = datetime.datetime(2024, 1, 2)
    base = {"instruction": "问", "output": "答"}
    rows = [{**base, "topic": when, "difficulty": float("nan")}, {**base, "topic": None, "difficulty": 3}]
    made, _ = clean_conversations(table(rows), "x", TASK)
    assert [row.extra for row in made] == [{"topic": str(when)}, {"difficulty": 3}]
    json.dumps([row.to_json("train") for row in made], allow_nan=False)


def turns(*said: str) -> dict[str, Any]:
    """A row of messages; "u…" is said by the user, "a…" by the assistant."""
    return {"messages": [{"role": {"u": "user", "a": "assistant"}[text[0]], "content": text} for text in said]}


def test_turns_in_succession_are_joined_and_a_greeting_goes() -> None:
    made, counts = read(turns("u1", "u2", "a1", "a2"), turns("a0", "a00", "u1", "a1"), turns("a0", "u1"))
    assert [[m["content"] for m in messages[1:]] for messages in made] == [["u1\nu2", "a1\na2"], ["u1", "a1"]]
    assert counts == {
        "changed: turns of one speaker in succession joined": 3,
        "changed: the assistant's greeting before the first question removed": 1,
        "dropped: no assistant turn": 1,
    }
    _, counts = read(turns("u1", "a1求助者：其实是我说的", "a2"))
    assert counts == {"dropped: roles not in turn (user first, then assistant)": 1}


@pytest.mark.parametrize("unseen", ["\u200b", "\ufeff \u2060", "\u3164", "\u2028"])
def test_turns_that_nobody_can_see_are_empty(unseen: str) -> None:
    assert read(turns("u1", "a1"), {"messages": [TURNS[0], {"role": "assistant", "content": unseen}]})[1] == {
        "dropped: an empty turn": 1
    }


def test_reasoning_beside_the_content_is_read() -> None:
    thinking = ConversationTask("dialogue", SYSTEM, 512, thinking=True)
    beside = {"role": "assistant", "content": "答", "reasoning_content": "想"}
    both = {**beside, "content": "<think>别的</think>答"}
    made, counts = read(*({"messages": [TURNS[0], answer]} for answer in (beside, both, TURNS[1])), task=thinking)
    assert [messages[-1]["content"] for messages in made] == ["<think>\n想\n</think>\n\n答", both["content"], "答"]
    other = "not used: the key 'reasoning_content' of turns"
    assert counts == {other: 1, "rows without reasoning: learned as answers without it": 1}
    earlier = [TURNS[0], beside, *TURNS]
    assert read({"messages": earlier}, {"messages": [TURNS[0], beside]}, task=thinking)[1] == {
        "dropped: no thinking in the last answer": 1
    }
    with pytest.raises(InputError, match=r"1 answers with .*reasoning_content"):
        read({"messages": [TURNS[0], beside]})
    with pytest.raises(InputError, match="1 answers with"):
        read({"messages": [TURNS[0], {"role": "assistant", "content": "<Think>想</Think>答"}]})


def test_one_row_of_another_kind_in_a_file(home: Path) -> None:
    result = prepare(settings(write(home / "d.jsonl", [*dialogues(20), {"messages": "str"}])), open_run("t"))
    assert {"step": "dropped: messages that are no list", "split": "all", "rows": 1} in result.flow
    with pytest.raises(InputError, match="messages that are no list"):
        prepare(settings(write(home / "e.jsonl", [{"messages": 5}] * 5), run_name="u"), open_run("u"))


def test_a_labelled_text_that_is_a_list_is_no_text() -> None:
    assert clean_split([{"text": ["a"], "label": 0}], "x", "", "", ["a", "b"]) == (
        [],
        {"dropped: content that is no text": 1},
    )


THINKING = ConversationTask("dialogue", SYSTEM, 512, thinking=True)


@pytest.mark.parametrize(
    "form",
    [
        *(
            "[THINK]想[/THINK]答",
            "◁think▷想◁/think▷答",
            "<thought>想</thought>答",
            "<thoughts>想</thoughts>答",
            "<seed:think>想</seed:think>\n答",
        ),
        *(
            "<reasoning>\n想</reasoning>\n答",
            "<Reflection>想</Reflection>答",
            "<thinking_process>想</thinking_process>答",
        ),
        *(
            "<inner thoughts>想</inner thoughts>答",
            "<思考>想</思考>答",
            "<analysis>想</analysis>答",
            "[思考]想[/思考]答",
        ),
        *("【思考】想【/思考】答", "【思考过程】想\n【回答】答", "【推理】想【最终答案】：答"),
        "\n<|begin_of_thought|>想<|end_of_thought|>\n<|begin_of_solution|>答<|end_of_solution|>\n",
        "<|START_THINKING|>想<|END_THINKING|><|START_RESPONSE|>答<|END_RESPONSE|>",
        "<|channel|>analysis<|message|>想<|end|><|start|>assistant<|channel|>final<|message|>答<|return|>",
    ],
)
def test_reasoning_in_the_tags_of_other_models_is_reasoning(form: str) -> None:
    turns = [TURNS[0], {"role": "assistant", "content": form}]
    [messages], _ = read({"messages": turns}, task=THINKING)
    assert "".join(messages[2]["content"].split()) == "<think>想</think>答"
    [messages], _ = read({"messages": [{"role": "user", "content": form}, TURNS[1]]})
    assert messages[1]["content"] == form.strip()
    with pytest.raises(InputError, match="1 answers with reasoning"):
        read({"messages": [*turns, *TURNS]})
    with pytest.raises(InputError, match="1 answers with reasoning"):
        read({"instruction": "问", "output": "答", "history": [["问", form]]})


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        *(
            (text, True)
            for text in ("Thinking: 想\n\n答", "**Thought process:** 想 答", "思考：想。答", "【思考】想。答")
        ),
        *((text, True) for text in ("Reasoning: 想\nAnswer: 答", "**思考过程**：想", "My reasoning：想")),
        *(
            (text, False)
            for text in ("Thinking about it: 答", "思考一下：答", "<b>想</b>答", "答。思考：想", "分析：答")
        ),
    ],
)
def test_reasoning_without_tags_is_named(answer: str, named: bool) -> None:
    [messages], counts = read({"messages": [TURNS[0], {"role": "assistant", "content": answer}]})
    assert messages[2]["content"] == answer
    assert counts == ({"kept: answers that begin as reasoning does, in no tags that are known": 1} if named else {})


def test_foreign_tags_that_do_not_close_drop_the_row() -> None:
    _, counts = read({"messages": [TURNS[0], {"role": "assistant", "content": "[THINK]想 答"}]}, task=THINKING)
    assert counts == {"dropped: thinking not closed": 1}


def test_reasoning_as_a_list_belongs_to_the_answers_one_by_one() -> None:
    [messages], _ = read({"messages": [*TURNS, *TURNS], "reasoning": ["甲", "乙"]}, task=THINKING)
    assert [m["content"] for m in messages[2::2]] == [f"<think>\n{said}\n</think>\n\n答" for said in "甲乙"]
    for said in (["甲"], ["甲", "乙", "丙"]):
        made, counts = read({"messages": [*TURNS, *TURNS], "thinking": said}, task=THINKING)
        assert not made and counts == {"dropped: thinking with another number of values than answers": 1}


@pytest.mark.parametrize(
    ("turn", "columns", "key"),
    [
        ({"reasoning_content": "甲", "thinking": "乙"}, {}, "thinking"),
        ({"reasoning_content": "甲"}, {"reasoning": "乙"}, "reasoning"),
        ({"content": "<think>甲</think>答"}, {"cot": "乙"}, "cot"),
        ({"reasoning": "甲", "reasoning_details": [{"type": "x", "data": "y"}]}, {}, "reasoning_details"),
    ],
)
def test_a_second_reasoning_is_counted(turn: dict, columns: dict, key: str) -> None:
    [messages], counts = read({"messages": [TURNS[0], {**TURNS[1], **turn}], **columns}, task=THINKING)
    assert "甲" in messages[2]["content"] and counts == {f"not used: the key '{key}' of turns": 1}
    same = dict.fromkeys(columns, "甲")
    assert not columns or not read({"messages": [TURNS[0], {**TURNS[1], **turn}], **same}, task=THINKING)[1]


@pytest.mark.parametrize("column", ["system", "system_prompt", "System_Message"])
def test_a_system_column_is_used_or_counted(column: str) -> None:
    [messages], counts = read({"messages": TURNS, column: "甲"})
    assert messages[0]["content"] == "甲" and not counts
    [messages], counts = read({"messages": [{"role": "system", "content": "乙"}, *TURNS], column: "甲"})
    assert messages[0]["content"] == "乙" and counts == {f"not used: the key '{column.lower()}' of turns": 1}
    assert not read({"messages": [{"role": "system", "content": "甲"}, *TURNS], column: "甲 "})[1]
