"""The rows of the tables of notebook 02: results brought into columns that are named with their units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lib.report.merge_page import (  # noqa: F401  (older place of these names)
    conversion_card,
    costs,
    gate,
    merge_card,
    merge_reading,
    nf4_merges,
    nf4_reading,
    proof,
    survival,
    unpacked,
)

Row = dict[str, Any]


def training_card(result: Any) -> Row:
    """What was trained and how (a FinetuneResult)."""
    return {
        "base model": f"{result.base['id']} ({str(result.base['revision'])[:12]})",
        "method": result.method,
        "trainable weights": f"{result.trainable:,} of {result.total:,} ({100 * result.trainable_share:.2f} %)",
        "rows": f"{result.train_rows:,} for training, {result.validation_rows:,} for validation",
        "number format": f"{result.dtype} ({result.dtype_reason})",
        "device": result.product.entry.device,
        "a micro-batch": result.layout or None,
        "an update": _update(result.micro_batch, result.product.entry.parameters["num_processes"]),
        "continued from step": "none; trained in one go" if result.resumed_from is None else result.resumed_from,
        "messages": "; ".join(result.messages) or "none",
    }


def _update(sizes: Mapping[str, Any], processes: int) -> str:
    def words(size: Mapping[str, int]) -> str:
        return f"{size['rows']} rows × {size['passes']} forward pass{'es' if size['passes'] > 1 else ''}"

    used, asked = words(sizes["used"]), words(sizes["asked"])
    together = f" × {processes} processes" if processes > 1 else ""
    return f"{used}{together}" + (f" (asked for: {asked}; the device was full)" if used != asked else "")


def memory(result: Any) -> list[Row]:
    """Estimated memory by purpose, what was free, what was measured (a FinetuneResult)."""
    rows = [{"part": part.replace("_", " "), "MiB": size / 2**20} for part, size in result.estimate.items()]
    processes = result.product.entry.parameters.get("num_processes", 1)
    if result.peak_device_mib is not None:  # estimate and free are the GPU's, one a process; so is this peak
        which = "of a GPU, the fullest of them" if processes > 1 else "of the GPU"
        rows.append(
            {"part": f"free {which.partition(',')[0]} before the start", "MiB": result.memory["available"] / 2**20}
        )
        rows.append({"part": f"measured peak {which} (tensors)", "MiB": result.peak_device_mib})
        rows.append({"part": "measured peak of the processor's memory", "MiB": result.peak_memory_mib})
        return rows
    if processes > 1:
        rows.append({"part": f"total of {processes} processes", "MiB": processes * result.estimate["total"] / 2**20})
    rows.append({"part": "free before the start", "MiB": result.memory["available"] / 2**20})
    which = " (all processes, and the one that started them)" if processes > 1 else ""
    rows.append({"part": f"measured peak while training{which}", "MiB": result.peak_memory_mib})
    return rows
