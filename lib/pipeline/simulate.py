"""An export simulated: what would be merged, the size of every format, memory, time. Reads headers alone.

It needs neither torch nor transformers nor weights: a student learns the steps with it on any machine.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lib.errors import refusal, refusing
from lib.models.adapters import base_named, folder_kind, read_adapter, shape_of
from lib.models.base_model import configuration_of
from lib.models.language_model import known_shapes
from lib.models.merge_plan import plan_merge
from lib.models.weights import open_weights
from lib.pipeline.formats import FOLDERS, GGUF, MERGED, REPORT, title_of
from lib.runs import files
from lib.runs.machine import has_module
from lib.runs.render import render
from lib.stages.export.sizes import Shapes, about_gguf, predict_folder

_TEMPLATES = Path(__file__).with_name("templates")
_CLASSES = ((20, "seconds"), (120, "about a minute"), (1200, "minutes"), (5400, "tens of minutes"))


class Cost(NamedTuple):
    """What a format takes on two cores: a start, and so much for every weight (docs/LOG.md, "What an export costs")."""

    seconds: float
    nanoseconds: float
    mib: float
    nbytes: float


_COSTS = {
    MERGED: Cost(1, 4, 400, 0),
    "fp16": Cost(1.5, 13, 380, 4),
    "bf16": Cost(1.5, 13, 380, 4),
    "int8": Cost(2.3, 9, 430, 4.5),
    "nf4": Cost(2.3, 15, 430, 3),
    "torchao-int8": Cost(1.5, 7, 380, 6),
    "gptq": Cost(6.6, 410, 720, 3.5),
    "autoround": Cost(10, 4000, 900, 5),
    "onnx-int8": Cost(3, 120, 500, 8),
    "onnx-int4": Cost(3, 140, 500, 8),
    "mnn-int4": Cost(12, 300, 900, 8),
    GGUF: Cost(0.1, 17, 60, 1.7),
}


@dataclass(frozen=True)
class Known:
    """What headers say of a checkpoint.

    Attributes:
        kind: "adapter" or "model".
        shapes: of the weights of the merged model.
        nbytes: of them, in the base's number format.
        folder: of the model, where its tokenizer and headers are on this disk; None of a configuration alone.
        steps: what the export would do, in sentences.
    """

    kind: str
    shapes: Shapes
    nbytes: int
    folder: Path | None
    steps: list[str]


def look_at(checkpoint: str, base_model: str | None) -> Known:
    """What a checkpoint is, from its headers, or from the configuration of a hub model.

    Raises:
        InputError: nothing there, no checkpoint, or a configuration that cannot be had.
    """
    folder = files.user_path(checkpoint)
    kind = folder_kind(folder) if folder.is_dir() else "model"
    if kind == "model":
        return _model(checkpoint)
    if kind != "adapter":
        raise refusal("pipeline/no-checkpoint", folder=folder, hint="check the path.")
    base = base_named(folder, base_model)
    shape, known = shape_of(read_adapter(folder)), _model(base)
    steps = [
        f"Read the adapter: LoRA of rank {shape.rank} with alpha {shape.alpha:g} on {shape.modules} layers "
        f"({shape.parameters:,} weights)."
    ]
    if known.folder is not None:
        plan = plan_merge(known.folder, folder)
        changed = sum(plan.base.tensors[name].size for name in plan.updates)
        steps.append(
            f"Merge: {len(plan.updates)} of {len(plan.base.tensors)} tensors of {base} become W + s·B·A "
            f"({changed / plan.base.parameters:.0%} of the weights), the others are copied."
        )
    else:
        steps.append(f"Merge it into {base}, which is not on this disk: whether it fits was not checked.")
    return Known("adapter", known.shapes, known.nbytes, known.folder, steps + known.steps[1:])


def _model(name: str) -> Known:
    """A model folder, or a hub model, of which config.json alone is read."""
    config, where = configuration_of(name)
    if where == "folder":
        folder = files.user_path(name)
        weights = open_weights(folder)
        shapes = {key: tensor.shape for key, tensor in weights.tensors.items()}
        return Known("model", shapes, weights.nbytes, folder, [f"Take the model {name} as it is."])
    with refusing(KeyError, "pipeline/other-family", name=name, kind=config.get("model_type")):
        shapes = known_shapes(config)
    return Known("model", shapes, predict_folder(shapes, "bf16"), None, [f"Download {name} from the hub."])


def simulate(
    checkpoint: str, folder: Path, formats: Sequence[str], recipes: Sequence[str], base_model: str | None = None
) -> dict[str, Any]:
    """What `export_checkpoint` would make, written as a tree of README files.

    Returns:
        The content of export_report.json: "simulated": true, "checkpoint", "kind", "steps", "formats": [{"format",
        "path", "bytes", "exact", "memory_mib", "time"}].

    Raises:
        InputError: as `look_at`; a folder that holds something else.
    """
    known = look_at(checkpoint, base_model)
    folders = files.data_file("stages/export/formats.yaml")
    weights = sum(map(math.prod, known.shapes.values()))
    rows = [_row(MERGED, MERGED, known.nbytes, True, weights, _COSTS[MERGED])]
    for name in formats:
        size = predict_folder(known.shapes, name)
        rows.append(_row(FOLDERS[name], FOLDERS[name], size, False, weights, _COSTS[name]))
        rows[-1]["title"] = folders[name]["title"]
    sizes, exact = _gguf_sizes(known, recipes)
    for recipe, size in zip(recipes, sizes, strict=True):
        path = f"{GGUF}/{title_of(checkpoint)}-{recipe}.gguf"
        rows.append(_row(f"gguf:{recipe}", path, size, exact, weights, _COSTS[GGUF]))
    report = {"format": 1, "simulated": True, "checkpoint": checkpoint, "kind": known.kind, "weights": weights}
    report |= {"steps": known.steps, "formats": rows}
    _write_tree(folder, report)
    return report


def _row(name: str, path: str, size: int, exact: bool, weights: int, cost: Cost) -> dict[str, Any]:
    seconds, memory = cost.seconds + cost.nanoseconds * weights / 1e9, cost.mib + cost.nbytes * weights / 2**20
    time = next((words for most, words in _CLASSES if seconds <= most), "hours")
    return {"format": name, "path": path, "bytes": size, "exact": exact, "memory_mib": round(memory), "time": time}


def _gguf_sizes(known: Known, recipes: Sequence[str]) -> tuple[list[int], bool]:
    """Bytes of the GGUF files; whether they are exact: by llama.cpp's dry run of a header, where both are here."""
    if known.folder is not None and recipes and has_module("llama_cpp") and has_module("transformers"):
        from lib.stages.convert.convert import plan_conversion
        from lib.stages.quantize.files import predict_sizes

        with tempfile.TemporaryDirectory(prefix="workbook-header-") as name:
            header = Path(name) / "model.gguf"
            plan_conversion(known.folder).write_header(header)
            return [row["bytes"] for row in predict_sizes(header, recipes)], True
    return [about_gguf(known.shapes, recipe) for recipe in recipes], False


def _write_tree(folder: Path, report: Mapping[str, Any]) -> None:
    """Folders with a README.md each: what would lie there. Nothing of an earlier real export is touched.

    Raises:
        InputError: the folder holds something else.
    """
    former = files.object_or_empty(folder / REPORT)
    if folder.exists() and not former.get("simulated"):
        files.require_new(folder)
    files.writable(folder)
    for row in report["formats"]:
        place = folder / row["path"]
        place = place.parent if place.suffix == ".gguf" else place
        place.mkdir(parents=True, exist_ok=True)
        inside = [other for other in report["formats"] if (folder / other["path"]).is_relative_to(place)]
        files.write_text(place / "README.md", render(_TEMPLATES / "simulated_folder.md.j2", rows=inside))
    files.write_text(folder / "README.md", render(_TEMPLATES / "simulated.md.j2", report=report))
    files.write_json(folder / REPORT, report)
