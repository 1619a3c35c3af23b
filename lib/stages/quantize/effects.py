"""The product `imatrix_effect`: the same types with and without the importance matrix, on held-out rows.
The product `mix_effect`: the file under a size budget beside every recipe of the ladder, on held-out rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.runs.files import read_json, write_json
from lib.runs.run import Product, Run, Work
from lib.settings import IMATRIX_TYPES
from lib.stages.quantize import recipes
from lib.stages.quantize.files import QuantizationReport, predict_sizes
from lib.stages.quantize.held_out import WITHOUT, HeldOut, measure_held_out
from lib.stages.quantize.importance_matrix import AUTO
from lib.stages.quantize.recipes import Options

if TYPE_CHECKING:
    from lib.settings import Settings


# The product `imatrix_effect`: the same types with and without the importance matrix, on held-out rows.
#
# Source, llama.cpp, options and windows are equal. Not all types of tensors need be: a recipe may want another type for
# some where it has a matrix (Q4_0 then stores a few as q4_1); these are recorded, with the bytes. What is compared is
# the KL divergence from the source at every scored token, so the difference is paired; whole rows are drawn, because
# tokens of one row are not independent.

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
    """Divergences of all files that this page and `lib.stages.quantize.effects` compare, each scored once.

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
    from lib.statistics.paired import clustered_bootstrap_t, holm, sign_flip_test

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


# The product `mix_effect`: the file under a size budget beside every recipe of the ladder, on held-out rows.
#
# The rows are those of `imatrix_effect`: as training sees them, like those on which the losses were predicted.
# Differences of KL divergence are paired token by token, and whole rows are drawn; likewise at the tokens of answers,
# which are the task.

MIX_SUMMARY = "mix_effect.json"


@dataclass(frozen=True)
class MixEffect:
    """What the choice of types was worth.

    Attributes:
        content: what `lib.stages.quantize.effects.counts` says, "mixed" ("type", "file", "bytes", "kld" in nats a
            token,
            "kld_interval") and "types": the same keys of every recipe, with "difference" (mixed minus recipe),
            "difference_interval", "p", "p_holm" and "verdict" of the mixed file ("better" | "worse" | "cannot tell").
            "answers" of each: the same from "kld" on in nats a position that predicts a token of an answer,
            Holm-corrected among themselves.
    """

    product: Product
    content: dict[str, Any]


def measure_mix_effect(
    settings: Settings, options: Options, run: Run, source: Path, files: tuple[QuantizationReport, ...]
) -> MixEffect | None:
    """Compare the mixed file with the recipes, or find it done; None without a mixed file or without recipes.

    Raises:
        InputError: too few test rows.
    """
    mixed = [file for file in files if file.mix]
    others = [file for file in files if not file.mix and file.type not in recipes.UNQUANTIZED]
    if not mixed or not others:
        return None
    # the effect of the matrix, where it had anything to compare, has scored them anew just now
    just_now = settings.imatrix == AUTO and compared_types(files, source, options)[0]
    again = settings.force and not just_now
    scored = scores(settings, options, run, source, files, again)
    product = run.produce(
        "mix_effect",
        lambda work: _build_mix_effect(scored, mixed[0], others, work),
        parameters={"types": [f.type for f in others]},
        inputs=("held_out_kld",),
        force=settings.force,
    )
    return MixEffect(product, read_json(product.path / MIX_SUMMARY))


_VERDICT = ("difference", "difference_interval", "p", "p_holm", "verdict")


def _build_mix_effect(scored: HeldOut, mixed: QuantizationReport, others: list[QuantizationReport], work: Work) -> None:
    text, answers = (
        judge([(values[mixed.type], values[other.type]) for other in others], rows)
        for values, rows in ((scored.text, scored.text_rows), (scored.answers, scored.answer_rows))
    )
    own = {**_values(text[0], "with"), "answers": _values(answers[0], "with")}
    types = [
        {
            **_file(other),
            **_values(entry, "without"),
            **{key: entry[key] for key in _VERDICT},
            "answers": {**_values(at_answers, "without"), **{key: at_answers[key] for key in _VERDICT}},
        }
        for other, entry, at_answers in zip(others, text, answers, strict=True)
    ]
    write_json(work.folder / MIX_SUMMARY, {**counts(scored), "mixed": {**_file(mixed), **own}, "types": types})
    work.metrics |= {entry["type"]: entry["difference"] for entry in types}


def _file(file: QuantizationReport) -> dict[str, Any]:
    return {"type": file.type, "file": file.file, "bytes": file.bytes}


def _values(found: dict[str, Any], side: str) -> dict[str, Any]:
    return {"kld": found[f"kld_{side}"], "kld_interval": found[f"kld_{side}_interval"]}
