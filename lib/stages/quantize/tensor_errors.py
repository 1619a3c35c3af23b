"""The product `tensor_errors`: how far every tensor of every file is from the source, and how many bits it takes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.runs.child import run_child
from lib.runs.files import read_json, write_json
from lib.runs.run import Product, Run, Work
from lib.stages.quantize.files import QuantizationReport

if TYPE_CHECKING:
    from lib.settings import Settings


SUMMARY = "tensor_errors.json"
_NAME = re.compile(r"^blk\.(\d+)\.(.+)\.weight$")
_AT_ONCE = 1 << 24
"""Weights of a tensor that are turned back into float32 together."""


@dataclass(frozen=True)
class TensorErrors:
    """Every quantized tensor of every file.

    Attributes:
        files: {type: [{"tensor", "layer" (None outside of the blocks), "kind", "type", "weights", "bits_per_weight",
            "relative_rmse"}]}; relative RMSE is ‖quantized - source‖ / ‖source‖.
    """

    product: Product
    files: dict[str, list[dict[str, Any]]]

    def by_kind(self, name: str) -> dict[str, dict[str, float]]:
        """{kind: {"relative_rmse" (root mean square, tensors weighted by their weights), "bits_per_weight"}}."""
        found: dict[str, dict[str, float]] = {}
        for kind in dict.fromkeys(row["kind"] for row in self.files[name]):
            rows = [row for row in self.files[name] if row["kind"] == kind]
            weights = [row["weights"] for row in rows]
            squares = float(np.average([row["relative_rmse"] ** 2 for row in rows], weights=weights))
            bits = float(np.average([row["bits_per_weight"] for row in rows], weights=weights))
            found[kind] = {"relative_rmse": squares**0.5, "bits_per_weight": bits}
        return found


def measure_errors(settings: Settings, run: Run, source: Path, files: tuple[QuantizationReport, ...]) -> TensorErrors:
    """Compare every file of the ladder with its source, tensor by tensor, or find it done.

    Raises:
        InputError: a damaged file.
    """
    product = run.produce(
        "tensor_errors",
        lambda work: _build(run, source, files, work),
        parameters={"types": [file.type for file in files]},
        inputs=("gguf", "quantized"),
        force=settings.force,
    )
    return TensorErrors(product, read_json(product.path / SUMMARY)["files"])


def _build(run: Run, source: Path, files: tuple[QuantizationReport, ...], work: Work) -> None:
    folder = run.require("quantized").path
    paths = {file.type: str((folder / file.file).resolve()) for file in files}
    argument = {"source": str(source.resolve()), "files": paths}
    answer = run_child("lib.stages.quantize.tensor_errors:compare_in_child", argument, "errors of single tensors")
    write_json(work.folder / SUMMARY, {"files": answer["files"]})
    worst = {name: max(row["relative_rmse"] for row in rows) for name, rows in answer["files"].items() if rows}
    work.metrics |= {name: round(value, 5) for name, value in worst.items()}


def compare_in_child(argument: dict[str, Any]) -> dict[str, Any]:
    """Rows of `TensorErrors.files` for "files" ({type: path}) against "source"."""
    from lib.progress import Progress
    from lib.stages.quantize import llama_library

    found: dict[str, list[dict[str, Any]]] = {}
    with (
        llama_library.open_header(Path(argument["source"])) as source,
        Progress("comparing files", len(argument["files"])) as progress,
    ):
        for name, path in argument["files"].items():
            with llama_library.open_header(Path(path)) as header:
                changed = [t for t in header.tensors if header.tensors[t]["type"] != source.tensors[t]["type"]]
                found[name] = [_compare(source, header, tensor) for tensor in changed]
            progress.advance(note=name)
    return {"files": found}


def place(name: str) -> dict[str, Any]:
    """The "layer" (None outside of the blocks) and "kind" of a tensor."""
    match = _NAME.match(name)
    return {"layer": int(match[1]) if match else None, "kind": match[2] if match else name.removesuffix(".weight")}


def _compare(source: Any, other: Any, name: str) -> dict[str, Any]:
    from lib.stages.quantize.llama_library import rows_of

    tensor = other.tensors[name]
    error, size = 0.0, 0.0
    step = max(1, _AT_ONCE // tensor["shape"][0])
    rows = tensor["weights"] // tensor["shape"][0]
    for start in range(0, rows, step):
        wanted, got = (rows_of(h.path, h.tensors[name], start, start + step) for h in (source, other))
        error += float(np.sum((got - wanted) ** 2, dtype=np.float64))
        size += float(np.sum(wanted**2, dtype=np.float64))
    return {
        "tensor": name,
        **place(name),
        "type": tensor["type"],
        "weights": tensor["weights"],
        "bits_per_weight": 8 * tensor["bytes"] / tensor["weights"],
        "relative_rmse": (error / size) ** 0.5 if size else 0.0,
    }
