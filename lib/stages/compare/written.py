"""What every GGUF file writes to the same test rows, measured, and compared with what the reference writes."""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.runs.files import write_json, write_jsonl
from lib.runs.machine import physical_cores
from lib.scoring.generation import Questions, Written, end_ids, llama_feed, write_all
from lib.scoring.journal import found_done
from lib.scoring.term_lists import read_terms
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
    questions = Questions.of(settings, tokenizer, task, asked.rows)
    argument = {
        "prompts": [one.ids for one in questions.asked],
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
        name: questions.told(questions.asked, [Written(**written) for written in own["written"]])
        for name, own in made.items()
    }
    reference = next(iter(answers))
    texts = {name: [answer["text"] for answer in given] for name, given in answers.items()}
    content = {
        "reference": reference,
        **questions.conditions(),
        "same_text": {name: sum(map(operator.eq, own, texts[reference])) for name, own in texts.items()},
        "metrics": questions.summarise(answers, reference),
    }
    write_json(asked.output / WRITTEN, content)
    write_jsonl(asked.output / ROWS, _readable(questions, answers))
    return found_done({name: [own["found"]] for name, own in made.items()})


def _readable(questions: Questions, answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Question, reference and every file's answer of each row."""
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
        for place, (row, one) in enumerate(zip(questions.rows, questions.asked, strict=True))
    ]


def write_file(argument: dict[str, Any]) -> dict[str, Any]:
    """Answers of one file, in a process of its own.

    Args:
        argument: "path", "prompts" (token ids of each), "ends", "most", "n_threads", "n_gpu_layers", "keep" (file for
            the answers as they come).

    Returns:
        {"written": fields of a Written, one a prompt; "found": what of them was there, in words}.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", WAIT_POLICY)
    from lib.scoring.llama_backend import LlamaCppBackend

    prompts, most = argument["prompts"], argument["most"]
    context = max(map(len, prompts)) + most
    path = Path(argument["path"])
    with LlamaCppBackend(path, context, argument["n_threads"], argument["n_gpu_layers"]) as backend:
        start, keep = functools.partial(llama_feed, backend), keep_of(argument)
        written, found = write_all(start, prompts, most, argument["ends"], backend, keep)
    return {"written": [asdict(one) for one in written], "found": found}
