"""The choice among runs: the rule by which one is taken, and why, in words; model_analysis.json; `best-of:`.

The rule itself, and the answer as a paragraph, are written in templates/choice.j2.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.models.base_model import GivenAdapter
from lib.runs.files import read_json, read_jsonl, render, sha256_json, write_json
from lib.runs.run import Run, open_run
from lib.scoring.metric import Metric
from lib.select.candidates import (
    Candidate,
    Ground,
    Ranking,
    Unit,
    make_unit,
    rank,
    read_candidate,
    read_candidates,
    shared_ground,
    text_key,
)
from lib.statistics.losses import limits

# Applying the rule.


def _bytes_of_file(run: Candidate) -> float | None:
    return (run.facts["file"] or {}).get("bytes")


def _seconds_a_row(run: Candidate) -> float | None:
    speed = run.facts["samples_per_second"]
    return 1 / speed if speed else None


_SIZES: tuple[tuple[str, Callable[[Candidate], float | None], float], ...] = (
    ("the smallest recommended GGUF file", _bytes_of_file, 0.01),
    ("the base with the fewest weights", lambda run: run.facts["weights"], 0.01),
    ("the smallest adapter", lambda run: run.facts["adapter_bytes"], 0.01),
)
"""What breaks a tie: in words, of a run (smaller is better; None = not known), share within which two are equal."""
_SPEED = ("the fastest training", _seconds_a_row, 0.10)


@dataclass(frozen=True)
class Choice:
    """The place of the taken one, and the reasons in the order in which they decided."""

    place: int
    reasons: tuple[str, ...]


def choose(ranking: Ranking, runs: Mapping[str, Candidate], speeds: bool) -> Choice:
    """Apply the rule to recipes.

    Args:
        speeds: whether the training speeds were measured on one device.
    """
    units, leader, left = ranking.units, ranking.leader, ranking.not_behind
    name = _name(units[leader])
    if len(units) == 1:
        return Choice(0, (f"{name} {'is' if len(units[0].names) == 1 else 'are seeds of'} the only recipe",))
    if left == [leader]:
        return Choice(leader, (f"{name} has the best estimate, and the intervals show every other one to be worse",))
    tied = ", ".join(_name(units[place]) for place in left)
    reasons = [f"{name} has the best estimate, but the rows cannot tell {tied} apart"]
    for words, cost, tolerance in (*_SIZES, *([_SPEED] if speeds else [])):
        costs = {place: _mean([cost(runs[name]) for name in units[place].names]) for place in left}
        kept = _cheapest(costs, tolerance)
        if len(kept) < len(left):
            names = " and ".join(_name(units[place]) for place in kept)
            reasons.append(f"{names} {'has' if len(kept) == 1 else 'have'} {words}")
            left = kept
        if len(left) == 1:
            return Choice(left[0], tuple(reasons))
    reasons.append(f"{', '.join(_name(units[place]) for place in left)} cost the same: the first named is taken")
    return Choice(left[0], tuple(reasons))


def choose_seed(ranking: Ranking, metric: Metric) -> Choice:
    """Apply the rule's last step to the seeds of one recipe."""
    units, place = ranking.units, ranking.not_behind[0]
    if len(units) == 1:
        return Choice(0, ())
    words = f"of its {len(units)} seeds {_name(units[place])} is the first that is not shown to be worse than another"
    if place != ranking.leader:
        best = _name(units[ranking.leader])
        words += f" (the {metric.best_words} is that of {best}, by luck as far as the rows tell)"
    return Choice(place, (words,))


def _name(unit: Unit) -> str:
    return unit.names[0] if len(unit.names) == 1 else f"{{{', '.join(unit.names)}}}"


def _cheapest(costs: Mapping[int, float | None], tolerance: float) -> list[int]:
    """Places within the tolerance of the cheapest; all of them where the cost of one is not known."""
    known = [cost for cost in costs.values() if cost is not None]
    if len(known) < len(costs):
        return list(costs)
    return [place for place, cost in costs.items() if cost <= min(known) * (1 + tolerance)]


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else sum(values) / len(values)


# The choice among runs as one document: model_analysis.json.

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
    """Compare runs and take one by the rule in templates/choice.j2.

    Raises:
        InputError: see `read_candidates` and `shared_ground`.
    """
    runs = read_candidates(names)
    ground, metric = shared_ground(runs), runs[0].metric
    devices = sorted({run.facts["train_device"] for run in runs})
    recipes: dict[str, list[Candidate]] = {}
    for run in runs:
        recipes.setdefault(run.recipe, []).append(run)
    recipe_ranking = rank([make_unit(members, ground) for members in recipes.values()], ground, metric, SEED)
    by_name = {run.name: run for run in runs}
    choice = choose(recipe_ranking, by_name, speeds=len(devices) == 1)
    taken = recipe_ranking.units[choice.place]
    seed_ranking = rank([make_unit([by_name[name]], ground) for name in taken.names], ground, metric, SEED)
    seed = choose_seed(seed_ranking, metric)
    content = {
        "format": FORMAT,
        "made": dt.datetime.now().astimezone().isoformat(timespec="seconds"),
        "task": runs[0].task.kind,
        "metric": metric.name,
        "rule": _written("rule"),
        "rows": _rows(ground),
        "speed": {"comparable": len(devices) == 1, "devices": devices},
        "recipes": recipe_ranking.to_json(),
        "runs": [_run(run, runs[0], ground) for run in runs],
        "chosen": {
            "run": seed_ranking.units[seed.place].names[0],
            "recipe": list(taken.names),
            "reasons": [*choice.reasons, *seed.reasons],
        },
    }
    return Analysis({**content, "text": _text(content, metric)})


def _rows(ground: Ground) -> dict[str, Any]:
    return {
        "n": len(ground.keys),
        "groups": len(set(ground.rows.groups.tolist())),
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


def _text(content: dict[str, Any], metric: Metric) -> str:
    """The answer as a paragraph."""
    run = content["chosen"]["run"]
    entry = next(one for one in content["runs"] if one["run"] == run)
    recipe = next(one for one in content["recipes"] if run in one["runs"])
    return _written("answer", words=metric.words, entry=entry, recipe=recipe, **content)


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
