"""Turns that ask for tags, what marks a turn as learned, and reasoning in shapes between the known ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lib.errors import InputError
from lib.runs.run import open_run
from lib.stages.data.stage import prepare
from tests.stages.data.test_conversations import dialogues, settings, write
from tests.stages.data.test_forms import THINKING, TURNS, read
from tests.stages.data.test_shapes import _conversations, _two


@pytest.mark.parametrize(
    ("opening", "closing", "answer"),
    [
        *(
            (f"<{word}>", f"</{word}>", "")
            for word in ("reasoning", "thought", "Reflection", "cot", "思考", "analysis")
        ),
        *(("[THINK]", "[/THINK]", ""), ("◁think▷", "◁/think▷", ""), ("<seed:think>", "</seed:think>", "")),
        ("【思考】", "【回答】", ""),
        ("<|begin_of_thought|>", "<|end_of_thought|>", "<|begin_of_solution|>答<|end_of_solution|>"),
        ("<|startofthink|>", "<|endofthink|>", ""),
        ("<|think_start|>", "<|think_end|>", ""),
        ("<unused94>thought\n", "<unused95>", ""),
        ("<|channel>thought\n", "<channel|>", ""),
    ],
)
@pytest.mark.parametrize("role", ["system", "user", "parameter"])
@pytest.mark.parametrize("own", [True, False])
def test_tags_that_a_turn_asks_for_are_those_of_the_answers(
    opening: str, closing: str, answer: str, role: str, own: bool
) -> None:
    asks = f"格式：{opening}…{closing}{answer.replace('答', '…')}，先想后答。"
    said = f"{opening if own else '<think>'}想{closing if own else '</think>'}{answer if own else ''}答"
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": said}]
    if role == "system":
        turns.insert(0, {"role": "system", "content": asks})
    elif role == "user":
        turns[0]["content"] = asks
    task = THINKING if role != "parameter" else type(THINKING)("dialogue", asks, 512, thinking=True)
    [messages], counts = read({"messages": turns}, task=task)
    asked = messages[role == "user"]["content"]
    assert asked in ("格式：<think>…</think>，先想后答。", "格式：<think>…</think>…，先想后答。")
    assert messages[2]["content"].startswith("<think>想</think>")
    assert counts["changed: tags that a turn asks for, named as the base model writes them"] == 1


def test_tags_that_answers_use_for_something_else_are_left_alone() -> None:
    asks = "先想，再写 <analysis>…</analysis>。"
    turns = [TURNS[0], {"role": "assistant", "content": "<think>想</think><analysis>析</analysis>"}]
    [messages], counts = read({"messages": [{"role": "system", "content": asks}, *turns]}, task=THINKING)
    assert messages[0]["content"] == asks and not counts
    plain = [{"role": "system", "content": "<reasoning>"}, *TURNS]
    assert read({"messages": plain})[0][0][0]["content"] == "<reasoning>"


@pytest.mark.parametrize("tag", ["thinking", "reasoning"])
def test_the_system_turn_of_later_questions_is_that_of_the_rows(home: Path, tag: str) -> None:
    rows = dialogues(40)
    for row in rows:
        row["messages"][-1]["content"] = f"<{tag}>想</{tag}>答"
    path = write(home / "rows.jsonl", rows)
    asked = settings(path, thinking=True, system_prompt=f"请在<{tag}>标签中思考</{tag}>。")
    result = prepare(asked, open_run(asked.run_name))
    assert result.task.system_prompt == "请在<think>标签中思考</think>。"
    assert {row["messages"][0]["content"] for row in result.rows("train")} == {result.task.system_prompt}


@pytest.mark.parametrize(
    "row",
    [
        *(_two({key: 0}) for key in ("loss_mask", "step_loss_mask", "lossMask")),
        *(_two(**{key: [0, 1]}) for key in ("weight", "train", "loss_weights", "turn_weights", "step_loss_mask")),
        *(_two(loss=[False, True]), _two(mask=[1, 0]), _two(masks=[1, 1, 1, 0]), _two(weight="[0, 1]")),
    ],
)
def test_marks_of_turns_in_any_shape(row: dict[str, Any]) -> None:
    learned, counts = _conversations([row])
    assert learned == [[False, True]]
    assert counts == {"answers marked as not to be learned: in the context, not in the loss": 1}


def test_turns_of_others_that_are_to_be_learned_are_counted() -> None:
    for key in ("loss", "train"):
        _, counts = read({"messages": [{**TURNS[0], key: True}, TURNS[1]]})
        assert counts == {f"not used: the key '{key}' of turns": 1}
        assert not read({"messages": [{**TURNS[0], key: False}, TURNS[1]]})[1]


_ANSWER = {"role": "assistant", "content": "答"}


@pytest.mark.parametrize(
    "answers",
    [
        [{**_ANSWER, "content": [{"type": "text", "text": "想", "thought": True}, {"type": "text", "text": "答"}]}],
        [{**_ANSWER, "content": "想", "channel": "analysis"}, {**_ANSWER, "channel": "final"}],
        [{**_ANSWER, "reasoningContent": "想"}],
        [{**_ANSWER, "reasoningContent": {"reasoningText": {"text": "想"}}}],
        [{**_ANSWER, "content": "<unused94>thought\n想<unused95>答"}],
        [{**_ANSWER, "content": "<|channel>thought\n想<channel|>答"}],
        [{**_ANSWER, "content": "<|startofthink|>想<|endofthink|>答"}],
    ],
)
def test_reasoning_between_the_known_shapes_is_reasoning(answers: list[dict[str, Any]]) -> None:
    [messages], counts = read({"messages": [TURNS[0], *answers]}, task=THINKING)
    assert "".join(messages[2]["content"].split()) == "<think>想</think>答"
    assert not any("not used" in what for what in counts)
    with pytest.raises(InputError, match="1 answers with reasoning"):
        read({"messages": [TURNS[0], *answers]})


def test_what_a_user_thinks_is_no_prompt() -> None:
    for key in ("thinking", "reasoning", "reasoningContent"):
        [messages], counts = read({"messages": [{**TURNS[0], key: "想"}, TURNS[1]]})
        assert messages[1]["content"] == "问" and sum(counts.values()) == 1


_DEEP, _LONG = "[" * 100000 + "]" * 100000, "9" * 5000


def _nested(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "row",
    [
        *(
            {"messages": text}
            for text in (_DEEP, '{"a":' * 50000, f"[{_LONG}]", f'[{{"role": "user", "content": {_LONG}}}]')
        ),
        *({"instruction": "问", "output": "答", "history": text} for text in (_DEEP, f"[{_LONG}]")),
        {"messages": TURNS, "loss_mask": _DEEP},
        {"messages": [TURNS[0], {**TURNS[1], "reasoning": _nested(900)}]},
    ],
)
def test_cells_that_no_parser_ends_are_left_out(row: dict[str, Any]) -> None:
    made, counts = read(row, task=THINKING)
    assert not made and [what.startswith("dropped: ") for what in counts] == [True]
