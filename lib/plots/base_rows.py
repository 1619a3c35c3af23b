"""What is shown of a base model that comes out of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def unpacked(facts: Mapping[str, Any]) -> dict[str, str]:
    """Lines for a card; none for other bases.

    Args:
        facts: of the product `data`; "unpacked" is the record of `lib.models.unpacking`.
    """
    record = facts.get("unpacked")
    if not record:
        return {}
    types = ", ".join(f"{kind} {count:,}" for kind, count in record["types"].items())
    lines = {"weights in the GGUF file, by type": types, "weights unpacked as": record["dtype"]}
    if record["off_grid"]:
        low, high = record["scales"]
        lines["channels rescaled by"] = f"{low:g} to {high:g}, log-uniform, seed {record['seed']}"
    return lines | {"cost of rounding": _cost(record)}


def _cost(record: Mapping[str, Any]) -> str:
    """The measured cost of every dtype, the one that was taken first."""
    cost = record["cost"]
    if cost is None:
        return str(record["cost_note"])
    names = sorted(cost, key=lambda name: name != record["dtype"])
    return f"{', '.join(f'{name} {cost[name]:.2g}' for name in names)} ({record['cost_note']})"
