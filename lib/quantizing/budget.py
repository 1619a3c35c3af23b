"""A type for every tensor under a size budget: the smallest predicted loss, solved exactly on a grid of bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lib.errors import InputError

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
