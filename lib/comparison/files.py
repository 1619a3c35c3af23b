"""Compare files: encode once, run every file in its own process, judge, write."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.comparison.advice import frontier, recommend
from lib.comparison.agreement import agreements
from lib.comparison.answering import judge_answers, recommend_answers
from lib.comparison.ceilings import read_bytes
from lib.comparison.encoding import Work, encode_work, unigram_perplexity
from lib.comparison.judging import Rows, judge
from lib.comparison.running import SCORING, run_all, run_one, shared_argument
from lib.comparison.steps import DEQUANTIZED_SCORES, MERGED_SCORES, step_file
from lib.device import cpu_name, llama_cpp_problem, physical_cores
from lib.errors import InputError
from lib.models.gguf_file import check_gguf
from lib.models.tasks import AnyTask, has_labels
from lib.run.files import write_json
from lib.run.folders import writable
from lib.scoring import Scores
from lib.scoring.answers import AnswerScores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUMMARY = "comparison.json"
GGUF, FOLDER = "gguf", "folder"
"""Kinds of entries: a file that llama.cpp runs, a folder that transformers loads."""

_MIX = re.compile(r"-(MIX_\w+)$")

_SPEED_KEYS = (
    *("load_seconds", "prompt_tokens_per_second", "prompt_tokens_per_second_range"),
    *("generation_tokens_per_second", "generation_tokens_per_second_range"),
)


def compare_files(
    reference: Path,
    others: Sequence[Path],
    rows: Sequence[Mapping[str, Any]],
    task: AnyTask,
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
        merged: folder of the model that `reference` was converted from; its labels in transformers are compared too.

    Returns:
        what comparison.json holds: "data", "conditions", "reference" (its type), "files" (one entry a file or folder,
        the reference first), "frontier" and "recommendation" (of GGUF files only: llama.cpp runs nothing else),
        "agreement" (equal labels by margin, see `lib.comparison.agreement`; None without labels), "notes", and with
        `merged` "steps": its name, and the file whose weights were also computed by transformers (`lib.comparison.
        steps`).

    Raises:
        InputError: a file that is missing, no GGUF, or that llama.cpp refuses or dies of (named); the same file twice;
            no rows; an unwritable folder; too little room for the reference's log-probabilities.
    """
    _check(reference, others, rows)
    writable(output)
    if tokenizer is None:
        from lib.models.gguf_tokenizer import tokenizer_from_gguf

        tokenizer = tokenizer_from_gguf(reference)
    work = encode_work(tokenizer, task, rows, n_ctx, perplexity_tokens)
    shared = shared_argument(work, rows, n_threads or physical_cores(), n_gpu_layers)
    paths = [reference, *others]
    answers = run_all(paths, shared, output)
    names = _names(paths, [answer["file_type"] for answer in answers])
    scores = {name: _scores(rows, work, answer) for name, answer in zip(names, answers, strict=True)}
    for name, score in scores.items():
        score.save(output / f"scores-{name}.jsonl")
    labelled = has_labels(task)
    in_torch = None
    if labelled and merged is not None:
        answer = run_one("torch_worker:score_merged", merged, dict(shared), output, "scoring the merged model")
        in_torch = (f"merged, transformers ({answer['dtype']})", _scores(rows, work, answer))
    margin = equivalence_margin if labelled else perplexity_margin
    floor = None if labelled or not train else unigram_perplexity(tokenizer, task, train, rows)
    judged = {"equivalence_margin_points": margin}
    if not labelled:
        judged = {"perplexity_margin_percent": margin, "unigram_ppl": floor}
    entries = _entries(names, paths, answers, scores, Rows.of(rows), margin, seed)
    files = [entry for entry in entries if entry["kind"] == GGUF]  # the statistics count every comparison, the advice
    best = frontier(files[1:])  # is about what a phone can run
    recommended = recommend(files, margin) if labelled else recommend_answers(files, margin, floor)
    result = {
        "data": {**(source or {}), "rows": len(rows), "leak_free_rows": _leak_free(rows)},
        "conditions": {**_conditions(answers[0], shared, work), **judged, "seed": seed},
        "reference": names[0],
        "files": [{**entry, "on_frontier": entry["type"] in best} for entry in entries],
        "frontier": best,
        "recommendation": recommended,
        "agreement": agreements(scores, in_torch) if labelled else None,
        "notes": [*work.notes, *(f"{n}: {a['note']}" for n, a in zip(names, answers, strict=True) if a.get("note"))],
    }
    chosen = step_file(files[1:], recommended)
    if in_torch is not None and chosen is not None:
        argument = {**shared, "config": str(merged.resolve())}
        what = f"scoring the weights of {chosen} in transformers"
        answer = run_one("torch_worker:score_dequantized", paths[names.index(chosen)], argument, output, what)
        in_torch[1].save(output / MERGED_SCORES)
        _scores(rows, work, answer).save(output / DEQUANTIZED_SCORES)
        result["steps"] = {"merged": in_torch[0], "file": chosen}
    write_json(output / SUMMARY, result)
    shutil.rmtree(output / SCORING, ignore_errors=True)
    return result


def _leak_free(rows: Sequence[Mapping[str, Any]]) -> int | None:
    return sum(row.get("leaked") is False for row in rows) or None


def _conditions(answer: Mapping[str, Any], shared: Mapping[str, Any], work: Work) -> dict[str, Any]:
    """Where and how it was measured."""
    return {
        "device": answer["device"],
        "processor": cpu_name(),
        "n_threads": shared["n_threads"],
        "thread_waiting": answer["thread_waiting"],
        "n_gpu_layers": shared["n_gpu_layers"],
        "window_tokens": len(work.windows[0]),
        "windows": len(work.windows),
    }


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
    from lib.models.loading import check_model_folder

    check_model_folder(path)


def _names(paths: Sequence[Path], file_types: Sequence[int | None]) -> list[str]:
    """A short, distinct name for each file: its recipe, or its file name where two share one.

    The header of a file made for a size budget tells only the recipe of its main type; its name tells the budget.
    """
    import llama_cpp

    prefix = "LLAMA_FTYPE_MOSTLY_"
    known = {getattr(llama_cpp, n): n.removeprefix(prefix) for n in dir(llama_cpp) if n.startswith(prefix)}
    known[llama_cpp.LLAMA_FTYPE_ALL_F32] = "F32"
    mixes = [_MIX.search(path.stem) for path in paths]
    recipes = [mix[1] if mix else known.get(number, "") for mix, number in zip(mixes, file_types, strict=True)]
    names = [
        recipe if recipe and recipes.count(recipe) == 1 else path.name if path.is_dir() else path.stem
        for path, recipe in zip(paths, recipes, strict=True)
    ]
    return [name if names.count(name) == 1 else f"{place}-{name}" for place, name in enumerate(names)]


def _scores(rows: Sequence[Mapping[str, Any]], work: Work, answer: Mapping[str, Any]) -> Scores | AnswerScores:
    """A child's numbers in the rows' own order."""
    values = np.array(answer["log_probs"], dtype=np.float64)
    log_probs = np.empty_like(values)
    log_probs[work.order] = values
    if work.spans:
        tokens = np.empty(len(rows), dtype=np.int64)
        tokens[work.order] = [sum(stop - start for start, stop in spans) for spans in work.spans]
        return AnswerScores([row["id"] for row in rows], log_probs[:, 0], tokens, answer["score_seconds"])
    labels = np.array([row["label"] for row in rows], dtype=np.int64)
    return Scores([row["id"] for row in rows], labels, log_probs, work.truncated, answer["score_seconds"])


def _entries(
    names: Sequence[str],
    paths: Sequence[Path],
    answers: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Any],
    rows: Rows,
    margin: float,
    seed: int,
) -> list[dict[str, Any]]:
    """One entry a file, the reference first."""
    reference, *others = names
    reference_ppl = answers[0]["perplexity"]["ppl"]
    labels = getattr(scores[reference], "labels", None)
    decide = judge_answers if labels is None else judge
    judged = decide(scores[reference], {name: scores[name] for name in others}, rows, margin, seed)
    majority = {} if labels is None else {"majority_share": float(np.bincount(labels).max() / len(labels))}
    entries = []
    for name, path, answer in zip(names, paths, answers, strict=True):
        entries.append(
            {
                "type": name,
                "kind": FOLDER if path.is_dir() else GGUF,
                "file": path.name,
                "bytes": answer["bytes"],
                "read_bytes": None if path.is_dir() else read_bytes(path, answer["tensor_bytes"]),
                "bits_per_weight": 8 * answer["tensor_bytes"] / answer["weights"],
                **judged["" if name == reference else name],
                **majority,
                **_text_quality(answer, reference_ppl),
                **{key: answer[key] for key in _SPEED_KEYS},
                "seconds_per_sample": answer["score_seconds"] / len(rows.groups),
                "peak_memory_mib": answer["memory_mib"],
                "device": answer["device"],
            }
        )
    return entries


def _text_quality(answer: Mapping[str, Any], reference_ppl: float) -> dict[str, Any]:
    """KL divergence and perplexity; the reference's divergence from itself is 0 by definition.

    The ratio is taken to the reference's own perplexity: the one in a KlTable is of its rounded log-probabilities,
    which end 16 nats below the likeliest token.
    """
    table = answer["divergence"]
    if table is None:
        own = answer["perplexity"]
        zero = dict.fromkeys(("kld_mean", "kld_uncertainty", "kld_low", "kld_high", "kld_median"), 0.0)
        text = {"n_tokens": own["n_tokens"], "ppl": own["ppl"], "ppl_uncertainty": own["uncertainty"]}
        return {**zero, "kld_p99": 0.0, "kld_max": 0.0, "same_top": 1.0, **text, "ppl_ratio": 1.0}
    half = 1.96 * table["uncertainty"]
    return {
        "kld_mean": table["mean"],
        "kld_uncertainty": table["uncertainty"],
        "kld_low": max(table["mean"] - half, 0.0),
        "kld_high": table["mean"] + half,
        "kld_median": table["median"],
        "kld_p99": table["p99"],
        "kld_max": table["max"],
        "same_top": table["same_top"],
        "n_tokens": table["n_tokens"],
        "ppl": table["ppl"],
        "ppl_uncertainty": table["ppl_uncertainty"],
        "ppl_ratio": table["ppl"] / reference_ppl,
    }
