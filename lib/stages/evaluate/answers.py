"""What is written in the product `evaluation`: answers to some test rows, and to a few prompts for human reading.
The product `evaluation` for rows without labels: how likely the reference answers are, and what the models write.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.prompts.conversations import Encoded
from lib.prompts.tasks import ConversationTask, read_task, spread
from lib.runs.files import read_json, read_jsonl, sha256_json, write_json, write_jsonl
from lib.runs.machine import compute_dtype, device_name
from lib.scoring.generation import Asked, Sampling, Writing, ask_prompt, ask_row, end_ids, told, torch_feed, write_all
from lib.scoring.journal import Keep, found_done
from lib.scoring.log_probabilities import AnswerScores, exponentials, score_answers
from lib.scoring.term_lists import TermList, read_prompts, read_terms
from lib.scoring.text_metrics import chrf_signature, summarise
from lib.stages.evaluate.analysis import BASE, FINETUNED, SHOWN, both_sides, facts_of, forget_kept
from lib.statistics.losses import cluster_test, limits, weighted_mean

if TYPE_CHECKING:
    from pathlib import Path

    from lib.runs.run import Product, Run, Work
    from lib.scoring.backend import Backend
    from lib.scoring.torch_backend import TransformersBackend
    from lib.settings import Settings


# What is written in the product `evaluation`: answers to some test rows, and to a few prompts for human reading.

PROMPTS_FILE = "counselling_prompts.json"
GREEDY, SAMPLED = "greedy", "sampled"


@dataclass(frozen=True)
class Questions:
    """What every model is asked.

    Attributes:
        tokenizer, terms, thinking: of the run.
        chosen: numbers of the test rows that are answered.
        asked: those rows.
        prompts: the prompts behind them, rendered; sources: as the file has them. Both empty where nothing is written
            (generated_rows: 0).
        most: tokens at which an answer is cut.
        sampling: of the second answer to a prompt.
    """

    tokenizer: Any
    terms: TermList | None
    thinking: bool
    chosen: list[int]
    asked: list[Asked]
    prompts: list[Asked]
    sources: list[dict[str, str]]
    most: int
    sampling: Sampling

    @classmethod
    def of(
        cls,
        settings: Settings,
        tokenizer: Any,
        task: ConversationTask,
        rows: Sequence[dict[str, Any]],
        encoded: Sequence[Encoded],
    ) -> Questions:
        """As the settings want it.

        Raises:
            InputError: no such list of terms or prompts.
        """
        writes = settings.generated_rows > 0
        chosen = spread(range(len(rows)), settings.generated_rows) if writes else []
        sources = read_prompts(settings.prompts_file) if writes else []
        return cls(
            tokenizer=tokenizer,
            terms=read_terms(settings.terms),
            thinking=task.thinking,
            chosen=chosen,
            asked=[ask_row(tokenizer, rows[i], encoded[i]) for i in chosen],
            prompts=[ask_prompt(tokenizer, task, source) for source in sources],
            sources=sources,
            most=settings.max_new_tokens,
            sampling=Sampling(seed=settings.seed),
        )


@dataclass(frozen=True)
class Replies:
    """What one model wrote.

    Attributes:
        answers: greedy, to the rows (see `told`).
        replies: {"greedy", "sampled"} to each prompt.
        found: what of them an interrupted try had written, in words.
    """

    answers: list[dict[str, Any]]
    replies: list[dict[str, Any]]
    found: list[str]


def write_with(backend: TransformersBackend, questions: Questions, keep: Keep | None = None) -> Replies:
    """Let a model answer.

    Args:
        keep: of the model's scores; beside it every answer is kept as it comes.
    """
    model, ends, found = backend.model, end_ids(questions.tokenizer), []

    def ask(asked: Sequence[Asked], what: str, drawn: Sampling | None = None) -> list[dict[str, Any]]:
        plan = Writing(questions.most, ends, drawn, keep and keep.part(what.replace(" ", "-")), backend.settings)
        written, done = write_all(lambda: torch_feed(model), asked, plan, what, backend.name)
        found.append(done)
        rest = (questions.terms, questions.thinking)
        return [told(questions.tokenizer, one, made, *rest) for one, made in zip(asked, written, strict=True)]

    answers = ask(questions.asked, "answers")
    for prompt in questions.prompts[:1]:
        torch_feed(model)(prompt.ids)  # latencies of a model that is warm, whatever was found done
    greedy, drawn = ask(questions.prompts, "replies"), ask(questions.prompts, "drawn replies", questions.sampling)
    replies = [{GREEDY: one, SAMPLED: other} for one, other in zip(greedy, drawn, strict=True)]
    return Replies(answers, replies, found)


def generated_rows(
    rows: Sequence[dict[str, Any]], questions: Questions, answers: Mapping[str, Sequence[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Question, reference and every model's answer to the chosen rows, one mapping a row."""
    made = []
    for place, (number, asked) in enumerate(zip(questions.chosen, questions.asked, strict=True)):
        given = {name: own[place] for name, own in answers.items()}
        row = {"id": rows[number]["id"], "group": rows[number]["group"]}
        row |= {"question": asked.question, "reference": asked.reference}
        row |= {name: answer["text"] for name, answer in given.items()}
        keys = ("ended", "tokens", "measured")
        made.append(row | {key: {name: answer[key] for name, answer in given.items()} for key in keys})
    return made


def prompts_json(
    questions: Questions, replies: Mapping[str, Sequence[dict[str, Any]]], conditions: dict[str, Any]
) -> dict[str, Any]:
    """The content of counselling_prompts.json.

    Returns:
        `conditions`, "decoding" (of "greedy" and "sampled"), "latency" (what the seconds are), "prompts": {"prompt",
        "reference", "answers": {model: {"greedy", "sampled"}}}, each answer as `told` gives it.
    """
    most = {"max_new_tokens": questions.most}
    return {
        **conditions,
        "decoding": {GREEDY: most, SAMPLED: {**most, **questions.sampling.to_json()}},
        "latency": "first_token_seconds: reading the prompt, to the first token; tokens_per_second: the later tokens; "
        "one prompt at a time, the first one read once before to warm up",
        "prompts": [
            {**source, "answers": {name: own[place] for name, own in replies.items()}}
            for place, source in enumerate(questions.sources)
        ],
    }


# The product `evaluation` for rows without labels: how likely the reference answers are, and what the models write.

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
    encoded = [task.encode(tokenizer, row) for row in rows]
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


def _score(backend: Backend, rows: Sequence[dict[str, Any]], encoded: Sequence[Encoded], keep: Keep) -> AnswerScores:
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
