"""The product `imatrix_effect`: the same types with and without the importance matrix, on held-out rows.

Source, llama.cpp, options and windows are equal. Not all types of tensors need be: a recipe may want another type for
some where it has a matrix (Q4_0 then stores a few as q4_1); these are recorded, with the bytes. What is compared is the
KL divergence from the source at every scored token, so the difference is paired; whole rows are drawn, because tokens
of one row are not independent.
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
from lib.quantizing.files import QuantizationReport, predict_sizes, quantize_file
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
            "difference_interval", "p", "p_holm", "verdict" ("better" | "worse" | "cannot tell") and "retyped" (tensors
            of other types: {"tensor", "with", "without"}). "left_out": types of the ladder that cannot be made without
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
    """Quantize the smallest types without the matrix and compare; None where no file was made with one.

    Args:
        options: of the ladder, with its matrix.
        source, files: what was quantized, and to what.
    """
    chosen, left_out = compared_types(files, source, options)
    if not chosen and not left_out:
        return None
    product = run.produce(
        "imatrix_effect",
        lambda work: _build(settings, options, run, source, chosen, left_out, work),
        parameters={
            **settings.pick("n_ctx", "perplexity_tokens", "seed"),
            "types": [f.type for f in chosen],
            "left_out": left_out,
        },
        inputs=("data", "gguf", "quantized"),
        force=settings.force,
    )
    return EffectResult(product, read_json(product.path / SUMMARY))


def _build(
    settings: Settings,
    options: Options,
    run: Run,
    source: Path,
    chosen: list[QuantizationReport],
    left_out: list[str],
    work: Work,
) -> None:
    if not chosen:
        write_json(work.folder / SUMMARY, {"types": [], "left_out": left_out})
        return
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
    write_json(work.folder / SUMMARY, {**content, "types": types, "left_out": left_out})
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
        "pairs" (see `EffectResult`; "retyped" too) and "rows", the number of rows with a scored token.
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
    judged = zip(judge(pairs, rows), argument["pairs"], strict=True)
    found = [{**entry, "retyped": retyped(Path(one), Path(other))} for entry, (one, other) in judged]
    return {"pairs": found, "rows": len(np.unique(rows))}


def retyped(one: Path, other: Path) -> list[dict[str, str]]:
    """Tensors that two files of one model store in different types: "tensor", "with" (in `one`), "without"."""
    from lib.quantizing import native

    with native.open_header(one) as first, native.open_header(other) as second:
        types = {name: (tensor["type"], second.tensors[name]["type"]) for name, tensor in first.tensors.items()}
    return [{"tensor": name, "with": a, "without": b} for name, (a, b) in types.items() if a != b]


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
