"""The product `evaluation` for rows without labels: how likely the reference answers are, and what the models write."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.device import compute_dtype, device_name
from lib.evaluation.sides import BASE, FINETUNED, SHOWN, both_sides, facts_of, forget_kept
from lib.evaluation.written import PROMPTS_FILE, Questions, Replies, generated_rows, prompts_json, write_with
from lib.models.conversations import ConversationTask, EncodedConversation
from lib.models.tasks import encode_row, read_task
from lib.run.files import read_json, read_jsonl, sha256_json, write_json, write_jsonl
from lib.scoring.answers import AnswerScores, exponentials, score_answers
from lib.scoring.journal import Keep, found_done
from lib.statistics.losses import cluster_test
from lib.statistics.ratios import limits, weighted_mean
from lib.textmetrics import chrf_signature, read_prompts, read_terms, summarise

if TYPE_CHECKING:
    from pathlib import Path

    from lib.run import Product, Run, Work
    from lib.scoring import Backend
    from lib.settings import Settings

PARAMETERS = (
    *("per_device_eval_batch_size", "seed", "dtype"),
    *("generated_rows", "max_new_tokens", "terms", "prompts_file"),
)
SUMMARY = "evaluation.json"
ALL, LEAK_FREE = "all", "leak_free"


@dataclass(frozen=True)
class AnswerResult:
    """What notebook 03 shows of rows without labels.

    Attributes:
        product: the product `evaluation`.
        task: what was asked.
        scores: "base" and "finetuned": per-row log-probabilities of the reference answers.
        content: evaluation.json: "titles", "parts" (of the rows: n, groups, tokens; by model loss, its interval and
            perplexity; difference of the losses with its interval, p and MDE, and the ratio of the perplexities; see
            `summary`), "decoding",
            "answers" (entries of `summarise`; empty where none were written), "chrf" (signature), "terms" (name and
            number of the list, or None).
        generated: {"id", "question", "reference", "base", "fine-tuned", "measured", …} of some test rows.
        prompts: counselling_prompts.json: what both models answer to a few prompts, greedily and drawn, with latency.
    """

    product: Product
    task: ConversationTask
    scores: dict[str, AnswerScores]
    content: dict[str, Any]
    generated: list[dict[str, Any]]
    prompts: dict[str, Any]
    labelled: bool = False

    @property
    def part(self) -> dict[str, Any]:
        """The leak-free rows where there are any, else all."""
        return self.content["parts"].get(LEAK_FREE) or self.content["parts"][ALL]


def evaluate_answers(settings: Settings, run: Run) -> AnswerResult:
    """Score base and fine-tuned model on the answers of the test rows, or take the scores of last time.

    Raises:
        InputError: data or adapter missing; a model that cannot be loaded; log-probabilities that are not numbers.
    """
    product = run.produce(
        "evaluation",
        lambda work: _build(settings, run, work),
        parameters=settings.pick(*PARAMETERS) | _content(settings),
        inputs=("data", "adapter"),
        force=settings.force,
        keep_partial=True,
    )
    task = read_task(run.require("data").path)
    scores = {name: AnswerScores.load(product.path / f"scores-{name}.jsonl") for name in (BASE, FINETUNED)}
    rows = read_jsonl(run.require("data").path / "test.jsonl")
    content = {**read_json(product.path / SUMMARY), "parts": summary(scores, rows)}  # of whatever version wrote it
    generated, prompts = read_jsonl(product.path / "generated.jsonl"), read_json(product.path / PROMPTS_FILE)
    return AnswerResult(product, task, scores, content, generated, prompts)


def _content(settings: Settings) -> dict[str, Any]:
    """Hashes of the lists that settings name, so that a change in a file is seen."""
    terms = read_terms(settings.terms)
    return {"terms_sha256": terms and terms.sha256, "prompts_sha256": sha256_json(read_prompts(settings.prompts_file))}


def _build(settings: Settings, run: Run, work: Work) -> None:
    from lib.models.loading import load_tokenizer

    data = run.require("data")
    task, rows = read_task(data.path), read_jsonl(data.path / "test.jsonl")
    tokenizer = load_tokenizer(data.path / "tokenizer")
    dtype, reason = compute_dtype(settings.dtype)
    sides = both_sides(run, dtype)
    work.device = device_name()
    encoded = [encode_row(tokenizer, task, row) for row in rows]
    questions = Questions.of(settings, tokenizer, task, rows, encoded)
    scores, wrote = {}, {}
    for side in sides:
        with side.opened(settings.per_device_eval_batch_size) as backend:
            keep = side.keep(work.folder)
            scores[side.name] = _score(backend, rows, encoded, keep)
            wrote[side.name] = write_with(backend, questions, keep)
        scores[side.name].save(work.folder / f"scores-{side.name}.jsonl")
    conditions = {"system_prompt": task.system_prompt, "device": work.device, "dtype": dtype}
    _write(work.folder, rows, questions, wrote, conditions)
    content = {
        "task": task.kind,
        "thinking": task.thinking,
        "titles": {side.name: side.title() for side in sides},
        **_written(settings, rows, questions, wrote),
        "turns_cut": sum(conversation.turns_cut for conversation in encoded),
        "parts": summary(scores, rows),
    }
    write_json(work.folder / SUMMARY, content)
    forget_kept(work.folder)
    found = {name: [scores[name].found, *wrote[name].found] for name in scores}
    work.facts |= facts_of(run, sides[0], reason, "task") | {"found_done": found_done(found)}
    whole = content["parts"][ALL]
    work.metrics |= {"n": whole["n"], "tokens": whole["tokens"]}
    work.metrics |= {f"{key}_{name}": whole[name][key] for name in scores for key in ("loss", "perplexity")}


def _score(
    backend: Backend, rows: Sequence[dict[str, Any]], encoded: Sequence[EncodedConversation], keep: Keep
) -> AnswerScores:
    names, ids, spans = [row["id"] for row in rows], [e.ids for e in encoded], [e.spans for e in encoded]
    return score_answers(backend, names, ids, spans, f"scoring test answers with {backend.name}", keep)


def _write(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    questions: Questions,
    wrote: dict[str, Replies],
    conditions: dict[str, Any],
) -> None:
    """What the models wrote, for reading."""
    answers = {SHOWN[name]: own.answers for name, own in wrote.items()}
    replies = {SHOWN[name]: own.replies for name, own in wrote.items()}
    write_jsonl(folder / "generated.jsonl", generated_rows(rows, questions, answers))
    write_json(folder / PROMPTS_FILE, prompts_json(questions, replies, conditions))


def _written(
    settings: Settings, rows: Sequence[dict[str, Any]], questions: Questions, wrote: dict[str, Replies]
) -> dict[str, Any]:
    """What the models wrote, in numbers."""
    measured = {SHOWN[name]: [answer["measured"] for answer in own.answers] for name, own in wrote.items()}
    groups = [rows[i]["group"] for i in questions.chosen]
    return {
        "decoding": {"method": "greedy", "max_new_tokens": settings.max_new_tokens, "rows": len(groups)},
        "answers": summarise(measured, groups, SHOWN[BASE]) if groups else [],
        "chrf": chrf_signature(),
        "terms": questions.terms and {"name": questions.terms.name, "terms": len(questions.terms)},
    }


def summary(scores: dict[str, AnswerScores], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Losses, perplexities and their paired difference on all rows and on the leak-free rows.

    Intervals are Student's over groups, None where the groups show no spread; "p" is the test that belongs to them,
    "mde" the smallest difference that these rows could have shown with 80 % power, nats a token (None: any).
    """
    groups = np.array([row["group"] for row in rows])
    free = np.array([not row["leaked"] for row in rows])
    masks = {ALL: np.ones(len(rows), dtype=bool), LEAK_FREE: free}
    parts = {}
    for part, mask in masks.items():
        if not mask.any():
            continue
        base, tuned = (scores[name].subset(mask) for name in (BASE, FINETUNED))
        losses = tuned.row_losses - base.row_losses
        change = weighted_mean(losses, base.tokens, groups[mask])
        p, mde = cluster_test(losses, base.tokens, groups[mask])
        parts[part] = {
            "n": int(mask.sum()),
            "groups": len(np.unique(groups[mask])),
            "tokens": int(base.tokens.sum()),
            BASE: base.figures(groups[mask]),
            FINETUNED: tuned.figures(groups[mask]),
            "difference": change.estimate,
            "difference_interval": limits(change),
            "p": p,
            "mde": mde if limits(change) else None,
            "ratio": math.exp(change.estimate),
            "ratio_interval": exponentials(limits(change)),
        }
    return parts
