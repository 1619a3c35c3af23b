"""QLoRA: the adapter was trained on a base rounded to NF4. Into which base should it be merged?

Two answers are measured against the model that was trained, the adapter on the NF4 base: the original weights (finer
than what the adapter saw), and the NF4 weights turned back into 16 bits (exactly what it saw, rounding included).
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lib.models.loading import load_model
from lib.models.weights import INDEX, open_weights
from lib.progress import Progress
from lib.prompts.tasks import Task
from lib.runs.machine import quiet
from lib.scoring.perplexity import kl_divergence
from lib.settings import DEQUANTIZED
from lib.statistics.intervals import Interval, paired_bootstrap, wilson

NF4, ORIGINAL = "adapter on the NF4 base", "original"
"""The trained model, and one of the two merges, as `merge_base` names them; the other is `DEQUANTIZED`."""

ROWS, POSITIONS = 200, 4
"""Validation rows on which they are compared, and last positions of each prompt whose distributions are."""

_SMALL_FILES = ("config.json", INDEX, "generation_config.json", "LICENSE", "NOTICE")


@dataclass(frozen=True)
class Nf4Result:
    """One of the three models on the same rows. Shares and divergences are [estimate, low, high] with 95 % intervals.

    Attributes:
        model: `NF4`, `ORIGINAL` or `DEQUANTIZED`.
        rows, positions: prompts, and positions of them at which distributions are compared.
        kld: mean KL(NF4 ‖ this) of the next token, nats a position; bootstrap over prompts.
        same_top: share of positions with the same most probable token (no interval: positions depend on each other).
        label_agreement: share of rows with the same label as the NF4 model (Wilson); None for rows without labels.
        accuracy: share of rows with the right label (Wilson); None for rows without labels.
        size_mb: of the merged weights; None for the NF4 model, which is not merged.
    """

    model: str
    rows: int
    positions: int
    kld: list[float]
    same_top: float
    label_agreement: list[float] | None
    accuracy: list[float] | None
    size_mb: float | None


@dataclass(frozen=True)
class Nf4Comparison:
    """All three, and which merge is closer to what was trained.

    Attributes:
        difference: KL of the dequantized merge minus KL of the original one, nats; [estimate, low, high], paired
            bootstrap over prompts. Below zero: the dequantized base is closer.
        closer: `ORIGINAL`, `DEQUANTIZED`, or None when the interval holds zero.
    """

    results: list[Nf4Result]
    difference: list[float]
    closer: str | None


def dequantize_base(base: Path, folder: Path) -> Path:
    """Write `base` with every 4-bit layer's weight replaced by what its NF4 form stands for, in the base's dtype.

    The layers and their weights are taken from the model as QLoRA loads it, so they are those that were trained on.

    Raises:
        InputError: bitsandbytes does not work here, or the folder is not usable.
    """
    from safetensors.torch import save_file

    quiet()
    import bitsandbytes as bnb

    weights = open_weights(base)
    model = load_model(base, load_in_4bit=True)
    layers = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    folder.mkdir(parents=True)
    with Progress("turning the NF4 base back into 16 bits (tensors)", len(weights.tensors)) as progress:
        for file in weights.files:
            tensors = {name: stored.tensor() for name, stored in weights.tensors.items() if stored.file == file}
            for name, tensor in tensors.items():
                if name in layers:
                    packed = layers[name].weight
                    wide = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
                    tensors[name] = wide.to("cpu", tensor.dtype).contiguous()
                progress.advance()
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
    for name in _SMALL_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    return folder


def compare_merges(
    base: Path, adapter: Path, merges: dict[str, Path], rows: Sequence[dict[str, Any]], task: Task, tokenizer: Any
) -> Nf4Comparison:
    """Measure both merges against the adapter on the NF4 base.

    Args:
        merges: folder of the merged model by `ORIGINAL` and `DEQUANTIZED`.
        rows: {"text", "label"} or {"messages"}; validation rows, because a choice may follow.
        tokenizer: of the run.

    Raises:
        InputError: a model cannot be loaded.
    """
    prompts, answers = [task.probe_ids(tokenizer, row) for row in rows], task.answer_words(tokenizer)
    truth = np.array([row["label"] for row in rows]) if answers else None
    loaders = {
        NF4: lambda: load_model(base, load_in_4bit=True, adapter=adapter),
        **{name: lambda path=path: load_model(path) for name, path in merges.items()},
    }
    measured = {}
    progress = Progress("comparing with the adapter on the NF4 base", len(loaders) * 2 * len(prompts))
    with progress, tempfile.TemporaryDirectory(prefix="workbook-nf4-") as references:
        for name, load in loaders.items():
            measured[name] = _measure(load(), prompts, answers, Path(references), progress)
            gc.collect()

    def share(labels: np.ndarray | None, wanted: np.ndarray | None) -> list[float] | None:
        """Of rows with the wanted label; None for rows without labels."""
        if labels is None or wanted is None:
            return None
        return _with_limits(wilson(int((labels == wanted).sum()), len(prompts)))

    results = [
        Nf4Result(
            model=name,
            rows=len(prompts),
            positions=len(found.same_top),
            kld=_with_limits(paired_bootstrap(found.divergence)),
            same_top=float(found.same_top.mean()),
            label_agreement=share(found.labels, measured[NF4].labels),
            accuracy=share(found.labels, truth),
            size_mb=open_weights(merges[name]).nbytes / 1e6 if name in merges else None,
        )
        for name, found in measured.items()
    ]
    difference = paired_bootstrap(measured[DEQUANTIZED].divergence - measured[ORIGINAL].divergence)
    closer = (DEQUANTIZED if difference.estimate < 0 else ORIGINAL) if difference.excludes_zero() else None
    return Nf4Comparison(results, _with_limits(difference), closer)


class _Measured(NamedTuple):
    """A model's answers.

    Attributes:
        labels: most probable label of every row; None for rows without labels.
        divergence: mean KL divergence of each prompt from the NF4 model, nats.
        same_top: of every position, whether the NF4 model's most probable token is the same.
    """

    labels: np.ndarray | None
    divergence: np.ndarray
    same_top: np.ndarray


def _measure(
    model: Any, prompts: list[list[int]], answers: list[list[int]], references: Path, progress: Progress
) -> _Measured:
    """Measure one model; the first one (the NF4 model) leaves its distributions in the folder `references`."""
    from lib.scoring.torch_backend import TransformersBackend

    backend = TransformersBackend(model, batch_size=16)
    labels = backend.label_log_probs(prompts, answers).argmax(1) if answers else None
    progress.advance(len(prompts))
    divergence, same_top = [], []
    for i, ids in enumerate(prompts):
        mine, path = backend.window_log_probs(ids, max(0, len(ids) - POSITIONS)), references / f"{i}.npy"
        if not path.is_file():
            np.save(path, mine)
        reference = np.load(path)
        divergence.append(kl_divergence(reference, mine).mean())
        same_top.append(reference.argmax(-1) == mine.argmax(-1))
        progress.advance()
    backend.close()
    return _Measured(labels, np.array(divergence), np.concatenate(same_top))


def _with_limits(interval: Interval) -> list[float]:
    return [interval.estimate, interval.low, interval.high]
