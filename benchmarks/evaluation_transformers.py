"""Labels of ChnSentiCorp rows in the Qwen2.5-0.5B shape: the workbook's scorer beside lm-eval's `hf` model.

    python benchmarks/evaluation_transformers.py --json OUT.json [--runs N] [--rows N] [--threads N]

Whole processes in turn, bfloat16, batches of at most eight. The clock of "samples_per_second" runs from the loaded
model to the last answer (tokenization included, imports and loading not); memory is that of the whole process. lm-eval
gets the rendered prompts and the answer words as a multiple-choice task. Both must give the same answers, but for rows
whose margin is within lm-eval's rounding (it sums log-probabilities in bfloat16: steps of 1/16 nat and more).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.evaluating import Side, arguments, make_job, measure, read_rows
from benchmarks.peers import packages
from benchmarks.shapes import shape_folder

LM_EVAL = "0.4.13"
_NEEDS = (
    *("DataProperty==1.1.1", "absl-py==2.5.1", "chardet==6.0.0.post1", "mbstrdecoder==1.1.5", "more-itertools==11.2.1"),
    *("nltk==3.10.4", "pathvalidate==3.3.1", "pytablewriter==1.2.1", "python-dateutil==2.9.0.post0", "pytz==2026.6"),
    *("rouge_score==0.1.2", "sqlitedict==2.1.0", "tabledata==1.3.5", "tcolorpy==0.1.7", "typepy==1.3.5"),
    "word2number==1.1",
)
"""What lm-eval imports and the workbook does not have."""

TIE = 0.25
"""Margins, nats, below which rounding in bfloat16 on either side may choose the other label."""


def sides() -> list[Side]:
    """The workbook, and lm-eval from a folder of its own."""
    folder = packages("lm-eval", f"lm_eval=={LM_EVAL}", *_NEEDS)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return [
        Side("workbook-transformers", "workbook, transformers", {}, {}),
        Side("lm-eval", f"lm-eval {LM_EVAL}, hf", {"PYTHONPATH": str(folder), **offline}, {}),
    ]


def main() -> None:
    """Measure, compare the answers, write the result."""
    from lib.models.loading import load_tokenizer

    chosen = arguments(__doc__)
    model, _ = shape_folder()
    tokenizer = load_tokenizer(model)
    rows, source = read_rows(chosen.rows, tokenizer)
    job = make_job(model, rows, tokenizer, chosen.threads)
    harness.write_rates(chosen.json, measure("evaluation_transformers", sides(), job, source, chosen.runs, TIE))


if __name__ == "__main__":
    main()
