"""The product `mix_effect`: the file under a size budget beside every recipe of the ladder, on held-out rows.

The rows are those of `imatrix_effect`: as training sees them, like those on which the losses were predicted.
Differences of KL divergence are paired token by token, and whole rows are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.quantizing import recipes
from lib.quantizing.effect import compare_pairs
from lib.quantizing.files import QuantizationReport
from lib.run import Product, Run, Work
from lib.run.files import read_json, write_json

if TYPE_CHECKING:
    from lib.settings import Settings

SUMMARY = "mix_effect.json"


@dataclass(frozen=True)
class MixEffect:
    """What the choice of types was worth.

    Attributes:
        content: "tokens", "rows", "windows", "window_tokens", "mixed" ("type", "file", "bytes", "kld" in nats a token,
            "kld_interval") and "types": the same keys of every recipe, with "difference" (mixed minus recipe),
            "difference_interval", "p", "p_holm" and "verdict" of the mixed file ("better" | "worse" | "cannot tell").
    """

    product: Product
    content: dict[str, Any]


def measure_mix_effect(
    settings: Settings, run: Run, source: Path, files: tuple[QuantizationReport, ...]
) -> MixEffect | None:
    """Compare the mixed file with the recipes, or find it done; None without a mixed file or without recipes.

    Raises:
        InputError: too few test rows.
    """
    mixed = [file for file in files if file.mix]
    others = [file for file in files if not file.mix and file.type not in recipes.UNQUANTIZED]
    if not mixed or not others:
        return None
    product = run.produce(
        "mix_effect",
        lambda work: _build(settings, run, source, mixed[0], others, work),
        parameters={**settings.pick("n_ctx", "perplexity_tokens", "seed"), "types": [f.type for f in others]},
        inputs=("data", "gguf", "quantized"),
        force=settings.force,
    )
    return MixEffect(product, read_json(product.path / SUMMARY))


def _build(
    settings: Settings, run: Run, source: Path, mixed: QuantizationReport, others: list[QuantizationReport], work: Work
) -> None:
    folder = run.require("quantized").path
    pairs = [(folder / mixed.file, folder / other.file) for other in others]
    content, found = compare_pairs(settings, run, source, pairs, "the mixed file beside the recipes")
    kept = ("difference", "difference_interval", "p", "p_holm", "verdict")
    types = [
        {**_entry(other, entry, "without"), **{key: entry[key] for key in kept}}
        for other, entry in zip(others, found, strict=True)
    ]
    write_json(work.folder / SUMMARY, {**content, "mixed": _entry(mixed, found[0], "with"), "types": types})
    work.metrics |= {entry["type"]: entry["difference"] for entry in types}


def _entry(file: QuantizationReport, found: dict[str, Any], side: str) -> dict[str, Any]:
    values = {"kld": found[f"kld_{side}"], "kld_interval": found[f"kld_{side}_interval"]}
    return {"type": file.type, "file": file.file, "bytes": file.bytes, **values}
