"""What page 06 shows of the file under a size budget: its types, what they are predicted to cost, what they bought."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lib.plots.display import say, table
from lib.plots.formats import with_interval
from lib.plots.rows import Row

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown

_NONE = (
    "No size budget in this run: `size_budget_mb` (or `size_budget_bpw`) adds one more file of at most that size, with "
    "a type for every tensor chosen by measurement."
)


def types_table(mix: Any) -> HTML | Markdown:
    """One row a kind of tensor (of a `lib.quantizing.Mix`); a sentence where there is none."""
    if mix is None:
        return say(_NONE)
    record, at_answers = mix.record, ""
    if record["answers"]:
        answers = record["answers"]
        at_answers = f", and {answers['positions']:,} tokens of the answers of {answers['rows']:,} training rows"
    caption = (
        f"The types chosen for {mix.prediction['type']} (layer by layer, first to last; MB = 10⁶ bytes), and the KL "
        f"divergence that each kind alone is predicted to cost, on {record['positions']:,} positions of training "
        f"text{at_answers}."
    )
    return table(rows(mix.record["tensors"]), caption)


def rows(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tensors by kind: "kind", "types" in the order of layers, "MB", "bits per weight", "predicted KL" and, where there
    were answers, "predicted KL at answers"."""
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
            **_at_answers(group),
        }
        for kind, group in kinds.items()
    ]


def _at_answers(tensors: list[dict[str, Any]]) -> dict[str, float]:
    if "answer_kld" not in tensors[0]:
        return {}
    return {"predicted KL at answers": round(sum(t["answer_kld"] for t in tensors), 6)}


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
        f"{worst['type']}. {_weight(record)} The prediction adds the tensors up and leaves out that llama.cpp rounds "
        f"activations too; below it is measured on held-out rows, in 07 on bare texts."
    )


def _weight(record: dict[str, Any]) -> str:
    """What counted in the choice."""
    if record["predicted_answer_kld"] is None:
        return "Text alone decided: there were no answers."
    loss, weight = f"{record['predicted_answer_kld']:.5f} nats", record["answer_weight"]
    if not weight:
        return f"Text alone decided (`answer_weight` 0); at a token of an answer {loss} are predicted."
    said = f"At a token of an answer {loss} are predicted"
    return f"{said}; answers alone decided." if weight == 1 else f"{said}; answers counted {weight:g} in the choice."


def beside(mixed: Mapping[str, Any], entry: Mapping[str, Any], found: Mapping[str, Any]) -> Row:
    """A recipe (`entry`) beside the mixed file, by what was found on one kind of tokens."""
    return {
        "recipe": entry["type"],
        "its size": f"{entry['bytes'] / mixed['bytes']:.2f}",
        "KLD of the recipe": with_interval(found["kld"], found["kld_interval"]),
        "mixed minus recipe": with_interval(found["difference"], found["difference_interval"], "+.2g"),
        "p (Holm)": f"{found['p_holm']:.2g}",
        "the mixed file is": found["verdict"],
    }


def against_recipes(effect: Any) -> HTML | Markdown:
    """The mixed file beside every recipe (a MixEffect); a sentence where nothing was compared."""
    if effect is None:
        return say("Nothing to compare: this run has no file under a size budget.")
    content = effect.content
    mixed = content["mixed"]
    rows = [beside(mixed, entry, entry) for entry in content["types"]]
    own = f"{mixed['bytes'] / 1e6:.2f} MB, KL divergence {with_interval(mixed['kld'], mixed['kld_interval'])}"
    caption = (
        f"{mixed['type']} ({own}) beside the recipes, in nats a token, on {content['tokens']:,} scored tokens of "
        f"{content['rows']} held-out rows; sizes in units of its own; in brackets 95 % intervals over whole rows, of "
        "differences paired token by token."
    )
    return table(rows, caption)


def against_reading(effect: Any) -> Markdown | None:
    """What the budget bought, in words."""
    if effect is None:
        return None
    content = effect.content
    mixed, types = content["mixed"], content["types"]
    better = [e["type"] for e in types if e["verdict"] == "better"]
    larger = [e["type"] for e in types if e["verdict"] == "better" and e["bytes"] > mixed["bytes"]]
    worse = [e["type"] for e in types if e["verdict"] == "worse" and e["bytes"] <= mixed["bytes"]]
    text = f"{mixed['type']} is shown to be closer to the unquantized file than {', '.join(better) or 'no recipe'}."
    if larger:
        text += f" Larger than it, and still farther: {', '.join(larger)}."
    if worse:
        text += f" No larger, and closer: {', '.join(worse)}; here the choice of types did not pay."
    return say(text)


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
