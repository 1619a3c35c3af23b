"""A file under a size budget: a type for every tensor by measured sensitivity, the smallest predicted loss of all.

Solved exactly on a grid of bytes. Of a run the solved choice is the product `mix`; `workbook quantize` makes one from a
model folder and a text, or the rows of a run.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import refusal
from lib.models.gguf_file import run_gguf
from lib.runs.child import run_child
from lib.runs.run import ProductDraft, Run
from lib.scoring.measure import Text
from lib.settings import Settings, mix_name
from lib.stages.quantize import calibration, sensitivity
from lib.stages.quantize.files import Options, PlannedFile, predict_sizes
from lib.stages.quantize.sensitivity import AT_ANSWERS, METHOD, TEXT

if TYPE_CHECKING:
    from lib.stages.quantize.quantizer import Source


MOST_MB, MOST_BITS = 1e6, 32.0
"""Bounds of a budget, as in the settings."""
PREDICTED = ("predicted_kld", "predicted_answer_kld")
SEED = 42
"""Of the labels that are drawn without a run."""
_CELLS = 1 << 16
"""Most cells of the grid: on a coarser one than the files' own, bytes are rounded up, so the budget always holds."""
_RECIPES = {"q5_K": "Q5_K_S", "q4_K": "Q4_K_S", "q3_K": "Q3_K_S", "q2_K": "Q2_K"}
"""Recipes whose name is not their main tensor type's in capitals."""


# The choice.


TypeCost = dict[str, Any]
"""A type that a tensor may have: "type" as llama.cpp writes it, "bytes" in the file (padded), predicted losses."""


def solve(
    tensors: Sequence[Sequence[TypeCost]], loss: Callable[[TypeCost], float], budget: int, fixed: int = 0
) -> list[TypeCost]:
    """One type a tensor, with `fixed` together at most `budget` bytes, with the smallest sum of losses.

    A larger budget never has a larger sum: the grid does not depend on it.

    Raises:
        InputError: a budget that even the smallest types exceed.
    """
    smallest = [min(cost["bytes"] for cost in tensor) for tensor in tensors]
    require_room(budget, fixed + sum(smallest))
    extra = [[cost["bytes"] - low for cost in tensor] for tensor, low in zip(tensors, smallest, strict=True)]
    unit = math.gcd(*(e for row in extra for e in row)) or 1
    unit *= max(1, math.ceil(sum(map(max, extra)) / (unit * _CELLS)))
    steps = [[-(-e // unit) for e in row] for row in extra]
    capacity = min((budget - fixed - sum(smallest)) // unit, sum(map(max, steps)))
    # dynamic programming over tensors: the least loss that at most so many grid steps allow
    best, taken = np.zeros(capacity + 1), np.zeros((len(tensors), capacity + 1), dtype=np.uint8)
    for i, tensor in enumerate(tensors):
        new = np.full(capacity + 1, np.inf)
        for k in sorted(range(len(tensor)), key=lambda k: steps[i][k]):  # among equals the smaller one
            if (step := steps[i][k]) > capacity:
                break
            reached = best[: capacity + 1 - step] + loss(tensor[k])
            better = reached < new[step:]
            new[step:][better] = reached[better]
            taken[i, step:][better] = k
        best = new
    chosen: list[TypeCost] = []
    for i in reversed(range(len(tensors))):
        k = int(taken[i, capacity])
        chosen.append(tensors[i][k])
        capacity -= steps[i][k]
    return chosen[::-1]


def require_room(budget: int, least: int) -> None:
    """Refuse a budget below the smallest file of the types tried, of `least` bytes.

    Raises:
        InputError: with that size.
    """
    if budget < least:
        least_mb = f"{math.ceil(least / 1e4) / 100:.2f}"
        raise refusal("quantize/too-small-budget", budget=budget / 1e6, least=least, least_mb=least_mb)


def budget_bytes(source: Path, megabytes: float, bits_per_weight: float = 0.0) -> int:
    """The most bytes that a file may have: megabytes of 10⁶ bytes for all of it or, where they are 0, bits per weight
    as the pages count them (of the tensors alone), to which the header of the source is added.

    Raises:
        InputError: a budget that is no size.
    """
    if not (0 <= megabytes <= MOST_MB and 0 <= bits_per_weight <= MOST_BITS and megabytes + bits_per_weight > 0):
        budget = f"{megabytes:g} MB" if megabytes else f"{bits_per_weight:g} bits per weight"
        raise refusal("quantize/bad-budget", budget=budget, most_mb=MOST_MB, most_bits=MOST_BITS)
    if megabytes:
        return round(megabytes * 1e6)
    plain = predict_sizes(source, ["Q8_0"])[0]
    return plain["header_bytes"] + int(bits_per_weight * plain["weights"] / 8)


@dataclass(frozen=True)
class MixRequest:
    """What types are chosen for.

    Attributes:
        budget: most bytes of the file; source: GGUF with F32, F16 or BF16 weights.
        matrix: importance matrix; both paths are texts in a child process.
        dataset: what sensitivities were measured on, for the header.
        answer_weight: what the loss at answers counts, 0 = text alone, 1 = answers alone.
    """

    budget: int
    source: Path
    matrix: Path | None
    dataset: str
    answer_weight: float = 0.0

    def options(self, types: tuple[str, ...] = ()) -> Options:
        """How such a file is made; its header tells of the choice."""
        notes = {"method": METHOD, "budget_bytes": str(self.budget), "rows": self.dataset}
        if self.answer_weight:
            notes["answer_weight"] = f"{self.answer_weight:g}"
        return Options(self.matrix, types, notes=tuple((f"quantize.mix.{key}", text) for key, text in notes.items()))


def choose_types(found: dict[str, Any], request: MixRequest) -> PlannedFile:
    """The types with the least predicted KL divergence of a file within the budget: of text and answers together,
    (1 - answer_weight) × nats a token + answer_weight × nats a position of an answer.

    For child processes only: llama.cpp tells the size.

    Args:
        found: record of the product `sensitivity`, or of `measure_types`; where it has no answers, the text decides.

    Raises:
        InputError: a budget below the smallest file of the types tried.
    """
    from lib.stages.quantize.quantizer import open_source

    request = request if found["answers"] else replace(request, answer_weight=0.0)
    weight, rows = request.answer_weight, found["tensors"]
    sizes = [{kind["type"]: kind["bytes"] for kind in row["types"]} for row in rows]
    fixed = _fixed_bytes(open_source(request.source, request.options()), sizes)

    def loss(kind: TypeCost) -> float:
        """The one that is minimized; that of text alone to the last bit where the weight is 0."""
        return (1 - weight) * kind[TEXT] + weight * kind[AT_ANSWERS] if weight else kind[TEXT]

    chosen = solve([row["types"] for row in rows], loss, request.budget, fixed)
    parts = [
        {"tensor": row["tensor"], "weights": row["weights"], **kind} for row, kind in zip(rows, chosen, strict=True)
    ]
    record = {
        "method": METHOD,
        "budget_bytes": request.budget,
        "answer_weight": weight,
        "predicted_kld": sum(part[TEXT] for part in parts),
        "predicted_answer_kld": sum(part[AT_ANSWERS] for part in parts) if found["answers"] else None,
        **{key: found[key] for key in ("positions", "answers", "rows_sha256")},
        "types": {part["tensor"]: part["type"] for part in parts},
        "tensors": parts,
    }
    patterns = tuple(f"^{re.escape(name)}$={kind}" for name, kind in record["types"].items())
    options = request.options(patterns)
    recipe, wanted = _main_recipe(parts), fixed + sum(part["bytes"] for part in parts)
    prediction = open_source(request.source, options).predict(recipe)
    if prediction["bytes"] != wanted:
        raise RuntimeError(
            f"the dry run of llama.cpp gives {prediction['bytes']} bytes; the types chosen give {wanted}"
        )
    # no recipe was wanted that the file could depart from
    prediction |= {
        "type": mix_name(request.budget),
        "fallbacks": [],
        "set_by_hand": [],
        "recipe": recipe,
        "mix": record,
    }
    return PlannedFile(prediction, options)


def _fixed_bytes(source: Source, types: Iterable[dict[str, int]]) -> int:
    """Bytes of the header, and of what is never quantized; `types`: {type: bytes} of every tensor that is."""
    return source.predict("Q8_0")["bytes"] - sum(sizes["q8_0"] for sizes in types)


def _main_recipe(parts: list[dict[str, Any]]) -> str:
    """The recipe of the type that most weights have."""
    total: Counter[str] = Counter()
    for part in parts:
        total[part["type"]] += part["weights"]
    ((most, _),) = total.most_common(1)
    return _RECIPES.get(most, most.upper())


# Both in child processes: they need llama.cpp.


def require_possible(request: MixRequest) -> None:
    """Refuse, before anything is measured, a budget that no choice of types keeps.

    Raises:
        InputError: with the smallest size.
    """
    argument = {"source": request.source, "options": request.options()}
    answer = run_child("lib.stages.quantize.size_budget:least_in_child", argument, "predicting sizes")
    require_room(request.budget, answer["bytes"])


def least_in_child(argument: dict[str, Any]) -> dict[str, Any]:
    """ "bytes" of the smallest file of "source" (GGUF) with "options" (importance matrix and notes)."""
    from lib.stages.quantize.quantizer import open_source
    from lib.stages.quantize.type_costs import possible_types

    source = open_source(argument["source"], Options(**argument["options"]))
    types = possible_types(source).values()
    return {"bytes": _fixed_bytes(source, types) + sum(min(sizes.values()) for sizes in types)}


def _choose(found: dict[str, Any], request: MixRequest) -> PlannedFile:
    """`choose_types` by a child process."""
    argument = {"found": found, "request": request}
    answer = run_child("lib.stages.quantize.size_budget:choose_in_child", argument, "choosing types")
    return PlannedFile(answer["prediction"], Options(**{**answer["options"], "imatrix": request.matrix}))


def choose_in_child(argument: dict[str, Any]) -> dict[str, Any]:
    """ "options" and "prediction" of `choose_types`, whose arguments these are."""
    return vars(choose_types(argument["found"], MixRequest(**argument["request"])))


# The product `mix` of a run.


def plan_mix(settings: Settings, run: Run, force: bool | None = None) -> PlannedFile | None:
    """The types of a file under the run's size budget, or find them solved; None without a budget.

    Args:
        force: measure sensitivities and solve again even if nothing changed; None = as the settings say.

    Raises:
        InputError: no products `data`, `merged` or `gguf`; a budget below the smallest file of the types tried.
    """
    if not settings.size_budget:
        return None
    source, matrix = run_gguf(run), calibration.run_options(settings, run).imatrix
    force = settings.force if force is None else force

    def request(rows: int, digest: str) -> MixRequest:
        budget = budget_bytes(source, settings.size_budget_mb, settings.size_budget_bpw)
        dataset = calibration.dataset_name("train.jsonl", f"{rows} rows", digest)
        return MixRequest(budget, source, matrix, dataset, settings.answer_weight)

    def check() -> None:
        require_possible(request(10, "0" * 64))  # a name as long as the real one

    def content(work: ProductDraft) -> dict[str, Any]:
        mix = _choose(found, request(found["rows"], found["rows_sha256"]))
        work.metrics |= {"bytes": mix.prediction["bytes"], **{key: mix.record[key] for key in PREDICTED}}
        options = {key: value for key, value in vars(mix.options).items() if key != "imatrix"}
        return {"options": options, "prediction": mix.prediction}

    found = sensitivity.measure_sensitivity(settings, run, source, matrix, force, check)
    parameters = settings.pick(settings.size_budget, "answer_weight")
    parameters["imatrix"] = calibration.matrix_identity(matrix)
    _, solved = run.produce_json("mix", content, parameters, ("gguf", "sensitivity"), force)
    return PlannedFile(solved["prediction"], Options(**solved["options"], imatrix=matrix))


# Without a run: from a model folder and a text, or the rows of a run.


@dataclass(frozen=True)
class Budget:
    """What a file under a size budget is chosen by.

    Attributes:
        bytes: the most that the file may have (see `budget_bytes`).
        model: the folder that the GGUF was converted from; gradients are computed there.
        text: what the gradients are of, at most 16 windows of `n_ctx` tokens; `file`: where it was read from. A text
            has no answers, so it decides alone.
        data: in place of a text the folder of a run's product `data`, whose training rows have answers.
        answer_weight: what the loss at answers counts (see `MixRequest`).
    """

    bytes: int
    model: Path
    text: Text | None = None
    file: Path | None = None
    n_ctx: int = 512
    data: Path | None = None
    answer_weight: float = 0.0


def mix_for_budget(source: Path, budget: Budget, matrix: Path | None, scratch: Path, n_threads: int = 0) -> PlannedFile:
    """Choose types for a file of a size, as the stage does for a run.

    Args:
        source: GGUF with F32, F16 or BF16 weights.
        matrix: importance matrix.
        scratch: folder on a disk with room for the sensitivities.
        n_threads: for trying types; 0 = physical cores.

    Raises:
        InputError: an impossible budget (before the work), a folder that is quantized or holds another model, a text
            that does not fill a window, too little memory or room.
    """
    chosen, answers = _texts(budget)
    request = MixRequest(budget.bytes, source, matrix, chosen.dataset, budget.answer_weight if answers else 0.0)
    require_possible(request)
    found = sensitivity.measure_types(budget.model, source, chosen, answers, matrix, SEED, scratch, n_threads)
    return _choose(found, request)


def _texts(budget: Budget) -> tuple[calibration.Windows, calibration.AnswerRows | None]:
    """What gradients are of.

    Raises:
        InputError: no model folder, a folder that is no product `data`, too little text.
    """
    if budget.data is None:
        return calibration.text_windows(budget.model, budget.text, budget.file, budget.n_ctx, sensitivity.WINDOWS), None
    calibration.require_whole_weights(budget.model)
    if not (budget.data / "train.jsonl").is_file() or not (budget.data / "task.json").is_file():
        raise refusal("quantize/no-rows", budget=budget)
    return sensitivity.run_texts(budget.data, budget.n_ctx, sensitivity.most_windows(budget.answer_weight), SEED)
