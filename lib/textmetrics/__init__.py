"""What a generated text is worth, from the text alone: no model, no tokenizer; the same for every backend.

`measuring` measures one answer, `summary` brings answers of several models together with intervals, `METRICS` says in
words what each number is. Lists of terms and prompts lie beside the code.
"""

from __future__ import annotations

from lib.textmetrics.measuring import METRICS, Answered, Metric, chrf_signature, measure
from lib.textmetrics.streams import Stream, read_stream
from lib.textmetrics.summary import summarise
from lib.textmetrics.terms import TermList, read_prompts, read_terms

__all__ = [
    "METRICS",
    "Answered",
    "Metric",
    "Stream",
    "TermList",
    "chrf_signature",
    "measure",
    "read_prompts",
    "read_stream",
    "read_terms",
    "summarise",
]
