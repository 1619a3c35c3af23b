"""What every type would cost every tensor: bytes, and the KL divergence that its rounding is predicted to cost, on text
and at answers.

llama.cpp's search for the small types takes nearly all of the time. So one cheap type is tried on all rows of a tensor,
and the others on some of them, drawn by their share in the cheap type's loss (with replacement, so that every row drawn
has a known weight); a type's loss is the cheap type's, times the ratio of the two on these rows. Rows differ far more
among themselves than in that ratio. For child processes only.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import refusal
from lib.models.gguf_file import padded
from lib.progress import Progress
from lib.runs.machine import physical_cores
from lib.stages.quantize import llama_library
from lib.stages.quantize.files import TABLES, Options, quantizing_seconds
from lib.stages.quantize.quantizer import Source, open_source, planned_types

PLAIN, WITH_MATRIX = TABLES["plain"], TABLES["with_matrix"]
"""Types that any tensor may have; and types for tensors with importance values only."""

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
        tensor, types = source.tensors[name], PLAIN + ([] if source.importance(name) is None else WITH_MATRIX)
        fitting = [kind for kind in types if tensor.columns % llama_library.block_size(kind) == 0]
        if fitting:
            found[name] = {kind: padded(tensor.as_type(kind).bytes) for kind in fitting}
    if not found:
        raise refusal("quantize/no-blocks", file=source.header.path.name)
    return found


@dataclass
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


class _Trial:
    """A tensor to be tried: every `step`-th of its rows, and of these, for all types but the cheap one, the rows drawn.

    Making one tries the cheap type, and draws the rows for the others.

    Args:
        folder, scales: as of `measure`.

    Attributes:
        drawn: numbers of the rows drawn among those tried; stands: how many rows each of them stands for, float64.
            None = all.
        sensitivities: {loss: …}; cheap: {loss: of the cheap type}.

    Raises:
        InputError: no sensitivities of the tensor.
    """

    def __init__(self, source: Source, name: str, folder: Path, scales: dict[str, dict[str, float]]) -> None:
        self.source, self.name, self.tensor = source, name, source.tensors[name]
        self.step = -(-self.tensor.weights // _WEIGHTS)
        self.rows_tried = self.rows_drawn = -(-self.tensor.rows // self.step)
        self.drawn = self.stands = None
        self.sensitivities: dict[str, _Sensitivity] = {}
        for loss, factors in scales.items():
            path, shape = folder / loss / f"{name}.npy", (self.tensor.rows, self.tensor.columns)
            values = np.load(path, mmap_mode="r") if path.is_file() else None
            if values is None or values.shape != shape:
                raise refusal("quantize/no-sensitivity", name=name, shape=shape)
            part = float(values[:: self.step].sum(dtype=np.float64))
            share = float(values.sum(dtype=np.float64)) / max(part, 1e-300)
            self.sensitivities[loss] = _Sensitivity(path, factors.get(name, 0.0), share)
        error, weights = self._error(_CHEAP)
        self.cheap = self._losses(error, weights)
        if self.rows_tried > 2 * _DRAWN:
            self._draw(error)

    def _draw(self, error: np.ndarray) -> None:
        """Draw the rows for the other types, by the error of the cheap one."""
        by_row = {
            loss: np.sum(self._rows(of) * error * error, axis=1, dtype=np.float64)
            for loss, of in self.sensitivities.items()
        }
        self.drawn, self.stands = _draw(list(by_row.values()))
        self.rows_drawn = len(self.drawn)
        for loss, values in by_row.items():
            of_drawn = np.sum(self.stands * values[self.drawn])
            self.sensitivities[loss].ratio = float(values.sum() / of_drawn) if of_drawn > 0 else 1.0

    def seconds(self, kind: str) -> float:
        """Roughly, that trying a type takes: for the order."""
        return quantizing_seconds([{"type": kind, "weights": self.rows_drawn * self.tensor.columns}])

    def losses(self, kind: str) -> dict[str, float]:
        """KL divergences that the tensor in a type is predicted to cost; its rows are read again for every type, which
        takes little time and spares the memory for all of them."""
        return self._losses(*self._error(kind))

    def _error(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """What a type changes of the rows that it is tried on, and these rows, float32, (rows, columns)."""
        weights = self._drawn(self.source.header.rows(self.name, step=self.step))
        error = llama_library.rounded(kind, weights, self.source.importance(self.name))
        error -= weights
        return error, weights

    def _losses(self, error: np.ndarray, weights: np.ndarray) -> dict[str, float]:
        """½ (Σ F d² + F of the common factor × its square): by what share of themselves the weights shrink together."""
        size = max(self._sum(weights * weights), 1e-300)
        shrunk = self._sum(error * weights) / size
        found = {}
        for loss, of in self.sensitivities.items():
            lost = self._sum(self._rows(of) * error * error) * of.ratio
            found[loss] = 0.5 * (of.share * lost + of.scale * shrunk**2)
        return found

    def _rows(self, sensitivity: _Sensitivity) -> np.ndarray:
        """The sensitivities of the rows that types are tried on."""
        return self._drawn(np.load(sensitivity.path, mmap_mode="r")[:: self.step])

    def _drawn(self, values: np.ndarray) -> np.ndarray:
        """Of the rows tried, those drawn."""
        return values if self.drawn is None else values[self.drawn]

    def _sum(self, values: np.ndarray) -> float:
        """Over all rows; each as many times as it stands for."""
        if self.stands is None:
            return float(np.sum(values, dtype=np.float64))
        return float(np.sum(values, axis=1, dtype=np.float64) @ self.stands)


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
    source = open_source(argument["source"], Options(argument["imatrix"]))
    possible, folder, scales = possible_types(source), Path(argument["folder"]), argument["scales"]
    with ThreadPoolExecutor(argument["n_threads"] or physical_cores()) as pool:
        longest = sorted(possible, key=lambda name: -source.tensors[name].weights)
        trials: dict[str, _Trial] = {}
        with Progress(f"trying {_CHEAP}, tensors", len(longest)) as progress:
            for trial in pool.map(lambda name: _Trial(source, name, folder, scales), longest):
                trials[trial.name] = trial
                progress.advance(note=trial.name)
        jobs = [(trials[name], kind) for name, types in possible.items() for kind in types if kind != _CHEAP]
        jobs.sort(key=lambda job: -job[0].seconds(job[1]))
        losses = {(name, _CHEAP): trial.cheap for name, trial in trials.items()}
        with Progress("trying types, tensors × types", len(jobs)) as progress:
            for (trial, kind), found in zip(jobs, pool.map(lambda job: job[0].losses(job[1]), jobs), strict=True):
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
