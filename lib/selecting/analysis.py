"""The choice among runs as one document: model_analysis.json."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.models.resolving import GivenAdapter
from lib.models.tasks import kind_of
from lib.run import Run, open_run
from lib.run.files import read_json, read_jsonl, sha256_json, write_json
from lib.selecting.candidates import ACCURACY, Candidate, read_candidate, read_candidates, text_key
from lib.selecting.comparing import Ground, against, leader_of, make_unit, shared_ground
from lib.selecting.rule import RULE, choose, choose_seed
from lib.statistics.ratios import limits

FILE = "model_analysis.json"
FORMAT = 1
"""Raised when the content changes, so that an older file is not read as if it were new."""
BEST_OF = "best-of:"
"""How the setting `adapter` asks for a choice among runs."""
SEED = 42
"""Of the sign flips: the same runs always give the same answer."""


@dataclass(frozen=True)
class Analysis:
    """What `select` found.

    Attributes:
        content: model_analysis.json: "task", "metric", "rule", "rows", "speed", "recipes", "runs", "chosen", "text".
    """

    content: dict[str, Any]

    @property
    def chosen(self) -> str:
        """Name of the run that is taken."""
        return str(self.content["chosen"]["run"])

    @property
    def text(self) -> str:
        """The answer as a paragraph."""
        return str(self.content["text"])

    def write(self, folder: Path) -> Path:
        """Write model_analysis.json into `folder`."""
        path = folder / FILE
        write_json(path, self.content)
        return path


def select(names: Sequence[str]) -> Analysis:
    """Compare runs and take one by `lib.selecting.rule.RULE`.

    Raises:
        InputError: see `read_candidates` and `shared_ground`.
    """
    runs = read_candidates(names)
    ground, metric = shared_ground(runs), runs[0].metric
    devices = sorted({run.facts["train_device"] for run in runs})
    recipes: dict[str, list[Candidate]] = {}
    for run in runs:
        recipes.setdefault(run.recipe, []).append(run)
    units = [make_unit(members, ground) for members in recipes.values()]
    leader = leader_of(units, metric)
    differences = against(units, leader, ground, metric, SEED)
    by_name = {run.name: run for run in runs}
    choice = choose(units, leader, differences, by_name, speeds=len(devices) == 1)
    seeds = [make_unit([by_name[name]], ground) for name in units[choice.place].names]
    best = leader_of(seeds, metric)
    seed = choose_seed(seeds, best, against(seeds, best, ground, metric, SEED), metric)
    chosen = seeds[seed.place].names[0]
    content = {
        "format": FORMAT,
        "made": dt.datetime.now().astimezone().isoformat(timespec="seconds"),
        "task": kind_of(runs[0].task),
        "metric": metric,
        "rule": RULE,
        "rows": _rows(ground),
        "speed": {"comparable": len(devices) == 1, "devices": devices},
        "recipes": [
            {**unit.to_json(), **(differences[place].to_json() if place != leader else {"verdict": "leader"})}
            for place, unit in enumerate(units)
        ],
        "runs": [_run(run, runs[0], ground) for run in runs],
        "chosen": {
            "run": chosen,
            "recipe": list(units[choice.place].names),
            "reasons": [*choice.reasons, *seed.reasons],
        },
    }
    return Analysis({**content, "text": _text(content)})


def _rows(ground: Ground) -> dict[str, Any]:
    return {
        "n": len(ground.keys),
        "groups": len(set(ground.groups.tolist())),
        "leak_free": ground.leak_free,
        "left_out": ground.left_out,
        "sha256": sha256_json(sorted(ground.keys)),
    }


def _run(run: Candidate, first: Candidate, ground: Ground) -> dict[str, Any]:
    """A run's row: metric on the shared rows, cost, and in which respects it is not like the first one."""
    unit = make_unit([run], ground)
    unlike = [
        words
        for words, same in (
            ("other prompt", run.facts["prompt_hash"] == first.facts["prompt_hash"]),
            ("other base model", run.facts["base"] == first.facts["base"]),
            ("other data product", run.facts["digests"]["data"] == first.facts["digests"]["data"]),
            ("validation loss not comparable", run.validation == first.validation),
        )
        if not same
    ]
    return {
        "run": run.name,
        "metric": unit.interval.estimate,
        "interval": limits(unit.interval),
        **run.facts,
        "unlike_first": unlike,
    }


def _text(content: dict[str, Any]) -> str:
    """The answer as a paragraph."""
    chosen, rows = content["chosen"], content["rows"]
    entry = next(run for run in content["runs"] if run["run"] == chosen["run"])
    known = entry["interval"]
    interval = f"[{known[0]:.4f}, {known[1]:.4f}]" if known else "(no interval: too few groups of rows, or all alike)"
    words = "accuracy" if content["metric"] == ACCURACY else "loss of the answers (nats a token)"
    recipe = next(r for r in content["recipes"] if chosen["run"] in r["runs"])
    spread = ""
    if recipe["n_seeds"] > 1:
        spread = (
            f" Over its {recipe['n_seeds']} seeds the mean is {recipe['mean']:.4f}, the standard deviation "
            f"{recipe['seed_sd']:.4f}, the range {recipe['seed_range'][0]:.4f} to {recipe['seed_range'][1]:.4f}."
        )
    alone = "" if all(r["n_seeds"] > 1 for r in content["recipes"]) else _ALONE
    return (
        f"Taken: run {chosen['run']}, {words} {entry['metric']:.4f} {interval} on {rows['n']:,} "
        f"{'leak-free ' if rows['leak_free'] else ''}test rows that all runs share.{spread} Why: "
        f"{'; '.join(chosen['reasons'])}.{alone}"
    )


_ALONE = " A recipe with one seed does not say what another seed would give (`workbook report --seeds 3`)."


def outdated(content: dict[str, Any]) -> list[str]:
    """Runs of an analysis whose products are no longer those that were compared."""
    stale = []
    for entry in content["runs"]:
        try:
            now = open_run(entry["run"]).manifest.entries()
        except InputError:
            now = {}
        if any(product not in now or now[product].digest != digest for product, digest in entry["digests"].items()):
            stale.append(entry["run"])
    return stale


def read_analysis(folder: Path) -> dict[str, Any] | None:
    """The analysis that was last written into `folder`; None when there is none, or none that can be read."""
    try:
        content = read_json(folder / FILE)
    except (OSError, InputError):
        return None
    return content if isinstance(content, dict) and content.get("format") == FORMAT else None


@dataclass(frozen=True)
class Best:
    """What `best-of:RUN,RUN,…` stands for.

    Attributes:
        given: the adapter. analysis: what chose it.
        run: name of the run it comes from. method: how it was trained there ("LoRA", "QLoRA").
        test_rows_seen: test rows of the run that takes it which the chosen run has trained on or chosen by.
    """

    given: GivenAdapter
    analysis: Analysis
    run: str
    method: str
    test_rows_seen: int


def best_of(adapter: str, run: Run) -> Best:
    """The adapter that the setting `best-of:RUN,RUN,…` stands for.

    Args:
        run: the one that takes it; it cannot be a candidate itself, and must ask what the chosen run was asked.

    Raises:
        InputError: see `select`; or this run is among the candidates, or has another task or prompt.
    """
    names = [name.strip() for name in adapter.removeprefix(BEST_OF).split(",") if name.strip()]
    if run.name in names:
        raise InputError(
            f"adapter {adapter!r} in run {run.name!r}, which is one of the candidates.",
            "a run of its own for the chosen adapter.",
            "set another run_name.",
        )
    analysis = select(names)
    chosen = open_run(analysis.chosen)
    product, own, other = chosen.require("adapter"), run.require("data"), chosen.require("data")
    for key, words in (("prompt_hash", "prompt"), ("base_revision", "base model")):
        if own.entry.facts.get(key) != other.entry.facts.get(key):
            raise InputError(
                f"run {chosen.name!r} is the best of {', '.join(names)}, but run {run.name!r} has another {words}.",
                f"the {words} that the adapter was trained for.",
                f"prepare run {run.name!r} with the {words} of run {chosen.name!r}.",
            )
    given = GivenAdapter(product.path, adapter, f"run {chosen.name}, {product.entry.digest[:16]}")
    seen = read_candidate(chosen).seen
    rows = read_jsonl(own.path / "test.jsonl")
    method = str(product.entry.facts.get("method", "LoRA"))
    return Best(given, analysis, chosen.name, method, sum(text_key(row) in seen for row in rows))
