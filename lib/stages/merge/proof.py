"""The proof of a merge: every number in the merged files is the right sum, rounded once.

The sums are computed again, another way than the merge computes them: in float64, a block of rows at a time, with the
scaling that peft's own rules give, from the files as they lie on the disk. Three kinds of tensors:

- not touched by the adapter, or replaced as a whole (`modules_to_save`, trained tokens): equal bits; where the merged
  model has another number format, the bits of torch's cast.
- W + s·B·A (also of an embedding, of a bias, and rescaled by DoRA): the merge sums in float32, whose result depends on
  the order of the additions, which the linear algebra library chooses. So the bits of two float32 sums cannot be
  compared. But every order ends within E of the exact sum T (Higham 2002, *Accuracy and Stability of Numerical
  Algorithms*, section 3.1; u = 2⁻²⁴, rank r, γ_n = n u / (1 - n u)):

      E = |s| γ_(r+3) (|B| |A|) + u |T|

  Rounding to nearest never changes the order of two numbers, so the stored number must lie between the roundings of
  T - E and T + E. In 16 bits these two are equal for nearly all weights, which then have one right value, bit for bit;
  `MergeProof.decided` counts them. The others lie next to the middle of two neighbours, and both are right.

DoRA: with rows of n numbers the length ‖T‖ has a relative error of at most ‖E‖ / ‖T‖ + (n / 2 + 4) u, and three more
roundings follow.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lib.errors import InputError, refusal
from lib.models.merge_plan import Update, plan_merge
from lib.models.weights import TORCH, StoredTensor, Weights, open_weights, slabs
from lib.progress import track
from lib.runs.machine import no_warnings

if TYPE_CHECKING:
    import torch


_BLOCK = 1 << 19  # weights summed at a time: four float64 arrays of it fit a processor's cache
_COPIED = 1 << 22  # weights compared at a time where nothing is summed
_U = 2.0**-24  # unit roundoff of float32
_OWN_ERROR = 1.000001  # rounding in float64, in the sums and bounds of this proof, is 10⁹ times smaller than E
_SMALLEST = 2.0**-126  # below it the error of float32 is no longer relative, and a processor may flush it to 0


@dataclass(frozen=True)
class MergeProof:
    """What was recomputed and found right.

    Attributes:
        tensors_summed, weights_summed: those that the adapter changes by a sum.
        tensors_copied, weights_copied: those that are equal bits (or the cast) of the base or of the adapter.
        decided: summed weights for which only one number of the format is right (all of them hold it).
        nearest: summed weights that hold the rounding of the exact sum; the others hold its neighbour, which a float32
            sum in another order gives.
        kept: Σ (stored - W) (T - W) / Σ (T - W)² over the summed weights: how much of the adapter's change rounding
            leaves (1 = all; less where changes are smaller than half a step of the format, so that W comes back); None
            where nothing changes.
        set_back: summed weights that hold W again although T differs from it.
        rounding: by tensor that is a sum, √(Σ (stored - T)² / Σ (T - W)²): the error of rounding beside the change.
        dtype: of the merged weights as safetensors names it ("BF16"), "mixed" where there are several.
    """

    tensors_summed: int
    weights_summed: int
    tensors_copied: int
    weights_copied: int
    decided: int
    nearest: int
    kept: float | None
    set_back: int
    dtype: str
    seconds: float
    rounding: dict[str, float] = field(default_factory=dict)


def prove_merge(base: Path, adapter: Path | None, merged: Path, dtype: str | None = None) -> MergeProof:
    """Compute every tensor of the model folder `merged` again from `base` and `adapter`.

    Args:
        adapter: None = every tensor is the base's, bit for bit, or the cast of it.
        dtype: as safetensors names it ("BF16"), of all merged tensors; None = each has that of the base.

    Raises:
        InputError: a tensor that is missing, superfluous, of another shape or format, or holds a number that no right
            merge gives; with its name and how many weights are wrong.
    """
    started = time.monotonic()
    plan, written = plan_merge(base, adapter), open_weights(merged)
    weights, updates = plan.base, plan.updates
    _check_places(weights, written, dtype)
    factors = _scalings(adapter, updates) if plan.adapter else {}
    counts: dict[str, float] = defaultdict(float)
    wrong: dict[str, int] = {}
    rounding: dict[str, float] = {}
    for name, tensor in track(written.tensors.items(), "proving the merge (tensors)"):
        update, own = updates.get(name), weights.tensors[name]
        if update and update.is_sum:
            before = dict(counts)
            count = _check_sums(tensor, own, update, factors[name], counts)
            change, error = (counts[key] - before.get(key, 0.0) for key in ("change", "error"))
            rounding |= {name: float(f"{math.sqrt(error / change):.3g}")} if change else {}
        else:
            count = _differing(tensor, own, update)
        if count:
            wrong[name] = count
    summed = [name for name, update in updates.items() if update.is_sum]
    if wrong:
        raise _wrong_weights(written, summed, wrong)
    weights_summed = sum(written.tensors[name].size for name in summed)
    kinds = {tensor.dtype for tensor in written.tensors.values()}
    return MergeProof(
        tensors_summed=len(summed),
        weights_summed=weights_summed,
        tensors_copied=len(written.tensors) - len(summed),
        weights_copied=written.parameters - weights_summed,
        decided=int(counts["decided"]),
        nearest=int(counts["nearest"]),
        kept=counts["kept"] / counts["change"] if counts["change"] else None,
        set_back=int(counts["set back"]),
        dtype=kinds.pop() if len(kinds) == 1 else "mixed",
        seconds=round(time.monotonic() - started, 2),
        rounding=rounding,
    )


def _check_places(base: Weights, merged: Weights, dtype: str | None) -> None:
    """The merged folder has the base's tensors, and each its shape and number format."""
    if odd := sorted(set(base.tensors) ^ set(merged.tensors)):
        where = "lacks" if odd[0] in base.tensors else "has the superfluous"
        raise _no_merge(merged.folder, f"it {where} tensor {odd[0]} ({len(odd)} such tensors)")
    for name, tensor in merged.tensors.items():
        own, wanted = (tensor.shape, tensor.dtype), (base.tensors[name].shape, dtype or base.tensors[name].dtype)
        if own != wanted:
            raise _no_merge(merged.folder, f"{name} is {own[1]} {own[0]}, and should be {wanted[1]} {wanted[0]}")


def _scalings(adapter: Path, updates: dict[str, Update]) -> dict[str, float]:
    """The factor of B·A of every changed weight by peft's own configuration and matching of names."""
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    with no_warnings():
        config = LoraConfig.from_pretrained(str(adapter))

    def factor(module: str) -> float:
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), module), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha)
        return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank

    return {name: factor(name.rpartition(".")[0]) for name in updates}


def _cast(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Rounded by torch, by way of float32 as the merge's sums are (a float64 model stays what it is)."""
    import torch

    target = getattr(torch, TORCH[dtype])
    return values if values.dtype == target else values.to(torch.float32).to(target)


def _differing(written: StoredTensor, base: StoredTensor, update: Update | None) -> int:
    """Number of weights that are not those of the base, or of the adapter that replaces them."""
    import torch

    whole = update is not None and update.kind == "replace"
    source = update.tensors["value"] if whole else base
    trained = {} if update is None or whole else dict(zip(update.rows, update.tensors["value"].tensor(), strict=True))
    wrong = 0
    for rows, first, count in slabs(written, _COPIED):
        values = source.read_tensor(first, count)
        if trained:
            values = values.to(torch.float64).reshape(rows.stop - rows.start, -1)
            for row, value in trained.items():
                if rows.start <= row < rows.stop:
                    values[row - rows.start] = value.to(torch.float64)
            values = values.reshape(-1)
        right, found = _cast(values, written.dtype), written.read_tensor(first, count)
        if not torch.equal(_bits(right), _bits(found)):
            wrong += int((_bits(right) != _bits(found)).sum())
    return wrong


def _bits(values: torch.Tensor) -> torch.Tensor:
    import torch

    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def _check_sums(
    written: StoredTensor, base: StoredTensor, update: Update, scaling: float, counts: dict[str, float]
) -> int:
    """Number of weights outside of what a float32 sum, rounded once, can be; adds to `counts`."""
    import torch

    wrong = 0
    for rows, first, count in slabs(written, _BLOCK):
        weight = base.read_tensor(first, count).to(torch.float64).reshape(-1, *written.shape[1:])
        with torch.inference_mode():
            total, error = _sum_and_bound(weight, update, rows, scaling)
            right, low, high = (_cast(value, written.dtype) for value in (total, total - error, total + error))
            found = written.read_tensor(first, count).reshape(right.shape)
            counts["decided"] += int((low == high).sum())
            counts["nearest"] += int((found == right).sum())
            change, stored = ((value.to(torch.float64) - weight).reshape(-1) for value in (total, found))
            counts["kept"] += float(stored @ change)
            counts["change"] += float(change @ change)
            counts["error"] += float((stored - change) @ (stored - change))
            counts["set back"] += int(((stored == 0) & (change != 0)).sum())
            wrong += count - int(((low <= found) & (found <= high)).sum())  # NaN is in no interval
    return wrong


def _sum_and_bound(
    weight: torch.Tensor, update: Update, rows: slice, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact sum T of some rows, and the bound E of the float32 error; both float64, of the shape of `weight`."""
    if update.kind == "bias":
        product = _float32_values(update.tensors["value"].tensor()[rows])
        size, rank = product.abs(), 0
    else:
        a, b = (_float32_values(update.tensors[role].tensor()) for role in ("A", "B"))
        rank = len(a)
        a, b = (a[:, rows], b) if update.kind == "embedding" else (a, b[rows])
        product, size = b @ a, b.abs() @ a.abs()
        if update.kind == "embedding":
            product, size = product.T, size.T
    gamma = (rank + 3) * _U / (1 - (rank + 3) * _U)
    total = product.mul_(scaling).add_(weight)
    error = size.mul_(abs(scaling) * gamma).add_(total.abs(), alpha=_U)
    if "magnitude" in update.tensors:
        length = _float32_values(update.tensors["magnitude"].tensor()[rows])[:, None]
        norm = total.norm(dim=1, keepdim=True)
        relative = error.norm(dim=1, keepdim=True) / norm + (total.shape[1] / 2 + 4) * _U
        factor = length / norm
        total = total.mul_(factor)
        error = error.mul_(factor.abs()).add_(total.abs() * (relative + 3 * _U)).mul_(1.01)  # terms of second order
    return total, error.mul_(_OWN_ERROR).add_((rank + 3) * _SMALLEST)


def _float32_values(tensor: torch.Tensor) -> torch.Tensor:
    """An adapter's numbers as the merge takes them, float32, for sums in float64."""
    import torch

    return tensor.to(torch.float32).to(torch.float64)


def _wrong_weights(written: Weights, summed: list[str], wrong: dict[str, int]) -> InputError:
    """The refusal of a merge; it names the first tensors with their numbers of wrong weights."""
    shown = []
    for name, count in list(wrong.items())[:3]:
        rule = "the sum, rounded once" if name in summed else "the stored value"
        shown.append(f"{name} ({count:,} of {written.tensors[name].size:,} weights are not {rule})")
    more = f" and {len(wrong) - len(shown)} more" if len(wrong) > len(shown) else ""
    which = f"{len(wrong)} of {len(written.tensors)} tensors are wrong: {', '.join(shown)}{more}"
    return _no_merge(written.folder, which)


def _no_merge(merged: Path, found: str) -> InputError:
    return refusal("merge/no-merge", merged=merged, found=found)
