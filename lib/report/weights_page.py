"""What becomes of the weights: merged (04), converted (05), quantized (06: grid, error, what is left of the tuning)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.language import sentences
from lib.models.gguf_file import run_gguf
from lib.report.charts import PHONE_WIDE
from lib.report.display import Entry, Row, Shown, absent, card, figure, mark_names, rows_of, table, tell
from lib.report.looks import GREY, ORANGE, panels, use_style
from lib.report.sentences import in_markdown, sentence, word_rows
from lib.statistics.intervals import Interval
from lib.statistics.losses import KEEPS_LITTLE

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

    from lib.runs.run import Run
    from lib.stages.convert.gate import GateReport
    from lib.stages.convert.stage import ExportResult
    from lib.stages.merge.proof import MergeProof
    from lib.stages.merge.stage import MergeResult
    from lib.stages.merge.verify import FormatCost, MergeCheck
    from lib.stages.quantize.files import QuantizeResult
    from lib.stages.quantize.stage import Retention, SourceGrid, TensorErrors

FAR_BETTER = 4.0
"""From so many times less on, another format of the same bytes is recommended."""

WORTH_SAVING = 1e-3
"""Share of the adapter's effect below which a cost is not worth a word of advice."""

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "mixed": 4}


# Page 04: the merge and its proof, and what rounding costs.


def proved(result: MergeResult) -> str:
    """What was recomputed and found right, and how much of the adapter's change rounding leaves, where there is one."""
    if not result.trained:
        return in_markdown("merge.passed_on", found=result.proof)
    if result.whole:
        return in_markdown("merge.taken_over", found=result.proof)
    return sentences((proof(result.proof), survival(result.proof)))


_LAYER = re.compile(r"(?:^|\.)(\d+)\.(.+?)(?:\.weight)?$")


def rounding_map(found: MergeProof) -> HTML | Markdown:
    """The error of rounding beside the adapter's change, of every tensor that is a sum."""
    if not found.rounding:
        return absent("merge.no_rounding")
    rows = []
    for name, value in found.rounding.items():
        match = _LAYER.search(name)
        kind = match[2] if match else name.removesuffix(".weight")
        rows.append({"layer": int(match[1]) if match else None, "kind": kind, "error / change": value})
    kinds, layers = _kinds(rows), _layers(rows)
    fig, ax = panels(min(7.0, 2.6 + 0.28 * layers), 1.0 + 0.24 * len(kinds))
    image = _map_by_layer(ax, rows, "error / change", kinds, layers, vmin=0)
    ax.set_xlabel("layer")
    fig.colorbar(image, ax=ax, label="rounding error ÷ adapter's change")
    worst = max(found.rounding, key=found.rounding.__getitem__)
    told = {"tensors": len(rows), "dtype": found.dtype, "worst": worst, "most": found.rounding[worst]}
    return figure(fig, sentence("merge.rounding_map", **told), sentence("merge.rounding_map_alt", **told))


def _kinds(rows: Sequence[Row]) -> list[str]:
    """Kinds of tensors, those of the layers first."""
    inside = {row["kind"] for row in rows if row["layer"] is not None}
    return [*sorted(inside), *dict.fromkeys(row["kind"] for row in rows if row["layer"] is None)]


def _layers(rows: Sequence[Row]) -> int:
    return 1 + max((row["layer"] for row in rows if row["layer"] is not None), default=0)


def _map_by_layer(
    ax: Axes, rows: Sequence[Row], key: str, kinds: Sequence[str], layers: int, **colours: Any
) -> AxesImage:
    """A value of every tensor: a row a kind, a column a layer, behind them those outside of the layers.

    Args:
        rows: mappings with kind, layer (None outside of the layers) and `key`. colours: of imshow.
    """
    import pandas as pd

    outside = any(row["layer"] is None for row in rows)
    table = pd.DataFrame(rows, columns=["kind", "layer", key]).fillna({"layer": layers})
    grid = table.pivot(index="kind", columns="layer", values=key)
    image = ax.imshow(
        grid.reindex(index=kinds, columns=range(layers + outside)), cmap="cividis", aspect="auto", **colours
    )
    places = list(range(0, layers, max(1, layers // 4)))
    ax.set_yticks(range(len(kinds)), kinds, fontsize=8)
    ax.set_xticks([*places, *[layers] * outside], [*map(str, places), *["–"] * outside], fontsize=8)
    ax.grid(visible=False)
    return image


def agreement_strip(report: GateReport) -> HTML | Markdown:
    """KL divergence between merged model and GGUF at every position that was compared, beside the gate's limit."""
    values = np.asarray(report.divergences)
    if not len(values):
        return absent("convert.no_divergences")
    fig, ax = panels(PHONE_WIDE, 2.2)
    least = max(values[values > 0].min() if (values > 0).any() else report.limit_kld * 1e-6, 1e-12)
    ax.plot(np.arange(1, len(values) + 1), np.maximum(values, least), ".", markersize=3)
    ax.axhline(report.limit_kld, color=ORANGE, linestyle="--", linewidth=1, label="limit of the mean")
    ax.axhline(max(report.mean_kld, least), color=GREY, linewidth=1, label="mean")
    ax.set(yscale="log", xlabel="position", ylabel="KL divergence, nats")
    ax.legend(fontsize=8)
    told = {"positions": len(values), "mean": report.mean_kld, "largest": report.max_kld, "limit": report.limit_kld}
    return figure(fig, sentence("convert.strip", **told), sentence("convert.strip_alt", **told))


def proof(found: MergeProof) -> str:
    """What was recomputed and found right."""
    return in_markdown("merge.proof", found=found)


def survival(found: MergeProof) -> str:
    """How much of the adapter's change rounding leaves in the weights."""
    return in_markdown("merge.survival", found=found)


def costs(check: MergeCheck, trained: bool = True, whole: bool = False) -> list[Row]:
    """What each number format costs, beside the effect of the training where there was one.

    Args:
        whole: every weight was trained, there is no adapter.
    """
    if not trained:
        return rows_of("merge.base_costs", check.costs)
    effect = {
        "number_format": sentence("merge.base_alone", whole=whole),
        "kld": check.effect_kld,
        "share_of_effect": 1.0 if check.effect_kld else None,
        "same_top_token": check.effect_agreement,
    }
    return [*rows_of("merge.costs", check.costs, check=check), effect]


def merge_reading(check: MergeCheck, trained: bool = True, whole: bool = False) -> str:
    """What rounding costs, what would be refused, and whether another format would be far better; `whole`: as in
    `costs`."""
    if not trained:
        return in_markdown("merge.base_reading", check=check)
    others = [cost for cost in check.costs if not cost.written and _BYTES[cost.dtype] <= _BYTES[check.dtype]]
    best: FormatCost | None = min(others, key=lambda cost: cost.mean_kld, default=None)
    if best is None:
        return in_markdown(
            "merge.reading", check=check, best=None, same_bytes=False, ratio=None, far=False, whole=whole
        )
    small, large = sorted((best.mean_kld, check.mean_kld))
    return in_markdown(
        "merge.reading",
        check=check,
        best=best,
        same_bytes=_BYTES[best.dtype] == _BYTES[check.dtype],
        ratio=large / small if small else None,
        far=check.mean_kld >= FAR_BETTER * best.mean_kld and check.mean_kld >= WORTH_SAVING * check.effect_kld,
        whole=whole,
    )


def nf4_reading(result: MergeResult) -> str:
    """Which merge is closer to the trained model, and which one was published."""
    found = result.nf4
    values = {"difference": Interval(*found.difference), "closer": found.closer, "merge_base": result.merge_base}
    return in_markdown("merge.nf4_reading", **values)


def merge_card(result: MergeResult) -> HTML:
    """What the merge did."""
    chosen = result.product.entry.facts.get("chosen")
    return card("merge.card", result=result, report=result.report, chosen=chosen)


# Page 05: the conversion and its gate; and a base model that comes out of a GGUF file.


def conversion_card(result: ExportResult) -> HTML:
    """What was converted."""
    return card("convert.card", file=result.path.name, conversion=result.conversion)


def gate(report: GateReport) -> list[Row]:
    """The questions of the gate with what was measured and what was required."""
    keys = ("question", "measured", "required")
    return [dict(zip(keys, cells, strict=True)) for cells in word_rows("convert.gate", report=report)]


def unpacked(facts: Mapping[str, Any]) -> dict[str, str]:
    """Lines for a card on weights from a GGUF file; none for other bases.

    Args:
        facts: of the product `data`; "unpacked" is the record of `lib.models.unpack`.
    """
    record = facts.get("unpacked")
    if not record:
        return {}
    costs = sorted((record["cost"] or {}).items(), key=lambda pair: pair[0] != record["dtype"])  # the one taken first
    return dict(word_rows("convert.unpacked", record=record, costs=costs))


# Page 06: the grid of the base's weights, and what is left of the fine-tuning.

MARK = sentence("quantize.mark")
"""What the mark behind types and files on the grid of the base's weights means."""


def mark(found: SourceGrid, plan: Sequence[Entry] = ()) -> None:
    """From now on tables mark types and files on that grid ("type" and "histogram" of planned files)."""
    mark_names(found.marked([(p["type"], p["histogram"]) for p in plan]), MARK)


def grid(found: SourceGrid, trained: bool = True) -> Shown:
    """Share of blocks that each type gives back, and whether the base's weights lie on its grid; why nobody knows."""
    if found.product is None:
        return (tell("quantize.not_measured", reason=found.reason),)
    shares = sorted(found.shares.items(), key=lambda pair: -pair[1])
    rows = [{"tensor_type": kind, "given_back": share} for kind, share in shares]
    tried = {"blocks": found.blocks, "matrices": found.matrices, "trained": trained}
    shown = table(rows, sentence("quantize.grid_caption", **tried))
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


# Page 06: the error of the weights.


def kinds_of(measured: TensorErrors | Retention) -> list[str]:
    """Kinds of tensors in all files, those of the layers first."""
    return _kinds([row for found in measured.files.values() for row in found])


def error_map(errors: TensorErrors) -> HTML | Markdown:
    """Relative RMSE of every tensor: one panel a file, a row a kind, a column a layer."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    use_style()
    rows = [row for found in errors.files.values() for row in found]
    values = [row["relative_rmse"] for row in rows if row["relative_rmse"] > 0]
    if not values:
        return tell("quantize.no_errors")
    kinds, layers = _kinds(rows), _layers(rows)
    across = max(1, min(len(errors.files), 15 // (layers + 4) + 1))
    down = -(-len(errors.files) // across)
    size = (PHONE_WIDE, 0.7 + down * (0.6 + 0.17 * len(kinds)))
    fig, axes = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False, sharey=True)
    scale = LogNorm(min(values), max(values))
    for ax, (name, found) in zip(axes.flat, errors.files.items(), strict=False):
        image = _map_by_layer(ax, found, "relative_rmse", kinds, layers, norm=scale)
        ax.set_title(name, fontsize=9)
    for ax in axes.flat[len(errors.files) :]:
        ax.set_axis_off()
    for ax in axes[-1]:
        ax.set_xlabel("layer (–: others)", fontsize=8)
    fig.colorbar(image, ax=axes, location="bottom", aspect=40, label="error ÷ size of the tensor")
    alt = sentence("quantize.error_map_alt", files=errors.files)
    return figure(fig, sentence("quantize.error_map_caption"), alt)


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


# Page 06: one block of Q4_K, for the cell that takes it apart.

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
            "step_size": float(steps[i]),
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
