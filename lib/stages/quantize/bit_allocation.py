"""A type for every tensor under a size budget: the smallest predicted loss, solved exactly on a grid of bytes.
A file under a size budget: a type for every tensor, by measured sensitivity.
What the sensitivities of a run's tensors predict of every file of its ladder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError
from lib.runs.child import run_child
from lib.runs.files import read_json
from lib.runs.run import Run
from lib.settings import mix_name
from lib.stages.quantize.calibration import dataset_name
from lib.stages.quantize.recipes import Options
from lib.stages.quantize.sensitivity import METHOD, RECORD, measure_sensitivity
from lib.stages.quantize.tensor_errors import SUMMARY as ERRORS

if TYPE_CHECKING:
    from lib.settings import Settings


# A type for every tensor under a size budget: the smallest predicted loss, solved exactly on a grid of bytes.

TEXT, AT_ANSWERS = "kld", "answer_kld"
"""The two predicted losses of a type: KL divergence in nats a token of text, and in nats a position that predicts a
token of an answer."""

_CELLS = 1 << 16
"""Most cells of the grid: on a coarser one than the files' own, bytes are rounded up, so the budget always holds."""


@dataclass(frozen=True)
class Choice:
    """One type that a tensor may have.

    Attributes:
        type: as llama.cpp writes it ("q4_K").
        bytes: in the file, with padding.
        loss: predicted KL divergence that it alone costs, nats.
    """

    type: str
    bytes: int
    loss: float


def solve(tensors: Sequence[Sequence[Choice]], budget: int, fixed: int = 0) -> list[Choice]:
    """One choice a tensor, with `fixed` together at most `budget` bytes, with the smallest sum of losses.

    A larger budget never has a larger sum: the grid does not depend on it.

    Raises:
        InputError: a budget that even the smallest choices exceed.
    """
    smallest = [min(choice.bytes for choice in tensor) for tensor in tensors]
    require_room(budget, fixed + sum(smallest))
    room = budget - fixed - sum(smallest)
    extra = [[c.bytes - low for c in tensor] for tensor, low in zip(tensors, smallest, strict=True)]
    most = sum(map(max, extra))
    unit = math.gcd(*(e for row in extra for e in row)) or 1
    unit *= max(1, -(-most // (unit * _CELLS)))
    capacity = min(room // unit, sum(max(-(-e // unit) for e in row) for row in extra))
    steps = [[-(-e // unit) for e in row] for row in extra]
    return _best(tensors, steps, capacity)


def require_room(budget: int, least: int) -> None:
    """Refuse a budget below the smallest file of the types tried, of `least` bytes.

    Raises:
        InputError: with that size.
    """
    if budget < least:
        expected = f"at least {least:,} bytes, the smallest file of the types tried (q8_0 to q2_K, with an importance "
        expected += "matrix to iq2_xxs)."
        least_mb = f"{math.ceil(least / 1e4) / 100:.2f}"
        do = f"set size_budget_mb (--size-budget-mb) to {least_mb} or more; in bits per weight likewise more."
        raise InputError(f"a size budget of {budget / 1e6:.7g} MB.", expected, do)


def _best(tensors: Sequence[Sequence[Choice]], steps: list[list[int]], capacity: int) -> list[Choice]:
    """Dynamic programming over tensors: the least loss that at most so many grid steps allow."""
    best = np.zeros(capacity + 1)
    taken = np.zeros((len(tensors), capacity + 1), dtype=np.uint8)
    for i, tensor in enumerate(tensors):
        new = np.full(capacity + 1, np.inf)
        for k in sorted(range(len(tensor)), key=lambda k: steps[i][k]):  # among equals the smaller one
            if (step := steps[i][k]) > capacity:
                break
            reached = best[: capacity + 1 - step] + tensor[k].loss
            better = reached < new[step:]
            new[step:][better] = reached[better]
            taken[i, step:][better] = k
        best = new
    chosen: list[Choice] = []
    left = capacity
    for i in reversed(range(len(tensors))):
        k = int(taken[i, left])
        chosen.append(tensors[i][k])
        left -= steps[i][k]
    return chosen[::-1]


# A file under a size budget: a type for every tensor, by measured sensitivity.

MOST_MB, MOST_BITS = 1e6, 32.0
"""Bounds of a budget, as in the settings."""
_RECIPES = {"q5_K": "Q5_K_S", "q4_K": "Q4_K_S", "q3_K": "Q3_K_S", "q2_K": "Q2_K"}
"""Recipes whose name is not their main tensor type's in capitals."""


_CHOSEN: dict[tuple[Any, ...], tuple[str, Mix]] = {}
"""The last choice of this process, by what was asked, with the digest of the sensitivities: page 06 asks three times
(types, sizes, files), and each answer takes several child processes and a search."""


@dataclass(frozen=True)
class Mix:
    """A file to be made.

    Attributes:
        options: importance matrix, the type of every tensor, and the keys that tell of them in the header.
        prediction: as of `predict_sizes`; "type" is the name ("MIX_300MB"), "recipe" what the header says (the recipe
            of the type that most weights have), "mix" the record.
        record: "method", "budget_bytes", "answer_weight" (0 = text alone), "predicted_kld" (nats a token),
            "predicted_answer_kld" (nats a position that predicts a token of an answer; None without answers),
            "positions", "answers", "rows_sha256", "types" ({tensor: type}), "tensors" ([{"tensor", "type", "weights",
            "bytes", "kld", "answer_kld"}]).
    """

    options: Options
    prediction: dict[str, Any]
    record: dict[str, Any]


def plan_mix(settings: Settings, run: Run, source: Path, matrix: Path | None, force: bool) -> Mix:
    """Choose types under `settings.size_budget_mb` or `size_budget_bpw`; `force`: measure sensitivities again.

    Raises:
        InputError: as `measure_sensitivity`; a budget below the smallest file of the types tried.
    """
    asked = (*settings.pick("size_budget_mb", "size_budget_bpw", "answer_weight").values(), str(matrix))
    key = (*asked, str(source), run.require("gguf").entry.digest)
    budget = 0
    if key not in _CHOSEN:
        budget = budget_bytes(source, settings.size_budget_mb, settings.size_budget_bpw)
        about = dataset_name("train.jsonl", "10 rows", "0" * 64)  # as long as the real one
        require_possible(budget, source, matrix, about, settings.answer_weight)
    measured = measure_sensitivity(settings, run, source, matrix, force)
    digest, found = measured.product.entry.digest, measured.record
    if key in _CHOSEN and _CHOSEN[key][0] == digest:
        return _CHOSEN[key][1]
    budget = budget or budget_bytes(source, settings.size_budget_mb, settings.size_budget_bpw)
    dataset = dataset_name("train.jsonl", f"{found['rows']} rows", found["rows_sha256"])
    mix = choose_types(found, budget, source, matrix, dataset, settings.answer_weight)
    _CHOSEN.clear()
    _CHOSEN[key] = (digest, mix)
    return mix


def budget_bytes(source: Path, megabytes: float, bits_per_weight: float = 0.0) -> int:
    """The most bytes that a file may have: megabytes of 10⁶ bytes for all of it or, where they are 0, bits per weight
    as the pages count them (of the tensors alone), to which the header of the source is added.

    Raises:
        InputError: a budget that is no size.
    """
    if not (0 <= megabytes <= MOST_MB and 0 <= bits_per_weight <= MOST_BITS and megabytes + bits_per_weight > 0):
        found = f"a size budget of {f'{megabytes:g} MB' if megabytes else f'{bits_per_weight:g} bits per weight'}."
        raise InputError(found, f"at most {MOST_MB:g} MB or {MOST_BITS:g} bits per weight.", "correct it.")
    if megabytes:
        return round(megabytes * 1e6)
    plain = _predict(source, "Q8_0", Options())
    return plain["header_bytes"] + int(bits_per_weight * plain["weights"] / 8)


def require_possible(budget: int, source: Path, matrix: Path | None, dataset: str, answer_weight: float = 0.0) -> None:
    """Refuse, before anything is measured, a budget that no choice of types keeps; arguments as of `choose_types`.

    Raises:
        InputError: with the smallest size.
    """
    argument = {"source": str(source.resolve()), "imatrix": None if matrix is None else str(matrix.resolve())}
    tensors = run_child("lib.stages.quantize.type_costs:sizes", argument, "predicting sizes")["tensors"]
    smallest = sum(min(kind["bytes"] for kind in types) for types in tensors)
    require_room(
        budget, _fixed(source, Options(matrix, notes=_notes(budget, dataset, answer_weight)), tensors) + smallest
    )


def choose_types(
    found: dict[str, Any], budget: int, source: Path, matrix: Path | None, dataset: str, answer_weight: float = 0.0
) -> Mix:
    """The types with the least predicted KL divergence of a file of at most `budget` bytes: of text and answers
    together, (1 - answer_weight) × nats a token + answer_weight × nats a position of an answer.

    Args:
        found: record of the product `sensitivity`, or of `measure_types` with "rows_sha256".
        dataset: what it was measured on, for the header.
        answer_weight: 0 = text alone, 1 = answers alone; without answers in `found` it is 0.

    Raises:
        InputError: a budget below the smallest file of the types tried.
    """
    weight = answer_weight if found["answers"] else 0.0
    notes = _notes(budget, dataset, weight)
    rows = found["tensors"]
    tensors = [[Choice(t["type"], t["bytes"], _mixed(t, weight)) for t in row["types"]] for row in rows]
    fixed = _fixed(source, Options(matrix, notes=notes), [row["types"] for row in rows])
    chosen = solve(tensors, budget, fixed)
    types = {row["tensor"]: choice.type for row, choice in zip(rows, chosen, strict=True)}
    options = Options(matrix, tuple(f"^{re.escape(name)}$={kind}" for name, kind in types.items()), notes=notes)
    recipe = _recipe(types, {row["tensor"]: row["weights"] for row in rows})
    parts = [
        {
            "tensor": row["tensor"],
            "weights": row["weights"],
            **next(t for t in row["types"] if t["type"] == choice.type),
        }
        for row, choice in zip(rows, chosen, strict=True)
    ]
    record = {
        "method": METHOD,
        "budget_bytes": budget,
        "answer_weight": weight,
        "predicted_kld": sum(part[TEXT] for part in parts),
        "predicted_answer_kld": sum(part[AT_ANSWERS] for part in parts) if found["answers"] else None,
        **{key: found[key] for key in ("positions", "answers", "rows_sha256")},
        "types": types,
        "tensors": parts,
    }
    prediction = _predict(source, recipe, options)
    prediction |= {"type": mix_name(budget), "recipe": recipe, "mix": record}
    prediction |= {"fallbacks": [], "set_by_hand": []}  # no recipe was wanted that it could depart from
    wanted = fixed + sum(choice.bytes for choice in chosen)
    if prediction["bytes"] != wanted:
        raise RuntimeError(
            f"the dry run of llama.cpp gives {prediction['bytes']} bytes; the types chosen give {wanted}"
        )
    return Mix(options, prediction, record)


def _mixed(kind: dict[str, Any], weight: float) -> float:
    """The loss that is minimized; that of text alone to the last bit where the weight is 0."""
    return (1 - weight) * kind[TEXT] + weight * kind[AT_ANSWERS] if weight else kind[TEXT]


def _notes(budget: int, dataset: str, answer_weight: float) -> tuple[tuple[str, str], ...]:
    """What the file's header tells of the choice."""
    rows = (("method", METHOD), ("budget_bytes", str(budget)), ("rows", dataset))
    if answer_weight:
        rows = (*rows, ("answer_weight", f"{answer_weight:g}"))
    return tuple((f"quantize.mix.{key}", value) for key, value in rows)


def _fixed(source: Path, options: Options, tensors: list[list[dict[str, Any]]]) -> int:
    """Bytes of the header, and of what is never quantized."""
    whole = sum(next(kind["bytes"] for kind in types if kind["type"] == "q8_0") for types in tensors)
    return _predict(source, "Q8_0", options)["bytes"] - whole


def _recipe(types: dict[str, str], weights: dict[str, int]) -> str:
    total: dict[str, int] = {}
    for name, kind in types.items():
        total[kind] = total.get(kind, 0) + weights[name]
    most = max(total, key=lambda kind: total[kind])
    return _RECIPES.get(most, most.upper())


def _predict(source: Path, recipe: str, options: Options) -> dict[str, Any]:
    argument = {"source": str(source.resolve()), "types": [recipe], "options": options.to_json(), "checked": True}
    return run_child("lib.stages.quantize.child:predict", argument, "predicting sizes")["predictions"][0]


# What the sensitivities of a run's tensors predict of every file of its ladder.


def predictions(run: Run, loss: str = TEXT) -> dict[str, float]:
    """{file of the product `quantized`: KL divergence from the source that its types predict, nats a token}.

    Args:
        loss: "kld" of text, or "answer_kld" of a position that predicts a token of an answer.

    The sum over its tensors, as for the file under a size budget; 0 for a file that rounds nothing. From products
    alone: `sensitivity` (losses) and `tensor_errors` (types). Empty where these files were made without sensitivities;
    a file with a type that was not tried is left out.

    Raises:
        InputError: a missing or damaged product, or one that was made for other files.
    """
    quantized = run.require("quantized")
    if "sensitivity" not in quantized.entry.inputs:
        return {}
    measured, errors = run.require("sensitivity"), run.require("tensor_errors")
    same = quantized.entry.inputs["sensitivity"] == measured.entry.digest
    if not same or errors.entry.inputs["quantized"] != quantized.entry.digest:
        found = f"run {run.name!r} holds sensitivities or errors of other files than those in quantized/."
        raise InputError(found, "products of one run of 06.", "run notebooks/06_quantize.ipynb again.")
    tensors = read_json(measured.path / RECORD)["tensors"]
    losses = {(t["tensor"], kind["type"]): kind.get(loss) for t in tensors for kind in t["types"]}
    tried = {t["tensor"] for t in tensors}  # the others are in F16 in every file
    types = read_json(errors.path / ERRORS)["files"]
    found = {}
    for row in read_json(quantized.path / "quantized.json")["files"]:
        parts = [losses.get((t["tensor"], t["type"])) for t in types[row["type"]] if t["tensor"] in tried]
        if None not in parts:
            found[row["file"]] = sum(parts)
    return found
