"""The product `held_out_kld`: KL divergence of a run's files from their source on held-out rows, file by file.

Every file is scored once, for all pages that compare files: windows of rows as training sees them (text), and whole
rows at the positions that predict an answer's tokens (the task). What is compared with what is for
`lib.stages.quantize.effects` and `lib.stages.quantize.effects` to say.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.runs.child import run_child
from lib.runs.files import read_json, write_json
from lib.runs.machine import available_memory, physical_cores
from lib.runs.run import Product, Run, Work
from lib.stages.quantize.calibration import held_out_rows, held_out_windows
from lib.stages.quantize.files import QuantizationReport
from lib.stages.quantize.ladder import quantize_files
from lib.stages.quantize.recipes import Options

if TYPE_CHECKING:
    from lib.settings import Settings


SUMMARY, VALUES = "held_out_kld.json", "held_out_kld.npz"
MOST_TOKENS = 2048
"""Most tokens of the windows, whatever `perplexity_tokens` allows: 07 measures more, and these files are many."""
ANSWER_ROWS, ANSWER_TOKENS = 96, 8192
"""Most rows whose answers are scored, and most tokens of them."""
_FILES, _MEMORY = 4, 1 << 30
"""Most files that are scored at once, and bytes that each needs beside its weights and the logits of its longest answer
(llama.cpp's and a copy)."""
WITHOUT = " without matrix"
"""Behind the type of a file that was made again without the importance matrix."""


@dataclass(frozen=True)
class HeldOut:
    """Divergences of files.

    Attributes:
        content: "tokens" (scored), "rows", "windows", "window_tokens" of the text; "answer_rows" and
            "answer_positions"; "without": {type: {"bytes", "retyped"}} of files made again.
        text, answers: {type (with `WITHOUT`): KL divergence of every scored token, and of every answer position, nats}.
        text_rows, answer_rows: the test row of each of them.
    """

    product: Product
    content: dict[str, Any]
    text: dict[str, np.ndarray]
    answers: dict[str, np.ndarray]
    text_rows: np.ndarray
    answer_rows: np.ndarray


def measure_held_out(
    settings: Settings,
    options: Options,
    run: Run,
    source: Path,
    files: list[QuantizationReport],
    without: list[str],
    force: bool,
) -> HeldOut:
    """Score files of the ladder, or find it done.

    Args:
        options: of the ladder.
        source, files: what was quantized, and the files to score.
        without: types that are made again without the importance matrix and scored too.
        force: score again even if nothing changed.

    Raises:
        InputError: too few test rows.
    """
    product = run.produce(
        "held_out_kld",
        lambda work: _build(settings, options, run, source, files, without, work),
        parameters={
            **settings.pick("n_ctx", "seed"),
            "windows": _most_windows(settings),
            "types": [file.type for file in files],
            "without_matrix": without,
            "answers": f"{ANSWER_ROWS} rows, {ANSWER_TOKENS} tokens",
        },
        inputs=("data", "gguf", "quantized"),
        force=force,
    )
    with np.load(product.path / VALUES) as stored:
        values = {key: stored[key] for key in stored.files}
    parts = {
        kind: {key.removeprefix(f"{kind}/"): value for key, value in values.items() if key.startswith(f"{kind}/")}
        for kind in ("text", "answers")
    }
    rows = (values["text_rows"], values["answer_rows"])
    return HeldOut(product, read_json(product.path / SUMMARY), parts["text"], parts["answers"], *rows)


def _most_windows(settings: Settings) -> int:
    return max(1, min(settings.perplexity_tokens, MOST_TOKENS) // settings.n_ctx)


def _build(
    settings: Settings,
    options: Options,
    run: Run,
    source: Path,
    files: list[QuantizationReport],
    without: list[str],
    work: Work,
) -> None:
    data, folder = run.require("data").path, run.require("quantized").path
    size = settings.n_ctx
    windows, rows = held_out_windows(data, size, _most_windows(settings), settings.seed)
    answers = held_out_rows(data, ANSWER_ROWS, ANSWER_TOKENS, settings.seed)
    with tempfile.TemporaryDirectory(prefix=".scored-", dir=run.folder) as name:
        unaided = replace(options, imatrix=None)
        plain = quantize_files(source, Path(name), without, unaided, settings.n_threads) if without else []
        paths = {file.type: folder / file.file for file in files}
        paths |= {f"{file.type}{WITHOUT}": Path(name) / file.file for file in plain}
        argument = {
            "reference": str(source.resolve()),
            "files": {kind: str(path.resolve()) for kind, path in paths.items()},
            "pairs": {kind: [kind, f"{kind}{WITHOUT}"] for kind in without},
            "windows": windows,
            "text_rows": rows,
            "answers": answers.rows,
            "n_threads": settings.n_threads,
            "scratch": name,
            "output": str((work.folder / VALUES).resolve()),
        }
        answer = run_child("lib.stages.quantize.held_out:score_in_child", argument, "files on held-out rows")
    content = {
        "tokens": len(windows) * (size - size // 2 - 1),
        "rows": answer["rows"],
        "windows": len(windows),
        "window_tokens": size,
        "answer_rows": len(answers.rows),
        "answer_positions": answers.facts["positions"],
        "without": {f.type: {"bytes": f.bytes, "retyped": answer["retyped"][f.type]} for f in plain},
    }
    write_json(work.folder / SUMMARY, content)
    work.metrics |= answer["means"]


def score_in_child(argument: dict[str, Any]) -> dict[str, Any]:
    """KL divergence from the reference; each file is scored once. The values go into "output".

    Several files at once with few threads each: comparing distributions is work of one thread. No number depends on it.

    Returns:
        "rows" (with a scored token of text), "retyped" (of "pairs"), "means" ({type: mean over the text}).
    """
    from lib.scoring.answer_kl import answer_divergences, answer_jobs, store_answers
    from lib.scoring.llama_backend import LlamaCppBackend
    from lib.scoring.perplexity import positions, store_reference

    windows, jobs, scratch = argument["windows"], answer_jobs(argument["answers"]), Path(argument["scratch"])
    size = len(windows[0])
    n_ctx = max(size, *(len(job.ids) for job in jobs))
    outputs = max(size - size // 2, *(len(job.reads) for job in jobs))

    threads = argument["n_threads"] or physical_cores()
    sizes = [Path(path).stat().st_size for path in argument["files"].values()]

    def opened(path: str, threads: int) -> Any:
        return closing(LlamaCppBackend(Path(path), n_ctx, threads, 0, n_outputs=outputs))

    with opened(argument["reference"], threads) as backend:
        text = store_reference(backend, windows, scratch / "text", "the source")
        answers = store_answers(backend, jobs, scratch / "answers", "the source's answers")
        at_once = _at_once(sizes, threads, _MEMORY + 2 * 4 * outputs * backend.vocab_size)

    def scored(kind: str) -> tuple[np.ndarray, np.ndarray]:
        with opened(argument["files"][kind], max(1, threads // at_once)) as backend:
            found = np.asarray(positions(text, backend, windows, f"KL of {kind}").kl)
            return found, answer_divergences(answers, backend, jobs, f"KL of {kind} at answers")

    values: dict[str, np.ndarray] = {}
    with text, answers, ThreadPoolExecutor(at_once) as pool:
        for kind, found in zip(argument["files"], pool.map(scored, argument["files"]), strict=True):
            values[f"text/{kind}"], values[f"answers/{kind}"] = found
    rows = np.array(argument["text_rows"]).reshape(len(windows), size)[:, size // 2 + 1 :].ravel()
    owners = [argument["answers"][job.prompt]["row"] for job in jobs for _ in job.reads]
    np.savez(argument["output"], text_rows=rows, answer_rows=np.array(owners), **values)
    pairs = {kind: [Path(argument["files"][name]) for name in pair] for kind, pair in argument["pairs"].items()}
    return {
        "rows": len(np.unique(rows)),
        "retyped": {kind: retyped(*pair) for kind, pair in pairs.items()},
        "means": {kind: float(values[f"text/{kind}"].mean()) for kind in argument["files"]},
    }


def _at_once(sizes: list[int], threads: int, beside: int) -> int:
    """Files that are open together: no more than threads, and what fits into the free memory.

    Args:
        sizes: of the files; beside: what each needs beside its weights. Bytes.
    """
    count, largest = min(threads, len(sizes), _FILES), sorted(sizes, reverse=True)
    while count > 1 and sum(largest[:count]) + count * beside > available_memory():
        count -= 1
    return count


def retyped(one: Path, other: Path) -> list[dict[str, str]]:
    """Tensors that two files of one model store in different types: "tensor", "with" (in `one`), "without"."""
    from lib.stages.quantize import llama_library

    with llama_library.open_header(one) as first, llama_library.open_header(other) as second:
        types = {name: (tensor["type"], second.tensors[name]["type"]) for name, tensor in first.tensors.items()}
    return [{"tensor": name, "with": a, "without": b} for name, (a, b) in types.items() if a != b]
