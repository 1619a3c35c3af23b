"""The product `evaluation` for rows without labels: how likely the reference answers are, and a few answers in full."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.device import compute_dtype, device_name
from lib.models.conversations import ASSISTANT, ConversationTask, EncodedConversation
from lib.models.prompting import end_of_turn_id
from lib.models.tasks import encode_row, read_task, spread
from lib.progress import Progress
from lib.run.files import read_json, read_jsonl, write_json, write_jsonl
from lib.scoring.answers import AnswerScores, score_answers
from lib.statistics import Interval, paired_bootstrap

if TYPE_CHECKING:
    from lib.run import Product, Run, Work
    from lib.settings import Settings

BASE, FINETUNED = "base", "finetuned"
SHOWN = {BASE: "base", FINETUNED: "fine-tuned"}
PARAMETERS = ("per_device_eval_batch_size", "seed", "dtype", "generated_rows", "max_new_tokens")
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
            perplexity; difference of the losses with its interval, and the ratio of the perplexities), "decoding".
        generated: {"id", "question", "reference", "base", "fine-tuned", …} of a few test rows.
    """

    product: Product
    task: ConversationTask
    scores: dict[str, AnswerScores]
    content: dict[str, Any]
    generated: list[dict[str, Any]]
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
        parameters=settings.pick(*PARAMETERS),
        inputs=("data", "adapter"),
        force=settings.force,
    )
    task = read_task(run.require("data").path)
    scores = {name: AnswerScores.load(product.path / f"scores-{name}.jsonl") for name in (BASE, FINETUNED)}
    generated = read_jsonl(product.path / "generated.jsonl")
    return AnswerResult(product, task, scores, read_json(product.path / SUMMARY), generated)


def _build(settings: Settings, run: Run, work: Work) -> None:
    from lib.models.loading import base_of, load_tokenizer

    data, adapter = run.require("data"), run.require("adapter")
    task, rows = read_task(data.path), read_jsonl(data.path / "test.jsonl")
    tokenizer, base = load_tokenizer(data.path / "tokenizer"), base_of(run)
    dtype, reason = compute_dtype(settings.dtype)
    in_4bit = adapter.entry.facts.get("method") == "QLoRA"
    work.device = device_name()
    encoded = [encode_row(tokenizer, task, row) for row in rows]
    chosen = spread(range(len(rows)), settings.generated_rows) if settings.generated_rows else []
    scores, answers = {}, {}
    for name, path, quantized in ((BASE, None, False), (FINETUNED, adapter.path, in_4bit)):
        scores[name], answers[name] = _run_model(
            name, base.path, path, quantized, dtype, settings, tokenizer, rows, encoded, chosen
        )
        scores[name].save(work.folder / f"scores-{name}.jsonl")
    write_jsonl(work.folder / "generated.jsonl", _readable(tokenizer, rows, encoded, chosen, answers))
    content = {
        "task": task.kind,
        "thinking": task.thinking,
        "titles": {
            BASE: f"{base.id} ({dtype})",
            FINETUNED: f"{base.id} with the adapter ({'NF4 base, ' if in_4bit else ''}{dtype})",
        },
        "decoding": {"method": "greedy", "max_new_tokens": settings.max_new_tokens, "rows": len(chosen)},
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


def _run_model(
    name: str,
    base: Path,
    adapter: Path | None,
    in_4bit: bool,
    dtype: str,
    settings: Settings,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    encoded: Sequence[EncodedConversation],
    chosen: Sequence[int],
) -> tuple[AnswerScores, list[dict[str, Any]]]:
    """Scores of one model and its own answers to the chosen rows; it is loaded for this and freed again."""
    from lib.models.loading import load_model
    from lib.scoring import TransformersBackend

    model = load_model(base, dtype=dtype, load_in_4bit=in_4bit, adapter=adapter)
    backend = TransformersBackend(model, settings.per_device_eval_batch_size, f"the {SHOWN[name]} model")
    names, ids, spans = [row["id"] for row in rows], [e.ids for e in encoded], [e.spans for e in encoded]
    try:
        scores = score_answers(backend, names, ids, spans, f"scoring test answers with {backend.name}")
        prompts = [encoded[i].prompt_ids for i in chosen]
        return scores, _generate(model, tokenizer, prompts, settings.max_new_tokens, f"answers of {backend.name}")
    finally:
        backend.close()
        del model
        gc.collect()


def _generate(model: Any, tokenizer: Any, prompts: Sequence[list[int]], most: int, what: str) -> list[dict[str, Any]]:
    """Greedy answers: {"text", "tokens", "ended"} (False: cut at `most` tokens)."""
    import torch

    end, answers = end_of_turn_id(tokenizer), []
    model.config.use_cache = True
    plain = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "repetition_penalty": 1.0}
    with Progress(what, len(prompts)) as progress, torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt], device=model.device)
            found = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=most,
                eos_token_id=end,
                pad_token_id=tokenizer.pad_token_id,
                **plain,
            )[0, len(prompt) :].tolist()
            ended = found[-1:] == [end]
            text = tokenizer.decode(found[:-1] if ended else found, skip_special_tokens=False)
            answers.append({"text": text.strip(), "tokens": len(found), "ended": ended})
            progress.advance()
    return answers


def _readable(
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    encoded: Sequence[EncodedConversation],
    chosen: Sequence[int],
    answers: dict[str, list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """Question, reference and both answers of the chosen rows, for human reading."""
    made = []
    for place, i in enumerate(chosen):
        turns = [m for m in rows[i]["messages"] if m["role"] == ASSISTANT]
        last = rows[i]["messages"].index(turns[len(encoded[i].spans) - 1])
        made.append(
            {
                "id": rows[i]["id"],
                "question": rows[i]["messages"][last - 1]["content"],
                "reference": rows[i]["messages"][last]["content"],
                **{SHOWN[name]: given[place]["text"] for name, given in answers.items()},
                "ended": {SHOWN[name]: given[place]["ended"] for name, given in answers.items()},
                "tokens": {SHOWN[name]: given[place]["tokens"] for name, given in answers.items()},
            }
        )
    return made


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
