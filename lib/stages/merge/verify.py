"""What a merge costs: the answers of base + adapter beside those of the merged model, and of other number formats.

`lib.stages.merge.proof` proves that the weights are right; what is left is their rounding, and what that does to the
answers depends on the model. Base + adapter (summed by peft, in float32) and the merged model are run in the same
arithmetic on the same token ids, and the log-probabilities of the next token are compared at the last positions of
every prompt. The other formats are measured in memory: peft's own float32 sum, every weight rounded to the format.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError, refusal
from lib.models.adapters import folder_kind
from lib.models.loading import affordable_dtype, load_model
from lib.models.weights import FLOAT16_MAX
from lib.progress import Progress
from lib.scoring.perplexity import kl_divergence, normalised

if TYPE_CHECKING:
    from transformers import PreTrainedModel


POSITIONS = 8
"""Last positions of each prompt that are compared; the last one is where the answer starts."""

FORMATS = ("float32", "float16", "bfloat16")
"""Number formats whose cost is measured; the last two take the same bytes."""

KLD_SHARE = 0.1
"""Largest mean KL divergence of a merge, as a share of what the adapter itself changes.

KL divergence grows with about the square of a change: a tenth is what undoing a third of the adapter does. SmolLM2-135M
in bfloat16, LoRA of rank 8 on all linear layers: 0.8 % after an epoch of 1,600 rows (as accurate as the adapter), and
11.6 % after 20 updates, whose small changes rounding sets back in 60 % of the weights (float16 loses 0.0002 %)."""

KLD_FLOOR = {"float32": 1e-3, "bfloat16": 1e-2}
"""Mean KL divergence, nats, that is never refused, by arithmetic of the check: a share of nearly nothing is nothing.

In float32: what `gate_max_kld` allows a conversion. In bfloat16 the arithmetic alone makes thousandths of a nat."""


@dataclass(frozen=True)
class FormatCost:
    """What rounding base + adapter to one number format changes.

    Attributes:
        dtype: "float32", "float16", "bfloat16", or "mixed" (that of a base with several).
        written: whether it is the merged folder, reloaded from the disk; else it was rounded in memory.
        mean_kld: mean KL(base + adapter ‖ rounded), nats a position.
        max_abs_log_prob: largest |Δ log p| of the most probable token and of those above 1e-4 in either, over all
            positions.
        argmax_agreement: share of positions with the same most probable token.
        answer_agreement: share of prompts with the same most probable first token of the answer.
    """

    dtype: str
    written: bool
    mean_kld: float
    max_abs_log_prob: float
    argmax_agreement: float
    answer_agreement: float


@dataclass(frozen=True)
class MergeCheck:
    """Base + adapter against the merged model.

    Attributes:
        dtype: of the merged weights; computed_in: arithmetic of both models.
        prompts, positions: how much was compared.
        max_abs_log_prob, mean_kld, argmax_agreement, answer_agreement: of the merged model, as in `FormatCost`.
        effect_kld: mean KL(base + adapter ‖ base): what the adapter does at all.
        effect_agreement: share of positions where base and base + adapter have the same most probable token.
        max_kld: the largest mean_kld that is not refused.
        costs: of the merged model and of the other formats.
        left_out: format → why it was not measured.
    """

    dtype: str
    computed_in: str
    prompts: int
    positions: int
    max_abs_log_prob: float
    mean_kld: float
    argmax_agreement: float
    answer_agreement: float
    effect_kld: float
    effect_agreement: float
    max_kld: float
    costs: list[FormatCost]
    left_out: dict[str, str]
    seconds: float


@dataclass(frozen=True)
class _Reference:
    """Log-probabilities of base + adapter and of the base, float32 (positions, vocabulary); rows of answer starts."""

    tuned: np.ndarray
    plain: np.ndarray
    starts: np.ndarray

    def cost(self, dtype: str, found: np.ndarray, written: bool = False) -> FormatCost:
        """What differs between base + adapter and another model's log-probabilities."""
        likely = np.maximum(self.tuned, found) > np.log(1e-4)
        # the top token in any case: a flat distribution has none above that
        np.put_along_axis(likely, self.tuned.argmax(-1)[:, None], True, axis=-1)
        return FormatCost(
            dtype=dtype,
            written=written,
            mean_kld=_mean_kld(self.tuned, found),
            max_abs_log_prob=float(np.abs(self.tuned - found)[likely].max()),
            argmax_agreement=_agreement(self.tuned, found),
            answer_agreement=_agreement(self.tuned[self.starts], found[self.starts]),
        )


def _mean_kld(p: np.ndarray, q: np.ndarray) -> float:
    """Mean KL(p ‖ q) of a position, nats; row by row, because the arrays are large."""
    return float(np.mean([kl_divergence(*map(normalised, pair)) for pair in zip(p, q, strict=True)]))


def _agreement(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.mean(p.argmax(axis=-1) == q.argmax(axis=-1)))


def check_merge(base: Path, adapter: Path | None, merged: Path, prompts: Sequence[list[int]], dtype: str) -> MergeCheck:
    """Compare base + adapter with the merged model, reloaded from its folder, and with other roundings of it.

    Args:
        adapter: a model folder, where every weight was trained, stands for base + adapter. None = the base alone. It
            has no change that rounding could eat, so that nothing is refused.
        prompts: token ids; a few dozen real prompts of the run.
        dtype: dtype of the merged weights ("float32", "bfloat16", "float16", "mixed").

    Raises:
        InputError: rounding takes more than `KLD_SHARE` of what the adapter changed; the message holds the numbers.
    """
    started = time.monotonic()
    if not prompts or min(len(ids) for ids in prompts) == 0:
        raise InputError("no prompt to check the merge with.", "a few prompts.", "give rows with text.")
    arithmetic = affordable_dtype(base)
    others = [name for name in FORMATS if name != dtype]
    with Progress("checking the merge (prompts)", ((3 if adapter else 2) + len(others)) * len(prompts)) as progress:
        reference, costs, left_out = _base_and_adapter(base, adapter, arithmetic, others, prompts, progress)
        gc.collect()
        found = _log_probs(load_model(merged, dtype=arithmetic), prompts, progress)
        gc.collect()
    own, effect = reference.cost(dtype, found, written=True), _mean_kld(reference.tuned, reference.plain)
    check = MergeCheck(
        **{key: value for key, value in vars(own).items() if key != "written"},
        computed_in=arithmetic,
        prompts=len(prompts),
        positions=len(reference.tuned),
        effect_kld=effect,
        effect_agreement=_agreement(reference.tuned, reference.plain),
        max_kld=max(KLD_FLOOR[arithmetic], KLD_SHARE * effect),
        costs=[own, *costs],
        left_out=left_out,
        seconds=round(time.monotonic() - started, 2),
    )
    if adapter:
        _refuse(check, merged)
    return check


def _base_and_adapter(
    base: Path,
    adapter: Path | None,
    arithmetic: str,
    names: Sequence[str],
    prompts: Sequence[list[int]],
    progress: Progress,
) -> tuple[_Reference, list[FormatCost], dict[str, str]]:
    """Base + adapter, the base alone, and the cost of the formats `names`, or why it was not measured."""
    whole = adapter is not None and folder_kind(adapter) == "model"
    folder, adapter = (adapter, None) if whole else (base, adapter)
    untuned = _log_probs(load_model(base, dtype=arithmetic), prompts, progress) if whole else None
    gc.collect()
    model = load_model(folder, dtype=arithmetic, adapter=adapter)
    tuned = _log_probs(model, prompts, progress)
    plain = tuned if untuned is None else untuned
    if adapter:
        with model.disable_adapter():
            plain = _log_probs(model, prompts, progress)
    starts = np.cumsum([min(POSITIONS, len(ids)) for ids in prompts]) - 1
    reference, costs, left_out = _Reference(tuned, plain, starts), [], {}
    if arithmetic != "float32":
        why = "its weights in float32 do not fit into memory"
        progress.advance(len(names) * len(prompts))
        return reference, costs, dict.fromkeys(names, why)
    if adapter:
        model.merge_adapter()
    rounded, largest = False, max(float(w.detach().abs().max()) for w in model.parameters() if w.numel())
    for name in names:
        if rounded:
            del model
            gc.collect()
            model = load_model(folder, dtype=arithmetic, adapter=adapter)
            if adapter:
                model.merge_adapter()
        if name == "float16" and largest > FLOAT16_MAX:
            left_out[name] = f"a weight is larger than {FLOAT16_MAX:,.0f}"
            progress.advance(len(prompts))
            continue
        rounded = name != "float32"
        if rounded:
            _round_weights(model, name)
        costs.append(reference.cost(name, _log_probs(model, prompts, progress)))
    return reference, costs, left_out


def _log_probs(model: PreTrainedModel, prompts: Sequence[list[int]], progress: Progress) -> np.ndarray:
    """Log-softmax at the last positions of every prompt, float32 (positions, vocabulary)."""
    import torch

    rows = []
    with torch.inference_mode():
        for ids in prompts:
            keep = min(POSITIONS, len(ids))
            logits = model(input_ids=torch.tensor([ids], device=model.device), logits_to_keep=keep).logits[0]
            rows.append(torch.log_softmax(logits.float(), dim=-1).cpu().numpy())
            progress.advance()
    return np.concatenate(rows)


def _round_weights(model: Any, dtype: str) -> None:
    """Round every float32 weight to a format, in place."""
    import torch

    target = getattr(torch, dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(target))


def _refuse(check: MergeCheck, merged: Path) -> None:
    if check.mean_kld <= check.max_kld:  # written so that NaN fails
        return
    if check.computed_in == "bfloat16" and check.dtype != "bfloat16" and check.mean_kld < float("inf"):
        return  # bfloat16 arithmetic rounds the finer weights once more: what it shows is not their cost
    floor, cure = KLD_FLOOR[check.computed_in], _cure(check)
    raise refusal("merge/other-answers", merged=merged, check=check, share=KLD_SHARE, floor=floor, cure=cure)


def _cure(check: MergeCheck) -> str:
    """What to do about a merge that rounding spoils, by the costs that were measured."""
    fitting = [cost for cost in check.costs if not cost.written and cost.mean_kld <= check.max_kld]
    if check.left_out and not fitting:
        why = "; ".join(f"{dtype}: {reason}" for dtype, reason in check.left_out.items())
        return f"set merge_dtype: float16, or train the adapter longer (not measured here: {why})."
    if not fitting:
        return "train the adapter longer, or report it: no number format keeps what it changes."
    best = min(fitting, key=lambda cost: (cost.dtype == "float32", cost.mean_kld))
    return f"set merge_dtype: {best.dtype}, which would cost {best.mean_kld:.2g} nats."
