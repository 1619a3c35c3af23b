"""Figures have caption, alternative text and glyphs; tables escape what users wrote."""

from __future__ import annotations

import re
import warnings
from types import SimpleNamespace

import pytest

from lib.report import charts, compare_page, display, quantize_page

NAMES = ["负面", "正面"]
HISTORY = [
    {"step": 1, "loss": 2.0, "learning_rate": 1e-3, "eval_loss": None},
    {"step": 2, "loss": 1.0, "learning_rate": 5e-4, "eval_loss": 1.1},
    {"step": 3, "loss": 0.5, "learning_rate": 1e-4, "eval_loss": 1.2},
]
ENTRY = {"type": "Q8_0", "bytes": 3_000_000, "kld_mean": 1e-3, "kld_low": 8e-4, "kld_high": 1.2e-3}
ENTRY |= {"bits_per_weight": 8.5, "peak_memory_mib": 50.0, "generation_tokens_per_second": 90.0}
ENTRY |= {"generation_tokens_per_second_range": [80.0, 95.0]}
ENTRY |= {"accuracy": 0.9, "accuracy_interval": [0.85, 0.93], "n": 400}
REFERENCE = {**ENTRY, "type": "F16", "kld_mean": 0.0, "kld_low": 0.0, "kld_high": 0.0}
FOLDER = {**ENTRY, "type": "nf4", "kind": "folder"}
BIN = {"confidence": 0.7, "accuracy": 0.6, "low": 0.5, "high": 0.8, "n": 10}
EMPTY_BIN = {"confidence": float("nan"), "accuracy": float("nan"), "low": 0.0, "high": 0.0, "n": 0}

FIGURES = {
    "label_balance": lambda: charts.label_balance({"train": [3, 4], "test": [1, 1]}, NAMES),
    "length_histogram": lambda: charts.length_histogram({"train": [10, 20, 500], "test": [30, 40]}, 192),
    "learning_curves": lambda: charts.learning_curves(HISTORY, chosen_step=2),
    "estimates": lambda: charts.estimates(
        "evaluate.wilson", [{"name": "base", "estimate": 0.5, "low": 0.4, "high": 0.6, "n": 9}], at=0.5, margin=0.01
    ),
    "confusion": lambda: charts.confusion({"base": [[3, 1], [2, 4]], "fine-tuned": [[4, 0], [0, 6]]}, NAMES),
    "reliability": lambda: charts.reliability({"base": [BIN, EMPTY_BIN]}, "c"),
    "overlay_histogram": lambda: charts.overlay_histogram({"F16": [1.0, 2.0], "Q2_K": [0.5, 1.0]}, "margin, nats", "c"),
    "tensor_types": lambda: charts.tensor_types({"Q4_K_M": {"Q4_K": 1.5, "F32": 0.1}, "F16": {"F16": 4.0}}),
    "size_quality": lambda: charts.size_quality([REFERENCE, ENTRY], ["F16", "Q8_0"]),
    "size_quality with folders": lambda: charts.size_quality([REFERENCE, ENTRY, FOLDER], ["Q8_0"]),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_described_and_has_its_glyphs(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph or an empty legend is only a warning to matplotlib
        page = FIGURES[name]().data
    assert re.search(r'<img style="max-width:100%" alt="[^"]{20,}" src="data:image/png;base64,', page)
    assert re.search(r"<figcaption>.+</figcaption>", page)
    assert "nan" not in page.split("base64,")[0]


def test_learning_curves_mark_the_chosen_step() -> None:
    assert "lowest 1.100 at step 2" in charts.learning_curves(HISTORY, 2).data


def test_without_a_chinese_font_labels_are_english_and_the_caption_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "cjk_font", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = charts.label_balance({"train": [3, 4]}, NAMES).data
    assert "label 0 = 负面" in page and "No Chinese font" in page


def test_a_font_installed_after_matplotlib_listed_them_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import font_manager

    new = font_manager.findfont("DejaVu Sans Mono")
    monkeypatch.setattr(charts, "CJK_FONTS", ("DejaVu Sans Mono",))
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    try:
        charts.cjk_font.cache_clear()
        assert charts.cjk_font() is None
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [new])
        charts.cjk_font.cache_clear()
        assert charts.cjk_font() == "DejaVu Sans Mono"
    finally:
        charts.cjk_font.cache_clear()


def test_table_escapes_and_formats() -> None:
    page = display.table(
        [{"text": "<b>|x", "n": 1234, "share": 0.12345, "none": None}], "cap & tion", {"share": ".1%"}
    ).data
    assert "&lt;b&gt;|x" in page and "1,234" in page and "12.3%" in page and "<td>–</td>" not in page.split("none")[0]
    assert "<caption>cap &amp; tion</caption>" in page and page.count("<th ") == 4


def test_tokens_mark_exactly_the_loss() -> None:
    page = display.tokens(["你", "好<", "正面"], [False, False, True], "c").data
    assert page.count('class="loss"') == 1 and "<u>正面</u>" in page and "好&lt;" in page


def test_triangles_are_explained_only_where_there_are_some() -> None:
    assert "triangles" in FIGURES["size_quality with folders"]().data
    assert "triangles" not in FIGURES["size_quality"]().data


def test_quality_stands_by_size_and_by_bits_with_speed_and_memory() -> None:
    """Four panels, each with words of its own for readers who do not see it."""
    page = FIGURES["size_quality with folders"]().data
    described = re.findall(r'alt="([^"]+)"', page)
    assert len(described) == page.count("<figcaption>") == 4
    assert described[0].startswith("KL divergence by file size") and "Q8_0 3.00, KL 0.001" in described[0]
    assert described[1].startswith("KL divergence by bits per weight") and "Q8_0 8.50, KL 0.001" in described[1]
    assert "Q8_0 3.00 MB, accuracy 0.900" in described[2]
    assert "Q8_0 90 tokens a second, 50 MiB" in described[3]


def test_formats_that_were_skipped_are_named_with_the_reason() -> None:
    gone = [{"format": "gptq", "reason": "llmcompressor not installed."}]
    files = [{"type": "Q8_0", "kind": "gguf"}, {"type": "nf4", "kind": "folder", "device": "cpu"}]
    shown, reading = quantize_page.exports(SimpleNamespace(made=[], skipped=gone))
    assert "no format was made" in shown.data and reading.data == "Skipped: **gptq** (llmcompressor not installed)."
    words = quantize_page.compared(files, gone)
    assert words.startswith("nf4: folders for transformers") and "gptq" in words and "recommendation leaves" in words
    assert quantize_page.compared(files[:1], []) == "Only GGUF files were compared."


def test_agreement_by_margin_is_shown_with_its_reading() -> None:
    def part(low: float, high: float | None, n: int, agree: int, every: bool = False) -> dict:
        share = {"share": agree / n, "interval": [0.1, 0.9]} if n else {"share": None, "interval": None}
        return {"low": low, "high": high, "all": every, "n": n, "agree": agree, **share}

    bins = [part(0.0, 0.1, 4, 2), part(0.1, 1.0, 0, 0), part(1.0, None, 6, 5), part(0.0, None, 10, 7, True)]
    pairs = [{"first": "merged", "second": "F16", "near_ties": 4, "bins": bins}]
    (row,) = compare_page.agreement(pairs, {REFERENCE["type"]: 3})
    assert list(row) == ["model", "against", "near_ties", "< 0.1", "0.1 – 1", "≥ 1", "all rows"]
    assert row["near_ties"] == 3 and row["0.1 – 1"] is None
    assert row["< 0.1"].replace("\u00a0", " ") == "2/4 [10, 90]"
    text = compare_page.agreement_reading(pairs).data
    assert "F16 gives 3 of 10 rows another label than merged: 2 of them are near ties" in text
    assert "(4 rows in all), 1 have a margin of 1 nat or more" in text
    assert "7/10" in display.table(compare_page.agreement(pairs, {REFERENCE["type"]: 3}), "c").data


def test_power_is_told_at_the_rows_of_the_run() -> None:
    few, many = (charts.power(n, 1.0).data for n in (200, 2000))
    assert "0 % of rows changed: 0 % at 200 rows" in few.replace("\u00a0", " ")
    assert "2 % of rows changed: 92 % at 2,000 rows" in many.replace("\u00a0", " ")


def test_limits_that_are_not_there_are_not_drawn() -> None:
    point = {"name": "Q8_0", "estimate": 0.4, "low": None, "high": None, "n": 9}
    assert "Q8_0 0.4 (no interval)" in charts.estimates("evaluate.wilson", [point]).data


def test_what_an_interrupted_try_had_done_is_said() -> None:
    facts = {"found_done": {"F16": "12 rows already scored", "Q8_0": "12 rows already scored", "Q2_K": "3 answers"}}
    product = SimpleNamespace(message="made in 3 s.", entry=SimpleNamespace(facts=facts))
    words = "made in 3 s. An interrupted run had left: F16, Q8_0: 12 rows already scored; Q2_K: 3 answers."
    assert display.made(product).data == words
    assert display.made(SimpleNamespace(message="made.", entry=SimpleNamespace(facts={}))).data == "made."
