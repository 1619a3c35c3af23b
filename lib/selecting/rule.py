"""The rule by which one run is taken, and why, in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lib.selecting.candidates import ACCURACY, Candidate
from lib.selecting.comparing import Difference, Unit

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


def choose_seed(units: Sequence[Unit], leader: int, differences: Mapping[int, Difference], metric: str) -> Choice:
    """Apply the rule's last step to the seeds of one recipe."""
    if len(units) == 1:
        return Choice(0, ())
    place = next(place for place in range(len(units)) if place == leader or not differences[place].behind)
    best = "highest accuracy" if metric == ACCURACY else "lowest loss"
    words = f"of its {len(units)} seeds {_name(units[place])} is the first that is not shown to be worse than another"
    more = (
        "" if place == leader else f" (the {best} is that of {_name(units[leader])}, by luck as far as the rows tell)"
    )
    return Choice(place, (words + more,))


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
