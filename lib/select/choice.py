"""The choice among runs: the rule by which one is taken, and why, in words; model_analysis.json; `best-of:`.

The rule itself, and the answer as a paragraph, are written in templates/choice.j2.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import InputError, refusal
from lib.models.base_model import GivenAdapter
from lib.runs.files import read_json, read_jsonl, sha256_json, write_json
from lib.runs.render import render
from lib.runs.run import Run, open_run
from lib.scoring.metric import Metric
from lib.select import candidates
from lib.statistics.losses import limits

# Applying the rule.

_SIZES = (
    ("the smallest recommended GGUF file", 0.01, lambda facts: (facts["file"] or {}).get("bytes")),
    ("the base with the fewest weights", 0.01, lambda facts: facts["weights"]),
    ("the smallest adapter", 0.01, lambda facts: facts["adapter_bytes"]),
)
"""What breaks a tie: in words, share within which two are equal, of a run's facts (smaller is better, None unknown)."""


def _seconds_a_row(facts: Mapping[str, Any]) -> float | None:
    """Of a training in one go: what is measured of the rest of a resumed one may be of a few updates."""
    return 1 / speed if (speed := facts["samples_per_second"]) and not facts["resumed"] else None


_SPEED = ("the fastest training", 0.10, _seconds_a_row)


def choose(
    ranking: candidates.Ranking, runs: Mapping[str, candidates.Candidate], speeds: bool
) -> tuple[candidates.Unit, list[str]]:
    """Apply the rule to recipes: the one taken, and the reasons in the order in which they decided.

    Args:
        speeds: whether the training speeds were measured on one device.
    """
    leader, left = ranking.units[ranking.leader], [ranking.units[place] for place in ranking.not_behind]
    name = _name(leader)
    if len(ranking.units) == 1:
        return leader, [f"{name} {'is' if len(leader.names) == 1 else 'are seeds of'} the only recipe"]
    if left == [leader]:
        return leader, [f"{name} has the best estimate, and the intervals show every other one to be worse"]
    tied = ", ".join(map(_name, left))
    reasons = [f"{name} has the best estimate, but the rows cannot tell {tied} apart"]
    for words, tolerance, cost in (*_SIZES, *([_SPEED] if speeds else [])):
        costs = [[cost(runs[name].facts) for name in unit.names] for unit in left]
        if any(None in own for own in costs):
            continue
        means = [sum(own) / len(own) for own in costs]
        kept = [unit for unit, mean in zip(left, means, strict=True) if mean <= min(means) * (1 + tolerance)]
        if len(kept) < len(left):
            names = " and ".join(map(_name, kept))
            reasons.append(f"{names} {'has' if len(kept) == 1 else 'have'} {words}")
            left = kept
        if len(left) == 1:
            return left[0], reasons
    reasons.append(f"{', '.join(map(_name, left))} cost the same: the first named is taken")
    return left[0], reasons


def choose_seed(ranking: candidates.Ranking, metric: Metric) -> tuple[candidates.Unit, list[str]]:
    """Apply the rule's last step to the seeds of one recipe."""
    units, place = ranking.units, ranking.not_behind[0]
    if len(units) == 1:
        return units[0], []
    words = f"of its {len(units)} seeds {_name(units[place])} is the first that is not shown to be worse than another"
    if place != ranking.leader:
        best = _name(units[ranking.leader])
        words += f" (the {metric.best_words} is that of {best}, by luck as far as the rows tell)"
    return units[place], [words]


def _name(unit: candidates.Unit) -> str:
    return unit.names[0] if len(unit.names) == 1 else f"{{{', '.join(unit.names)}}}"


# The choice among runs as one document: model_analysis.json.

FILE = "model_analysis.json"
FORMAT = 1
"""Raised when the content changes, so that an older file is not read as if it were new."""
BEST_OF = "best-of:"
"""How the setting `adapter` asks for a choice among runs."""
SEED = 42
"""Of the sign flips: the same runs always give the same answer."""


def select(names: Sequence[str]) -> dict[str, Any]:
    """Compare runs and take one by the rule in templates/choice.j2.

    Returns:
        model_analysis.json: "task", "metric", "rule", "rows", "speed", "recipes", "runs", "chosen" (with "run", the
        name of the one that is taken), "text" (the answer as a paragraph).

    Raises:
        InputError: see `read_candidates` and `shared_ground`.
    """
    runs = candidates.read_candidates(names)
    ground, metric = candidates.shared_ground(runs), runs[0].metric
    devices = sorted({run.facts["train_device"] for run in runs})
    recipes: dict[str, list[candidates.Candidate]] = {}
    for run in runs:
        recipes.setdefault(run.recipe, []).append(run)
    ranking = candidates.rank([candidates.Unit(members, ground) for members in recipes.values()], ground, metric, SEED)
    by_name = {run.name: run for run in runs}
    taken, reasons = choose(ranking, by_name, speeds=len(devices) == 1)
    seeds = candidates.rank([candidates.Unit([by_name[name]], ground) for name in taken.names], ground, metric, SEED)
    seed, more = choose_seed(seeds, metric)
    content = {
        "format": FORMAT,
        "made": dt.datetime.now().astimezone().isoformat(timespec="seconds"),
        "task": runs[0].task.kind,
        "metric": metric.name,
        "rule": _written("rule"),
        "rows": {
            "n": len(ground.keys),
            "groups": len(set(ground.rows.groups.tolist())),
            "leak_free": ground.leak_free,
            "left_out": ground.left_out,
            "sha256": sha256_json(sorted(ground.keys)),
        },
        "speed": {"comparable": len(devices) == 1, "devices": devices},
        "recipes": ranking.entries,
        "runs": [_run(run, runs[0], ground) for run in runs],
        "chosen": {"run": seed.names[0], "recipe": list(taken.names), "reasons": [*reasons, *more]},
    }
    entry = next(one for one in content["runs"] if one["run"] == seed.names[0])
    recipe = next(one for one in content["recipes"] if seed.names[0] in one["runs"])
    return {**content, "text": _written("answer", words=metric.words, entry=entry, recipe=recipe, **content)}


def _run(run: candidates.Candidate, first: candidates.Candidate, ground: candidates.Ground) -> dict[str, Any]:
    """A run's row: metric on the shared rows, cost, and in which respects it is not like the first one."""
    unit = candidates.Unit([run], ground)
    like = {
        "other prompt": run.facts["prompt_hash"] == first.facts["prompt_hash"],
        "other base model": run.facts["base"] == first.facts["base"],
        "other data product": run.facts["digests"]["data"] == first.facts["digests"]["data"],
        "validation loss not comparable": run.validation == first.validation,
    }
    return {
        "run": run.name,
        "metric": unit.interval.estimate,
        "interval": limits(unit.interval),
        **run.facts,
        "unlike_first": [words for words, same in like.items() if not same],
    }


def _written(asked: str, **values: Any) -> str:
    """A paragraph of the template on one line."""
    return " ".join(render(Path(__file__).with_name("templates") / "choice.j2", asked=asked, **values).split())


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


def write_analysis(content: dict[str, Any], folder: Path) -> Path:
    """Write model_analysis.json into `folder`."""
    write_json(folder / FILE, content)
    return folder / FILE


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
        given: the adapter. analysis: what chose it (see `select`).
        run: name of the run it comes from. method: how it was trained there ("LoRA", "QLoRA").
        test_rows_seen: test rows of the run that takes it which the chosen run has trained on or chosen by.
    """

    given: GivenAdapter
    analysis: dict[str, Any]
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
        raise refusal("select/own-candidate", adapter=adapter, run=run)
    analysis = select(names)
    chosen = open_run(analysis["chosen"]["run"])
    if chosen.whole:
        raise refusal("select/no-adapter", chosen=chosen, names=", ".join(names))
    product, own, other = chosen.require("adapter"), run.require("data"), chosen.require("data")
    for key, words in (("prompt_hash", "prompt"), ("base_revision", "base model")):
        if own.entry.facts.get(key) != other.entry.facts.get(key):
            raise refusal("select/other-start", chosen=chosen, names=", ".join(names), run=run, words=words)
    given = GivenAdapter(product.path, adapter, f"run {chosen.name}, {product.entry.digest[:16]}")
    seen = candidates.read_candidate(chosen).seen
    rows = read_jsonl(own.path / "test.jsonl")
    method = str(product.entry.facts.get("method", "LoRA"))
    return Best(given, analysis, chosen.name, method, sum(candidates.text_key(row) in seen for row in rows))
