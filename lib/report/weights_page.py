"""What page 06 shows of the weights themselves: grid of the base, error, what is left of the tuning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.models.gguf_file import run_gguf
from lib.report.display import Shown, figure, mark_names, table, tell, use_style
from lib.report.sentences import sentence
from lib.statistics.losses import KEEPS_LITTLE

if TYPE_CHECKING:
    from IPython.display import HTML

    from lib.runs.run import Run
    from lib.stages.quantize.files import QuantizeResult
    from lib.stages.quantize.weights import Retention, SourceGrid, TensorErrors

Row = dict[str, Any]
Entry = Mapping[str, Any]
"""An object of a product's JSON file."""

MARK = sentence("quantize.mark")
"""What the mark behind types and files on the grid of the base's weights means."""


# The grid of the base's weights, and what is left of the fine-tuning.


def mark(found: SourceGrid, plan: Sequence[Entry] = ()) -> None:
    """From now on tables mark types and files on that grid ("type" and "histogram" of planned files)."""
    mark_names(found.marked([(p["type"], p["histogram"]) for p in plan]), MARK)


def grid(found: SourceGrid) -> Shown:
    """Share of blocks that each type gives back, and whether the base's weights lie on its grid; why nobody knows."""
    if found.product is None:
        return (tell("quantize.not_measured", reason=found.reason),)
    shares = sorted(found.shares.items(), key=lambda pair: -pair[1])
    rows = [{"tensor_type": kind, "given_back": share} for kind, share in shares]
    shown = table(rows, sentence("quantize.grid_caption", blocks=found.blocks, matrices=found.matrices))
    if notes := found.product.entry.notes:
        return shown, tell("quantize.grid_found", note=notes[0])
    if found.distinct is None:
        return shown, tell("quantize.grid_unknown")
    most = max(found.shares.values(), default=0.0)
    return shown, tell("quantize.grid_none", types=len(found.shares), most=most, distinct=found.distinct)


def kept(found: Retention) -> Shown:
    """The share of the change that is left, a row a kind of tensor, a column a file; and the files that lose more than
    a tenth of it."""
    if found.product is None:
        return (tell("quantize.not_measured", reason=found.reason),)
    kinds = {"all matrices": None, **{kind: kind for kind in kinds_of(found)}}
    rows = [{"kind": name, **{file: _kept(found, file, kind) for file in found.files}} for name, kind in kinds.items()]
    shown = table(rows, sentence("quantize.kept_caption", moved=found.moved, left_out=found.left_out))
    files = [{"name": n, "share": found.kept(n), "returned": found.returned(n)} for n in found.files]
    files = sorted((file for file in files if file["share"] is not None), key=lambda file: file["share"])
    if not files:
        return shown, tell("quantize.nothing_moved")
    poor = [file for file in files if file["share"] < KEEPS_LITTLE]
    return shown, tell("quantize.kept_reading", poor=poor, least=files[0], limit=KEEPS_LITTLE)


def _kept(found: Retention, file: str, kind: str | None) -> str | None:
    share = found.kept(file, kind)
    return None if share is None else sentence("quantize.kept", share=share, returned=found.returned(file, kind))


# The error of the weights.


def kinds_of(measured: TensorErrors | Retention) -> list[str]:
    """Kinds of tensors in all files, those of the layers first."""
    rows = [row for found in measured.files.values() for row in found]
    inside = {row["kind"] for row in rows if row["layer"] is not None}
    return [*sorted(inside), *dict.fromkeys(row["kind"] for row in rows if row["layer"] is None)]


def error_map(errors: TensorErrors) -> HTML:
    """Relative RMSE of every tensor: one panel a file, a row a kind, a column a layer."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    use_style()
    kinds, rows = kinds_of(errors), [row for found in errors.files.values() for row in found]
    values = [row["relative_rmse"] for row in rows if row["relative_rmse"] > 0]
    layers = 1 + max((row["layer"] for row in rows if row["layer"] is not None), default=0)
    across = max(1, min(len(errors.files), 24 // (layers + 4) + 1))
    down = -(-len(errors.files) // across)
    size = (7.4, down * (0.7 + 0.17 * len(kinds)))
    fig, axes = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False, sharey=True)
    scale, places = LogNorm(min(values), max(values)), list(range(0, layers, max(1, layers // 4)))
    for ax, (name, found) in zip(axes.flat, errors.files.items(), strict=False):
        image = ax.imshow(_grid(found, kinds, layers), norm=scale, cmap="cividis", aspect="auto")
        ax.set_title(name, fontsize=9)
        ax.set_yticks(range(len(kinds)), kinds, fontsize=7)
        ax.set_xticks([*places, layers], [*map(str, places), "–"], fontsize=7)
        ax.grid(visible=False)
    for ax in axes.flat[len(errors.files) :]:
        ax.set_axis_off()
    fig.supxlabel("layer (–: outside of the layers)", fontsize=9)
    fig.colorbar(image, ax=axes, label="relative RMSE")
    extremes = [(name, *_extremes(found)) for name, found in errors.files.items() if found]
    alt = sentence("quantize.error_map_alt", extremes=extremes)
    return figure(fig, sentence("quantize.error_map_caption"), alt)


def _grid(rows: Iterable[Entry], kinds: list[str], layers: int) -> np.ndarray:
    """Relative RMSE, (kinds, layers + 1); the last column is what stands outside of the layers."""
    grid = np.full((len(kinds), layers + 1), np.nan)
    for row in rows:
        grid[kinds.index(row["kind"]), layers if row["layer"] is None else row["layer"]] = row["relative_rmse"]
    return grid


def _extremes(rows: Sequence[Entry]) -> tuple[Entry, Entry]:
    """The tensors with the smallest and the largest error."""
    ordered = sorted(rows, key=lambda row: row["relative_rmse"])
    return ordered[0], ordered[-1]


def error_kinds(errors: TensorErrors) -> Shown:
    """Relative RMSE at bits per weight of each kind of tensor in every file, and the kind with the largest error."""
    found = {name: errors.by_kind(name) for name in errors.files}
    rows = [
        {
            "kind": kind,
            **{n: sentence("quantize.kind_error", **own[kind]) if kind in own else None for n, own in found.items()},
        }
        for kind in kinds_of(errors)
    ]
    worst = {name: max(own, key=lambda kind: own[kind]["relative_rmse"]) for name, own in found.items() if own}
    largest = [(name, kind, found[name][kind]) for name, kind in worst.items()]
    return table(rows, sentence("quantize.kinds_caption")), tell("quantize.error_reading", largest=largest)


# One block of Q4_K, for the cell that takes it apart.

BLOCK, BLOCK_BYTES = 256, 144
"""Weights of a block of Q4_K, and the bytes that hold them."""


@dataclass(frozen=True)
class Block:
    """A block of Q4_K beside the weights that it stores.

    Attributes:
        tensor: its name. file: type of the file that holds the block; empty where it was made for this page alone.
        original: (256,) float32, from the source. stored: (144,) bytes.
    """

    tensor: str
    file: str
    original: np.ndarray
    stored: np.ndarray


def q4_k_block(run: Run, result: QuantizeResult) -> Block:
    """The first block of Q4_K in a file of the ladder; where none has any, one that llama.cpp makes of weights of the
    source."""
    from gguf import GGMLQuantizationType, GGUFReader
    from gguf.quants import dequantize

    source = {tensor.name: tensor for tensor in GGUFReader(run_gguf(run)).tensors}

    def first_weights(name: str) -> np.ndarray:
        return dequantize(source[name].data, source[name].tensor_type).reshape(-1)[:BLOCK].astype(np.float32)

    for file in result.files:
        if any(part["type"] == "q4_K" for part in file.histogram):
            tensors = GGUFReader(result.product.path / file.file).tensors
            stored = next(t for t in tensors if t.tensor_type == GGMLQuantizationType.Q4_K)
            return Block(stored.name, file.type, first_weights(stored.name), stored.data.reshape(-1)[:BLOCK_BYTES])
    from lib.stages.quantize.llama_library import quantize_rows

    name = next(name for name, tensor in source.items() if len(tensor.shape) > 1 and tensor.n_elements >= BLOCK)
    return Block(name, "", first_weights(name), quantize_rows("q4_K", first_weights(name)[None], None)[0])


def block(
    found: Block, steps: np.ndarray, offsets: np.ndarray, scales: np.ndarray, minimums: np.ndarray, codes: np.ndarray
) -> Shown:
    """What the parts of a block are, a row for each 32 weights, and how far the weights have moved.

    Args:
        steps, offsets: (8,) a weight is step × code − offset. scales, minimums: (8,) the 6-bit numbers behind them.
        codes: (8, 32) 4-bit numbers.
    """
    original = found.original.reshape(codes.shape)
    rebuilt = steps[:, None] * codes - offsets[:, None]
    change = np.linalg.norm(rebuilt - original, axis=1)
    rows = [
        {
            "sub_block": f"{32 * i}–{32 * i + 31}",
            "sub_scale": int(scales[i]),
            "sub_minimum": int(minimums[i]),
            "step": float(steps[i]),
            "offset": float(offsets[i]),
            "codes": " ".join(map(str, codes[i, :6])),
            "weights_before": " ".join(f"{w:+.4f}" for w in original[i, :2]),
            "weights_after": " ".join(f"{w:+.4f}" for w in rebuilt[i, :2]),
            "relative_error": float(change[i] / np.linalg.norm(original[i])),
        }
        for i in range(len(codes))
    ]
    error = float(np.linalg.norm(change) / np.linalg.norm(original))
    counts = {"weights": codes.size, "bytes": len(found.stored)}
    caption = sentence("quantize.block_caption", tensor=found.tensor, file=found.file, **counts)
    return table(rows, caption), tell("quantize.block_reading", error=error, values=len(np.unique(rebuilt)), **counts)
