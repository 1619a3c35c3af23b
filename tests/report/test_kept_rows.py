"""Page 07 on retention: figure, sentences, marks."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from scipy.stats import spearmanr

from lib.report import display, retention
from lib.report.display import mark_names, marked
from lib.report.weights_page import MARK
from lib.settings import GRID_SIZABLE


def entry(name: str, size: int, kld: float, kept: float | None, half: float = 0.03, grid: float | None = 0.0) -> dict:
    limits = None if kept is None else [kept - half, kept + half]
    return {
        "type": name,
        "bytes": size * 10**6,
        "kld_mean": kld,
        "kld_low": 0.9 * kld,
        "kld_high": 1.1 * kld,
        "n": 800,
        "verdict": "cannot tell",
        "retention": kept,
        "retention_interval": limits,
        "source_grid": grid,
    }


REFERENCE = {**entry("F16", 270, 0.0, 1.0), "verdict": "reference", "retention_interval": None}
FILES = [
    REFERENCE,
    entry("Q8_0", 145, 0.003, 0.97, 0.05),
    entry("Q5_K_M", 112, 0.013, 0.31, grid=0.79),
    entry("Q4_K_M", 105, 0.041, 0.76),
]


@pytest.fixture(autouse=True)
def unmarked() -> Iterator[None]:
    yield
    mark_names([], "")


def test_reading() -> None:
    words = retention.kept_reading(FILES, "The note.").data
    assert "is left in: Q5_K_M 0.31 [0.28,\u00a00.34]; Q4_K_M 0.76 [0.73,\u00a00.79].** The note." in words
    rank = -spearmanr([0.003, 0.013, 0.041], [0.97, 0.31, 0.76]).statistic
    assert f"3 files with a rank correlation of {rank:.2f}" in words
    assert (
        "1 pair is surely in opposite order: Q5_K_M is nearer on text (0.013 against 0.041 nats) but keeps 0.31"
        in words
    )
    fine = retention.kept_reading(
        [REFERENCE, FILES[1], entry("Q6_K", 120, 0.005, 0.95), entry("Q4_0", 90, 0.1, 0.93)], ""
    ).data
    assert "at least 0.9 by estimate, or may keep all; least: Q4_0 0.93" in fine and "no two files are surely" in fine
    blurred = [REFERENCE, FILES[1], {**FILES[2], "kld_high": 0.05}, {**FILES[3], "kld_low": 0.01}]
    assert "no two files are surely" in retention.kept_reading(blurred, "").data, (
        "on text these two cannot be told apart"
    )
    around = retention.kept_reading([REFERENCE, entry("Q4_0", 90, 0.1, 0.85, 0.1)], "").data
    assert "**By estimate less than 0.9 of what" in around, "the interval holds 0.9"
    assert "Spearman" not in retention.kept_reading(FILES[:3], "").data
    unknown = retention.kept_reading([entry("F16", 1, 0, None), entry("Q8_0", 1, 0, None)], "03 was not run.").data
    assert unknown == "What the files keep of the fine-tuning is not known. 03 was not run."


def test_a_loss_of_nothing_is_not_said_to_be_hidden_by_text() -> None:
    """Slopes of 0.998 and 1.000 with narrow intervals are surely in opposite order, and nothing to speak of."""
    near = {"type": "Q6_K", "kld_mean": 0.001, "kld_low": 0.0009, "kld_high": 0.0011}
    far = {"type": "gptq", "kld_mean": 0.011, "kld_low": 0.0105, "kld_high": 0.0115}
    rows = [{**near, "retention": 0.998, "retention_interval": [0.9975, 0.9985]}]
    rows += [{**far, "retention": 1.0, "retention_interval": [0.9999, 1.0001]}]
    rows += [{**far, "type": "Q2_K", "kld_mean": 0.08, "retention": 0.99, "retention_interval": [0.98, 1.0]}]
    told = retention.kept_reading([{**row, "verdict": "not shown"} for row in rows], "").data
    assert "no two files are surely in opposite order" in told


def test_chart() -> None:
    shown = retention.kept_chart(FILES, FILES[0]["n"]).data
    assert "n = 800 test rows" in shown and "Q5_K_M, 112 MB 0.31 [0.28,\u00a00.34]" in shown
    assert "F16, 270" not in shown, "the reference keeps all by definition"
    assert retention.kept_chart([entry("F16", 1, 0, None)], 9) is None


def test_marks() -> None:
    mark_names([e["type"] for e in FILES if (e["source_grid"] or 0) >= GRID_SIZABLE], MARK)
    shown = display.table([{"type": e["type"], "MB": 1.0} for e in FILES], "Files.").data
    assert re.findall(r"<td>(\w+‡?)</td>", shown) == ["F16", "Q8_0", "Q5_K_M‡", "Q4_K_M"]
    assert "Files. ‡ on the grid of the base&#39;s weights" in shown
    assert marked("XQ5_K_M, Q5_K_M_L, Q5_K_M × 3") == "XQ5_K_M, Q5_K_M_L, Q5_K_M‡ × 3"
    mark_names([], "")
    assert "‡" not in display.table([{"type": "Q5_K_M"}], "Files.").data
    assert "<caption>Rows.</caption>" in display.table([{"text": "see note ‡"}], "Rows.").data
