"""The self-check of a merge: does the merged model answer as base + adapter does?

Both are run in the same arithmetic on the same token ids, and the log-probabilities of the next token are compared at
the last positions of every prompt. In float32 the only difference is the rounding of the merged weights.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError
from lib.models.saved import affordable_dtype
from lib.progress import Progress
from lib.scoring.divergence import kl_divergence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POSITIONS = 8
"""Last positions of each prompt that are compared; the last one is where the answer starts."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}
"""Largest |Δ log p| by dtype of the merged weights. Seen with a real adapter on 24 layers: 5e-6, 0.02, 0.002."""

KLD_FLOOR = {"float32": 1e-6, "bfloat16": 2e-4, "float16": 1e-5}
"""Mean KL divergence, nats, that rounding alone may cause, by dtype. Seen there: 7e-8, 6e-6, 1e-7."""

KLD_SHARE = 0.01
"""Further mean KL divergence allowed, as a share of what the adapter itself changes."""


@dataclass(frozen=True)
class MergeCheck:
    """Base + adapter against the merged model.

    Attributes:
        dtype: of the merged weights; computed_in: arithmetic of both models.
        prompts, positions: how much was compared.
        max_abs_log_prob: largest |Δ log p| of the most probable token and of those above 1e-4 in either, over all
            positions.
        mean_kld: mean KL(base + adapter ‖ merged), nats a position.
        argmax_agreement: share of positions with the same most probable token.
        effect_kld: mean KL(base + adapter ‖ base): what the adapter does at all; mean_kld should be far below it.
        effect_agreement: share of positions where base and base + adapter have the same most probable token.
    """

    dtype: str
    computed_in: str
    prompts: int
    positions: int
    max_abs_log_prob: float
    mean_kld: float
    argmax_agreement: float
    effect_kld: float
    effect_agreement: float
    tolerance: float
    max_kld: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


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


def _agreement(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.mean(p.argmax(axis=-1) == q.argmax(axis=-1)))


def check_merge(base: Path, adapter: Path, merged: Path, prompts: Sequence[list[int]], dtype: str) -> MergeCheck:
    """Compare base + adapter with the merged model, reloaded from its folder.

    Args:
        prompts: token ids; a few dozen real prompts of the run.
        dtype: dtype of the merged weights ("float32", "bfloat16", "float16", "mixed").

    Raises:
        InputError: they differ by more than rounding explains; the message holds the numbers.
    """
    from lib.models.loading import load_model

    started = time.monotonic()
    if not prompts or min(len(ids) for ids in prompts) == 0:
        raise InputError("no prompt to check the merge with.", "a few prompts.", "give rows with text.")
    arithmetic = affordable_dtype(base)
    with Progress("checking the merge (prompts)", 3 * len(prompts)) as progress:
        model = load_model(base, dtype=arithmetic, adapter=adapter)
        reference = _log_probs(model, prompts, progress)
        with model.disable_adapter():
            plain = _log_probs(model, prompts, progress)
        del model
        gc.collect()
        result = _log_probs(load_model(merged, dtype=arithmetic), prompts, progress)
        gc.collect()
    check = _compare(reference, plain, result, dtype, arithmetic, len(prompts), started)
    _refuse(check, merged)
    return check


def _compare(
    reference: np.ndarray,
    plain: np.ndarray,
    result: np.ndarray,
    dtype: str,
    arithmetic: str,
    prompts: int,
    started: float,
) -> MergeCheck:
    coarse = "bfloat16" if arithmetic == "bfloat16" or dtype not in TOLERANCE else dtype
    effect = float(kl_divergence(reference, plain).mean())
    likely = np.maximum(reference, result) > np.log(1e-4)
    np.put_along_axis(likely, reference.argmax(-1)[:, None], True, axis=-1)  # a flat distribution has none above that
    return MergeCheck(
        dtype=dtype,
        computed_in=arithmetic,
        prompts=prompts,
        positions=len(reference),
        max_abs_log_prob=float(np.abs(reference - result)[likely].max()),
        mean_kld=float(kl_divergence(reference, result).mean()),
        argmax_agreement=_agreement(reference, result),
        effect_kld=effect,
        effect_agreement=_agreement(reference, plain),
        tolerance=TOLERANCE[coarse],
        max_kld=KLD_FLOOR[coarse] + KLD_SHARE * effect,
        seconds=round(time.monotonic() - started, 2),
    )


def _refuse(check: MergeCheck, merged: Path) -> None:
    if check.max_abs_log_prob <= check.tolerance and check.mean_kld <= check.max_kld:
        return
    raise InputError(
        f"the merged model {merged.name} differs from base + adapter: largest |Δ log p| {check.max_abs_log_prob:.3g}, "
        f"mean KL divergence {check.mean_kld:.3g} nats, equal answers {check.argmax_agreement:.1%} "
        f"(the adapter itself changes the base by {check.effect_kld:.3g} nats).",
        f"at most {check.tolerance:g} and {check.max_kld:.3g} nats for {check.dtype} weights.",
        "check that adapter and base belong together; report it if they do.",
    )
