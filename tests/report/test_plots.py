"""Figures have caption, alternative text and glyphs; tables escape what users wrote."""

from __future__ import annotations

import math
import re
import warnings
from types import SimpleNamespace

import pytest
from bs4 import BeautifulSoup

from lib.report import charts, compare_page, display, looks, quantize_page
from lib.report.html import problems_in

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
LOST = [
    REFERENCE,
    {**ENTRY, "verdict": "good enough", "loss": -0.1, "loss_interval": [-0.7, 0.5], "loss_limit": 0.5},
    {**ENTRY, "type": "Q4_K_M", "bytes": 2_000_000, "verdict": "not shown", "loss": 0.4, "loss_interval": None}
    | {"loss_limit": None},
    {**ENTRY, "type": "Q2_K", "bytes": 1_000_000, "verdict": "worse", "loss": 3.0, "loss_interval": [1.5, 4.5]}
    | {"loss_limit": 4.5},
]
POINTS = [
    {"part": part, "point": {"name": name, "estimate": middle, "low": middle - half, "high": middle + half, "n": n}}
    for part, half, n in (("all", 0.1, 90), ("leak_free", 0.2, 30))
    for name, middle in (("base", 0.5), ("fine-tuned", 0.8))
]
BIN = {"confidence": 0.7, "accuracy": 0.6, "low": 0.5, "high": 0.8, "n": 10}
EMPTY_BIN = {"confidence": float("nan"), "accuracy": float("nan"), "low": 0.0, "high": 0.0, "n": 0}

FIGURES = {
    "label_balance": lambda: charts.label_balance({"train": [3, 4], "test": [1, 1]}, NAMES),
    "length_histogram": lambda: charts.length_histogram({"train": [10, 20, 500], "test": [30, 40]}, 192),
    "learning_curves": lambda: charts.learning_curves(HISTORY, chosen_step=2),
    "estimates": lambda: charts.estimates(
        "compare.accuracy_differences", LOST[1:], at=0.5, margin=0.01, reference="F16"
    ),
    "confusion": lambda: charts.confusion({"base": [[3, 1], [2, 4]], "fine-tuned": [[4, 0], [0, 6]]}, NAMES),
    "reliability": lambda: charts.reliability({"base": [BIN, EMPTY_BIN]}, "c"),
    "overlay_histogram": lambda: charts.overlay_histogram({"F16": [1.0, 2.0], "Q2_K": [0.5, 1.0]}, "margin, nats", "c"),
    "tensor_types": lambda: charts.tensor_types({"Q4_K_M": {"Q4_K": 1.5, "F32": 0.1}, "F16": {"F16": 4.0}}),
    "size_divergence": lambda: charts.size_divergence([REFERENCE, ENTRY], ["F16", "Q8_0"]),
    "size_divergence with folders": lambda: charts.size_divergence([REFERENCE, ENTRY, FOLDER], ["Q8_0"]),
    "speed_and_memory": lambda: charts.speed_and_memory([REFERENCE, ENTRY, FOLDER], ["Q8_0"]),
    "size_loss": lambda: charts.size_loss(LOST, "Q8_0", 1.0, "accuracy points"),
    "grouped_estimates": lambda: charts.grouped_estimates("evaluate.wilson", POINTS, at=0.5, patterns=False),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_described_and_has_its_glyphs(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph or an empty legend is only a warning to matplotlib
        page = FIGURES[name]().data
    drawn = r'<img style="max-width:100%(;min-width:\d+px)?" alt="[^"]{20,}" src="data:image/png;base64,'
    assert re.search(drawn, page) or re.search(r'<svg role="img" aria-label="[^"]{20,}"', page)
    assert re.search(r"<figcaption>.+</figcaption>", page)
    assert "nan" not in page.split("base64,")[0]


def test_small_print_scrolls_where_a_phone_would_make_it_smaller_still() -> None:
    """6 inches and 8 points: 6 · 72 · 9 / 8 pixels for letters of 9; with 10 points or 4.9 inches a phone will
    do."""
    small, plain = FIGURES["speed_and_memory"]().data, FIGURES["length_histogram"]().data
    assert 'class="scroll" tabindex="0" role="region" aria-label="figure"' in small and "min-width:486px" in small
    assert all("scroll" not in page and "min-width" not in page for page in (plain, FIGURES["tensor_types"]().data))


@pytest.mark.parametrize(("size", "tall"), [((4.0, 6.0), True), ((6.0, 4.0), False)])
def test_a_figure_higher_than_wide_gets_more_room_in_print(size: tuple[float, float], tall: bool) -> None:
    fig, _ = looks.panels(*size)
    assert ('<figure class="tall">' in display.figure(fig, "c", "what it shows").data) == tall


def test_learning_curves_mark_the_chosen_step() -> None:
    assert "lowest 1.100 at step 2" in charts.learning_curves(HISTORY, 2).data


def test_without_a_chinese_font_labels_are_english_and_the_caption_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks, "cjk_font", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = charts.label_balance({"train": [3, 4]}, NAMES).data
    assert "label 0 = 负面" in page and "No Chinese font" in page


def test_a_font_installed_after_matplotlib_listed_them_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import font_manager

    new = font_manager.findfont("DejaVu Sans Mono")
    monkeypatch.setattr(looks, "CJK_FONTS", ("DejaVu Sans Mono",))
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    try:
        looks.cjk_font.cache_clear()
        assert looks.cjk_font() is None
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [new])
        looks.cjk_font.cache_clear()
        assert looks.cjk_font() == "DejaVu Sans Mono"
    finally:
        looks.cjk_font.cache_clear()


def test_table_escapes_and_formats() -> None:
    page = display.table(
        [{"text": "<b>|x", "n": 1234, "share": 0.12345, "none": None}], "cap & tion", {"share": ".1%"}
    ).data
    assert (
        "&lt;b&gt;|x" in page
        and "1,234" in page
        and "12.3\u00a0%" in page
        and "<td>–</td>" not in page.split("none")[0]
    )
    assert "<caption>cap &amp; tion</caption>" in page and page.count("<th ") == 4


def test_tokens_mark_exactly_the_loss() -> None:
    page = display.tokens(["你", "好<", "正面"], [False, False, True], "c").data
    assert page.count('class="loss"') == 1 and "<u>正面</u>" in page and "好&lt;" in page


def test_triangles_are_explained_only_where_there_are_some() -> None:
    assert "triangles" in FIGURES["size_divergence with folders"]().data
    assert "triangles" not in FIGURES["size_divergence"]().data


def test_divergence_speed_and_memory_are_told_to_whoever_does_not_see_them() -> None:
    told = [
        FIGURES[name]().data.replace("\u00a0", " ") for name in ("size_divergence with folders", "speed_and_memory")
    ]
    assert 'alt="KL divergence by file size. Q8_0 3.00 MB, KL 0.001' in told[0]
    assert "Q8_0 90 tokens a second, 50 MiB" in told[1]


def test_loss_by_size_has_a_tooltip_for_every_file_and_its_verdict() -> None:
    drawn = BeautifulSoup(FIGURES["size_loss"]().data.replace("\u00a0", " "), "html.parser")
    tips = {group["id"]: group.title.get_text() for group in drawn.select("g[id^=file-]")}
    assert {name: tip.replace("−", "-") for name, tip in tips.items()} == {
        "file-Q8_0": "Q8_0, 3.00 MB: good enough, loss -0.10, at most +0.50 (accuracy points)",
        "file-Q4_K_M": "Q4_K_M, 2.00 MB: not shown, loss +0.40 (accuracy points)",
        "file-Q2_K": "Q2_K, 1.00 MB: worse, loss +3.00, at most +4.50 (accuracy points)",
    }
    alt = drawn.svg["aria-label"]
    assert alt.startswith("Loss by file size in accuracy points, margin 1.") and "F16" not in alt
    for name, verdict in (("Q8_0", "good enough"), ("Q4_K_M", "not shown"), ("Q2_K", "worse")):
        assert re.search(rf"{name} [\d.]+ MB, loss [^;]+, {verdict}", alt)
    assert "Ringed: Q8_0." in drawn.figcaption.get_text() and "on 400 test rows" in drawn.figcaption.get_text()


def test_a_drawing_in_a_page_brings_nothing_that_loads_or_styles_the_page() -> None:
    assert problems_in(f'<html lang="en"><title>t</title><body>{FIGURES["size_loss"]().data}</body></html>') == []
    assert "<style" not in FIGURES["size_loss"]().data and "<metadata" not in FIGURES["size_loss"]().data


def test_words_of_users_in_tooltips_are_text() -> None:
    odd = {**LOST[1], "type": "<b>Q&"}
    drawn = charts.size_loss([LOST[0], odd], None, 1.0, "points").data
    assert "<b>" not in drawn and "&lt;b&gt;Q&amp;" in drawn


def test_grouped_estimates_name_group_model_and_limits() -> None:
    shown = FIGURES["grouped_estimates"]().data.replace("\u00a0", " ")
    assert "all test rows, base 0.500 [0.400, 0.600]; all test rows, fine-tuned 0.800 [0.700, 0.900]" in shown
    assert "leak-free rows, base 0.500 [0.300, 0.700]" in shown


def test_where_guessing_lies_is_drawn_and_said() -> None:
    told = charts.learning_curves(HISTORY, 2, guessing=math.log(2)).data
    assert "Dotted: 0.693 nats, the loss of a model" in told.replace("\u00a0", " ")
    assert "guess" not in charts.learning_curves(HISTORY, 2).data


def test_formats_that_were_skipped_are_named_with_the_reason() -> None:
    gone = [{"format": "gptq", "reason": "llmcompressor not installed."}]
    files = [{"type": "Q8_0", "kind": "gguf"}, {"type": "nf4", "kind": "folder", "device": "cpu"}]
    (reading,) = quantize_page.exports(SimpleNamespace(made=[], skipped=gone))  # no table without a line
    assert reading.data == "Skipped: **gptq** (llmcompressor not installed)."
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
    assert "F16 gives 3 of 10 rows another label than merged. Near ties of the latter among them: 2" in text
    assert "(4 in all rows); with a margin of 1 nat or more: 1." in text
    assert "7/10" in display.table(compare_page.agreement(pairs, {REFERENCE["type"]: 3}), "c").data


def test_without_a_verdict_the_picture_of_sizes_speaks_of_none() -> None:
    unjudged = [{**entry, "verdict": "no verdict"} for entry in LOST[1:]]
    drawn = charts.size_loss([LOST[0], *unjudged], None, 1.0, "accuracy points").data
    assert "by which no file is judged here" in drawn and "good enough" not in drawn
    assert "judged here" not in FIGURES["size_loss"]().data


def test_power_is_told_at_the_rows_of_the_run() -> None:
    few, many = (charts.power(n, 1.0).data for n in (200, 2000))
    assert "0 % of rows changed: 0 % at 200 rows" in few.replace("\u00a0", " ")
    assert "2 % of rows changed: 92 % at 2,000 rows" in many.replace("\u00a0", " ")


def test_limits_that_are_not_there_are_not_drawn() -> None:
    shown = charts.estimates("compare.accuracy_differences", LOST[1:3], reference="F16").data
    assert "Q4_K_M 0.4 (no interval)" in shown and "Q8_0 -0.1 [" in shown


def test_what_an_interrupted_try_had_done_is_said() -> None:
    facts = {"found_done": {"F16": "12 rows already scored", "Q8_0": "12 rows already scored", "Q2_K": "3 answers"}}
    product = SimpleNamespace(message="made in 3 s.", entry=SimpleNamespace(facts=facts))
    words = "made in 3 s. An interrupted run had left: F16, Q8_0: 12 rows already scored; Q2_K: 3 answers."
    assert display.made(product).data == words
    assert display.made(SimpleNamespace(message="made.", entry=SimpleNamespace(facts={}))).data == "made."
