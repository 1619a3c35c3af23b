"""The product `mix_effect`: the file under a size budget beside every recipe of the ladder, on held-out rows.

The rows are those of `imatrix_effect`: as training sees them, like those on which the losses were predicted.
Differences of KL divergence are paired token by token, and whole rows are drawn; likewise at the tokens of answers,
which are the task.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.quantizing import recipes
from lib.quantizing.effect import compared_types, counts, judge, scores
from lib.quantizing.files import QuantizationReport
from lib.quantizing.heldout import HeldOut
from lib.quantizing.importance import AUTO
from lib.quantizing.options import Options
from lib.run import Product, Run, Work
from lib.run.files import read_json, write_json

if TYPE_CHECKING:
    from lib.settings import Settings

SUMMARY = "mix_effect.json"


@dataclass(frozen=True)
class MixEffect:
    """What the choice of types was worth.

    Attributes:
        content: what `lib.quantizing.effect.counts` says, "mixed" ("type", "file", "bytes", "kld" in nats a token,
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
        lambda work: _build(scored, mixed[0], others, work),
        parameters={"types": [f.type for f in others]},
        inputs=("held_out_kld",),
        force=settings.force,
    )
    return MixEffect(product, read_json(product.path / SUMMARY))


_VERDICT = ("difference", "difference_interval", "p", "p_holm", "verdict")


def _build(scored: HeldOut, mixed: QuantizationReport, others: list[QuantizationReport], work: Work) -> None:
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
    write_json(work.folder / SUMMARY, {**counts(scored), "mixed": {**_file(mixed), **own}, "types": types})
    work.metrics |= {entry["type"]: entry["difference"] for entry in types}


def _file(file: QuantizationReport) -> dict[str, Any]:
    return {"type": file.type, "file": file.file, "bytes": file.bytes}


def _values(found: dict[str, Any], side: str) -> dict[str, Any]:
    return {"kld": found[f"kld_{side}"], "kld_interval": found[f"kld_{side}_interval"]}
