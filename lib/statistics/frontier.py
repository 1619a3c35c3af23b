"""The efficient frontier: what no other file beats in both size and loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def frontier(entries: Sequence[Mapping[str, Any]], loss: str = "kld_mean") -> list[str]:
    """Types of which no other file is smaller (or as small) and loses less, the smallest first.

    Args:
        entries: with type, bytes and the loss; the reference not among them.
        loss: key of what is lost, nats: by default mean KL divergence from the reference.
    """
    chosen, best = [], math.inf
    for entry in sorted(entries, key=lambda e: (e["bytes"], e[loss])):
        if entry[loss] < best:
            chosen.append(entry["type"])
            best = entry[loss]
    return chosen
