"""Which files are worth their size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SAME_SIZE = 1.001
"""Files whose sizes differ by less than a thousandth count as equally large: padding and headers differ by as much."""


def frontier(entries: Sequence[Mapping[str, Any]], loss: str = "kld_mean") -> list[str]:
    """Types of which no other file is smaller (or as small) and loses less, the smallest first.

    Args:
        entries: with type, bytes and the loss; the reference not among them.
        loss: key of what is lost, nats: by default mean KL divergence from the reference.
    """
    chosen: list[Mapping[str, Any]] = []
    for entry in sorted(entries, key=lambda e: (e["bytes"], e[loss])):
        if chosen and entry[loss] >= chosen[-1][loss]:
            continue
        while chosen and entry["bytes"] <= SAME_SIZE * chosen[-1]["bytes"]:
            chosen.pop()
        chosen.append(entry)
    return [entry["type"] for entry in chosen]
