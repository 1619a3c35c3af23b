"""`workbook report --fast`: fewer rows and tokens, never more than the parameter file asks for."""

from __future__ import annotations

from lib.cli.making import FAST, fast_overrides
from lib.settings import Settings


def test_all_rows_become_few() -> None:
    assert fast_overrides(Settings(run_name="mine")) == {**FAST, "run_name": "mine-fast"}


def test_a_smaller_number_stays() -> None:
    fewer = fast_overrides(Settings(max_train_rows=50, max_eval_rows=1000, imatrix_chunks=4))
    assert "max_train_rows" not in fewer
    assert "imatrix_chunks" not in fewer
    assert fewer["max_eval_rows"] == FAST["max_eval_rows"]


def test_text_still_fills_a_window() -> None:
    settings = Settings(n_ctx=4096, perplexity_tokens=8192)
    assert fast_overrides(settings)["perplexity_tokens"] == 4096
    assert Settings(**{**settings.model_dump(), **fast_overrides(settings)}).n_ctx == 4096
