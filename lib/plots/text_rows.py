"""Rows and sentences of notebook 01 on the characters of the rows (`lib.data.textaudit`)."""

from __future__ import annotations

from typing import Any

from lib.plots.rows import Row

_OLD = "made before there was this audit; force: true makes it"


def findings(result: Any) -> list[Row]:
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


def scripts(result: Any) -> list[Row]:
    """Simplified and traditional rows of each split (a DataResult)."""
    lines = result.text_audit.get("scripts", [{"split": _OLD}])
    return [{("traditional forms" if "share" in k else k): v for k, v in line.items()} for line in lines]


def reading(result: Any) -> str:
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
