"""Labels of ChnSentiCorp rows by a Q4_K_M file of the Qwen2.5-0.5B shape: the workbook's scorer beside the usual ways.

    python benchmarks/evaluation_gguf.py --json OUT.json [--runs N] [--rows N] [--threads N]

The peers: `create_chat_completion` a row (greedy, only the answer words allowed, and the second token that a model
needs to end its turn), once with the workbook's threads, which wait passively, and once with its own defaults; and one
`llama_decode` a row. Whole processes in turn; the clock of "samples_per_second" runs
from the loaded model to the last answer, tokenization included. All must give the same answers but for near ties.
"limit": the rate at which llama-bench reads a prompt of 512 tokens with this file (pp512), in tokens a second and in
samples of the mean length.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.evaluating import Side, arguments, make_job, measure, read_rows, task
from benchmarks.peers import pinned_version, tool
from benchmarks.quantize import source_file
from benchmarks.shapes import cache
from lib.scoring.log_probabilities import NEAR_TIE

TYPE = "Q4_K_M"
OURS = Side("workbook-gguf", "workbook, llama.cpp", {}, {})
AS_IT_COMES = {"OMP_WAIT_POLICY": "", "OMP_NUM_THREADS": ""}
PROMPT = 512
"""Tokens of the prompt whose rate is the limit."""


def sides() -> list[Side]:
    """The workbook and the peers."""
    name = f"llama-cpp-python {pinned_version()}"
    return [
        OURS,
        Side("chat", f"{name}, create_chat_completion a row", {}, {"max_tokens": 2}),
        Side("chat-as-it-comes", f"{name}, the same with its defaults", AS_IT_COMES, {"max_tokens": 2}),
        Side("one-by-one", f"{name}, llama_decode a row", {}, {}),
    ]


def model_file() -> Path:
    """The quantized file, made once by the workbook."""
    source = source_file()
    path = cache() / source.name.replace("-F16.gguf", f"-{TYPE}.gguf")
    if not path.is_file():
        subprocess.run(harness.workbook("quantize", source, path, TYPE), check=True, cwd=harness.PROJECT)
    return path


def prompt_rate(model: Path, threads: int) -> float:
    """Tokens a second, mean of five prompts after a warm-up."""
    command = [tool("llama-bench"), "-m", model, "-p", PROMPT, "-n", 0, "-t", threads, "-r", 5, "-o", "json"]
    answer = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    (found,) = json.loads(answer.stdout)
    return float(found["avg_ts"])


def main() -> None:
    """Measure, compare the answers, write the result."""
    from lib.models.gguf_tokenizer import tokenizer_from_gguf

    chosen = arguments(__doc__)
    model = model_file()
    tokenizer = tokenizer_from_gguf(model)
    rows, source = read_rows(chosen.rows, tokenizer)
    job = make_job(model, rows, tokenizer, chosen.threads)
    result = measure("evaluation_gguf", sides(), job, source, chosen.runs, NEAR_TIE)
    length = statistics.mean(len(task().encode(tokenizer, {"text": row["text"]}).prompt_ids) for row in rows)
    rate = prompt_rate(model, chosen.threads)
    result["limit"] = {"tokens_per_second": round(rate, 1), "samples_per_second": round(rate / length, 3)}
    result["rows"]["mean_tokens"] = round(length, 1)
    harness.write_rates(chosen.json, result)


if __name__ == "__main__":
    main()
