"""What page 04 shows of a merge: the proof of its weights, and what rounding them costs (a MergeResult's parts)."""

from __future__ import annotations

from typing import Any

from lib.plots.rows import Row

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


def reading(check: Any) -> str:
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
