"""Any models on conversations, each in a process of its own: `workbook evaluate` where rows have no labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import InputError
from lib.evaluation.standalone import each_in_a_child, keep_of, open_model, peak_kept
from lib.models.conversations import ASSISTANT, ConversationTask
from lib.models.tasks import encode_row
from lib.run.files import read_jsonl
from lib.scoring.answers import AnswerScores, score_answers


def evaluate_models_by_answers(
    models: Sequence[str | Path],
    rows: Sequence[Mapping[str, Any]],
    task: ConversationTask,
    data: Mapping[str, Any] | None = None,
    keep: Path | None = None,
    tokenizer: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """How likely each model finds the reference answers of the same rows.

    Args:
        models: hub ids, folders (a full model, or an adapter), or .gguf files; each has its own tokenizer.
        rows: {"id", "messages"}, with "group" and "leaked" where they were audited.
        data: description of the rows, put into the result.
        keep, tokenizer, options: as the keywords of `evaluate_models`; all options must be given.

    Returns:
        {"data": {…, "n", "task"}, "models": [{"model", "n", "answer_tokens", "loss" (nats a token), "perplexity",
        "loss_interval", "perplexity_interval" (Student's over groups; null below three), "bits_per_character" (for
        models with other tokenizers), "turns_cut", "leak_free" (the same on those rows; null without an audit),
        "seconds_per_sample", "peak_memory_mib", "device"}]}.

    Raises:
        InputError: no rows, a model that cannot be loaded or run, or whose tokenizer needs more than
            `max_seq_length` for a first exchange.
    """
    if not rows:
        raise InputError("no rows to evaluate on.", "at least one conversation.", "check --run and --max-samples.")
    function = "lib.evaluation.standalone_answers:score_in_child"
    shared = {**options, "task": task.to_json(), "tokenizer": str(tokenizer) if tokenizer else None}
    results = [
        {"model": model, **_summary(AnswerScores.load(path), answer.pop("facts"), rows), **answer}
        for model, path, answer in each_in_a_child(function, models, rows, shared, keep)
    ]
    return {"data": {**(data or {}), "n": len(rows), "task": task.kind}, "models": results}


def _summary(scores: AnswerScores, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    characters = np.array(facts["characters"])
    leaked = np.array([row.get("leaked") is not False for row in rows])
    free = None if leaked.all() else _figures(scores.subset(~leaked), characters[~leaked], _groups(rows)[~leaked])
    return {
        **_figures(scores, characters, _groups(rows)),
        "turns_cut": sum(facts["turns_cut"]),
        "leak_free": free,
        "seconds_per_sample": scores.seconds_per_sample,
    }


def _groups(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return np.array([row.get("group", -1 - i) for i, row in enumerate(rows)])


def _figures(scores: AnswerScores, characters: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    return {
        "n": len(scores.ids),
        "answer_tokens": int(scores.tokens.sum()),
        **scores.figures(groups),
        "bits_per_character": float(-scores.log_probs.sum() / math.log(2) / characters.sum()),
    }


def score_in_child(argument: dict[str, Any]) -> dict[str, Any]:
    """Load one model, score the answers of the rows, save the scores; runs in the child process."""
    task, rows = ConversationTask.from_json(argument["task"]), read_jsonl(Path(argument["rows"]))
    backend, tokenizer, files = open_model(argument, task.max_seq_length)
    keep, what = keep_of(argument, files), f"scoring answers with {Path(argument['model']).name}"
    try:
        encoded = [encode_row(tokenizer, task, row) for row in rows]
        names, ids, spans = [row["id"] for row in rows], [e.ids for e in encoded], [e.spans for e in encoded]
        scores = score_answers(backend, names, ids, spans, what, keep)
    finally:
        backend.close()
    scores.save(Path(argument["scores"]))
    answers = [[m["content"] for m in row["messages"] if m["role"] == ASSISTANT] for row in rows]
    kept = [[texts[i] for i in e.answers] for texts, e in zip(answers, encoded, strict=True)]
    facts = {"characters": [sum(map(len, texts)) for texts in kept], "turns_cut": [e.turns_cut for e in encoded]}
    return {"device": backend.device, "facts": facts, "peak_of_scoring": peak_kept(keep), "found": scores.found}
