"""What page 01 says about characters, from an audit that was really made."""

from __future__ import annotations

from types import SimpleNamespace

from lib.report import display
from lib.report.data_page import DataPage, text_findings
from lib.stages.data.text_audit import audit_texts

TEXTS = {"train": ["好，Ａ", "a\u200bb", "&nbsp;坏\ufffd"], "test": ["這個學習，"]}


def page(audit: dict) -> DataPage:
    product = SimpleNamespace(entry=SimpleNamespace(facts={}))
    return DataPage(SimpleNamespace(text_audit=audit, task=None, product=product))


def test_findings_scripts_and_reading() -> None:
    lines = text_findings(audit_texts(TEXTS))
    assert all(line["characters"] > 0 and line["example"] for line in lines)
    assert [line["rows: train, test"] for line in lines if line["what"].startswith("zero-width")] == ["1, 0"]
    assert "⟨U+200B⟩" in display.table(lines, "c").data
    shown = page(audit_texts(TEXTS))
    assert [line["traditional"] for line in shown.result.text_audit["scripts"]] == [0, 1]
    assert "⟨U+200B⟩" in shown.characters().data and "traditional forms" in shown.scripts().data
    words = shown.reading().data
    assert "change 2 of 4 rows, 1 of them (25.0 %)" in words
    assert (
        "zero-width characters, soft hyphens, fillers and U+2028 in 1 rows" in words
        and "HTML entities in 1 rows" in words
    )
    assert "traditional forms: 1." in words


def test_a_clean_text_and_an_old_product_say_so() -> None:
    clean = audit_texts({"train": ["好"], "test": ["好"]})
    assert "nothing" in text_findings(clean)[0]["what"] and "damage: none" in page(clean).reading().data
    old = page({})
    assert all("force" in shown().data for shown in (old.characters, old.reading, old.scripts))
