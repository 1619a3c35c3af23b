"""The rows of the tables of notebooks 02 to 05: results brought into columns that are named with their units.
What is shown of a base model that comes out of a GGUF file.
What page 04 shows of a merge: the proof of its weights, and what rounding them costs (a MergeResult's parts).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# The rows of the tables of notebooks 02 to 05: results brought into columns that are named with their units.

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


def merge_card(result: Any) -> Row:
    """What the merge did (a MergeResult)."""
    report, chosen = result.report, result.product.entry.facts.get("chosen")
    return {
        "base model": result.base,
        **({"adapter": f"of run {chosen['run']}. {chosen['text']}"} if chosen else {}),
        "trained as": result.method,
        "number format": report.dtype,
        "tensors": f"{report.tensors_changed:,} changed, {report.tensors_copied:,} copied as bytes",
        "weights": f"{report.parameters_changed:,} of {report.parameters:,} changed",
        "scaling (modules)": ", ".join(f"{factor} ({count})" for factor, count in report.scalings.items()),
        "memory of its own, MiB": report.peak_anonymous_mib,
        "seconds": report.seconds,
    }


def nf4_merges(comparison: Any) -> list[Row]:
    """The trained QLoRA model and both merges on the same rows (an Nf4Comparison)."""
    return [
        {
            "model": row.model if row.size_mb is None else f"merged into the {row.model} base",
            "KL from the trained model, nats ↓": _limits(row.kld, 1, ".2g"),
            "same top token, % ↑": f"{100 * row.same_top:.1f}",
            "same label, % ↑": _limits(row.label_agreement, 100, ".1f"),
            "accuracy, % ↑": _limits(row.accuracy, 100, ".1f"),
            "MB": row.size_mb,
        }
        for row in comparison.results
    ]


def nf4_reading(result: Any) -> str:
    """Which merge is closer to the trained model, and which one was published, in words (a MergeResult with nf4)."""
    comparison = result.nf4
    difference = _limits(comparison.difference, 1, ".2g")
    words = "neither merge is measurably closer to the trained model"
    if comparison.closer is not None:
        words = f"the merge into the **{comparison.closer}** base is closer to the trained model"
    text = f"In KL divergence {words} (dequantized minus original: {difference} nats). This run's product is the merge "
    text += f"into the **{result.merge_base}** base (`merge_base`)."
    if comparison.closer not in (None, result.merge_base):
        text += f" Closer is not better by itself; compare the accuracies before choosing `{comparison.closer}`."
    return text


def _limits(values: Sequence[float] | None, scale: float, form: str) -> str | None:
    if values is None:  # what rows without labels cannot have
        return None
    estimate, low, high = (format(scale * value, form) for value in values)
    return f"{estimate} [{low}, {high}]"


def conversion_card(result: Any) -> Row:
    """What was converted (an ExportResult)."""
    conversion = result.conversion
    return {
        "file": result.path.name,
        "architecture": conversion.architecture,
        "type": conversion.outtype.upper(),
        "weights": f"{conversion.parameters:,} in {conversion.tensors} tensors",
        "tensor types": ", ".join(f"{kind}: {count}" for kind, count in conversion.types.items()),
        "size": f"{conversion.bytes_after / 1e6:,.2f} MB",
        "pre-tokenizer": f"{conversion.pre_tokenizer} ({conversion.recognised})",
        "vocabulary": f"{conversion.tokens:,} tokens, {conversion.padding_tokens:,} of them padding",
        "loaded by llama.cpp": conversion.loaded,
    }


def _clear(report: Any) -> str:
    """Equal labels of the rows that are no near ties, in words."""
    if report.clear_agreement is None:
        return "all of which are near ties"
    return f"{100 * report.clear_agreement:.2f} % of the {report.clear_rows:,} that are no near ties"


def gate(report: Any) -> list[Row]:
    """The questions of the gate with what was measured and what was required (a GateReport)."""
    exact = f"at most {report.exact_limit:.1e} nats" if report.exact_limit else "none (weights are rounded)"
    divergence = f"mean KL {report.mean_kld:.2e} nats, largest {report.max_kld:.1e}, {report.positions:,} positions"
    answers = {
        "same token ids": (f"{report.tokens:,} ids of {report.texts:,} texts, all equal", "all equal"),
        "same prompts": (f"{report.prompts:,} prompts from both chat templates, all equal", "all equal"),
        "same next-token distribution": (divergence, f"mean at most {report.limit_kld:g} nats"),
        "same log-probabilities": (f"largest difference {report.max_log_prob_difference:.1e} nats, any token", exact),
        "same labels": (
            "does not apply: the rows have no labels"
            if report.label_agreement is None
            else f"{100 * report.label_agreement:.2f} % of {report.rows:,} rows, {_clear(report)}",
            "–" if report.clear_agreement is None else f"at least {100 * report.limit_agreement:g} % of the latter",
        ),
    }
    return [{"question": q, "measured": measured, "required": needed} for q, (measured, needed) in answers.items()]


# What is shown of a base model that comes out of a GGUF file.


def unpacked(facts: Mapping[str, Any]) -> dict[str, str]:
    """Lines for a card; none for other bases.

    Args:
        facts: of the product `data`; "unpacked" is the record of `lib.models.unpack`.
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


# What page 04 shows of a merge: the proof of its weights, and what rounding them costs (a MergeResult's parts).

FAR_BETTER = 4.0
"""From so many times less on, another format of the same bytes is recommended."""

WORTH_SAVING = 1e-3
"""Share of the adapter's effect below which a cost is not worth a word of advice."""

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "mixed": 4}
_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def proof(found: Any) -> str:
    """What was recomputed and found right, in words (a MergeProof)."""
    text = (
        f"All {found.weights_summed + found.weights_copied:,} weights were computed again, another way, from the "
        f"files: {found.weights_copied:,} are those of the base, and {found.weights_summed:,} are the "
        f"sum, rounded once."
    )
    open_ones = found.weights_summed - found.decided
    if not found.weights_summed or not open_ones:
        return text
    if found.decided == 0 or _NAMES.get(found.dtype) in ("float32", "float64"):
        return (
            f"{text} In {_NAMES.get(found.dtype, found.dtype)} the order of the additions moves a sum in its last "
            f"bits: {found.nearest / found.weights_summed:.1%} hold the exact sum's rounding, the others a number "
            f"within the error bound of float32 sums."
        )
    return (
        f"{text} For {found.decided / found.weights_summed:.3%} of the sums only one number is right, bit for bit; "
        f"{open_ones:,} lie so near the middle of two numbers that the order of the additions decides."
    )


def survival(found: Any) -> str:
    """How much of the adapter's change rounding leaves in the weights, in words (a MergeProof)."""
    if found.kept is None:
        return "The adapter changes no weight."
    back = found.set_back / found.weights_summed
    return (
        f"Rounding to {_NAMES.get(found.dtype, 'their formats')} leaves {found.kept:.1%} of the adapter's change in "
        f"the weights (slope of the stored change on the exact one); {back:.1%} of the weights are the base's again, "
        f"for their change is smaller than half a step of the format."
    )


def costs(check: Any) -> list[Row]:
    """What each number format costs, beside the adapter's effect (a MergeCheck)."""
    found = [
        {
            "weights of base + adapter": f"{cost.dtype} (the merged model)" if cost.written else cost.dtype,
            "KL, nats ↓": cost.mean_kld,
            "share of the effect": cost.mean_kld / check.effect_kld if check.effect_kld else None,
            "largest |Δ log p|": cost.max_abs_log_prob,
            "same top token ↑": cost.argmax_agreement,
            "same first answer token ↑": cost.answer_agreement,
        }
        for cost in check.costs
    ]
    effect = {
        "weights of base + adapter": "the base alone (the adapter's effect)",
        "KL, nats ↓": check.effect_kld,
        "share of the effect": 1.0 if check.effect_kld else None,
        "largest |Δ log p|": None,
        "same top token ↑": check.effect_agreement,
        "same first answer token ↑": None,
    }
    return [*found, effect]


def merge_reading(check: Any) -> str:
    """What rounding costs, what would be refused, and whether another format would be far better, in words."""
    share = f", {check.mean_kld / check.effect_kld:.2%} of" if check.effect_kld else " beside"
    text = (
        f"Rounding to {check.dtype} costs {check.mean_kld:.2g} nats{share} the {check.effect_kld:.2g} nats that the "
        f"adapter changes; more than {check.max_kld:.2g} nats would be refused."
    )
    others = [cost for cost in check.costs if not cost.written and _BYTES[cost.dtype] <= _BYTES[check.dtype]]
    if others:
        best = min(others, key=lambda cost: cost.mean_kld)
        text += f" {best.dtype}, in {'the same' if _BYTES[best.dtype] == _BYTES[check.dtype] else 'half the'} bytes, "
        if best.mean_kld >= check.mean_kld:
            text += f"would cost {_times(best.mean_kld, check.mean_kld)} ({best.mean_kld:.2g} nats)."
        else:
            text += f"would cost {_times(best.mean_kld, check.mean_kld)} ({best.mean_kld:.2g} nats)"
            far = check.mean_kld >= FAR_BETTER * best.mean_kld and check.mean_kld >= WORTH_SAVING * check.effect_kld
            text += f": **set `merge_dtype: {best.dtype}`**." if far else ": too little to matter here."
    for name, why in check.left_out.items():
        text += f" {name} was not measured: {why}."
    return text


def _times(other: float, own: float) -> str:
    """0.1 and 0.4 → '4.0 times less'."""
    if other == own:
        return "the same"
    small, large = sorted((other, own))
    ratio = f"{large / small:,.{0 if large > 10 * small else 1}f} times " if small else "far "
    return ratio + ("less" if other < own else "more")
