"""Files compared: encoded once, each measured in its own process, judged by the metric, written as comparison.json."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError, refusal
from lib.language import ENGLISH, speaking
from lib.models.gguf_file import ARCHITECTURES, check_model_gguf, read_metadata
from lib.models.gguf_tokenizer import tokenizer_from_gguf
from lib.models.runtime_folders import program_of
from lib.progress import say
from lib.prompts.tasks import Task, in_model_tags
from lib.runs.child import run_child
from lib.runs.files import data_file, writable, write_json
from lib.runs.machine import cpu_name, llama_cpp_problem, physical_cores
from lib.scoring.backend import found_done, journal_path
from lib.scoring.log_probabilities import load_scores
from lib.scoring.metric import AnyScores, Metric, RowGroups, compare, metric_of, rows_of_folds
from lib.settings import mix_name
from lib.stages.compare.changes import (
    FOLDER,
    GGUF,
    STEP_SCORES,
    UNTUNED,
    BaseScores,
    agreements,
    retentions,
    with_retention,
)
from lib.stages.compare.child import MERGED, MERGED_FLOAT32, EncodedRows, encode_rows
from lib.stages.compare.recommend import judge, recommend, step_file
from lib.stages.compare.speed import read_bytes
from lib.statistics.noninferiority import REFERENCE, frontier
from lib.statistics.paired import holm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUMMARY = "comparison.json"
SCORING = ".scores"
"""Folder of scores and answers that are kept as they come."""
ALL_FOLDS = "all-folds-{}.jsonl"
"""Scores of a type's files on the test rows of all folds."""
_TEMPORARY = ".reference-"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Fold:
    """Another fold of cross-validated data: its test rows, and the folder of the comparison of its own files."""

    rows: Sequence[Row]
    comparison: Path


@dataclass(frozen=True)
class Comparison:
    """What is compared with what, on which rows, and how.

    Attributes:
        reference: the unquantized GGUF file.
        others: GGUF files made from it, and folders of the same model that transformers loads.
        rows: {"id", "text", "label"} or {"id", "messages"}, with "group" and "leaked" where known.
        task: how the rows are asked; it has the metric.
        output: folder for comparison.json and one scores-<TYPE>.jsonl a file; rows that an interrupted comparison
            scored there are not scored again.
        source: what the rows are, in words; goes into comparison.json as "data".
        tokenizer: of the model; None = the one inside `reference`.
        n_ctx, perplexity_tokens: window and most tokens of the held-out text (the rows' texts, leak-free first).
        n_threads, n_gpu_layers: of llama.cpp; 0 threads = physical cores.
        margin: loss from which a file is not good enough, in the metric's `loss_unit`.
        train: file of the training rows; the frequencies in it may be what the reference must beat (`Metric.floor`).
        merged: folder of the model that `reference` was converted from; its scores in transformers are compared too.
        seed: of bootstraps and sign flips.
        folds: the comparisons of the other folds of cross-validated data: files are judged on the rows of all.
        start: scores of the base model on the same rows, from which the reference was trained.
        grid: by file name, share of its weights in types on the grid of the base's weights.
    """

    reference: Path
    others: Sequence[Path]
    rows: Sequence[Row]
    task: Task
    output: Path
    source: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = None
    n_ctx: int = 512
    perplexity_tokens: int = 8192
    n_threads: int = 0
    n_gpu_layers: int = 0
    margin: float = 1.0
    train: Path | None = None
    merged: Path | None = None
    seed: int = 42
    folds: Sequence[Fold] = ()
    start: BaseScores = field(default_factory=BaseScores)
    grid: Mapping[str, float] = field(default_factory=dict)

    @property
    def judged_rows(self) -> list[Row]:
        """The rows that files are judged on: with folds those of all, each with its "fold"."""
        return rows_of_folds([self.rows, *(fold.rows for fold in self.folds)]) if self.folds else [*self.rows]

    @property
    def paths(self) -> list[Path]:
        """All files and folders, the reference first."""
        return [self.reference, *self.others]


def compare_files(asked: Comparison, forget: bool = True) -> dict[str, Any]:
    """Compare GGUF files and model folders with a reference on the same rows and on held-out text.

    Args:
        forget: False leaves what was kept for an interruption, for more work in the same folder.

    Returns:
        what comparison.json holds: "data", "conditions", "reference" (its type), "files" (one entry a file or folder,
        the reference first), "frontier" and "recommendation" (of GGUF files only: llama.cpp runs nothing else),
        "agreement" (equal labels by margin, see `lib.stages.compare.changes`; None without labels),
        "retention_note" (what the entries' "retention" rests on, or why it is unknown), "notes", "found_done" (by type:
        what an interrupted run had already scored, in words), and with `merged` "steps": its name, its name in float32
        where it was scored in that too (else None), and the file whose weights were also computed by transformers.

    Raises:
        InputError: a file that is missing, no GGUF, or that llama.cpp refuses or dies of (named); the same file twice;
            no rows; an unwritable folder; too little room for the reference's log-probabilities.
    """
    _check(asked)
    if (tokenizer := asked.tokenizer) is None:
        tokenizer = tokenizer_from_gguf(asked.reference)
        asked = replace(asked, rows=in_model_tags(tokenizer, asked.rows))
    encoded = encode_rows(tokenizer, asked.task, asked.rows, asked.n_ctx, asked.perplexity_tokens)
    writable(asked.output)
    metric, groups = metric_of(asked.task), RowGroups.of(asked.rows)
    shared = encoded.argument(asked.n_threads or physical_cores(), asked.n_gpu_layers)
    measured = _measure_all(asked, encoded, shared)
    scores = {one.name: one.scores for one in measured}
    floor = metric.floor(tokenizer, asked.task, asked.train, asked.judged_rows)
    entries = _entries(metric, measured, asked, floor)
    files = [entry for entry in entries if entry["kind"] == GGUF]  # tests count every comparison, the advice is about
    best = frontier(files[1:])  # what a phone can run
    free = sum(row.get("leaked") is False for row in asked.rows)
    with speaking(ENGLISH):  # as everything that is kept; who reads it words it anew (`reworded`)
        advice = recommend(metric, files[0], files[1:], asked.margin, floor, asked.start.note != UNTUNED)
    chosen = step_file(files[1:], advice)
    merged, steps, notes = _score_steps(asked, encoded, shared, next((o for o in measured if o.name == chosen), None))
    result = {
        "data": {**asked.source, "rows": len(asked.rows), "leak_free_rows": free or None},
        "conditions": {
            "device": measured[0].answer["device"],
            "processor": cpu_name(),
            "n_threads": shared["n_threads"],
            "thread_waiting": measured[0].answer["thread_waiting"],
            "n_gpu_layers": shared["n_gpu_layers"],
            "window_tokens": len(encoded.windows[0]),
            "windows": len(encoded.windows),
            **metric.conditions(asked.margin, floor),
            "seed": asked.seed,
        },
        "reference": measured[0].name,
        "files": [{**entry, "on_frontier": entry["type"] in best} for entry in entries],
        "frontier": best,
        "recommendation": advice,
        "agreement": agreements(scores, merged) if encoded.rows.answers else None,
        "notes": [
            *encoded.notes,
            *(f"{one.name}: {note}" for one in measured if (note := one.answer.get("note"))),
            *notes,
        ],
        "found_done": found_done({name: [score.found] for name, score in scores.items()}),
        **steps,
    }
    result = with_retention(result, retentions(metric, scores, asked.start, groups.groups), asked.grid)
    write_json(asked.output / SUMMARY, result)
    if forget:
        forget_scores(asked.output)
    return result


# The processes of a comparison: one a model, one after another.


@dataclass(frozen=True)
class Measured:
    """What a process gave about a file or folder: a short and distinct name, `measure_model`'s answer, and scores."""

    name: str
    path: Path
    answer: Mapping[str, Any]
    scores: AnyScores


def _measure_all(asked: Comparison, encoded: EncodedRows, shared: Mapping[str, Any]) -> list[Measured]:
    """Every file and folder; the reference's log-probabilities live as long as this call."""
    paths, output, answers = asked.paths, asked.output, []
    for stray in output.glob(f"{_TEMPORARY}*"):  # of a comparison that was killed
        shutil.rmtree(stray, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=output) as folder:
        for place, path in enumerate(paths):
            what = f"comparing {path.name} ({place + 1} of {len(paths)})"
            argument = {**shared, "reference": Path(folder, "log-probs"), "is_reference": place == 0}
            answers.append(run_kept("child:measure_model", path, argument, output, what))
    names = _names(paths, *([answer.get(key) for answer in answers] for key in ("file_type", "size_budget")))
    return [
        Measured(name, path, answer, _saved(asked, encoded, answer, f"scores-{name}.jsonl"))
        for name, path, answer in zip(names, paths, answers, strict=True)
    ]


def _saved(asked: Comparison, encoded: EncodedRows, answer: Mapping[str, Any], file: str) -> AnyScores:
    log_probs = np.array(answer["log_probs"], dtype=np.float64)
    scores = encoded.rows.scores(asked.rows, log_probs, answer["score_seconds"], answer["found"])
    scores.save(asked.output / file)
    return scores


def _score_steps(
    asked: Comparison, encoded: EncodedRows, shared: Mapping[str, Any], last: Measured | None
) -> tuple[tuple[str, AnyScores] | None, dict[str, Any], list[str]]:
    """What the error ladder needs of transformers: scores of the merged model, of its weights in 32-bit arithmetic if
    it was scored in another, and of the weights of the file at the ladder's end.

    Returns:
        the merged model (what it is, its scores); {"steps"} of comparison.json; a note where a step is left out.
    """
    if asked.merged is None:
        return None, {}, []
    what = "scoring the merged model" + (f" and the weights of {last.name} in transformers" if last else "")
    known = last is not None and read_metadata(last.path).get("general.architecture") in ARCHITECTURES.values()
    argument = {**shared, "gguf": last and last.path, "dequantize": known}
    answers = run_kept("child:score_in_transformers", asked.merged, argument, asked.output, what)["answers"]
    scores = {way: _saved(asked, encoded, answer, STEP_SCORES[way]) for way, answer in answers.items()}
    dtype, exact = answers[MERGED]["dtype"], MERGED_FLOAT32 in answers
    merged = f"merged, transformers ({dtype})", scores[MERGED]
    if last is None:
        return merged, {}, []
    in_float32 = "merged, transformers (float32)" if exact else None
    steps = {"merged": merged[0], "merged_float32": in_float32, "file": last.name, "dequantized": known}
    notes = []
    if not (exact or dtype == "float32"):
        words = "the merged model in float32 does not fit into the free memory (4 bytes a weight and a third)"
        notes.append(f"{words}, so the step from 16-bit to 32-bit arithmetic is left out of the error ladder")
    if not known:
        words = "the weights of a quantized file are dequantized for Qwen2, Qwen3 and Llama alone"
        notes.append(f"{words}, so the error ladder shows their rounding and the runtime as one step")
    return merged, {"steps": steps}, notes


def run_kept(function: str, path: Path, argument: Mapping[str, Any], output: Path, what: str) -> dict[str, Any]:
    """One process; what it scores or writes is kept in `output` until the whole comparison is done.

    Args:
        function: "module:name" of this package; it gives "found": what was already done, in words.
    """
    keep = journal_path(output / SCORING / function.partition(":")[2], path.resolve())
    answer = run_child(f"lib.stages.compare.{function}", {**argument, "path": path, "keep": keep}, what)
    if answer["found"]:
        say(f"{path.name}: {answer['found']}")
    return answer


def forget_scores(output: Path) -> None:
    """Remove what was kept for an interruption."""
    shutil.rmtree(output / SCORING, ignore_errors=True)


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


# From what was measured to comparison.json.


def _entries(
    metric: Metric, measured: Sequence[Measured], asked: Comparison, floor: float | None
) -> list[dict[str, Any]]:
    """One entry a file, the reference first, but for what `lib.stages.compare.changes.with_retention` adds."""
    reference, judged = measured[0], _judged(metric, measured, asked)
    entries = [
        {
            "type": one.name,
            "kind": FOLDER if one.path.is_dir() else GGUF,
            "file": one.path.name,
            "runtime": program_of(one.path),
            "bytes": one.answer["bytes"],
            "read_bytes": None if one.path.is_dir() else read_bytes(one.path, one.answer["tensor_bytes"]),
            "bits_per_weight": 8 * one.answer["tensor_bytes"] / one.answer["weights"],
            **judged[one.name],
            **metric.entry_floor(floor),
            **_text_quality(one.answer["text"], reference.answer["text"]["ppl"]),
            **one.answer["speed"],
            "seconds_per_sample": one.answer["score_seconds"] / len(asked.rows),
            "peak_memory_mib": one.answer["memory_mib"],
            "device": one.answer["device"],
        }
        for one in measured
    ]
    words = judge(metric, entries[0], entries[1:], asked.margin, floor)
    return [{**entry, "verdict": words.get(entry["type"], REFERENCE)} for entry in entries]


def _judged(metric: Metric, measured: Sequence[Measured], asked: Comparison) -> dict[str, dict[str, Any]]:
    """Quality of every file by name, the reference's too, on all rows that files are judged on.

    What the other folds did not compare, as folders for other programs, is judged on this fold's own rows.
    """

    def found(scores: Mapping[str, AnyScores], rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
        reference, *others = scores
        judged = compare(
            metric, scores[reference], {name: scores[name] for name in others}, RowGroups.of(rows), asked.seed
        )
        judged = {reference: judged.pop(""), **judged}
        names = asked.task.label_names
        return {name: {**entry, **metric.classes(scores[name], names)} for name, entry in judged.items()}

    own = {one.name: one.scores for one in measured}
    if not asked.folds:
        return found(own, asked.rows)
    every = {}
    for name, scores in own.items():
        paths = [fold.comparison / f"scores-{name}.jsonl" for fold in asked.folds]
        if all(path.is_file() for path in paths):
            every[name] = scores.joined([load_scores(path) for path in paths])
            every[name].save(asked.output / ALL_FOLDS.format(name))
    count = {"folds": len(asked.folds) + 1}
    alone = found(own, asked.rows)
    together = found(every, asked.judged_rows)
    entries = alone | {name: entry | count | {"own": alone[name]} for name, entry in together.items()}
    others = [entry for name, entry in entries.items() if name != measured[0].name]
    for entry, p in zip(others, holm([entry["p"] for entry in others]), strict=True):
        entry["p_holm"] = p  # over all files, whichever rows they are judged on
    return entries


_OWN_TEXT: dict[str, float | None] = data_file("stages/compare/own_text.yaml")
"""How far the reference is from itself, by definition."""


def _text_quality(text: Mapping[str, Any], reference_ppl: float) -> dict[str, Any]:
    """KL divergence and perplexity on the held-out text.

    The ratio is taken to the reference's own perplexity: the one in a table is of its rounded log-probabilities, which
    end 16 nats below the likeliest token.
    """
    own = {**_OWN_TEXT, **{key: text[key] for key in (*_OWN_TEXT, "n_tokens", "ppl", "ppl_uncertainty") if key in text}}
    if "kld_mean" not in text:
        return own
    mean, half = text["kld_mean"], 1.96 * text["kld_uncertainty"]
    return {**own, "kld_low": max(mean - half, 0.0), "kld_high": mean + half, "ppl_ratio": text["ppl"] / reference_ppl}


# What cannot be compared is refused before any work.


def _check(asked: Comparison) -> None:
    if problem := llama_cpp_problem():
        raise refusal("runs/no-llama-cpp", problem=problem)
    if not asked.others:
        raise InputError("no file to compare.", "at least one beside the reference.", "name one or more .gguf files.")
    if not asked.rows:
        raise refusal("scoring/no-rows")
    seen: set[Path] = set()
    for path in asked.paths:
        if path is asked.reference or not path.is_dir():
            check_model_gguf(path)
        else:
            from lib.scoring.folders import check_folder

            check_folder(path)
        if path.resolve() in seen:
            raise InputError(f"{path} is named twice.", "each file once.", "remove one of the two.")
        seen.add(path.resolve())
