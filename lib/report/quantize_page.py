"""What page 06 shows of files: importance matrix, size budget, sizes and types, export formats."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lib.report.display import Entry, Row, Shown, absent, card, rows_of, table, tabled, tell
from lib.report.sentences import in_markdown, sentence
from lib.stages.export.stage import FORMATS

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown

    from lib.stages.export.stage import ExportsResult
    from lib.stages.quantize.calibration import ImportanceMatrix
    from lib.stages.quantize.files import PlannedFile, QuantizeResult
    from lib.stages.quantize.held_out_kl import Comparison

# The importance matrix.


def imatrix_card(matrix: ImportanceMatrix | None) -> HTML | Markdown:
    """From which rows the matrix was made; a sentence where there is none."""
    if matrix is None:
        return absent("quantize.no_matrix")
    return card("quantize.imatrix_card", record=matrix.record)


def effect(found: Comparison | None) -> Shown:
    """The smallest types with and without the matrix, and what else it changed; why nothing was compared."""
    if found is None or not found.content["types"]:
        left_out = found.content["left_out"] if found else []
        return absent("quantize.no_effect", left_out=left_out), absent("quantize.no_effect_reading")
    types = [{**entry, "changes": _retyped(entry["retyped"])} for entry in found.content["types"]]
    return (
        tabled("quantize.effect", found.content["types"], content=found.content),
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
        return (absent("quantize.no_budget"),)
    name, record = mix.prediction["type"], mix.record
    caption = sentence("quantize.types_caption", name=name, positions=record["positions"], answers=record["answers"])
    return (
        table(kinds_of_mix(record["tensors"]), caption),
        tell("quantize.mix_reading", record=record, prediction=mix.prediction),
    )


def kinds_of_mix(tensors: Sequence[Entry]) -> list[Row]:
    """The tensors of a mixed file by kind, their types in the order of layers."""
    kinds: dict[str, list[Entry]] = defaultdict(list)
    for tensor in sorted(tensors, key=lambda t: _layer(t["tensor"])):
        kinds[re.sub(r"^blk\.\d+\.", "", tensor["tensor"]).removesuffix(".weight")].append(tensor)
    groups = [
        {"kind": kind, "types": _counted(t["type"] for t in group), "all": group} for kind, group in kinds.items()
    ]
    found = rows_of("quantize.kinds_of_mix", groups)
    return [{key: value for key, value in row.items() if value is not None} for row in found]


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
        return (absent("quantize.no_mixed"),)
    content, mixed, types = found.content, found.content["mixed"], found.content["types"]
    caption = sentence("quantize.against_caption", mixed=mixed, tokens=content["tokens"], rows=content["rows"])
    rows = rows_of("quantize.beside_recipes", types, mixed=mixed)
    return table(rows, caption), tell("quantize.against_reading", mixed=mixed, types=types)


def against_recipes_at_answers(found: Comparison | None) -> Shown:
    """The same at answers, and whether the mixed file beats recipes of its size there."""
    if found is None:
        return (absent("quantize.no_mixed_at_answers"),)
    content = found.content
    at_answers = [{**entry, **entry["answers"]} for entry in content["types"]]
    counts = {"positions": content["answer_positions"], "rows": content["answer_rows"]}
    caption = sentence("quantize.answers_against_caption", mixed=content["mixed"], **counts)
    rows = rows_of("quantize.beside_recipes", at_answers, mixed=content["mixed"])
    return table(rows, caption), _task_loss(content)


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


def planned(plan: Sequence[Entry]) -> Shown:
    """What the files of a ladder will be by a dry run (`lib.stages.quantize.stage.plan`), how much disk they take, and
    how many recipes cannot keep what their names promise."""
    return tabled("quantize.planned_files", plan), tell("quantize.planned", plan=plan)


def sizes(result: QuantizeResult) -> Shown:
    """Predicted and measured sizes of a ladder below their source; how exact the dry run was."""
    source = result.source
    reading = tell(
        "quantize.sizes_reading",
        exact=sum(f.bytes == f.predicted_bytes for f in result.files),
        files=result.files,
        source=source,
    )
    first = {key: source[key] for key in ("type", "bytes", "bits_per_weight")}
    rows = rows_of("quantize.sizes", [first, *result.files], source=source)
    return table(rows, sentence("quantize.sizes")), reading


def megabytes_by_type(result: QuantizeResult) -> dict[str, dict[str, float]]:
    """Megabytes of each tensor type of each file, for `charts.tensor_types`."""
    histograms = {result.source["type"]: result.source["histogram"], **{f.type: f.histogram for f in result.files}}
    return {name: {part["type"]: part["bytes"] / 1e6 for part in parts} for name, parts in histograms.items()}


def other_types(result: QuantizeResult) -> Shown:
    """Tensors stored in another type than the recipe wants, and those whose type the parameters set."""
    fell = [{"file": f.type, **entry} for f in result.files for entry in f.fallbacks]
    by_hand = [{"file": f.type, **entry} for f in result.files for entry in f.set_by_hand]
    if not fell and not by_hand:
        return (absent("quantize.no_other_types"),)
    caption = sentence("quantize.fallbacks_caption", count=len(fell), shown=MOST_TENSORS)
    set_caption = sentence("quantize.by_hand_caption", count=len(by_hand), shown=MOST_TENSORS)
    found = ((fell, caption), (by_hand, set_caption))
    return tuple(table(rows[:MOST_TENSORS], words) for rows, words in found if rows)


# Export formats, and the end of the page.


def exports(found: ExportsResult) -> Shown:
    """Size, cost and self-check of each format and why others are absent."""
    if not found.made and not found.skipped:
        return (absent("quantize.no_export"),)
    rows = rows_of("quantize.exports", found.made)
    shown = (table(rows, sentence("quantize.exports", seconds=found.product.entry.seconds)),) if rows else ()
    return (*shown, tell("quantize.skipped", formats=found.skipped))


def compared(files: Iterable[Entry], formats: Iterable[Mapping[str, str]]) -> str:
    """What stands in the tables of 07 beside GGUF files, and what is not there."""
    others: dict[str, list[str]] = {}
    for entry in files:
        if (found := FORMATS.get(entry["type"])) and not found.in_transformers:
            others.setdefault(found.runs_in, []).append(entry["type"])
    return in_markdown("quantize.compared", files=files, skipped_formats=list(formats), others=others)


def learned(result: QuantizeResult, exported: ExportsResult) -> Markdown:
    """The conclusions of the page."""
    names = {file.type: file for file in result.files}
    told = next((names[name] for name in ("Q4_K_M", *names) if name in names and re.match(_NAMED, name)), None)
    return tell("quantize.learned", files=result.files, inside=told and _inside(told), exported=exported)


_NAMED = r"I?Q(\d)_"
_PARTS = 2
"""Tensor types of a file that the conclusions name."""


def _inside(file: Entry) -> dict[str, Any]:
    """What a recipe holds beside what its name says: bits a weight, and its tensor types by their bytes."""
    total = sum(part["bytes"] for part in file.histogram)
    parts = [
        {"type": part["type"], "share": part["bytes"] / total, "bits": 8 * part["bytes"] / part["weights"]}
        for part in sorted(file.histogram, key=lambda part: -part["bytes"])[:_PARTS]
    ]
    named = re.match(_NAMED, file.type)[1]
    told = {"type": file.type, "bits": file.bits_per_weight, "named": named, "embedding": file.token_embedding_type}
    return {**told, "parts": parts}
