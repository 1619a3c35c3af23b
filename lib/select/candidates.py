"""Runs as candidates: what their products say, the rows that all can be judged on, and paired differences there."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError, refusal
from lib.prompts.tasks import Task, read_task
from lib.runs.files import read_json, read_jsonl, sha256_json
from lib.runs.run import Product, Run, known_run
from lib.scoring.log_probabilities import load_scores
from lib.scoring.metric import Metric, RowGroups, metric_of
from lib.statistics.intervals import Interval
from lib.statistics.losses import limits
from lib.statistics.paired import holm

if TYPE_CHECKING:
    import pandas as pd

# A run as a candidate: what its products say about quality, speed and size.


@dataclass(frozen=True)
class Candidate:
    """One finished run.

    Attributes:
        name: of the run. task: what it was asked.
        rows: the test rows, by a hash of text and label, or messages (copies are numbered): "text" (hash without the
            label), "leaked" (whether the run's leak audit found it in the training data), "group" (of near-duplicates),
            "value" and "weight" (see `Metric.row_values`).
        seen: hashes of the texts that training and the choice of the checkpoint have used.
        recipe: hash of everything that training depends on but the seed; equal in runs that differ in it alone.
        validation: hash of prompt, tokenizer and validation rows: losses compare only where it is equal.
        facts: plain values for tables: train_seed, training_loss (last one logged up to the chosen checkpoint),
            validation_loss, samples_per_second (after a resumption of the rest), tokens_per_second, resumed,
            train_device, adapter_bytes, weights, file (type and bytes of the recommended GGUF), base, digests.
    """

    name: str
    task: Task
    rows: pd.DataFrame
    seen: frozenset[str]
    recipe: str
    validation: str
    facts: dict[str, Any]

    @property
    def metric(self) -> Metric:
        """What the rows' values are of."""
        return metric_of(self.task)


def row_key(row: Mapping[str, Any]) -> str:
    """Hash of what a row says, whatever its id and place."""
    return sha256_json({key: row[key] for key in ("text", "label", "messages") if key in row})


def text_key(row: Mapping[str, Any]) -> str:
    """Hash of a row's text or messages, whatever its label."""
    return sha256_json({key: row[key] for key in ("text", "messages") if key in row})


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
        if other.task.kind != first.task.kind or other.task.label_names != first.task.label_names:
            raise refusal(
                "select/other-task", first=first, task=_words(first.task), other=other, other_task=_words(other.task)
            )
    # two trainings of one recipe with one seed are one piece of evidence: no spread of seeds can be seen in them
    alike: dict[tuple[str, Any], Candidate] = {}
    for run in found:
        seed = run.facts["train_seed"]
        same = alike.setdefault((run.recipe, seed), run)
        if same is not run:
            raise refusal("select/same-training", same=same, run=run, seed=seed)
    return found


def _words(task: Task) -> str:
    return f"{task.kind}{' of ' + '/'.join(task.label_names) if task.label_names else ''}"


def read_candidate(run: Run) -> Candidate:
    """Everything the choice needs from one run.

    Raises:
        InputError: a product is missing or damaged, or the evaluation is not of this adapter and these rows.
    """
    import pandas as pd

    run.adapter()
    data, adapter, evaluation = (run.require_current(name) for name in ("data", "adapter", "evaluation"))
    task, rows = read_task(data.path), read_jsonl(data.path / "test.jsonl")
    path = evaluation.path / "scores-finetuned.jsonl"
    scores = load_scores(path)
    if scores.ids != [row["id"] for row in rows]:
        raise refusal("select/other-rows", path=path)
    values, weights = metric_of(task).row_values(scores)
    table = pd.DataFrame(
        {
            "text": [text_key(row) for row in rows],
            "leaked": [bool(row.get("leaked", False)) for row in rows],
            "group": [row["group"] for row in rows],
            "value": values,
            "weight": weights,
        },
        index=[row_key(row) for row in rows],
    )
    copies = table.groupby(level=0).cumcount()
    table.index = [f"{key}#{copy}" if copy else key for key, copy in copies.items()]
    used = {split: read_jsonl(data.path / f"{split}.jsonl") for split in ("train", "validation")}
    validation = [row_key(row) for row in used["validation"]]
    tokenizer = {n: o["sha256"] for n, o in data.entry.outputs.items() if n.startswith("tokenizer/")}
    parameters = {key: value for key, value in adapter.entry.parameters.items() if key != "seed"}
    # an adopted adapter has no seed to be a sibling by: its run stands alone
    adopted = run.name if "adopted" in adapter.entry.facts else None
    return Candidate(
        name=run.name,
        task=task,
        rows=table,
        seen=frozenset(text_key(row) for split in used.values() for row in split),
        recipe=sha256_json({"parameters": parameters, "data": data.entry.digest, "name": adopted}),
        validation=sha256_json({"task": task.to_json(), "tokenizer": tokenizer, "rows": validation}),
        facts=_facts(run, data, adapter, evaluation),
    )


_WEIGHTS = re.compile(r"(adapter_)?model[^/]*\.safetensors")
"""Files of an adapter's weights, or of those of a model whose weights were all trained."""


def _facts(run: Run, data: Product, adapter: Product, evaluation: Product) -> dict[str, Any]:
    training, entry = read_json(adapter.path / "training.json"), adapter.entry
    adopted = "adopted" in entry.facts
    seconds, steps = None if adopted else training.get("seconds"), training.get("steps")
    rows = training.get("train_rows", 0) * entry.parameters.get("num_train_epochs", 0.0)
    if (done := training.get("resumed_from")) is not None:  # the seconds are of the updates behind it
        rows = rows * (1 - done / steps) if steps else 0
    history = read_jsonl(path) if (path := adapter.path / "history.jsonl").is_file() else []
    losses = [row["loss"] for row in history if "loss" in row and row["step"] <= training.get("chosen_step", 0)]
    return {
        "train_seed": None if adopted else entry.parameters.get("seed"),
        "training_loss": losses[-1] if losses else None,
        "validation_loss": entry.metrics.get("eval_loss"),
        "samples_per_second": round(rows / seconds, 3) if seconds and rows else None,
        "tokens_per_second": training.get("throughput") or None,
        "resumed": done is not None,
        "train_device": entry.device,
        "adapter_bytes": sum(o["bytes"] for name, o in entry.outputs.items() if _WEIGHTS.fullmatch(name)),
        "weights": training["total"] - (0 if run.whole else training["trainable"]),
        "file": _file(run),
        "base": data.entry.facts.get("base_model"),
        "prompt_hash": data.entry.facts.get("prompt_hash"),
        "adopted": entry.facts.get("adopted"),
        "digests": {p.entry.product: p.entry.digest for p in (data, adapter, evaluation)},
    }


def _file(run: Run) -> dict[str, Any] | None:
    """Type and bytes of the file that the run's comparison recommends; None where it names none, or is of others."""
    if "comparison" not in run.manifest.entries() or run.outdated("comparison"):
        return None
    content = read_json(run.require("comparison").path / "comparison.json")
    name = (content.get("recommendation") or {}).get("type")
    entry = next((file for file in content.get("files", []) if name and file["type"] == name), None)
    return {"type": entry["type"], "bytes": entry["bytes"]} if entry else None


# Runs on the rows that all of them can be judged on, and the paired difference of every two recipes there.

ALPHA = 0.05


@dataclass(frozen=True)
class Ground:
    """The test rows that every run holds and that no run has trained on.

    Attributes:
        keys: their hashes, in the first run's order.
        rows: groups and weights of each row, from the first run.
        leak_free: True when the rows that a leak audit flagged are left out as well.
        left_out: rows of the union that are not used, by reason.
    """

    keys: list[str]
    rows: RowGroups
    leak_free: bool
    left_out: dict[str, int]

    def values(self, run: Candidate) -> np.ndarray:
        """A run's values on these rows."""
        return run.rows.value[self.keys].to_numpy()


def shared_ground(runs: Sequence[Candidate]) -> Ground:
    """The rows to compare on, by hash.

    Raises:
        InputError: no such row; or answers that have other numbers of tokens in different runs.
    """
    first = runs[0]
    common = first.rows[[all(key in run.rows.index for run in runs) for key in first.rows.index]]
    unseen = common[~common.text.isin(frozenset().union(*(run.seen for run in runs)))]
    if unseen.empty:
        names = ", ".join(run.name for run in runs)
        seen = ", and a run has trained on each of them" if len(common) else ""
        raise refusal("select/no-common-rows", names=names, count=len(common), seen=seen)
    free = unseen[~np.any([run.rows.leaked[unseen.index] for run in runs], axis=0)]
    rows = unseen if free.empty else free
    for run in runs[1:]:
        if not run.rows.weight[rows.index].equals(rows.weight):
            raise refusal("select/other-tokens", first=first, run=run)
    left_out = {
        "not in every run": len(set().union(*(run.rows.index for run in runs))) - len(common),
        "used by a training": len(common) - len(unseen),
        "flagged by a leak audit": len(unseen) - len(rows),
    }
    of_rows = RowGroups(rows.group.to_numpy(), weights=rows.weight.to_numpy())
    return Ground(list(rows.index), of_rows, not free.empty, left_out)


class Unit:
    """What is compared: a run, or runs that differ only in the seed of training, by their mean on every row.

    Attributes:
        names: the runs. scores: each run's metric on the rows.
        interval: the metric (mean over the runs) with its 95 % interval over rows; infinite limits where fewer than
            three groups of rows, or losses that all agree, leave nothing to tell one from.
    """

    def __init__(self, runs: Sequence[Candidate], ground: Ground) -> None:
        table = np.stack([ground.values(run) for run in runs])
        self.names, self.values = tuple(run.name for run in runs), table.mean(axis=0)
        self.scores = tuple(float(np.average(row, weights=ground.rows.weights)) for row in table)
        self.interval = runs[0].metric.mean(self.values, ground.rows, len(runs))

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None of a single run."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Runs, seeds, mean, standard deviation and range over the seeds, interval over rows."""
        return {
            "runs": list(self.names),
            "n_seeds": len(self.names),
            "mean": self.interval.estimate,
            "interval": limits(self.interval),
            "seed_sd": self.spread,
            "seed_range": [min(self.scores), max(self.scores)],
        }


@dataclass(frozen=True)
class Ranking:
    """Units in the order in which they were named, and every one against the one with the best estimate.

    Attributes:
        leader: place of the best estimate; the first of equals.
        entries: what `Unit.to_json` says of each, and "verdict": "leader", "worse" (the rows show that it is not as
            good as the leader) or "cannot tell". Of all but the leader also "difference" (unit minus leader),
            "difference_interval" (simultaneous over all pairs, with the seeds' spread; None: too few groups),
            "confidence", "p" (two-sided) and "p_holm" (over all pairs).
    """

    units: list[Unit]
    leader: int
    entries: list[dict[str, Any]]

    @property
    def not_behind(self) -> list[int]:
        """Places that are the leader's or not shown to be worse."""
        return [place for place, entry in enumerate(self.entries) if entry["verdict"] != "worse"]


def rank(units: list[Unit], ground: Ground, metric: Metric, seed: int) -> Ranking:
    """Every unit against the best.

    Which unit leads is read from the same rows, so all pairs count in the correction, not those with the leader alone.
    """
    leader = metric.best([unit.interval.estimate for unit in units])
    pairs = list(itertools.combinations(range(len(units)), 2))
    p_values = [metric.p_value(units[i].values - units[j].values, ground.rows, seed) for i, j in pairs]
    adjusted = dict(zip(pairs, zip(p_values, holm(p_values), strict=True), strict=True))
    entries = []
    for place, unit in enumerate(units):
        if place == leader:
            entries.append({**unit.to_json(), "verdict": "leader"})
            continue
        p, p_holm = adjusted[min(place, leader), max(place, leader)]
        tries = max(len(unit.names), len(units[leader].names))
        change = unit.values - units[leader].values
        rows = metric.difference(change, ground.rows, 1 - ALPHA / len(pairs), tries)
        interval = _widened(rows, unit, units[leader])
        tests = {
            "difference": interval.estimate,
            "difference_interval": limits(interval),
            "confidence": interval.confidence,
            "p": p,
            "p_holm": p_holm,
            "verdict": "worse" if p_holm < ALPHA and interval.excludes_zero() else "cannot tell",
        }
        entries.append({**unit.to_json(), **tests})
    return Ranking(units, leader, entries)


def _widened(rows: Interval, *units: Unit) -> Interval:
    """The interval with what another draw of seeds would change: squared half-widths add up."""
    spreads = [(unit.spread, len(unit.names)) for unit in units if unit.spread is not None]
    if not spreads:
        return rows
    from scipy.stats import t

    error = math.sqrt(sum(spread**2 / count for spread, count in spreads))
    extra = float(t.ppf(0.5 + rows.confidence / 2, min(count for _, count in spreads) - 1)) * error
    low, high = (math.hypot(rows.estimate - limit, extra) for limit in (rows.low, rows.high))
    return Interval(rows.estimate, rows.estimate - low, rows.estimate + high, rows.confidence)
