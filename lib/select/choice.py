"""The choice among runs: the rule by which one is taken, and why, in words; model_analysis.json; `best-of:`."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.models.base_model import GivenAdapter
from lib.runs.files import read_json, read_jsonl, sha256_json, write_json
from lib.runs.run import Run, open_run
from lib.scoring.metric import Metric
from lib.select.candidates import (
    Candidate,
    Difference,
    Ground,
    Unit,
    against,
    leader_of,
    make_unit,
    read_candidate,
    read_candidates,
    shared_ground,
    text_key,
)
from lib.statistics.losses import limits

# The rule by which one run is taken, and why, in words.

SIZE_TOLERANCE, SPEED_TOLERANCE = 0.01, 0.10

RULE = (
    "Runs that differ only in train_seed count as one recipe, by the mean over their seeds on every row. Recipes are "
    "compared on the test rows that all runs hold and none has trained on (leak-free ones where there are any), by "
    "accuracy, or without labels by the loss of the answers. The best estimate leads. A recipe is out when the paired "
    "interval of its difference to the leader excludes 0 and the Holm-adjusted p is below 0.05 (sign flips of whole "
    "groups of rows, or a t-test over groups for losses; corrected over all pairs, the intervals simultaneous and "
    "widened by the spread of the seeds). Of those left the smallest is taken: by the recommended GGUF file, else by "
    "the weights of the base, then by the adapter; sizes within 1 % are equal. Then the fastest in training on the "
    "same device; speeds within 10 % are equal. Then the one named first. Of the chosen recipe's seeds, the first "
    "named that is not shown to be worse. A difference that the rows cannot show never decides, and the validation "
    "loss, which has chosen the checkpoints, is shown only."
)


@dataclass(frozen=True)
class Choice:
    """The place of the taken one, and the reasons in the order in which they decided."""

    place: int
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class _Cost:
    """One measure that breaks a tie: smaller is better."""

    words: str
    value: Callable[[Sequence[Candidate]], float | None]
    tolerance: float


def choose(
    units: Sequence[Unit],
    leader: int,
    differences: Mapping[int, Difference],
    runs: Mapping[str, Candidate],
    speeds: bool,
) -> Choice:
    """Apply RULE to recipes.

    Args:
        differences: place -> difference to the leader, of every unit but the leader.
        speeds: whether the training speeds were measured on one device.
    """
    left = [place for place in range(len(units)) if place == leader or not differences[place].behind]
    name = _name(units[leader])
    if len(units) == 1:
        return Choice(0, (f"{name} {'is' if len(units[0].names) == 1 else 'are seeds of'} the only recipe",))
    if left == [leader]:
        return Choice(leader, (f"{name} has the best estimate, and the intervals show every other one to be worse",))
    tied = ", ".join(_name(units[place]) for place in left)
    reasons = [f"{name} has the best estimate, but the rows cannot tell {tied} apart"]
    members = {place: [runs[name] for name in units[place].names] for place in left}
    for cost in (_FILE, _WEIGHTS, _ADAPTER, *([_SPEED] if speeds else [])):
        left, reason = _narrow(left, members, cost, units)
        reasons += [reason] if reason else []
        if len(left) == 1:
            return Choice(left[0], tuple(reasons))
    reasons.append(f"{', '.join(_name(units[place]) for place in left)} cost the same: the first named is taken")
    return Choice(left[0], tuple(reasons))


def choose_seed(units: Sequence[Unit], leader: int, differences: Mapping[int, Difference], metric: Metric) -> Choice:
    """Apply the rule's last step to the seeds of one recipe."""
    if len(units) == 1:
        return Choice(0, ())
    place = next(place for place in range(len(units)) if place == leader or not differences[place].behind)
    words = f"of its {len(units)} seeds {_name(units[place])} is the first that is not shown to be worse than another"
    if place == leader:
        return Choice(place, (words,))
    luck = f" (the {metric.best_words} is that of {_name(units[leader])}, by luck as far as the rows tell)"
    return Choice(place, (words + luck,))


def _name(unit: Unit) -> str:
    return unit.names[0] if len(unit.names) == 1 else f"{{{', '.join(unit.names)}}}"


def _narrow(
    left: list[int], members: Mapping[int, Sequence[Candidate]], cost: _Cost, units: Sequence[Unit]
) -> tuple[list[int], str | None]:
    """Those within the tolerance of the cheapest; all of them where the cost of one is not known."""
    known = {place: cost.value(members[place]) for place in left}
    values = {place: value for place, value in known.items() if value is not None}
    if len(values) < len(left):
        return left, None
    limit = min(values.values()) * (1 + cost.tolerance)
    kept = [place for place in left if values[place] <= limit]
    if len(kept) == len(left):
        return left, None
    return (
        kept,
        f"{' and '.join(_name(units[place]) for place in kept)} {'has' if len(kept) == 1 else 'have'} {cost.words}",
    )


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found and len(found) == len(values) else None


def _of(key: str) -> Callable[[Sequence[Candidate]], float | None]:
    return lambda runs: _mean([run.facts[key] for run in runs])


def _file_bytes(runs: Sequence[Candidate]) -> float | None:
    return _mean([(run.facts["file"] or {}).get("bytes") for run in runs])


def _seconds_a_row(runs: Sequence[Candidate]) -> float | None:
    speeds = [run.facts["samples_per_second"] for run in runs]
    return _mean([1 / speed if speed else None for speed in speeds])


_FILE = _Cost("the smallest recommended GGUF file", _file_bytes, SIZE_TOLERANCE)
_WEIGHTS = _Cost("the base with the fewest weights", _of("weights"), SIZE_TOLERANCE)
_ADAPTER = _Cost("the smallest adapter", _of("adapter_bytes"), SIZE_TOLERANCE)
_SPEED = _Cost("the fastest training", _seconds_a_row, SPEED_TOLERANCE)


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
    """Compare runs and take one by `lib.select.choice.RULE`.

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
        "task": runs[0].task.kind,
        "metric": metric.name,
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
    chosen, rows = content["chosen"], content["rows"]
    entry = next(run for run in content["runs"] if run["run"] == chosen["run"])
    known = entry["interval"]
    interval = f"[{known[0]:.4f}, {known[1]:.4f}]" if known else "(no interval: too few groups of rows, or all alike)"
    recipe = next(r for r in content["recipes"] if chosen["run"] in r["runs"])
    spread = ""
    if recipe["n_seeds"] > 1:
        spread = (
            f" Over its {recipe['n_seeds']} seeds the mean is {recipe['mean']:.4f}, the standard deviation "
            f"{recipe['seed_sd']:.4f}, the range {recipe['seed_range'][0]:.4f} to {recipe['seed_range'][1]:.4f}."
        )
    alone = "" if all(r["n_seeds"] > 1 for r in content["recipes"]) else _ALONE
    return (
        f"Taken: run {chosen['run']}, {metric.words} {entry['metric']:.4f} {interval} on {rows['n']:,} "
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
