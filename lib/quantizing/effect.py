"""The product `imatrix_effect`: the same types with and without the importance matrix, on held-out rows.

Everything else is equal: source, llama.cpp, options, windows. What is compared is the KL divergence from the source at
every scored token, so the difference is paired; whole rows are drawn, because tokens of one row are not independent.
"""

from __future__ import annotations

import tempfile
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.formats import IMATRIX_TYPES
from lib.quantizing import recipes
from lib.quantizing.calibration import held_out_windows
from lib.quantizing.files import QuantizationReport, quantize_file
from lib.quantizing.options import Options
from lib.run import Product, Run, Work
from lib.run.child import run_child
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
        content: "tokens", "rows", "windows", "window_tokens" and "types", each with "type", "bytes", "bytes_without",
            "kld_with", "kld_without" (nats a token, with "…_interval"), "difference" (with minus without),
            "difference_interval", "p", "p_holm", "verdict" ("better" | "worse" | "cannot tell").
    """

    product: Product
    content: dict[str, Any]


def compared_types(files: tuple[QuantizationReport, ...]) -> list[QuantizationReport]:
    """The smallest files of a ladder that could be made without a matrix too, largest first."""
    able = [
        f for f in files if f.imatrix and not f.mix and f.type not in {*IMATRIX_TYPES, *recipes.UNQUANTIZED, "Q8_0"}
    ]
    return sorted(able, key=lambda f: -f.bytes)[-TYPES:]


def measure_effect(
    settings: Settings, options: Options, run: Run, source: Path, files: tuple[QuantizationReport, ...]
) -> EffectResult | None:
    """Quantize the smallest types without the matrix and compare; None where no file was made with one.

    Args:
        options: of the ladder, with its matrix.
        source, files: what was quantized, and to what.
    """
    chosen = compared_types(files)
    if not chosen:
        return None
    product = run.produce(
        "imatrix_effect",
        lambda work: _build(settings, options, run, source, chosen, work),
        parameters={**settings.pick("n_ctx", "perplexity_tokens", "seed"), "types": [f.type for f in chosen]},
        inputs=("data", "gguf", "quantized"),
        force=settings.force,
    )
    return EffectResult(product, read_json(product.path / SUMMARY))


def _build(
    settings: Settings, options: Options, run: Run, source: Path, chosen: list[QuantizationReport], work: Work
) -> None:
    folder = run.require("quantized").path
    with tempfile.TemporaryDirectory(prefix=".without-", dir=run.folder) as name:
        pairs, sizes = [], []
        for report in chosen:
            plain = Path(name) / f"{report.type}.gguf"
            quantize_file(source, plain, report.type, replace(options, imatrix=None), settings.n_threads)
            sizes.append(plain.stat().st_size)
            pairs.append((folder / report.file, plain))
        content, found = compare_pairs(settings, run, source, pairs, "with and without importance matrix")
    types = [
        {"type": report.type, "bytes": report.bytes, "bytes_without": size, **entry}
        for report, size, entry in zip(chosen, sizes, found, strict=True)
    ]
    write_json(work.folder / SUMMARY, {**content, "types": types})
    work.metrics |= {entry["type"]: entry["difference"] for entry in types}


def compare_pairs(
    settings: Settings, run: Run, source: Path, pairs: list[tuple[Path, Path]], what: str
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Pairs of files on held-out rows as training sees them.

    Returns:
        "tokens" (scored), "rows", "windows" and "window_tokens"; and what `judge` says of each pair.

    Raises:
        InputError: too few test rows.
    """
    windows, rows = held_out_windows(
        run.require("data").path, settings.n_ctx, settings.perplexity_tokens // settings.n_ctx, settings.seed
    )
    with tempfile.TemporaryDirectory(prefix=".compared-", dir=run.folder) as name:
        argument = {
            "reference": str(source.resolve()),
            "pairs": [[str(path.resolve()) for path in pair] for pair in pairs],
            "windows": windows,
            "rows": rows,
            "n_threads": settings.n_threads,
            "scratch": name,
        }
        answer = run_child("lib.quantizing.effect:compare_in_child", argument, what)
    scored = len(windows) * (settings.n_ctx - settings.n_ctx // 2 - 1)
    content = {"tokens": scored, "rows": answer["rows"], "windows": len(windows), "window_tokens": settings.n_ctx}
    return content, answer["pairs"]


def compare_in_child(argument: dict[str, Any]) -> dict[str, Any]:
    """KL divergence from the reference of pairs of files; each file is opened alone, and scored once.

    Returns:
        "pairs" (see `EffectResult`) and "rows", the number of rows with a scored token.
    """
    from lib.scoring.llama import LlamaCppBackend
    from lib.scoring.perplexity import Reference, positions, store_reference

    windows = argument["windows"]
    size = len(windows[0])

    def opened(path: str) -> Any:
        return closing(LlamaCppBackend(Path(path), size, argument["n_threads"], 0, n_outputs=size - size // 2))

    with opened(argument["reference"]) as backend:
        kept: Reference = store_reference(backend, windows, Path(argument["scratch"]) / "reference", "the source")
    klds = {}
    with kept:
        for path in dict.fromkeys(path for pair in argument["pairs"] for path in pair):
            with opened(path) as backend:
                klds[path] = np.asarray(positions(kept, backend, windows, f"KL of {Path(path).name}").kl)
    rows = np.array(argument["rows"]).reshape(len(windows), size)[:, size // 2 + 1 :].ravel()
    pairs = [(klds[one], klds[other]) for one, other in argument["pairs"]]
    return {"pairs": judge(pairs, rows), "rows": len(np.unique(rows))}


def judge(pairs: list[tuple[np.ndarray, np.ndarray]], rows: np.ndarray) -> list[dict[str, Any]]:
    """Means, paired differences and verdicts of (with, without), Holm-corrected over the pairs.

    Args:
        pairs: KL divergence of every scored token, nats.
        rows: the row of each token.
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
