"""What page 06 shows of files: importance matrix, size budget, sizes and types, export formats."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lib.report.display import Row, Shown, card, rows_of, table, tell
from lib.report.sentences import sentence

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown

    from lib.stages.export.stage import ExportsResult
    from lib.stages.quantize.calibration import ImportanceMatrix
    from lib.stages.quantize.files import PlannedFile, QuantizeResult
    from lib.stages.quantize.held_out_kl import Comparison

Entry = Mapping[str, Any]
"""An object of a product's JSON file."""

# The importance matrix.


def imatrix_card(matrix: ImportanceMatrix | None) -> HTML | Markdown:
    """From which rows the matrix was made; a sentence where there is none."""
    if matrix is None:
        return tell("quantize.no_matrix")
    return card("quantize.imatrix_card", record=matrix.record)


def effect(found: Comparison | None) -> Shown:
    """The smallest types with and without the matrix, and what else it changed; why nothing was compared."""
    if found is None or not found.content["types"]:
        left_out = found.content["left_out"] if found else []
        return tell("quantize.no_effect", left_out=left_out), tell("quantize.no_effect_reading")
    rows = rows_of(
        found.content["types"],
        "type mb_with=bytes mb_without=bytes_without retyped kld_with kld_without with_minus_without=difference p_holm"
        " verdict_with=verdict with_minus_without_at_answers=answers.difference p_holm_at_answers=answers.p_holm"
        " verdict_with_at_answers=answers.verdict",
        retyped=lambda entry: len(entry["retyped"]),
    )
    types = [{**entry, "changes": _retyped(entry["retyped"])} for entry in found.content["types"]]
    return (
        table(rows, sentence("quantize.effect_caption", content=found.content)),
        tell("quantize.effect_reading", types=types, left_out=found.content["left_out"]),
    )


def _retyped(tensors: Iterable[Mapping[str, str]]) -> list[Row]:
    """Tensors of other types, those with the same two types together."""
    changes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for tensor in tensors:
        changes[tensor["with"], tensor["without"]].append(tensor["tensor"].removesuffix(".weight"))
    return [{"with": new, "without": old, "tensors": names} for (new, old), names in changes.items()]


# The file under a size budget.

NEAR = 0.1
"""Recipes of a mixed file's size: those whose size differs from it by at most this share."""


def chosen_types(mix: PlannedFile | None) -> Shown:
    """The types of the mixed file, a row a kind of tensor, and what it is predicted to cost; a sentence without one."""
    if mix is None:
        return (tell("quantize.no_budget"),)
    name, record = mix.prediction["type"], mix.record
    caption = sentence("quantize.types_caption", name=name, positions=record["positions"], answers=record["answers"])
    worst = max(record["tensors"], key=lambda t: t["kld"])
    share = worst["kld"] / record["predicted_kld"] if record["predicted_kld"] else 0.0
    return (
        table(kinds_of_mix(record["tensors"]), caption),
        tell("quantize.mix_reading", record=record, prediction=mix.prediction, worst=worst, share=share),
    )


def kinds_of_mix(tensors: Sequence[Entry]) -> list[Row]:
    """The tensors of a mixed file by kind, their types in the order of layers."""
    kinds: dict[str, list[Entry]] = defaultdict(list)
    for tensor in sorted(tensors, key=lambda t: _layer(t["tensor"])):
        kinds[re.sub(r"^blk\.\d+\.", "", tensor["tensor"]).removesuffix(".weight")].append(tensor)
    rows = []
    for kind, group in kinds.items():
        total = {
            key: sum(t[key] for t in group) for key in ("bytes", "weights", "kld", "answer_kld") if key in group[0]
        }
        losses = {"predicted_kld": "kld", "predicted_answer_kld": "answer_kld"}
        rows.append(
            {
                "kind": kind,
                "types": _counted(t["type"] for t in group),
                "size_mb": round(total["bytes"] / 1e6, 3),
                "bits_per_weight": round(8 * total["bytes"] / total["weights"], 2),
                **{key: round(total[loss], 6) for key, loss in losses.items() if loss in total},
            }
        )
    return rows


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _counted(types: Iterable[str]) -> str:
    """Types one after another, those alike counted: "q6_K, 3 × q4_K"."""
    runs = [(kind, len(list(run))) for kind, run in itertools.groupby(types)]
    return ", ".join(kind if count == 1 else f"{count} × {kind}" for kind, count in runs)


def against_recipes(found: Comparison | None) -> Shown:
    """The mixed file beside every recipe on text, and what the budget bought; a sentence where nothing was compared."""
    if found is None:
        return (tell("quantize.no_mixed"),)
    content, mixed, types = found.content, found.content["mixed"], found.content["types"]
    caption = sentence("quantize.against_caption", mixed=mixed, tokens=content["tokens"], rows=content["rows"])
    better = [e for e in types if e["verdict"] == "better"]
    reading = tell(
        "quantize.against_reading",
        name=mixed["type"],
        better=[e["type"] for e in better],
        larger=[e["type"] for e in better if e["bytes"] > mixed["bytes"]],
        worse=[e["type"] for e in types if e["verdict"] == "worse" and e["bytes"] <= mixed["bytes"]],
    )
    return table(_beside_recipes(content, types), caption), reading


def against_recipes_at_answers(found: Comparison | None) -> Shown:
    """The same at answers, and whether the mixed file beats recipes of its size there."""
    if found is None:
        return (tell("quantize.no_mixed_at_answers"),)
    content = found.content
    at_answers = [{**entry, **entry["answers"]} for entry in content["types"]]
    counts = {"positions": content["answer_positions"], "rows": content["answer_rows"]}
    caption = sentence("quantize.answers_against_caption", mixed=content["mixed"], **counts)
    return table(_beside_recipes(content, at_answers), caption), _task_loss(content)


def _beside_recipes(content: Entry, types: Iterable[Entry]) -> list[Row]:
    """Every recipe beside the mixed file."""
    return rows_of(
        types,
        "recipe=type relative_size kld_of_recipe=kld mixed_minus_recipe=difference p_holm mixed_verdict=verdict",
        relative_size=lambda entry: entry["bytes"] / content["mixed"]["bytes"],
    )


def _task_loss(content: Entry) -> Markdown:
    """That the types of the mixed file paid, or did not, is said only where size cannot explain it."""
    mixed, types = content["mixed"], content["types"]
    nearest = min(types, key=lambda e: abs(e["bytes"] - mixed["bytes"]))
    of_its_size = [e for e in types if abs(e["bytes"] / mixed["bytes"] - 1) <= NEAR]
    near = of_its_size or [nearest]
    verdicts = {v: [e for e in near if e["answers"]["verdict"] == v] for v in ("better", "worse", "cannot tell")}
    if any(e["bytes"] <= mixed["bytes"] for e in verdicts["worse"]):
        conclusion = "did not pay"
    elif verdicts["worse"] or verdicts["cannot tell"]:
        conclusion = "not shown"
    else:
        conclusion = "paid" if max(e["bytes"] for e in verdicts["better"]) >= mixed["bytes"] else "smaller"
    return tell(
        "quantize.answers_against_reading",
        name=mixed["type"],
        near=[(verdict, [e["type"] for e in entries]) for verdict, entries in verdicts.items() if entries],
        count=len(near),
        ratio=nearest["bytes"] / mixed["bytes"],
        within=NEAR if of_its_size else None,
        conclusion=conclusion,
    )


# Sizes, and types of tensors.

MOST_TENSORS = 12
"""Tensors that a table names; their number is in its caption."""


def predicted(plan: Iterable[Entry]) -> list[Row]:
    """What a dry run tells of a ladder (`lib.stages.quantize.stage.plan`)."""
    return rows_of(
        plan,
        "type size_mb=bytes bits_per_weight fallbacks set_by_hand tensor_types",
        fallbacks=lambda p: len(p["fallbacks"]),
        set_by_hand=lambda p: len(p["set_by_hand"]),
        tensor_types=lambda p: ", ".join(part["type"] for part in p["histogram"]),
    )


def planned(plan: Sequence[Entry]) -> Shown:
    """What the files will be, how much disk they take, and how many recipes cannot keep what their names promise."""
    total, wider = sum(p["bytes"] for p in plan) / 1e6, sum(bool(p["fallbacks"]) for p in plan)
    return (
        table(predicted(plan), sentence("quantize.planned_caption")),
        tell("quantize.planned", megabytes=total, wider=wider, types=len(plan)),
    )


def sizes(result: QuantizeResult) -> Shown:
    """Predicted and measured sizes of a ladder below their source; how exact the dry run was."""
    source = result.source
    first = {"type": source["type"], "size_mb": source["bytes"] / 1e6, "predicted_mb": None, "share_of_source": 1.0}
    rows = rows_of(
        result.files,
        "type size_mb=bytes predicted_mb=predicted_bytes share_of_source bits_per_weight"
        " token_embedding=token_embedding_type fell_back seconds",
        share_of_source=lambda f: f.bytes / source["bytes"],
        fell_back=lambda f: len(f.fallbacks),
    )
    reading = tell(
        "quantize.sizes_reading",
        exact=sum(f.bytes == f.predicted_bytes for f in result.files),
        files=len(result.files),
        smallest=min(result.files, key=lambda f: f.bytes),
        source=source,
    )
    first["bits_per_weight"] = source["bits_per_weight"]
    return table([first, *rows], sentence("quantize.sizes_caption")), reading


def megabytes_by_type(result: QuantizeResult) -> dict[str, dict[str, float]]:
    """Megabytes of each tensor type of each file, for `charts.tensor_types`."""
    histograms = {result.source["type"]: result.source["histogram"], **{f.type: f.histogram for f in result.files}}
    return {name: {part["type"]: part["bytes"] / 1e6 for part in parts} for name, parts in histograms.items()}


def other_types(result: QuantizeResult) -> Shown:
    """Tensors stored in another type than the recipe wants, and those whose type the parameters set."""
    fell = [{"file": f.type, **entry} for f in result.files for entry in f.fallbacks]
    by_hand = [{"file": f.type, **entry} for f in result.files for entry in f.set_by_hand]
    no_fallback = {"tensor": sentence("quantize.no_fallback"), "columns": None, "wanted": None, "type": None}
    none_set = {"tensor": sentence("quantize.none_by_hand"), "recipe": None, "type": None}
    caption = sentence("quantize.fallbacks_caption", count=len(fell), shown=MOST_TENSORS)
    set_caption = sentence("quantize.by_hand_caption", count=len(by_hand), shown=MOST_TENSORS)
    return (
        table(fell[:MOST_TENSORS] or [{"file": "all", **no_fallback}], caption),
        table(by_hand[:MOST_TENSORS] or [{"file": "all", **none_set}], set_caption),
    )


# Export formats, and the end of the page.


def exports(found: ExportsResult) -> Shown:
    """Size, cost and self-check of each format (one row saying so where there is none), and why others are absent."""
    rows = rows_of(
        found.made,
        "format what=title size_mb=bytes bits_per_weight group_size kld_from_merged=check.mean_kld"
        " same_top_of_merged=check.same_top seconds peak_memory=peak_memory_mib",
    )
    none = {"format": "none", "what": sentence("quantize.no_export")}
    return (
        table(rows or [none], sentence("quantize.exports_caption")),
        tell("quantize.skipped", formats=found.skipped),
    )


def compared(files: Iterable[Entry], formats: Iterable[Mapping[str, str]]) -> str:
    """What stands in the tables of 07 beside GGUF files, and what is not there."""
    return sentence("quantize.compared", files=files, skipped_formats=list(formats))


def learned(result: QuantizeResult, exported: ExportsResult) -> Markdown:
    """The conclusions of the page."""
    at_once = result.product.entry.facts.get("at_once", 1)
    return tell("quantize.learned", files=result.files, at_once=at_once, exported=exported)
