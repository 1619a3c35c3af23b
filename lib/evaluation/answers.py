"""The product `evaluation` for rows without labels: how likely the reference answers are, and what the models write."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.device import compute_dtype, device_name
from lib.evaluation.written import PROMPTS_FILE, Questions, generated_rows, prompts_json, write_with
from lib.models.conversations import ConversationTask, EncodedConversation
from lib.models.tasks import encode_row, read_task
from lib.run.files import read_json, read_jsonl, sha256_json, write_json, write_jsonl
from lib.scoring.answers import AnswerScores, score_answers
from lib.statistics import Interval, paired_bootstrap
from lib.textmetrics import chrf_signature, read_prompts, read_terms, summarise

if TYPE_CHECKING:
    from lib.run import Product, Run, Work
    from lib.settings import Settings

BASE, FINETUNED = "base", "finetuned"
SHOWN = {BASE: "base", FINETUNED: "fine-tuned"}
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
        content: evaluation.json: "titles", "parts" (of the rows: n, tokens; by model loss, its interval and
            perplexity; difference of the losses with its interval, and the ratio of the perplexities), "decoding",
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
    )
    task = read_task(run.require("data").path)
    scores = {name: AnswerScores.load(product.path / f"scores-{name}.jsonl") for name in (BASE, FINETUNED)}
    generated, prompts = read_jsonl(product.path / "generated.jsonl"), read_json(product.path / PROMPTS_FILE)
    return AnswerResult(product, task, scores, read_json(product.path / SUMMARY), generated, prompts)


def _content(settings: Settings) -> dict[str, Any]:
    """Hashes of the lists that settings name, so that a change in a file is seen."""
    terms = read_terms(settings.terms)
    return {"terms_sha256": terms and terms.sha256, "prompts_sha256": sha256_json(read_prompts(settings.prompts_file))}


def _build(settings: Settings, run: Run, work: Work) -> None:
    from lib.models.loading import base_of, load_tokenizer

    data, adapter = run.require("data"), run.require("adapter")
    task, rows = read_task(data.path), read_jsonl(data.path / "test.jsonl")
    tokenizer, base = load_tokenizer(data.path / "tokenizer"), base_of(run)
    dtype, reason = compute_dtype(settings.dtype)
    in_4bit = adapter.entry.facts.get("method") == "QLoRA"
    work.device = device_name()
    encoded = [encode_row(tokenizer, task, row) for row in rows]
    questions = Questions.of(settings, tokenizer, task, rows, encoded)
    scores, answers, replies = {}, {}, {}
    for name, path, quantized in ((BASE, None, False), (FINETUNED, adapter.path, in_4bit)):
        scores[name], answers[name], replies[name] = _run_model(
            name, base.path, path, quantized, dtype, settings, rows, encoded, questions
        )
        scores[name].save(work.folder / f"scores-{name}.jsonl")
    write_jsonl(work.folder / "generated.jsonl", generated_rows(rows, questions, _by_shown(answers)))
    measured = {SHOWN[name]: [answer["measured"] for answer in given] for name, given in answers.items()}
    groups = [rows[i]["group"] for i in questions.chosen]
    conditions = {"system_prompt": task.system_prompt, "device": work.device, "dtype": dtype}
    write_json(work.folder / PROMPTS_FILE, prompts_json(questions, _by_shown(replies), conditions))
    content = {
        "task": task.kind,
        "thinking": task.thinking,
        "titles": {
            BASE: f"{base.id} ({dtype})",
            FINETUNED: f"{base.id} with the adapter ({'NF4 base, ' if in_4bit else ''}{dtype})",
        },
        "decoding": {"method": "greedy", "max_new_tokens": settings.max_new_tokens, "rows": len(groups)},
        "answers": summarise(measured, groups, SHOWN[BASE]) if groups else [],
        "chrf": chrf_signature(),
        "terms": questions.terms and {"name": questions.terms.name, "terms": len(questions.terms)},
        "turns_cut": sum(conversation.turns_cut for conversation in encoded),
        "parts": summary(scores, rows, settings.seed),
    }
    write_json(work.folder / SUMMARY, content)
    facts = data.entry.facts
    work.facts |= {
        **{key: facts[key] for key in ("task", "source", "sample_data", "prompt_hash") if key in facts},
        "base_model": base.id,
        "base_revision": base.revision,
        "offline_base": base.offline,
        "dtype": dtype,
        "dtype_reason": reason,
    }
    whole = content["parts"][ALL]
    work.metrics |= {"n": whole["n"], "tokens": whole["tokens"]}
    work.metrics |= {f"{key}_{name}": whole[name][key] for name in (BASE, FINETUNED) for key in ("loss", "perplexity")}


def _by_shown(answers: dict[str, Any]) -> dict[str, Any]:
    return {SHOWN[name]: given for name, given in answers.items()}


def _run_model(
    name: str,
    base: Path,
    adapter: Path | None,
    in_4bit: bool,
    dtype: str,
    settings: Settings,
    rows: Sequence[dict[str, Any]],
    encoded: Sequence[EncodedConversation],
    questions: Questions,
) -> tuple[AnswerScores, list[dict[str, Any]], list[dict[str, Any]]]:
    """Scores of one model, its own answers to test rows and to prompts; it is loaded for this and freed again."""
    from lib.models.loading import load_model
    from lib.scoring import TransformersBackend

    model = load_model(base, dtype=dtype, load_in_4bit=in_4bit, adapter=adapter)
    backend = TransformersBackend(model, settings.per_device_eval_batch_size, f"the {SHOWN[name]} model")
    names, ids, spans = [row["id"] for row in rows], [e.ids for e in encoded], [e.spans for e in encoded]
    try:
        scores = score_answers(backend, names, ids, spans, f"scoring test answers with {backend.name}")
        return scores, *write_with(model, questions, backend.name)
    finally:
        backend.close()
        del model
        gc.collect()


def summary(scores: dict[str, AnswerScores], rows: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Losses, perplexities and their paired difference on all rows and on the leak-free rows."""
    groups = np.array([row["group"] for row in rows])
    free = np.array([not row["leaked"] for row in rows])
    masks = {ALL: np.ones(len(rows), dtype=bool), LEAK_FREE: free}
    parts = {}
    for part, mask in masks.items():
        if not mask.any():
            continue
        base, tuned = (scores[name].subset(mask) for name in (BASE, FINETUNED))
        losses = {name: own.interval(groups[mask], seed) for name, own in ((BASE, base), (FINETUNED, tuned))}
        change = paired_bootstrap(tuned.row_losses - base.row_losses, groups[mask], seed, weights=base.tokens)
        parts[part] = {
            "n": int(mask.sum()),
            "groups": len(np.unique(groups[mask])),
            "tokens": int(base.tokens.sum()),
            **{name: _figures(loss) for name, loss in losses.items()},
            "difference": change.estimate,
            "difference_interval": change.to_json(),
            "ratio": math.exp(change.estimate),
            "ratio_interval": [math.exp(limit) for limit in change.to_json()],
        }
    return parts


def _figures(loss: Interval) -> dict[str, Any]:
    return {
        "loss": loss.estimate,
        "loss_interval": loss.to_json(),
        "perplexity": math.exp(loss.estimate),
        "perplexity_interval": [math.exp(limit) for limit in loss.to_json()],
    }
