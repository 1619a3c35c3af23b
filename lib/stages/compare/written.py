"""What every GGUF file writes to the same test rows, measured, and compared with what the reference writes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.prompts.tasks import spread
from lib.runs.files import write_json, write_jsonl
from lib.runs.machine import physical_cores
from lib.scoring.generation import Asked, Writing, Written, ask_row, end_ids, llama_feed, told, write_all
from lib.scoring.journal import found_done
from lib.scoring.term_lists import TermList, read_terms
from lib.scoring.text_metrics import chrf_signature, summarise
from lib.stages.compare.child import WAIT_POLICY, keep_of
from lib.stages.compare.files import Comparison, run_kept

if TYPE_CHECKING:
    from lib.prompts.tasks import Task
    from lib.settings import Settings


WRITTEN, ROWS = "written.json", "generated.jsonl"
KEYS = ("generated_rows", "max_new_tokens", "terms")


def written_parameters(settings: Settings, task: Task) -> dict[str, Any]:
    """The settings that decide what is written, with the hash of the list of terms; none where answers are words.

    Raises:
        InputError: no such list.
    """
    if task.label_names:
        return {}
    terms = read_terms(settings.terms)
    return settings.pick(*KEYS) | {"terms_sha256": terms and terms.sha256}


def write_answers(files: Mapping[str, Path], asked: Comparison, settings: Settings) -> dict[str, str]:
    """Let every file answer the same test rows greedily; written.json and generated.jsonl in the comparison's folder.

    Nothing is written with `generated_rows: 0`, or where the answers are words that are scored.

    Args:
        files: type -> GGUF file, the reference first.

    Returns:
        by type, what an interrupted run had already written, in words.

    Raises:
        InputError: a file that llama.cpp refuses or dies of.
    """
    task, tokenizer = asked.task, asked.tokenizer
    if task.label_names or not settings.generated_rows:
        return {}
    terms = read_terms(settings.terms)
    rows = spread(asked.rows, settings.generated_rows)
    questions = [ask_row(tokenizer, dict(row), task.encode(tokenizer, row)) for row in rows]
    argument = {
        "asked": [one.ids for one in questions],
        "ends": sorted(end_ids(tokenizer)),
        "most": settings.max_new_tokens,
        "n_threads": settings.n_threads or physical_cores(),
        "n_gpu_layers": settings.n_gpu_layers,
    }
    made = {
        name: run_kept("written:write_file", path, argument, asked.output, f"answers of {name}")
        for name, path in files.items()
    }
    answers = {
        name: [
            told(tokenizer, one, Written(**written), terms, task.thinking)
            for one, written in zip(questions, own["written"], strict=True)
        ]
        for name, own in made.items()
    }
    groups = [row.get("group", place) for place, row in enumerate(rows)]
    write_json(asked.output / WRITTEN, _measured(answers, groups, settings, terms))
    write_jsonl(asked.output / ROWS, _readable(rows, questions, answers))
    return found_done({name: [own["found"]] for name, own in made.items()})


def _measured(
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
    groups: Sequence[int],
    settings: Settings,
    terms: TermList | None,
) -> dict[str, Any]:
    """The content of written.json; the first of `answers` is the reference."""
    reference = next(iter(answers))
    measured = {name: [answer["measured"] for answer in given] for name, given in answers.items()}
    return {
        "reference": reference,
        "decoding": {"method": "greedy", "max_new_tokens": settings.max_new_tokens, "rows": len(groups)},
        "chrf": chrf_signature(),
        "terms": terms and {"name": terms.name, "terms": len(terms)},
        "same_text": _same_text(answers, reference),
        "metrics": summarise(measured, groups, reference),
    }


def _same_text(answers: Mapping[str, Sequence[Mapping[str, Any]]], reference: str) -> dict[str, int]:
    """How many answers of each file are the reference's to the letter."""
    return {
        name: sum(one["text"] == other["text"] for one, other in zip(given, answers[reference], strict=True))
        for name, given in answers.items()
    }


def _readable(
    rows: Sequence[Mapping[str, Any]], asked: Sequence[Asked], answers: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    return [
        {
            "id": row["id"],
            "question": one.question,
            "reference": one.reference,
            "answers": {
                name: {key: given[place][key] for key in ("text", "tokens", "ended", "measured")}
                for name, given in answers.items()
            },
        }
        for place, (row, one) in enumerate(zip(rows, asked, strict=True))
    ]


def write_file(argument: dict[str, Any]) -> dict[str, Any]:
    """Answers of one file, in a process of its own.

    Args:
        argument: "path", "asked" (token ids of every prompt), "ends", "most", "n_threads", "n_gpu_layers", "keep" (file
            for the answers as they come).

    Returns:
        {"written": fields of a Written, one a prompt; "found": what of them was there, in words}.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", WAIT_POLICY)
    from lib.scoring.llama_backend import LlamaCppBackend

    asked = [Asked(ids, "", "", "") for ids in argument["asked"]]
    context = max(len(one.ids) for one in asked) + argument["most"]
    path = Path(argument["path"])
    with LlamaCppBackend(path, context, argument["n_threads"], argument["n_gpu_layers"]) as backend:
        how = Writing(argument["most"], argument["ends"], keep=keep_of(argument), settings=backend.settings)
        written, found = write_all(lambda: llama_feed(backend), asked, how, "answers", path.name)
    return {"written": [asdict(one) for one in written], "found": found}
