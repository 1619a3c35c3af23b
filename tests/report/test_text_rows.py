"""What page 01 says about characters, from an audit that was really made."""

from __future__ import annotations

from types import SimpleNamespace

from lib.report import display, rows
from lib.stages.data.text_audit import audit_texts

TEXTS = {"train": ["好，Ａ", "a\u200bb", "&nbsp;坏\ufffd"], "test": ["這個學習，"]}


def test_findings_scripts_and_reading() -> None:
    result = SimpleNamespace(text_audit=audit_texts(TEXTS))
    lines = rows.text_findings(result)
    assert all(line["characters"] > 0 and line["example"] for line in lines)
    assert [line["rows: train, test"] for line in lines if line["what"].startswith("zero-width")] == ["1, 0"]
    assert "⟨U+200B⟩" in display.table(lines, "c").data
    assert [line["traditional"] for line in rows.text_scripts(result)] == [0, 1]
    words = rows.text_reading(result)
    assert "change 2 of 4 rows, 1 of them (25.0 %)" in words
    assert (
        "zero-width characters, soft hyphens, fillers and U+2028 in 1 rows" in words
        and "HTML entities in 1 rows" in words
    )
    assert "traditional forms: 1." in words


def test_a_clean_text_and_an_old_product_say_so() -> None:
    clean = SimpleNamespace(text_audit=audit_texts({"train": ["好"], "test": ["好"]}))
    assert "nothing" in rows.text_findings(clean)[0]["what"] and "damage: none" in rows.text_reading(clean)
    old = SimpleNamespace(text_audit={})
    assert "force" in rows.text_findings(old)[0]["what"] and "force" in rows.text_reading(old)
    assert "force" in rows.text_scripts(old)[0]["split"]
