"""The product `imatrix_effect`: the same types with and without the importance matrix, on held-out rows.

Source, llama.cpp, options and windows are equal. Not all types of tensors need be: a recipe may want another type for
some where it has a matrix (Q4_0 then stores a few as q4_1); these are recorded, with the bytes. What is compared is the
KL divergence from the source at every scored token, so the difference is paired; whole rows are drawn, because tokens
of one row are not independent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.formats import IMATRIX_TYPES
from lib.quantizing import recipes
from lib.quantizing.files import QuantizationReport, predict_sizes
from lib.quantizing.heldout import WITHOUT, HeldOut, measure_held_out
from lib.quantizing.importance import AUTO
from lib.quantizing.options import Options
from lib.run import Product, Run, Work
from lib.run.files import read_json, write_json

if TYPE_CHECKING:
    from lib.settings import Settings

TYPES = 3
"""The smallest types of the ladder: a matrix moves them most."""
SUMMARY = "imatrix_effect.json"
SEED = 42


@dataclass(frozen=True)
class EffectResult:
    """What the matrix changed.

    Attributes:
        content: what `counts` says and "types", each with "type", "bytes", "bytes_without", "kld_with", "kld_without"
            (nats a token, with "…_interval"), "difference" (with minus without), "difference_interval", "p", "p_holm",
            "verdict" ("better" | "worse" | "cannot tell"); "answers": the same from "kld_with" to "verdict" in nats a
            position that predicts a token of an answer, Holm-corrected among themselves; "retyped" (tensors of other
            types: {"tensor", "with", "without"}). "left_out": types of the ladder that cannot be made without
            a matrix, because tensor_types or its companions want a type that needs one.
    """

    product: Product
    content: dict[str, Any]


def compared_types(
    files: tuple[QuantizationReport, ...], source: Path, options: Options
) -> tuple[list[QuantizationReport], list[str]]:
    """The smallest files of a ladder that could be made without a matrix too, largest first; and types of which the
    recipe could, but not with the types of single tensors that `options` set."""
    never = {*IMATRIX_TYPES, *recipes.UNQUANTIZED, "Q8_0"}
    able = [f for f in files if f.imatrix and not f.mix and f.type not in never]
    needing: set[str] = set()
    if able and options.any_types():
        told = predict_sizes(source, [f.type for f in able], replace(options, imatrix=None))
        needing = {prediction["type"] for prediction in told if prediction["needs_imatrix"]}
    free = [f for f in able if f.type not in needing]
    return sorted(free, key=lambda f: -f.bytes)[-TYPES:], [f.type for f in able if f.type in needing]


def measure_effect(
    settings: Settings, options: Options, run: Run, source: Path, files: tuple[QuantizationReport, ...]
) -> EffectResult | None:
    """Compare the smallest types with and without the matrix; None where no file was made with one.

    Args:
        options: of the ladder, with its matrix.
        source, files: what was quantized, and to what.

    Raises:
        InputError: too few test rows.
    """
    chosen, left_out = compared_types(files, source, options)
    if not chosen and not left_out:
        return None
    scored = scores(settings, options, run, source, files, settings.force) if chosen else None
    product = run.produce(
        "imatrix_effect",
        lambda work: _build(scored, chosen, left_out, work),
        parameters={"types": [f.type for f in chosen], "left_out": left_out},
        inputs=("held_out_kld",) if scored else ("quantized",),
        force=settings.force,
    )
    return EffectResult(product, read_json(product.path / SUMMARY))


def scores(
    settings: Settings, options: Options, run: Run, source: Path, files: tuple[QuantizationReport, ...], force: bool
) -> HeldOut:
    """Divergences of all files that this page and `lib.quantizing.mixeffect` compare, each scored once.

    Args:
        force: score again even if nothing changed.

    Raises:
        InputError: too few test rows.
    """
    wanted, without = [], []
    if settings.imatrix == AUTO:
        wanted = compared_types(files, source, options)[0]
        without = [file.type for file in wanted]
    beside = [file for file in files if file.type not in recipes.UNQUANTIZED]
    if any(file.mix for file in beside) and not all(file.mix for file in beside):
        wanted = beside
    return measure_held_out(settings, options, run, source, wanted, without, force)


def _build(scored: HeldOut | None, chosen: list[QuantizationReport], left_out: list[str], work: Work) -> None:
    if scored is None:
        write_json(work.folder / SUMMARY, {"types": [], "left_out": left_out})
        return
    names = [report.type for report in chosen]
    text, answers = (
        judge([(values[name], values[f"{name}{WITHOUT}"]) for name in names], rows)
        for values, rows in ((scored.text, scored.text_rows), (scored.answers, scored.answer_rows))
    )
    types = []
    for report, entry, at_answers in zip(chosen, text, answers, strict=True):
        plain = scored.content["without"][report.type]
        sizes = {"type": report.type, "bytes": report.bytes, "bytes_without": plain["bytes"]}
        types.append({**sizes, **entry, "answers": at_answers, "retyped": plain["retyped"]})
    write_json(work.folder / SUMMARY, {**counts(scored), "types": types, "left_out": left_out})
    work.metrics |= {entry["type"]: entry["difference"] for entry in types}


def counts(scored: HeldOut) -> dict[str, Any]:
    """What a comparison is of: "tokens" (scored), "rows", "windows", "window_tokens"; "answer_rows" and
    "answer_positions"."""
    keys = ("tokens", "rows", "windows", "window_tokens", "answer_rows", "answer_positions")
    return {key: scored.content[key] for key in keys}


def judge(pairs: list[tuple[np.ndarray, np.ndarray]], rows: np.ndarray) -> list[dict[str, Any]]:
    """Means, paired differences and verdicts of (with, without), Holm-corrected over the pairs.

    Args:
        pairs: KL divergence of every scored token or position, nats.
        rows: the row of each.
    """
    from lib.statistics import clustered_bootstrap_t, holm, sign_flip_test

    p_values = [sign_flip_test(one - other, rows, SEED) for one, other in pairs]
    found = []
    for (one, other), p, p_holm in zip(pairs, p_values, holm(p_values), strict=True):
        change = clustered_bootstrap_t(one - other, rows, SEED)
        alone = {"kld_with": clustered_bootstrap_t(one, rows, SEED)}
        alone["kld_without"] = clustered_bootstrap_t(other, rows, SEED)
        shown = p_holm < 0.05 and change.excludes_zero()
        found.append(
            {
                **{key: interval.estimate for key, interval in alone.items()},
                **{f"{key}_interval": interval.to_json() for key, interval in alone.items()},
                "difference": change.estimate,
                "difference_interval": change.to_json(),
                "p": p,
                "p_holm": p_holm,
                "verdict": ("better" if change.estimate < 0 else "worse") if shown else "cannot tell",
            }
        )
    return found
