"""`workbook report --fast`: fewer rows and tokens, never more than the parameter file asks for."""

from __future__ import annotations

from pathlib import Path

from lib.cli.report import FAST, fast_overrides
from lib.settings import Settings, load


def test_all_rows_become_few() -> None:
    assert fast_overrides(Settings(run_name="mine"), {}) == {**FAST, "run_name": "mine-fast"}


def test_a_smaller_number_stays() -> None:
    fewer = fast_overrides(Settings(max_train_rows=50, max_eval_rows=1000, imatrix_chunks=4), {})
    assert "max_train_rows" not in fewer
    assert "imatrix_chunks" not in fewer
    assert fewer["max_eval_rows"] == FAST["max_eval_rows"]


def test_text_still_fills_a_window() -> None:
    whole = Settings(n_ctx=4096, perplexity_tokens=8192)
    assert fast_overrides(whole, {})["perplexity_tokens"] == 4096
    assert Settings(**{**whole.model_dump(), **fast_overrides(whole, {})}).n_ctx == 4096


def test_the_whole_run_is_never_overwritten(tmp_path: Path) -> None:
    """A run name on the command line names the whole run; --fast still makes its own."""
    file = tmp_path / "mine.yaml"
    file.write_text("run_name: other\n", encoding="utf-8")
    given = {"run_name": "mine", "max_train_rows": 600}
    found = fast_overrides(load(file, given), given)
    assert found["run_name"] == "mine-fast"
    assert found["max_train_rows"] == 600
