"""Predicted and measured KL divergence: which files are shown, and what is said of them."""

from __future__ import annotations

from lib.plots import forecast


def entry(name: str, kld: float) -> dict:
    return {"type": name, "file": f"m-{name}.gguf", "bytes": 10**6, "kld_mean": kld, "kld_uncertainty": 0.1 * kld} | {
        "n_tokens": 4080
    }


FILES = [entry("F16", 0.0), entry("Q8_0", 3e-4), entry("Q4_0", 5e-3), entry("MIX_2MB", 2e-3), entry("nf4", 1e-2)]
PREDICTED = {"m-F16.gguf": 0.0, "m-Q8_0.gguf": 1e-4, "m-Q4_0.gguf": 4e-3, "m-MIX_2MB.gguf": 5e-3}


def test_rows_stand_in_the_predicted_order() -> None:
    found = forecast.rows(PREDICTED, FILES)
    assert [row["type"] for row in found] == ["Q8_0", "Q4_0", "MIX_2MB"], "nothing to predict of F16 and nf4"
    assert [round(row["measured / predicted"], 3) for row in found] == [3.0, 1.25, 0.4]
    assert found[1]["± (1.96 SE)"] == 1.96 * 5e-4
    text = forecast.shown(PREDICTED, FILES).data
    assert "4,080 tokens" in text and "MIX_2MB" in text and "nf4" not in text


def test_the_reading_counts() -> None:
    text = forecast.reading(PREDICTED, FILES).data
    assert "between 0.40 (MIX_2MB) and 3.00 (Q8_0), within a factor of two for 1 of 3 files" in text
    assert "Of 3 pairs of files 2 are measured in the predicted order" in text
    assert "pairs" not in forecast.reading({"m-Q8_0.gguf": 1e-4}, FILES).data


def test_the_chart_says_both_numbers() -> None:
    text = forecast.chart(PREDICTED, FILES).data
    assert "Q8_0 0.0001, 0.0003" in text and "4,080 tokens" in text


def test_a_run_without_predictions() -> None:
    assert "size_budget_mb" in forecast.shown({}, FILES).data
    assert forecast.chart({}, FILES) is None and forecast.reading({}, FILES) is None
