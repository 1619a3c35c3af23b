"""What pages 04 and 05 show: the merge and its proof, what rounding costs, the conversion and its gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lib.report.display import card
from lib.report.sentences import sentence, word_rows
from lib.statistics.intervals import Interval

if TYPE_CHECKING:
    from IPython.display import HTML

    from lib.stages.convert.gate import GateReport
    from lib.stages.convert.stage import ExportResult
    from lib.stages.merge.nf4 import Nf4Comparison
    from lib.stages.merge.proof import MergeProof
    from lib.stages.merge.stage import MergeResult
    from lib.stages.merge.verify import FormatCost, MergeCheck

Row = dict[str, Any]

FAR_BETTER = 4.0
"""From so many times less on, another format of the same bytes is recommended."""

WORTH_SAVING = 1e-3
"""Share of the adapter's effect below which a cost is not worth a word of advice."""

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "mixed": 4}
_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


# Page 04.


def proof(found: MergeProof) -> str:
    """What was recomputed and found right."""
    dtype = _NAMES.get(found.dtype, found.dtype)
    undecided = found.weights_summed - found.decided
    exact_order = found.decided > 0 and dtype not in ("float32", "float64")
    return sentence("merge.proof", found=found, dtype=dtype, undecided=undecided, exact_order=exact_order)


def survival(found: MergeProof) -> str:
    """How much of the adapter's change rounding leaves in the weights."""
    returned = found.set_back / found.weights_summed if found.weights_summed else 0.0
    return sentence("merge.survival", kept=found.kept, returned=returned, dtype=_NAMES.get(found.dtype))


def costs(check: MergeCheck) -> list[Row]:
    """What each number format costs, beside the adapter's effect."""
    found = [
        {
            "number_format": sentence("merge.format_name", dtype=cost.dtype, written=cost.written),
            "kld": cost.mean_kld,
            "share_of_effect": cost.mean_kld / check.effect_kld if check.effect_kld else None,
            "largest_change": cost.max_abs_log_prob,
            "same_top_token": cost.argmax_agreement,
            "same_first_answer": cost.answer_agreement,
        }
        for cost in check.costs
    ]
    effect = {
        "number_format": sentence("merge.base_alone"),
        "kld": check.effect_kld,
        "share_of_effect": 1.0 if check.effect_kld else None,
        "same_top_token": check.effect_agreement,
    }
    return [*found, effect]


def merge_reading(check: MergeCheck) -> str:
    """What rounding costs, what would be refused, and whether another format would be far better."""
    others = [cost for cost in check.costs if not cost.written and _BYTES[cost.dtype] <= _BYTES[check.dtype]]
    best: FormatCost | None = min(others, key=lambda cost: cost.mean_kld, default=None)
    if best is None:
        return sentence("merge.reading", check=check, best=None, same_bytes=False, ratio=None, far=False)
    small, large = sorted((best.mean_kld, check.mean_kld))
    return sentence(
        "merge.reading",
        check=check,
        best=best,
        same_bytes=_BYTES[best.dtype] == _BYTES[check.dtype],
        ratio=large / small if small else None,
        far=check.mean_kld >= FAR_BETTER * best.mean_kld and check.mean_kld >= WORTH_SAVING * check.effect_kld,
    )


def nf4_merges(comparison: Nf4Comparison) -> list[Row]:
    """The trained QLoRA model and both merges on the same rows."""
    return [
        {
            "model": row.model if row.size_mb is None else sentence("merge.merged_into", model=row.model),
            "kld_from_trained": Interval(*row.kld),
            "same_top_percent": 100 * row.same_top,
            "same_label_percent": Interval(*row.label_agreement).scaled(100) if row.label_agreement else None,
            "accuracy_percent": Interval(*row.accuracy).scaled(100) if row.accuracy else None,
            "size_mb": row.size_mb,
        }
        for row in comparison.results
    ]


def nf4_reading(result: MergeResult) -> str:
    """Which merge is closer to the trained model, and which one was published."""
    found = result.nf4
    values = {"difference": Interval(*found.difference), "closer": found.closer, "merge_base": result.merge_base}
    return sentence("merge.nf4_reading", **values)


def merge_card(result: MergeResult) -> HTML:
    """What the merge did."""
    chosen = result.product.entry.facts.get("chosen")
    return card("merge.card", result=result, report=result.report, chosen=chosen)


# Page 05, and a base model that comes out of a GGUF file.


def conversion_card(result: ExportResult) -> HTML:
    """What was converted."""
    return card("convert.card", file=result.path.name, conversion=result.conversion)


def gate(report: GateReport) -> list[Row]:
    """The questions of the gate with what was measured and what was required."""
    keys = ("question", "measured", "required")
    return [dict(zip(keys, cells, strict=True)) for cells in word_rows("convert.gate", report=report)]


def unpacked(facts: Mapping[str, Any]) -> dict[str, str]:
    """Lines for a card on weights from a GGUF file; none for other bases.

    Args:
        facts: of the product `data`; "unpacked" is the record of `lib.models.unpack`.
    """
    record = facts.get("unpacked")
    if not record:
        return {}
    costs = sorted((record["cost"] or {}).items(), key=lambda pair: pair[0] != record["dtype"])  # the one taken first
    return dict(word_rows("convert.unpacked", record=record, costs=costs))
