"""The rows of the tables of notebooks 01 to 05: results brought into columns that are named with their units.
Rows and sentences of notebook 01 on the characters of the rows (`lib.stages.data.text_audit`).
"""

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

# The rows of the tables of notebooks 01 to 05: results brought into columns that are named with their units.

Row = dict[str, Any]


def machine_card(machine: Any) -> Row:
    """What ran everything (a device.Machine)."""
    return {
        "system": machine.system,
        "processor": f"{machine.processor}, {machine.cores} cores",
        "accelerator": machine.accelerator,
        "memory": f"{machine.memory_gib:g} GiB, {machine.available_gib:g} GiB of it free",
        "free on the disk of runs/": f"{machine.disk_free_gb:g} GB",
        "number format": f"{machine.dtype} ({machine.dtype_reason})",
        "bitsandbytes": machine.bitsandbytes,
        "llama-cpp-python": machine.llama_cpp,
    }


def copies_caption(result: Any) -> str:
    """Caption of the duplicates on page 01 (a DataResult)."""
    what = "Copies and conflicting labels" if result.labelled else "Copies of openings and of whole rows"
    return f"{what} within each split and over all splits, as read."


def lengths_caption(result: Any) -> str:
    """Caption of the token lengths on page 01 (a DataResult)."""
    if result.labelled:
        return "Tokens a row: percentiles, and rows whose text is cut at its end."
    return (
        "Tokens a row: percentiles, rows that lose whole turns at their end, rows left out as too long, and answers "
        "that are learned or only read."
    )


def reports(parts: Mapping[str, Mapping[str, Any] | None]) -> list[Row]:
    """Estimates for `charts.estimates` from classification reports as JSON; parts without rows are left out."""
    return [
        {
            "name": name,
            "estimate": report["accuracy"],
            "low": report["accuracy_interval"][0],
            "high": report["accuracy_interval"][1],
            "n": report["n"],
        }
        for name, report in parts.items()
        if report
    ]


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


# Rows and sentences of notebook 01 on the characters of the rows (`lib.stages.data.text_audit`).

_OLD = "made before there was this audit; force: true makes it"


def text_findings(result: Any) -> list[Row]:
    """One line a kind of character that occurs (a DataResult)."""
    audit = result.text_audit
    if not audit:
        return [{"what": _OLD}]
    splits = [line["split"] for line in audit["scripts"]]
    rows = [
        {
            "what": line["what"],
            f"rows: {', '.join(splits)}": ", ".join(f"{line[name]:,}" for name in splits),
            "characters": line["characters"],
            "most frequent": line["most frequent"],
            "example": line["example"],
        }
        for line in audit["findings"]
    ]
    return rows or [{"what": "nothing: every character is ordinary, and NFKC would change none"}]


def text_scripts(result: Any) -> list[Row]:
    """Simplified and traditional rows of each split (a DataResult)."""
    lines = result.text_audit.get("scripts", [{"split": _OLD}])
    return [{("traditional forms" if "share" in k else k): v for k, v in line.items()} for line in lines]


def text_reading(result: Any) -> str:
    """What the audit says, in words (a DataResult)."""
    audit = result.text_audit
    if not audit:
        return f"No audit of the characters: this product was {_OLD}."
    rows, odd = audit["rows"], audit["changed_beyond_punctuation"]
    other = sum(line["traditional"] + line["mixed"] for line in audit["scripts"])
    return (
        f"NFKC would change {audit['changed_by_nfkc']:,} of {rows:,} rows, {odd:,} of them ({100 * odd / rows:.1f} %) "
        f"in more than Chinese punctuation. Invisible characters: {_kinds('invisible', audit)}. Signs of damage: "
        f"{_kinds('damage', audit)}. Rows with a tenth or more of traditional forms: {other:,}."
    )


def _kinds(group: str, audit: Row) -> str:
    """The lines of a group with their rows over all splits."""
    splits = [line["split"] for line in audit["scripts"]]
    words = [
        f"{line['what'].split(' (')[0]} in {sum(line[name] for name in splits):,} rows"
        for line in audit["findings"]
        if line["group"] == group
    ]
    return "; ".join(words) or "none"
