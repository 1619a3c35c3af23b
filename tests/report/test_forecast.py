"""Predicted and measured KL divergence: which files are shown, and what is said of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lib.report import quantize_page, steps_page


def entry(name: str, kld: float) -> dict:
    """Of comparison.json."""
    limits = {"kld_low": 0.9 * kld, "kld_high": 1.1 * kld}
    return {"type": name, "file": f"m-{name}.gguf", "bytes": 10**6, "kld_mean": kld, **limits, "n_tokens": 4080}


FILES = [entry("F16", 0.0), entry("Q8_0", 3e-4), entry("Q4_0", 5e-3), entry("MIX_2MB", 2e-3), entry("nf4", 1e-2)]
PREDICTED = {"m-F16.gguf": 0.0, "m-Q8_0.gguf": 1e-4, "m-Q4_0.gguf": 4e-3, "m-MIX_2MB.gguf": 5e-3}


def compared(name: str, kld: float, verdict: str, size: int = 10**6) -> dict:
    """Of mix_effect.json."""
    own = {"type": name, "file": f"m-{name}.gguf", "bytes": size, "kld": kld, "kld_interval": [0.5 * kld, 2 * kld]}
    return {**own, "difference": 0.002 - kld, "difference_interval": [-0.1, 0.1], "p_holm": 0.01, "verdict": verdict}


CONTENT = {"tokens": 4080, "rows": 56, "mixed": compared("MIX_2MB", 2e-3, "")}
CONTENT["types"] = [compared("Q4_0", 5e-3, "better", 3 * 10**6), compared("Q2_K", 1e-3, "worse", 10**6)]
EFFECT = SimpleNamespace(content=CONTENT)


def test_points_stand_in_the_predicted_order() -> None:
    found = steps_page.on_bare_texts(PREDICTED, FILES).points
    assert [point["type"] for point in found] == ["Q8_0", "Q4_0", "MIX_2MB"], "nothing to predict of F16 and nf4"
    assert found[1] == {"type": "Q4_0", "bytes": 10**6, "predicted": 4e-3, "measured": 5e-3} | {
        "low": pytest.approx(4.5e-3),
        "high": pytest.approx(5.5e-3),
    }
    text = steps_page.forecast_table(steps_page.on_bare_texts(PREDICTED, FILES)).data
    assert "4,080 tokens of bare test texts" in text and "MIX_2MB" in text and "nf4" not in text
    held_out = steps_page.on_rows(PREDICTED, EFFECT)
    assert [(p["type"], p["measured"], p["high"]) for p in held_out.points] == [
        ("Q4_0", 5e-3, 0.01),
        ("MIX_2MB", 2e-3, 4e-3),
    ]
    assert "56 held-out rows" in steps_page.forecast_table(held_out).data


def test_the_reading_counts() -> None:
    text = steps_page.forecast_reading(steps_page.on_bare_texts(PREDICTED, FILES)).data
    assert "between 0.40 (MIX_2MB) and 3.00 (Q8_0), within a factor of two for 1 of 3 files" in text
    assert "Of 3 pairs of files 2 are measured in the predicted order" in text
    assert "pairs" not in steps_page.forecast_reading(steps_page.on_bare_texts({"m-Q8_0.gguf": 1e-4}, FILES)).data


def test_the_chart_says_both_numbers() -> None:
    text = steps_page.forecast_chart(steps_page.on_bare_texts(PREDICTED, FILES)).data
    assert "Q8_0 0.0001, 0.0003" in text and "4,080 tokens" in text


def test_open_intervals_of_few_rows() -> None:
    """Two or three rows bound nothing: the numbers stand without an interval."""
    loose = [{**e, "kld_interval": [None, None], "difference_interval": [None, None]} for e in CONTENT["types"]]
    for e in loose:
        e["answers"] = {key: e[key] for key in e if key != "answers"}
    mixed = {**loose[0], "type": "MIX_2MB", "file": "m-MIX_2MB.gguf"}
    counts = {"answer_rows": 2, "answer_positions": 6}
    effect = SimpleNamespace(content={**CONTENT, **counts, "mixed": mixed, "types": loose})
    for found in (steps_page.on_rows(PREDICTED, effect), steps_page.on_answers(PREDICTED, effect)):
        assert (
            "0.005 (no interval)" in steps_page.forecast_table(found).data
            and steps_page.forecast_chart(found) is not None
        )
    for found in (quantize_page.against_recipes(effect), quantize_page.against_recipes_at_answers(effect)):
        assert "-0.003 (no interval)" in found[0].data


def test_a_run_without_predictions() -> None:
    for nothing in (steps_page.on_bare_texts({}, FILES), steps_page.on_rows(PREDICTED, None)):
        assert "size_budget_mb" in steps_page.forecast_table(nothing).data
        assert steps_page.forecast_chart(nothing) is None and steps_page.forecast_reading(nothing) is None


def test_the_mixed_file_beside_the_recipes() -> None:
    shown, reading = quantize_page.against_recipes(EFFECT)
    text, said = shown.data, reading.data
    assert "MIX_2MB (1.00 MB, KL divergence 0.002 [0.001,\u00a00.004])" in text
    assert '<td class="number">3.00</td>' in text
    assert "closer to the source than Q4_0. Larger than it, and still farther: Q4_0." in said
    assert "No larger, and closer: Q2_K" in said
    (nothing,) = quantize_page.against_recipes(None)
    assert "Nothing to compare" in nothing.data
