"""The processes of a comparison: one a file, what each of them gets, and where its scores are kept.
Compare files: encode once, run every file in its own process, judge, write.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.models.gguf_file import check_gguf
from lib.progress import say
from lib.prompts.tasks import Task
from lib.runs.child import run_child
from lib.runs.files import writable, write_json
from lib.runs.machine import llama_cpp_problem, physical_cores
from lib.scoring.journal import found_done, journal_path
from lib.scoring.metric import ACCURACY, Metric, RowGroups, metric_of
from lib.settings import mix_name
from lib.stages.compare.advice import recommend, recommend_answers
from lib.stages.compare.entries import (
    Measured,
    Work,
    conditions_of,
    encode_work,
    entries_of,
    row_scores,
)
from lib.stages.compare.error_ladder import DEQUANTIZED_SCORES, MERGED32_SCORES, MERGED_SCORES, agreements, step_file
from lib.stages.compare.retention import GGUF, BaseScores, retentions, with_retention
from lib.statistics.verdicts import frontier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# The processes of a comparison: one a file, what each of them gets, and where its scores are kept.

_TEMPORARY = ".reference-"
SCORING = ".scores"
"""Folder of scores and answers that are kept as they come."""


def shared_argument(work: Work, rows: Sequence[Mapping[str, Any]], threads: int, gpu_layers: int) -> dict[str, Any]:
    """What every child process gets."""
    return {
        "names": [str(rows[i]["id"]) for i in work.order],
        "prompts": work.prompts,
        "answers": work.answers,
        "spans": work.spans,
        "windows": work.windows,
        "documents": work.documents,
        "n_ctx": work.n_ctx,
        "n_threads": threads,
        "n_gpu_layers": gpu_layers,
        "sample": work.sample,
    }


def run_all(paths: Sequence[Path], shared: Mapping[str, Any], output: Path) -> list[dict[str, Any]]:
    """Measure every file, one process after another; the reference's log-probabilities live as long as this call."""
    answers = []
    for stray in output.glob(f"{_TEMPORARY}*"):  # of a comparison that was killed
        shutil.rmtree(stray, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=output) as folder:
        stored = str(Path(folder).resolve() / "log-probs")
        for place, path in enumerate(paths):
            function = "child:score_folder" if path.is_dir() else "child:score_file"
            what = f"comparing {path.name} ({place + 1} of {len(paths)})"
            more = {"reference": stored, "is_reference": place == 0}
            answers.append(run_one(function, path, {**shared, **more}, output, what))
    return answers


def run_one(function: str, path: Path, argument: Mapping[str, Any], output: Path, what: str) -> dict[str, Any]:
    """One process; what it scores or writes is kept in `output` until the whole comparison is done.

    Args:
        function: "module:name" of this package; it gives "found": what was found done, in words.
    """
    name = function.partition(":")[2]  # one file may be scored in two ways
    keep = journal_path(output / SCORING / name, path.resolve())
    given = {**argument, "path": str(path.resolve()), "keep": str(keep)}
    answer = run_child(f"lib.stages.compare.{function}", given, what)
    if answer["found"]:
        say(f"{path.name}: {answer['found']}")
    return answer


def forget_scores(output: Path) -> None:
    """Remove what was kept for an interruption."""
    shutil.rmtree(output / SCORING, ignore_errors=True)


# Compare files: encode once, run every file in its own process, judge, write.

SUMMARY = "comparison.json"


def compare_files(
    reference: Path,
    others: Sequence[Path],
    rows: Sequence[Mapping[str, Any]],
    task: Task,
    output: Path,
    source: Mapping[str, Any] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    n_ctx: int = 512,
    perplexity_tokens: int = 8192,
    n_threads: int = 0,
    n_gpu_layers: int = 0,
    equivalence_margin: float = 1.0,
    perplexity_margin: float = 1.0,
    train: Sequence[Mapping[str, Any]] = (),
    merged: Path | None = None,
    seed: int = 42,
    start: BaseScores | None = None,
    grid: Mapping[str, float] | None = None,
    forget: bool = True,
) -> dict[str, Any]:
    """Compare GGUF files and model folders with a reference on the same rows and on held-out text.

    Args:
        reference: the unquantized GGUF file.
        others: GGUF files made from it, and folders of the same model that transformers loads.
        rows: {"id", "text", "label"} or {"id", "messages"}, with "group" and "leaked" where known.
        output: folder for comparison.json and one scores-<TYPE>.jsonl a file; rows that an interrupted comparison
            scored there are not scored again.
        source: what the rows are, in words; goes into comparison.json as "data".
        tokenizer: of the model; None = the one inside `reference`.
        n_ctx, perplexity_tokens: window and most tokens of the held-out text (the rows' texts, leak-free first).
        equivalence_margin: accuracy points that count as equivalent.
        perplexity_margin: percent of answer perplexity that count as equivalent, for rows without labels.
        train: training rows without labels, whose token frequencies are the least that the reference must beat.
        merged: folder of the model that `reference` was converted from; its scores in transformers are compared too.
        start: scores of the base model on the same rows, from which the reference was trained.
        grid: by file name, share of its weights in types on the grid of the base's weights; None = not known.
        forget: False leaves what was kept for an interruption, for more work (`lib.stages.compare.files`).

    Returns:
        what comparison.json holds: "data", "conditions", "reference" (its type), "files" (one entry a file or folder,
        the reference first), "frontier" and "recommendation" (of GGUF files only: llama.cpp runs nothing else),
        "agreement" (equal labels by margin, see `lib.stages.compare.error_ladder`; None without labels),
        "retention_note"
        (what the entries' "retention" rests on, or why it is unknown), "notes",
        "found_done" (by type: what an interrupted try had done, in words), and with `merged` "steps": its name, its
        name in float32 where it was scored in that too (else None), and the file whose weights were also computed by
        transformers (`lib.stages.compare.error_ladder`).

    Raises:
        InputError: a file that is missing, no GGUF, or that llama.cpp refuses or dies of (named); the same file twice;
            no rows; an unwritable folder; too little room for the reference's log-probabilities.
    """
    _check(reference, others, rows)
    writable(output)
    tokenizer = tokenizer or _tokenizer_in(reference)
    work, metric = encode_work(tokenizer, task, rows, n_ctx, perplexity_tokens), metric_of(task)
    shared = shared_argument(work, rows, n_threads or physical_cores(), n_gpu_layers)
    measured = _measure([reference, *others], rows, work, shared, output)
    in_torch = merged and _merged(merged, shared, rows, work, output)
    margin = {"equivalence_margin": equivalence_margin, "perplexity_margin": perplexity_margin}[metric.margin_setting]
    floor = metric.floor(tokenizer, task, train, rows)
    kept = retentions(metric, measured.scores, start or BaseScores(), RowGroups.of(rows).groups)
    notes = (f"{n}: {a['note']}" for n, a in zip(measured.names, measured.answers, strict=True) if a.get("note"))
    result = {
        "data": {**(source or {}), "rows": len(rows), "leak_free_rows": _leak_free(rows)},
        "conditions": {**conditions_of(measured, shared, work), **metric.conditions(margin, floor), "seed": seed},
        **_judge(metric, measured, rows, margin, floor, seed),
        "agreement": agreements(measured.scores, in_torch) if metric is ACCURACY else None,
        "notes": [*work.notes, *notes],
        "found_done": found_done({name: [score.found] for name, score in measured.scores.items()}),
    }
    result = with_retention(result, kept, grid or {})
    files = [entry for entry in result["files"] if entry["kind"] == GGUF]
    chosen = step_file(files[1:], result["recommendation"])
    if in_torch and chosen is not None:
        weights = _dequantized(measured, chosen, merged, shared, output)
        row_scores(rows, work, weights).save(output / DEQUANTIZED_SCORES)
        in_float32, note = _merged_float32(in_torch[0], merged, shared, rows, work, output)
        result["steps"] = {"merged": in_torch[0], "merged_float32": in_float32, "file": chosen}
        result["notes"] += note
    write_json(output / SUMMARY, result)
    if forget:
        forget_scores(output)
    return result


def _tokenizer_in(reference: Path) -> PreTrainedTokenizerBase:
    from lib.models.gguf_tokenizer import tokenizer_from_gguf

    return tokenizer_from_gguf(reference)


def _leak_free(rows: Sequence[Mapping[str, Any]]) -> int | None:
    return sum(row.get("leaked") is False for row in rows) or None


def _merged(
    merged: Path, shared: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], work: Work, output: Path
) -> tuple[str, Any]:
    """The merged model in transformers: what it is, and its scores, which are saved."""
    answer = run_one("child:score_merged", merged, shared, output, "scoring the merged model")
    scores = row_scores(rows, work, answer)
    scores.save(output / MERGED_SCORES)
    return merged_name(answer["dtype"]), scores


def _merged_float32(
    name: str, merged: Path, shared: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], work: Work, output: Path
) -> tuple[str | None, list[str]]:
    """The merged model in 32-bit arithmetic, if it was scored in another: its name, and a note where it is left out."""
    from lib.models.loading import affordable_dtype

    if name == merged_name("float32"):
        return None, []
    if affordable_dtype(merged) != "float32":
        words = "the merged model in float32 does not fit into the free memory (4 bytes a weight and a third)"
        return None, [f"{words}, so the step from 16-bit to 32-bit arithmetic is left out of the error ladder"]
    answer = run_one("child:score_merged_float32", merged, shared, output, "scoring the merged model in float32")
    row_scores(rows, work, answer).save(output / MERGED32_SCORES)
    return merged_name("float32"), []


def merged_name(dtype: str) -> str:
    """The merged model as a step of the error ladder."""
    return f"merged, transformers ({dtype})"


def _dequantized(
    measured: Measured, chosen: str, merged: Path, shared: Mapping[str, Any], output: Path
) -> dict[str, Any]:
    """The weights of the file at the end of the error ladder, computed by transformers."""
    path, config = measured.paths[measured.names.index(chosen)], str(merged.resolve())
    what = f"scoring the weights of {chosen} in transformers"
    return run_one("child:score_dequantized", path, {**shared, "config": config}, output, what)


def _measure(
    paths: Sequence[Path], rows: Sequence[Mapping[str, Any]], work: Work, shared: Mapping[str, Any], output: Path
) -> Measured:
    """Run every file; per-row scores in `output`."""
    answers = run_all(paths, shared, output)
    names = _names(paths, *([answer.get(key) for answer in answers] for key in ("file_type", "size_budget")))
    scores = {name: row_scores(rows, work, answer) for name, answer in zip(names, answers, strict=True)}
    for name, score in scores.items():
        score.save(output / f"scores-{name}.jsonl")
    return Measured(names, paths, answers, scores)


def _judge(
    metric: Metric,
    measured: Measured,
    rows: Sequence[Mapping[str, Any]],
    margin: float,
    floor: float | None,
    seed: int,
) -> dict[str, Any]:
    """The parts of comparison.json that say what the scores mean."""
    entries = entries_of(metric, measured, RowGroups.of(rows), margin, floor, seed)
    files = [entry for entry in entries if entry["kind"] == GGUF]  # the statistics count every comparison, the advice
    best = frontier(files[1:])  # is about what a phone can run
    return {
        "reference": measured.names[0],
        "files": [{**entry, "on_frontier": entry["type"] in best} for entry in entries],
        "frontier": best,
        "recommendation": _recommend(metric, files, margin, len(entries) - 1, floor),
    }


def _recommend(
    metric: Metric, files: Sequence[Mapping[str, Any]], margin: float, compared: int, floor: float | None
) -> dict[str, Any]:
    if metric is ACCURACY:
        return recommend(files, margin, compared)
    return recommend_answers(files, margin, floor, compared)


def _check(reference: Path, others: Sequence[Path], rows: Sequence[Mapping[str, Any]]) -> None:
    if problem := llama_cpp_problem():
        do = "install llama-cpp-python as the README says; `workbook doctor` tells what it lacks."
        raise InputError(f"llama.cpp cannot be used here ({problem}).", "llama-cpp-python.", do)
    if not others:
        raise InputError("no file to compare.", "at least one beside the reference.", "name one or more .gguf files.")
    if not rows:
        raise InputError("no rows to score.", "at least one row.", "check the data and max_eval_rows.")
    seen: set[Path] = set()
    for path in (reference, *others):
        if path is reference or not path.is_dir():
            check_gguf(path)
        else:
            _check_folder(path)
        if path.resolve() in seen:
            raise InputError(f"{path} is named twice.", "each file once.", "remove one of the two.")
        seen.add(path.resolve())


def _check_folder(path: Path) -> None:
    from lib.models.base_model import check_model_folder

    check_model_folder(path)


def _names(paths: Sequence[Path], file_types: Sequence[int | None], budgets: Sequence[int | None]) -> list[str]:
    """A short, distinct name for each file: its recipe or size budget, or its file name where two share one."""
    import llama_cpp

    prefix = "LLAMA_FTYPE_MOSTLY_"
    known = {getattr(llama_cpp, n): n.removeprefix(prefix) for n in dir(llama_cpp) if n.startswith(prefix)}
    known[llama_cpp.LLAMA_FTYPE_ALL_F32] = "F32"
    recipes = [
        mix_name(budget) if budget else known.get(number, "")
        for number, budget in zip(file_types, budgets, strict=True)
    ]
    names = [
        recipe if recipe and recipes.count(recipe) == 1 else path.name if path.is_dir() else path.stem
        for path, recipe in zip(paths, recipes, strict=True)
    ]
    return [name if names.count(name) == 1 else f"{place}-{name}" for place, name in enumerate(names)]
