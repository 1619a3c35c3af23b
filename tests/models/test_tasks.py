"""What both kinds of rows have in common."""

from __future__ import annotations

from lib.prompts.tasks import language_of


def test_a_card_names_chinese_only_where_the_rows_are() -> None:
    chinese, english = {"text": "房间很好 ok"}, {"text": "A splash, café."}
    dialogue = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "你好"}]}
    assert language_of([chinese, english]) == "zh"
    assert language_of([dialogue]) == "zh"
    assert language_of([english, english, chinese]) is None
    assert language_of([]) is None
