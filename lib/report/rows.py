"""The rows of the tables of notebooks 01 to 05: results brought into columns that are named with their units.
Rows and sentences of notebook 01 on the characters of the rows (`lib.stages.data.text_audit`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lib.report.merge_page import unpacked  # noqa: F401  (older place of this name, for page 01)

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
