"""Stage 1: from a table of texts and labels to audited splits, a tokenizer and the linear floor."""

from __future__ import annotations

from lib.data.result import DataResult
from lib.data.stage import prepare, rows_from_file
from lib.data.textfiles import file_fingerprint

__all__ = ["DataResult", "file_fingerprint", "prepare", "rows_from_file"]
