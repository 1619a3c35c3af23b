"""What every type would cost every tensor: bytes, and the KL divergence that its rounding is predicted to cost, on text
and at answers.

llama.cpp's search for the small types takes nearly all of the time. So one cheap type is tried on all rows of a tensor,
and the others on some of them, drawn by their share in the cheap type's loss (with replacement, so that every row drawn
has a known weight); a type's loss is the cheap type's, times the ratio of the two on these rows. Rows differ far more
among themselves than in that ratio. For child processes only.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import InputError
from lib.progress import Progress
from lib.runs.machine import physical_cores
from lib.stages.quantize import llama_library, recipes
from lib.stages.quantize.llama_library import Tensor
from lib.stages.quantize.quantizer import Source, open_source, padded, planned_types
from lib.stages.quantize.recipes import Options

PLAIN = (
    *("q8_0", "q6_K", "q5_K", "q5_1", "q5_0", "q4_K", "q4_1", "q4_0"),
    *("iq4_nl", "iq4_xs", "iq3_s", "q3_K", "q2_K"),
)
"""Types that any tensor may have."""
WITH_MATRIX = ("iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs")
"""Types for tensors with importance values only."""

_WEIGHTS = 1 << 21
"""Most weights of a tensor that are tried; a larger one is represented by rows at even distances."""
_CHEAP = "q4_0"
"""The type that is tried on all of them; its blocks of 32 weights fit wherever any type's do."""
_DRAWN = 96
"""Rows that the other types are tried on, of a tensor that has more than twice as many (docs/LOG.md: six budgets)."""
_EVEN = 0.25
"""Part of the draw that is even over all rows, so that none stands for too many."""


def possible_types(source: Source) -> dict[str, dict[str, int]]:
    """{tensor: {type that it may have: bytes in the file}}, of the tensors for which there is a choice.

    Rows that do not fill blocks of 32 weights fit no type: llama.cpp leaves such a tensor in F16 whatever is wanted.

    Raises:
        InputError: no choice for any tensor, an importance matrix of another model.
    """
    names = list(planned_types(source.dry_run("Q8_0", Options())))
    source.check_coverage(names)
    found = {}
    for name in names:
        tensor, types = source.tensors[name], PLAIN + (() if source.importance(name) is None else WITH_MATRIX)
        fitting = [kind for kind in types if tensor.columns % llama_library.block_size(kind) == 0]
        if fitting:
            found[name] = {kind: padded(tensor.as_type(kind).bytes) for kind in fitting}
    if not found:
        what = f"no tensor of {source.path.name} has rows that fill blocks of 32 weights."
        raise InputError(what, "a model that can be quantized.", "do without a size budget.")
    return found


@dataclass(frozen=True)
class _Sensitivity:
    """How much each weight of a tensor matters for one of the losses.

    Attributes:
        path: of the sensitivities, (rows, columns).
        scale: information of the tensor's common factor.
        share: by what the sensitivities of all rows exceed those of the rows tried.
        ratio: loss of the cheap type on all rows tried over that on the rows drawn.
    """

    path: Path
    scale: float
    share: float
    ratio: float = 1.0


@dataclass(frozen=True)
class _Trial:
    """A tensor to be tried: every `step`-th of its rows, and of these, for all types but the cheap one, the rows drawn.

    Attributes:
        drawn: their numbers among the rows tried; stands: how many rows each of them stands for, float64. None = all.
        sensitivities: {loss: …}; cheap: {loss: of the cheap type}.
    """

    name: str
    tensor: Tensor
    step: int
    sensitivities: dict[str, _Sensitivity]
    cheap: dict[str, float] = field(default_factory=dict)
    drawn: np.ndarray | None = None
    stands: np.ndarray | None = None

    @property
    def rows_tried(self) -> int:
        return -(-self.tensor.rows // self.step)

    @property
    def rows_drawn(self) -> int:
        return self.rows_tried if self.drawn is None else len(self.drawn)

    def of_rows(self, values: np.ndarray) -> np.ndarray:
        """Of the values of the rows tried, those of the rows drawn."""
        return values if self.drawn is None else values[self.drawn]

    def seconds(self, kind: str) -> float:
        """Roughly, that trying a type takes: for the order."""
        return recipes.quantizing_seconds([{"type": kind, "weights": self.rows_drawn * self.tensor.columns}])


def measure(argument: dict[str, Any]) -> dict[str, Any]:
    """Quantize and turn back rows of every tensor in every type, and weigh the squared errors; as many at once as there
    are threads (llama.cpp's functions and numpy leave Python's lock), the longest first.

    Args:
        argument: "source" (GGUF), "folder" and "scales" (of `lib.stages.quantize.sensitivity.collect`), "imatrix" (path
            or None), "n_threads" (0 = physical cores).

    Returns:
        "tensors": [{"tensor", "weights", "rows_tried", "rows_drawn", "rows", "types": [{"type", "bytes", "kld",
        "answer_kld"}]}], with the bytes in the file (padded) and KL divergence in nats a token of text, and a position
        that predicts a token of an answer (absent without answers).

    Raises:
        InputError: a tensor without sensitivities, an importance matrix of another model.
    """
    source = open_source(Path(argument["source"]), Options(Path(argument["imatrix"]) if argument["imatrix"] else None))
    possible, folder, scales = possible_types(source), Path(argument["folder"]), argument["scales"]
    with ThreadPoolExecutor(argument["n_threads"] or physical_cores()) as pool:
        longest = sorted(possible, key=lambda name: -source.tensors[name].weights)
        trials: dict[str, _Trial] = {}
        with Progress(f"trying {_CHEAP}, tensors", len(longest)) as progress:
            for trial in pool.map(lambda name: _prepare(source, name, folder, scales), longest):
                trials[trial.name] = trial
                progress.advance(note=trial.name)
        jobs = [(trials[name], kind) for name, types in possible.items() for kind in types if kind != _CHEAP]
        jobs.sort(key=lambda job: -job[0].seconds(job[1]))
        losses = {(name, _CHEAP): trial.cheap for name, trial in trials.items()}
        with Progress("trying types, tensors × types", len(jobs)) as progress:
            for (trial, kind), found in zip(jobs, pool.map(lambda job: _try(source, *job), jobs), strict=True):
                losses[trial.name, kind] = found
                progress.advance(note=f"{trial.name} {kind}")
    return {
        "tensors": [
            {
                "tensor": name,
                "weights": trials[name].tensor.weights,
                "rows": trials[name].tensor.rows,
                "rows_tried": trials[name].rows_tried,
                "rows_drawn": trials[name].rows_drawn,
                "types": [{"type": kind, "bytes": size, **losses[name, kind]} for kind, size in types.items()],
            }
            for name, types in possible.items()
        ]
    }


def _prepare(source: Source, name: str, folder: Path, scales: dict[str, dict[str, float]]) -> _Trial:
    """Try the cheap type, and draw rows for the others."""
    tensor = source.tensors[name]
    step, sensitivities = -(-tensor.weights // _WEIGHTS), {}
    for loss, factors in scales.items():
        path = folder / loss / f"{name}.npy"
        values = np.load(path, mmap_mode="r") if path.is_file() else None
        if values is None or values.shape != (tensor.rows, tensor.columns):
            found = f"no sensitivity of {name} ({tensor.rows} × {tensor.columns}) in the model folder."
            raise InputError(found, "a dense model of the Qwen2, Qwen3 or Llama family.", "do without a size budget.")
        part = float(values[::step].sum(dtype=np.float64))
        share = float(values.sum(dtype=np.float64)) / max(part, 1e-300)
        sensitivities[loss] = _Sensitivity(path, factors.get(name, 0.0), share)
    trial = _Trial(name, tensor, step, sensitivities)
    error, weights = _error(source, trial, _CHEAP)
    trial = replace(trial, cheap=_losses(trial, error, weights))
    if trial.rows_tried <= 2 * _DRAWN:
        return trial
    by_row = {
        loss: np.sum(_rows(trial, of) * error * error, axis=1, dtype=np.float64) for loss, of in sensitivities.items()
    }
    drawn, stands = _draw(list(by_row.values()))
    for loss, values in by_row.items():
        of_drawn = np.sum(stands * values[drawn])
        ratio = float(values.sum() / of_drawn) if of_drawn > 0 else 1.0
        sensitivities[loss] = replace(sensitivities[loss], ratio=ratio)
    return replace(trial, drawn=drawn, stands=stands)


def _draw(losses: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows by their share in the losses, one at a random place of every stretch of equal share; and how many rows each
    of them stands for."""
    count = len(losses[0])
    shares = [values / total for values in losses if (total := values.sum()) > 0]
    chance = np.full(count, 1 / count) if not shares else (1 - _EVEN) * np.mean(shares, axis=0) + _EVEN / count
    ends = np.cumsum(chance)
    places = (np.arange(_DRAWN) + np.random.default_rng(0).random(_DRAWN)) / _DRAWN * ends[-1]
    rows, times = np.unique(np.minimum(np.searchsorted(ends, places), count - 1), return_counts=True)
    return rows, times / (_DRAWN * chance[rows])


def _try(source: Source, trial: _Trial, kind: str) -> dict[str, float]:
    """KL divergences that the tensor in a type is predicted to cost; its rows are read again for every type, which
    takes little time and spares the memory for all of them."""
    return _losses(trial, *_error(source, trial, kind))


def _error(source: Source, trial: _Trial, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """What a type changes of the rows that it is tried on, and these rows, float32, (rows, columns)."""
    weights = trial.of_rows(source.header.rows(trial.name, step=trial.step))
    error = llama_library.rounded(kind, weights, source.importance(trial.name))
    error -= weights
    return error, weights


def _losses(trial: _Trial, error: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """½ (Σ F d² + F of the common factor × its square): by what share of themselves the weights shrink together."""
    size = max(_sum(weights * weights, trial.stands), 1e-300)
    shrunk = _sum(error * weights, trial.stands) / size
    found = {}
    for loss, of in trial.sensitivities.items():
        lost = _sum(_rows(trial, of) * error * error, trial.stands) * of.ratio
        found[loss] = 0.5 * (of.share * lost + of.scale * shrunk**2)
    return found


def _rows(trial: _Trial, sensitivity: _Sensitivity) -> np.ndarray:
    """The sensitivities of the rows that types are tried on."""
    return trial.of_rows(np.load(sensitivity.path, mmap_mode="r")[:: trial.step])


def _sum(values: np.ndarray, stands: np.ndarray | None) -> float:
    """Over all rows; each as many times as it stands for."""
    if stands is None:
        return float(np.sum(values, dtype=np.float64))
    return float(np.sum(values, axis=1, dtype=np.float64) @ stands)
