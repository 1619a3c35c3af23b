"""What page 06 shows of the file under a size budget: which types were chosen, and what they are predicted to cost."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lib.plots.display import say, table

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown

_NONE = (
    "No size budget in this run: `size_budget_mb` adds one more file of at most that size, with a type for every "
    "tensor chosen by measurement."
)


def types_table(mix: Any) -> HTML | Markdown:
    """One row a kind of tensor (of a `lib.quantizing.Mix`); a sentence where there is none."""
    if mix is None:
        return say(_NONE)
    caption = (
        f"The types chosen for {mix.prediction['type']} (layer by layer, first to last; MB = 10⁶ bytes), and the KL "
        f"divergence that each kind alone is predicted to cost, {mix.record['positions']:,} positions of training text."
    )
    return table(rows(mix.record["tensors"]), caption)


def rows(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tensors by kind: "kind", "types" in the order of layers, "MB", "bits per weight", "predicted KL"."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for tensor in sorted(tensors, key=lambda t: _place(t["tensor"])[0]):
        kinds.setdefault(_place(tensor["tensor"])[1], []).append(tensor)
    return [
        {
            "kind": kind,
            "types": _runs([t["type"] for t in group]),
            "MB": round(sum(t["bytes"] for t in group) / 1e6, 3),
            "bits per weight": round(8 * sum(t["bytes"] for t in group) / sum(t["weights"] for t in group), 2),
            "predicted KL": round(sum(t["kld"] for t in group), 6),
        }
        for kind, group in kinds.items()
    ]


def reading(mix: Any) -> Markdown | None:
    """The budget, the size and the prediction in words; nothing without a budget."""
    if mix is None:
        return None
    record, prediction = mix.record, mix.prediction
    worst = max(record["tensors"], key=lambda t: t["kld"])
    share = worst["kld"] / record["predicted_kld"] if record["predicted_kld"] else 0.0
    return say(
        f"{prediction['bytes']:,} bytes of {record['budget_bytes']:,} allowed, {prediction['bits_per_weight']:.2f} "
        f"bits per weight in {len(set(record['types'].values()))} types. Predicted KL divergence from the unquantized "
        f"file: {record['predicted_kld']:.5f} nats a token, {100 * share:.0f} % of it by {worst['tensor']} as "
        f"{worst['type']}. The prediction adds the tensors up and leaves out that llama.cpp rounds "
        f"activations too; 07 measures it on held-out text."
    )


def _place(name: str) -> tuple[int, str]:
    match = re.match(r"blk\.(\d+)\.(.+)\.weight$", name)
    return (int(match[1]), match[2]) if match else (-1, name.removesuffix(".weight"))


def _runs(types: list[str]) -> str:
    """Types one after another, those alike counted: "q6_K, 3 × q4_K"."""
    parts: list[list[Any]] = []
    for kind in types:
        if parts and parts[-1][1] == kind:
            parts[-1][0] += 1
        else:
            parts.append([1, kind])
    return ", ".join(kind if count == 1 else f"{count} × {kind}" for count, kind in parts)
