"""From what the child processes measured to one entry a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.comparison.answering import judge_answers
from lib.comparison.ceilings import read_bytes
from lib.comparison.encoding import Work
from lib.comparison.judging import Rows, judge
from lib.comparison.retention import FOLDER, GGUF
from lib.device import cpu_name
from lib.scoring import Scores
from lib.scoring.answers import AnswerScores

_SPEED_KEYS = (
    *("load_seconds", "load_seconds_range", "load_runs"),
    *("prompt_tokens_per_second", "prompt_tokens_per_second_range", "prompt_runs"),
    *("generation_tokens_per_second", "generation_tokens_per_second_range", "generation_runs"),
)


@dataclass(frozen=True)
class Measured:
    """What the child processes gave, one of each a file, the reference first.

    Attributes:
        names: short and distinct.
        paths: files and folders.
        answers: as `lib.comparison.worker.score_file` gives them.
        scores: by name.
    """

    names: Sequence[str]
    paths: Sequence[Path]
    answers: Sequence[Mapping[str, Any]]
    scores: Mapping[str, Any]


def row_scores(rows: Sequence[Mapping[str, Any]], work: Work, answer: Mapping[str, Any]) -> Scores | AnswerScores:
    """A child's numbers in the rows' own order."""
    values = np.array(answer["log_probs"], dtype=np.float64)
    log_probs, ids = np.empty_like(values), [row["id"] for row in rows]
    log_probs[work.order] = values
    if work.spans:
        tokens = np.empty(len(rows), dtype=np.int64)
        tokens[work.order] = [sum(stop - start for start, stop in spans) for spans in work.spans]
        return AnswerScores(ids, log_probs[:, 0], tokens, answer["score_seconds"], answer["found"])
    labels = np.array([row["label"] for row in rows], dtype=np.int64)
    return Scores(ids, labels, log_probs, work.truncated, answer["score_seconds"], answer["found"])


def conditions_of(measured: Measured, shared: Mapping[str, Any], work: Work) -> dict[str, Any]:
    """Where and how it was measured."""
    reference = measured.answers[0]
    return {
        "device": reference["device"],
        "processor": cpu_name(),
        "n_threads": shared["n_threads"],
        "thread_waiting": reference["thread_waiting"],
        "n_gpu_layers": shared["n_gpu_layers"],
        "window_tokens": len(work.windows[0]),
        "windows": len(work.windows),
    }


def entries_of(measured: Measured, rows: Rows, margin: float, seed: int) -> list[dict[str, Any]]:
    """One entry a file, the reference first, but for what `lib.comparison.retention.with_retention` adds."""
    scores, (reference, *others) = measured.scores, measured.names
    reference_ppl = measured.answers[0]["perplexity"]["ppl"]
    labels = getattr(scores[reference], "labels", None)
    decide = judge_answers if labels is None else judge
    judged = decide(scores[reference], {name: scores[name] for name in others}, rows, margin, seed)
    majority = {} if labels is None else {"majority_share": float(np.bincount(labels).max() / len(labels))}
    entries = []
    for name, path, answer in zip(measured.names, measured.paths, measured.answers, strict=True):
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
        return {
            **zero,
            "kld_mean_interval": None,
            "kld_p99": 0.0,
            "kld_max": 0.0,
            "same_top": 1.0,
            **text,
            "ppl_ratio": 1.0,
        }
    half = 1.96 * table["uncertainty"]
    return {
        "kld_mean": table["mean"],
        "kld_uncertainty": table["uncertainty"],
        "kld_low": max(table["mean"] - half, 0.0),
        "kld_high": table["mean"] + half,
        "kld_mean_interval": answer["kld_mean_interval"],
        "kld_median": table["median"],
        "kld_p99": table["p99"],
        "kld_max": table["max"],
        "same_top": table["same_top"],
        "n_tokens": table["n_tokens"],
        "ppl": table["ppl"],
        "ppl_uncertainty": table["ppl_uncertainty"],
        "ppl_ratio": table["ppl"] / reference_ppl,
    }
