"""KL divergence of a run's files from their source on held-out rows, and what is compared by it.

Every file is scored once (product `held_out_kld`): windows of rows as training sees them (text), and whole rows at the
positions that predict an answer's tokens (the task). Two products compare: `imatrix_effect` the smallest types with and
without the importance matrix, `mix_effect` the file under a size budget beside every recipe. Differences are paired
token by token, and whole rows are drawn, because tokens of one row are not independent.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lib.models.gguf_file import run_gguf
from lib.runs.child import run_child
from lib.runs.machine import available_memory, physical_cores
from lib.runs.run import Product, ProductDraft, Run
from lib.scoring import perplexity
from lib.scoring.llama_backend import LlamaCppBackend
from lib.settings import IMATRIX_TYPES, UNQUANTIZED, Settings
from lib.stages.quantize.calibration import AUTO, row_answers, row_windows, run_options
from lib.stages.quantize.files import QuantizationReport, QuantizeResult, quantize_files
from lib.statistics.paired import clustered_bootstrap_t, holm, sign_flip_test

VALUES = "held_out_kld.npz"
MOST_TOKENS = 2048
"""Most tokens of the windows, whatever `perplexity_tokens` allows: 07 measures more, and these files are many."""
ANSWER_ROWS, ANSWER_TOKENS = 96, 8192
"""Most rows whose answers are scored, and most tokens of them."""
WITHOUT = " without matrix"
"""Behind the type of a file that was made again without the importance matrix."""
TYPES = 3
"""The smallest types of the ladder: a matrix moves them most."""
SEED = 42
_FILES, _MEMORY = 4, 1 << 30
"""Most files that are scored at once, and bytes that each needs beside its weights and the logits of its longest answer
(llama.cpp's and a copy)."""
_NEED_MATRIX = frozenset({"iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s"})
"""Types that llama.cpp gives to matrices of the blocks with an importance matrix only."""
_EMBEDDINGS_NEED_MATRIX = frozenset({"iq2_xs", "iq2_xxs", "iq1_s"})
"""Likewise to embedding and output."""


# The scores.


@dataclass(frozen=True)
class HeldOutScores:
    """Divergences of files.

    Attributes:
        content: "tokens" (scored), "rows", "windows", "window_tokens" of the text; "answer_rows" and
            "answer_positions"; "without": {type: {"bytes", "retyped"}} of files made again.
        values: {"text/<type>" and "answers/<type>" (with `WITHOUT`): KL divergence of every scored token, and of every
            answer position, nats; "text_rows", "answer_rows": the test row of each of them}.
    """

    content: dict[str, Any]
    values: dict[str, np.ndarray]

    def counts(self) -> dict[str, Any]:
        """What a comparison is of."""
        return {key: value for key, value in self.content.items() if key != "without"}

    def compare(self, pairs: list[tuple[str, str]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Each pair of files on text and at answers, Holm-corrected among themselves; see `judge`."""
        text, answers = (
            judge([(self.values[f"{part}/{one}"], self.values[f"{part}/{other}"]) for one, other in pairs], rows)
            for part, rows in (("text", self.values["text_rows"]), ("answers", self.values["answer_rows"]))
        )
        return list(zip(text, answers, strict=True))


def judge(pairs: list[tuple[np.ndarray, np.ndarray]], rows: np.ndarray) -> list[dict[str, Any]]:
    """Means, paired differences and verdicts of (with, without), Holm-corrected over the pairs.

    Args:
        pairs: KL divergence of every scored token or position, nats.
        rows: the row of each.
    """
    p_values = [sign_flip_test(one - other, rows, SEED) for one, other in pairs]
    found = []
    for (one, other), p, p_holm in zip(pairs, p_values, holm(p_values), strict=True):
        entry: dict[str, Any] = {}
        for key, values in (("kld_with", one), ("kld_without", other), ("difference", one - other)):
            interval = clustered_bootstrap_t(values, rows, SEED)
            entry |= interval.named(key)
        shown = p_holm < 0.05 and interval.excludes_zero()
        verdict = ("better" if interval.estimate < 0 else "worse") if shown else "cannot tell"
        found.append({**entry, "p": p, "p_holm": p_holm, "verdict": verdict})
    return found


def score_files(settings: Settings, run: Run, result: QuantizeResult, force: bool) -> HeldOutScores:
    """Score every file that one of the comparisons is of, each once, or find it done.

    Args:
        force: score again even if nothing changed.

    Raises:
        InputError: too few test rows.
    """
    wanted, without = [], []
    if settings.imatrix == AUTO:
        wanted = compared_with_matrix(result.files)[0]
        without = [file.type for file in wanted]
    mixed, recipes = _mixed_and_recipes(result.files)
    if mixed and recipes:
        wanted = [file for file in result.files if file.type not in UNQUANTIZED]
    size, most, source = settings.n_ctx, _most_windows(settings), run_gguf(run)
    unaided = replace(run_options(settings, run), imatrix=None)

    def content(work: ProductDraft) -> dict[str, Any]:
        data = run.require("data").path
        chosen = row_windows(data, "test", size, most, settings.seed)
        answers = row_answers(data, "test", ANSWER_ROWS, ANSWER_TOKENS, settings.seed)
        with tempfile.TemporaryDirectory(prefix=".scored-", dir=run.folder) as name:
            scratch = Path(name)
            plain = quantize_files(source, scratch, without, unaided, settings.n_threads) if without else []
            paths = {file.type: run.require("quantized").path / file.file for file in wanted}
            argument = {
                "reference": source,
                "files": paths | {f"{file.type}{WITHOUT}": scratch / file.file for file in plain},
                "pairs": {kind: [kind, f"{kind}{WITHOUT}"] for kind in without},
                "windows": chosen.windows,
                "text_rows": chosen.owners,
                "answers": answers.rows,
                "n_threads": settings.n_threads,
                "scratch": scratch,
                "output": work.folder / VALUES,
            }
            answer = run_child("lib.stages.quantize.held_out_kl:score_in_child", argument, "files on held-out rows")
        work.metrics |= answer["means"]
        return {
            "tokens": len(chosen.windows) * (size - size // 2 - 1),
            "rows": answer["rows"],
            "windows": len(chosen.windows),
            "window_tokens": size,
            "answer_rows": len(answers.rows),
            "answer_positions": answers.facts["positions"],
            "without": {f.type: {"bytes": f.bytes, "retyped": answer["retyped"][f.type]} for f in plain},
        }

    parameters = {
        **settings.pick("n_ctx", "seed"),
        "windows": most,
        "types": [file.type for file in wanted],
        "without_matrix": without,
        "answers": f"{ANSWER_ROWS} rows, {ANSWER_TOKENS} tokens",
    }
    product, found = run.produce_json("held_out_kld", content, parameters, ("data", "gguf", "quantized"), force)
    with np.load(product.path / VALUES) as values:
        return HeldOutScores(found, dict(values))


def _most_windows(settings: Settings) -> int:
    return max(1, min(settings.perplexity_tokens, MOST_TOKENS) // settings.n_ctx)


def score_in_child(argument: dict[str, Any]) -> dict[str, Any]:
    """KL divergence from the reference; each file is scored once. The values go into "output".

    Several files at once with few threads each: comparing distributions is work of one thread. No number depends on it.

    Returns:
        "rows" (with a scored token of text), "retyped" (of "pairs"), "means" ({type: mean over the text}).
    """
    files: dict[str, Path] = {kind: Path(path) for kind, path in argument["files"].items()}
    windows, jobs, scratch = argument["windows"], perplexity.answer_jobs(argument["answers"]), Path(argument["scratch"])
    size = len(windows[0])
    n_ctx = max(size, *(len(job.ids) for job in jobs))
    outputs = max(size - size // 2, *(len(job.reads) for job in jobs))
    threads = argument["n_threads"] or physical_cores()

    def opened(path: Path, threads: int) -> Any:
        return closing(LlamaCppBackend(path, n_ctx, threads, 0, n_outputs=outputs))

    with opened(Path(argument["reference"]), threads) as backend:
        text = perplexity.store_reference(backend, windows, scratch / "text", "the source")
        answers = perplexity.store_reference(backend, jobs, scratch / "answers", "the source's answers")
        sizes = [path.stat().st_size for path in files.values()]
        at_once = _at_once(sizes, threads, _MEMORY + 2 * 4 * outputs * backend.vocab_size)

    def scored(kind: str) -> tuple[np.ndarray, np.ndarray]:
        with opened(files[kind], max(1, threads // at_once)) as backend:
            found = perplexity.positions(text, backend, windows, f"KL of {kind}")
            return found.kl, perplexity.positions(answers, backend, jobs, f"KL of {kind} at answers").kl

    values: dict[str, np.ndarray] = {}
    with text, answers, ThreadPoolExecutor(at_once) as pool:
        for kind, found in zip(files, pool.map(scored, files), strict=True):
            values[f"text/{kind}"], values[f"answers/{kind}"] = found
    rows = perplexity.scored_tokens(np.array(argument["text_rows"]), windows)
    owners = [argument["answers"][job.prompt]["row"] for job in jobs for _ in job.reads]
    np.savez(argument["output"], text_rows=rows, answer_rows=np.array(owners), **values)
    return {
        "rows": len(np.unique(rows)),
        "retyped": {kind: retyped(*(files[name] for name in pair)) for kind, pair in argument["pairs"].items()},
        "means": {kind: float(values[f"text/{kind}"].mean()) for kind in files},
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
    from lib.stages.quantize.llama_library import read_header

    first, second = read_header(one).tensors, read_header(other).tensors
    return [
        {"tensor": name, "with": tensor.type, "without": second[name].type}
        for name, tensor in first.items()
        if tensor.type != second[name].type
    ]


# What is compared.


@dataclass(frozen=True)
class Comparison:
    """The content of one of the two products: "types", with what `judge` found of each on text, and "answers" of each:
    the same in nats a position that predicts a token of an answer."""

    product: Product
    content: dict[str, Any]


def compared_with_matrix(files: tuple[QuantizationReport, ...]) -> tuple[list[QuantizationReport], list[str]]:
    """The smallest files of a ladder that could be made without a matrix too, largest first; and types of which the
    recipe could, but not with the types of single tensors that the options set."""
    never = {*IMATRIX_TYPES, *UNQUANTIZED, "Q8_0"}
    able = [file for file in files if file.imatrix and not file.mix and file.type not in never]
    needing = [file for file in able if any(map(_needs_matrix, file.set_by_hand))]
    free = [file for file in able if file not in needing]
    return sorted(free, key=lambda file: -file.bytes)[-TYPES:], [file.type for file in needing]


def _needs_matrix(tensor: dict[str, Any]) -> bool:
    """Whether the type that the options give a tensor can only be made with an importance matrix."""
    return tensor["type"] in (_NEED_MATRIX if tensor["tensor"].startswith("blk.") else _EMBEDDINGS_NEED_MATRIX)


def imatrix_effect(settings: Settings, run: Run, result: QuantizeResult) -> Comparison | None:
    """The smallest types with and without the run's own importance matrix; None without `imatrix: auto`, or where no
    file was made with one.

    Source, llama.cpp, options and windows are equal. Not all types of tensors need be: a recipe may want another type
    for some where it has a matrix (Q4_0 then stores a few as q4_1); these are recorded, with the bytes.

    The content has what `HeldOutScores.counts` says and "types", each with "type", "bytes", "bytes_without",
    "kld_with", "kld_without" (nats a token, with "…_interval"), "difference" (with minus without),
    "difference_interval", "p", "p_holm", "verdict" ("better" | "worse" | "cannot tell"), "answers" and "retyped"
    (tensors of other types: {"tensor", "with", "without"}); and "left_out": types of the ladder that cannot be made
    without a matrix, because tensor_types or its companions want a type that needs one.

    Raises:
        InputError: too few test rows.
    """
    chosen, left_out = compared_with_matrix(result.files)
    if settings.imatrix != AUTO or not (chosen or left_out):
        return None
    scores = score_files(settings, run, result, settings.force) if chosen else None

    def content(work: ProductDraft) -> dict[str, Any]:
        types = []
        found = scores.compare([(file.type, f"{file.type}{WITHOUT}") for file in chosen]) if scores else []
        for file, (text, answers) in zip(chosen, found, strict=True):
            plain = scores.content["without"][file.type]
            sizes = {"type": file.type, "bytes": file.bytes, "bytes_without": plain["bytes"]}
            types.append({**sizes, **text, "answers": answers, "retyped": plain["retyped"]})
        work.metrics |= {entry["type"]: entry["difference"] for entry in types}
        return {**(scores.counts() if scores else {}), "types": types, "left_out": left_out}

    parameters = {"types": [file.type for file in chosen], "left_out": left_out}
    inputs = ("held_out_kld",) if scores else ("quantized",)
    return Comparison(*run.produce_json("imatrix_effect", content, parameters, inputs, settings.force))


def mix_effect(settings: Settings, run: Run, result: QuantizeResult) -> Comparison | None:
    """The file under the size budget beside every recipe of the ladder; None without a mixed file or without recipes.

    The content has what `HeldOutScores.counts` says, "mixed" ("type", "file", "bytes", "kld" in nats a token,
    "kld_interval", "answers") and "types": the same keys of every recipe, with "difference" (mixed minus recipe),
    "difference_interval", "p", "p_holm" and "verdict" of the mixed file ("better" | "worse" | "cannot tell").

    Raises:
        InputError: too few test rows.
    """
    mixed, recipes = _mixed_and_recipes(result.files)
    if not mixed or not recipes:
        return None
    # the effect of the matrix, where it had anything to compare, has scored them anew just now
    just_now = settings.imatrix == AUTO and compared_with_matrix(result.files)[0]
    scores = score_files(settings, run, result, force=settings.force and not just_now)

    def of(file: QuantizationReport, which: str, text: dict[str, Any], answers: dict[str, Any]) -> dict[str, Any]:
        """One of the two files ("with" or "without") that `judge` compared; of a recipe also the comparison."""
        keys = {"kld": f"kld_{which}", "kld_interval": f"kld_{which}_interval"}
        if which == "without":
            keys |= {key: key for key in ("difference", "difference_interval", "p", "p_holm", "verdict")}
        on_text, at_answers = ({key: found[name] for key, name in keys.items()} for found in (text, answers))
        return {"type": file.type, "file": file.file, "bytes": file.bytes, **on_text, "answers": at_answers}

    def content(work: ProductDraft) -> dict[str, Any]:
        found = scores.compare([(mixed.type, file.type) for file in recipes])
        types = [of(file, "without", *measured) for file, measured in zip(recipes, found, strict=True)]
        work.metrics |= {entry["type"]: entry["difference"] for entry in types}
        return {**scores.counts(), "mixed": of(mixed, "with", *found[0]), "types": types}

    parameters = {"types": [file.type for file in recipes]}
    return Comparison(*run.produce_json("mix_effect", content, parameters, ("held_out_kld",), settings.force))


def _mixed_and_recipes(
    files: tuple[QuantizationReport, ...],
) -> tuple[QuantizationReport | None, list[QuantizationReport]]:
    """The file under a size budget, and the quantized others."""
    mixed = next((file for file in files if file.mix), None)
    return mixed, [file for file in files if not file.mix and file.type not in UNQUANTIZED]
