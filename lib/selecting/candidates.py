"""A run as a candidate: what its products say about quality, speed and size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lib.errors import InputError
from lib.models.tasks import AnyTask, has_labels, kind_of, read_task
from lib.run import Product, Run, known_run
from lib.run.files import read_json, read_jsonl, sha256_json
from lib.scoring import Scores
from lib.scoring.answers import AnswerScores

ACCURACY, ANSWER_LOSS = "accuracy", "answer_loss"


@dataclass(frozen=True)
class Candidate:
    """One finished run.

    Attributes:
        name: of the run. task: what it was asked.
        keys: hash of every test row (text and label, or messages); copies are numbered.
        texts: hash of every test row without its label.
        seen: the same of the rows that training and the choice of the checkpoint have used.
        leaked: (n,) whether the run's leak audit found the test row in its training data.
        groups: (n,) near-duplicate group of each test row.
        values: (n,) per test row: right or wrong (1, 0), or loss of the answers in nats a token.
        weights: (n,) 1, or tokens of the answers.
        recipe: hash of everything that training depends on but the seed; equal in runs that differ in it alone.
        validation: hash of prompt, tokenizer and validation rows: losses compare only where it is equal.
        facts: plain values for tables: train_seed, validation_loss, samples_per_second, tokens_per_second,
            train_device, adapter_bytes, weights, file (type and bytes of the recommended GGUF), base, digests.
    """

    name: str
    task: AnyTask
    keys: list[str]
    texts: list[str]
    seen: frozenset[str]
    leaked: np.ndarray
    groups: np.ndarray
    values: np.ndarray
    weights: np.ndarray
    recipe: str
    validation: str
    facts: dict[str, Any]

    @property
    def metric(self) -> str:
        """What `values` are."""
        return ACCURACY if has_labels(self.task) else ANSWER_LOSS


def row_key(row: Mapping[str, Any]) -> str:
    """Hash of what a row says, whatever its id and place."""
    return sha256_json({key: row[key] for key in ("text", "label", "messages") if key in row})


def text_key(row: Mapping[str, Any]) -> str:
    """Hash of a row's text or messages, whatever its label."""
    return sha256_json({key: row[key] for key in ("text", "messages") if key in row})


def numbered(keys: Iterable[str]) -> list[str]:
    """Keys with copies told apart: the second equal one ends in "#1", and so on."""
    count, found = Counter[str](), []
    for key in keys:
        found.append(f"{key}#{count[key]}" if count[key] else key)
        count[key] += 1
    return found


def read_candidates(names: Sequence[str]) -> list[Candidate]:
    """The runs of these names, all of one task.

    Raises:
        InputError: fewer than two runs, a run twice or unknown, without a product, with an evaluation of another
            adapter, runs of different tasks, or two of one recipe with one seed.
    """
    twice = [name for name, count in Counter(names).items() if count > 1]
    if len(names) < 2 or twice:
        what = f"run {twice[0]!r} twice" if twice else f"{len(names)} run"
        raise InputError(f"{what} to choose from.", "at least two runs, each once.", "name the runs to compare.")
    found = [read_candidate(known_run(name)) for name in names]
    first = found[0]
    for other in found[1:]:
        if kind_of(other.task) != kind_of(first.task) or _labels(other.task) != _labels(first.task):
            raise InputError(
                f"run {first.name!r} is a {_words(first.task)}, run {other.name!r} a {_words(other.task)}.",
                "runs of one task.",
                "compare runs with the same task (and the same label_names).",
            )
    _refuse_repetitions(found)
    return found


def _refuse_repetitions(runs: Sequence[Candidate]) -> None:
    """Two trainings of one recipe with one seed are one piece of evidence: no spread of seeds can be seen in them."""
    first: dict[tuple[str, Any], Candidate] = {}
    for run in runs:
        seed = run.facts["train_seed"]
        same = first.setdefault((run.recipe, seed), run)
        if same is not run:
            raise InputError(
                f"runs {same.name!r} and {run.name!r} have the same data, training parameters and train_seed ({seed}).",
                "runs that differ in their recipe or in the seed of training.",
                f"leave one of the two out, or train run {run.name!r} with another train_seed.",
            )


def _labels(task: AnyTask) -> tuple[str, ...]:
    return tuple(getattr(task, "label_names", ()))


def _words(task: AnyTask) -> str:
    return f"{kind_of(task)}{' of ' + '/'.join(_labels(task)) if _labels(task) else ''}"


def read_candidate(run: Run) -> Candidate:
    """Everything the choice needs from one run.

    Raises:
        InputError: a product is missing or damaged, or the evaluation is not of this adapter and these rows.
    """
    data, adapter, evaluation = (run.require(name) for name in ("data", "adapter", "evaluation"))
    for product in (data, adapter):
        if evaluation.entry.inputs.get(product.entry.product) != product.entry.digest:
            raise InputError(
                f"the evaluation of run {run.name!r} was made from another {product.entry.product}.",
                "an evaluation of what the run holds now.",
                "run 03_evaluate of that run again.",
            )
    task, rows = read_task(data.path), read_jsonl(data.path / "test.jsonl")
    values, weights = _values(evaluation, task, [row["id"] for row in rows])
    used = {split: read_jsonl(data.path / f"{split}.jsonl") for split in _USED}
    validation = [row_key(row) for row in used["validation"]]
    tokenizer = {n: o["sha256"] for n, o in data.entry.outputs.items() if n.startswith("tokenizer/")}
    parameters = {key: value for key, value in adapter.entry.parameters.items() if key != "seed"}
    return Candidate(
        name=run.name,
        task=task,
        keys=numbered(row_key(row) for row in rows),
        texts=[text_key(row) for row in rows],
        seen=frozenset(text_key(row) for split in used.values() for row in split),
        leaked=np.array([bool(row.get("leaked", False)) for row in rows]),
        groups=np.array([row["group"] for row in rows]),
        values=values,
        weights=weights,
        recipe=sha256_json({"parameters": parameters, "data": data.entry.digest, "name": _adopted(run, adapter)}),
        validation=sha256_json({"task": task.to_json(), "tokenizer": tokenizer, "rows": validation}),
        facts=_facts(run, data, adapter, evaluation),
    )


_USED = ("train", "validation")


def _adopted(run: Run, adapter: Product) -> str | None:
    """An adopted adapter has no seed to be a sibling by: its run stands alone."""
    return run.name if "adopted" in adapter.entry.facts else None


def _values(evaluation: Product, task: AnyTask, ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
    path = evaluation.path / "scores-finetuned.jsonl"
    scores = Scores.load(path) if has_labels(task) else AnswerScores.load(path)
    if scores.ids != ids:
        raise InputError(
            f"{path} holds scores of other rows.", "one score a test row.", "run 03_evaluate of that run again."
        )
    if isinstance(scores, Scores):
        return scores.correct.astype(np.float64), np.ones(len(ids))
    return scores.row_losses, scores.tokens.astype(np.float64)


def _facts(run: Run, data: Product, adapter: Product, evaluation: Product) -> dict[str, Any]:
    training, entry = read_json(adapter.path / "training.json"), adapter.entry
    adopted = "adopted" in entry.facts
    seconds = training.get("seconds") if training.get("resumed_from") is None and not adopted else None
    rows = training.get("train_rows", 0) * entry.parameters.get("num_train_epochs", 0.0)
    return {
        "train_seed": None if adopted else entry.parameters.get("seed"),
        "validation_loss": entry.metrics.get("eval_loss"),
        "samples_per_second": round(rows / seconds, 3) if seconds and rows else None,
        "tokens_per_second": training.get("throughput") or None,
        "train_device": entry.device,
        "adapter_bytes": entry.outputs["adapter_model.safetensors"]["bytes"],
        "weights": training["total"] - training["trainable"],
        "file": _file(run),
        "base": data.entry.facts.get("base_model"),
        "prompt_hash": data.entry.facts.get("prompt_hash"),
        "adopted": entry.facts.get("adopted"),
        "digests": {p.entry.product: p.entry.digest for p in (data, adapter, evaluation)},
    }


def _file(run: Run) -> dict[str, Any] | None:
    """Type and bytes of the file that the run's comparison recommends; None where it names none."""
    if "comparison" not in run.manifest.entries():
        return None
    content = read_json(run.require("comparison").path / "comparison.json")
    name = (content.get("recommendation") or {}).get("type")
    entry = next((file for file in content.get("files", []) if name and file["type"] == name), None)
    return {"type": entry["type"], "bytes": entry["bytes"]} if entry else None
