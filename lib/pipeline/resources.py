"""What a run will take: room on the disk by product, and time, from sizes and a short measurement of this machine."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import InputError
from lib.models.base_model import configuration_of
from lib.models.offline_base import BaseRecipe, TokenizerRecipe, model_config
from lib.models.unpack_source import read_source
from lib.runs import files
from lib.runs.machine import compute_dtype, has_module, torch_device
from lib.settings import FULL, OFFLINE_BASE, UNTRAINED, Settings
from lib.stages.export.sizes import Shapes, about_gguf, group_size, predict_folder

_SIDE = 1024
"""Rows and columns of the matrices that are multiplied."""
_PATIENCE = 3.0
"""Seconds that the products of a measurement take."""
REACHED = 0.4
"""Share of the speed of large matrix products that a training reaches, roughly (docs/LOG.md)."""
LONG = 8 * 3600.0
"""Seconds above which a run on this machine is no plan."""
_DAY = 24 * 3600.0


def configuration(source: str) -> tuple[dict[str, Any], str]:
    """config.json of a base model, and where it is from: "offline", "gguf", or as `configuration_of` says.

    Raises:
        InputError: it can be had nowhere, or cannot be used.
    """
    file = files.user_path(source)
    if source == OFFLINE_BASE:
        return model_config(BaseRecipe(), TokenizerRecipe().vocabulary).to_dict(), "offline"
    if file.is_file() and file.suffix.lower() == ".gguf":
        return dict(read_source(file).config), "gguf"
    return configuration_of(source)


@dataclass(frozen=True)
class Speed:
    """This machine, measured: floating-point operations a second, in which format and where, and bytes a second that
    the disk of runs/ takes."""

    flops: float
    how: str
    disk: float


def measure_speed(folder: Path, device: str = "cpu", dtype: str = "float32", patience: float = _PATIENCE) -> Speed:
    """Matrix products and writing.

    Args:
        folder: on the disk that is measured. device, dtype: those of the training.
        patience: seconds that the products take; writing takes a third of them at most.
    """
    product, how = _product(device, dtype)
    product()  # warm
    count, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < patience:
        product()
        count += 1
    return Speed(2 * _SIDE**3 * count / passed, how, _written(folder, patience / 3))


def _product(device: str, dtype: str) -> tuple[Any, str]:
    """One product of two matrices, finished when it returns; what it computes in, in words."""
    if not has_module("torch"):
        one = np.ones((_SIDE, _SIDE), np.float32)
        return (lambda: one @ one), "float32 (NumPy)"
    import torch

    own = torch.ones((_SIDE, _SIDE), dtype=getattr(torch, dtype), device=device)

    def run() -> None:
        result = own @ own
        if device != "cpu":
            result[0, 0].item()  # waits

    return run, f"{dtype} on the {device.upper() if device == 'cpu' else device}"


def _written(folder: Path, patience: float) -> float:
    """Bytes a second."""
    block = os.urandom(1 << 24)
    with tempfile.TemporaryFile(dir=files.writable(folder)) as file:
        count, started = 0, time.perf_counter()
        while (passed := time.perf_counter() - started) < patience and count < 32:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            count += 1
    return count * len(block) / passed if passed else float("inf")


def disk_of(settings: Settings, shapes: Shapes, download: bool) -> dict[str, int]:
    """Bytes of the large products of a run, by product.

    A model whose weights are all trained is kept in float32, beside three checkpoints of it with AdamW's two numbers.

    Args:
        download: whether the base model has to be fetched first.
    """
    exports = {name: predict_folder(shapes, name) for name in settings.export_formats}
    ladder = [about_gguf(shapes, name) for name in settings.ladder]
    wide = 2 if settings.merge_dtype == "float32" else 1
    base = predict_folder(shapes, "bf16")
    weights = sum(map(math.prod, shapes.values()))
    return {
        "base": base if download else 0,
        **({"adapter": (4 + 3 * 12) * weights * settings.folds} if settings.finetuning_type == FULL else {}),
        "merged": base * wide * settings.folds,
        "gguf": about_gguf(shapes, "F16") * settings.folds,
        "quantized": (sum(ladder) + round(settings.size_budget_mb * 1e6)) * settings.folds,
        "exports": sum(exports.values()) * settings.folds,
    }


def seconds_of(
    settings: Settings, weights: int, rows: Mapping[str, int], speed: Speed, disk: int, tokens: float = 0
) -> dict[str, float]:
    """Roughly the seconds of a run's long steps on this machine.

    A pass over a token costs 2 operations a weight; a training step 4 (LoRA needs no gradients of the base's weights),
    2 more where every weight is trained, and 2 more with gradient checkpointing (Kaplan et al. 2020, §2.1). Base and
    fine-tuned model score the test rows in 03, every file and export in 07.

    Args:
        rows: by split, of one fold.
        tokens: of a row, on average; 0 = not known: as many as `max_seq_length` allows.
    """
    tokens, rate = tokens or settings.max_seq_length, speed.flops * REACHED / settings.folds
    passes = (6 if settings.gradient_checkpointing else 4) + 2 * (settings.finetuning_type == FULL)
    passes = 0 if settings.finetuning_type == UNTRAINED else passes
    models = 4 + len(settings.ladder) + len(settings.export_formats)
    return {
        "training": passes * weights * tokens * rows["train"] * settings.num_train_epochs / rate,
        "evaluation": 2 * weights * tokens * rows["test"] * models / rate,
        "files": 3 * disk / speed.disk,
    }


@dataclass(frozen=True)
class Expected:
    """What a run will take: weights of its model, bytes by product, seconds by long step, the speed they are from."""

    weights: int
    disk: dict[str, int]
    seconds: dict[str, float]
    speed: Speed

    @property
    def time(self) -> str:
        """The time class of all steps."""
        return time_class(sum(self.seconds.values()))


def expected(
    settings: Settings,
    shapes: Shapes,
    rows: Mapping[str, int],
    download: bool,
    patience: float = _PATIENCE,
    tokens: float = 0,
) -> Expected:
    """Measure this machine, and say what the run will take on it.

    Args:
        rows, tokens, download, patience: as `seconds_of`, `disk_of` and `measure_speed` take them.
    """
    device, dtype = "cpu", "float32"
    if has_module("torch"):
        device, dtype = torch_device(), compute_dtype(settings.dtype)[0]
    speed, disk = measure_speed(files.home(), device, dtype, patience), disk_of(settings, shapes, download)
    weights = sum(map(math.prod, shapes.values()))
    seconds = seconds_of(settings, weights, rows, speed, sum(disk.values()), tokens)
    return Expected(weights, disk, seconds, speed)


def time_class(seconds: float) -> str:
    """A time class: nobody should read more into an estimate."""
    for most, words in ((600, "minutes"), (3600, "less than an hour"), (LONG, "some hours"), (_DAY, "a day")):
        if seconds <= most:
            return words
    days = seconds / _DAY
    return f"about {days:.0f} days" if days < 14 else f"about {days / 7:.0f} weeks"


def possible_formats(settings: Settings, shapes: Shapes) -> dict[str, str]:
    """Why an export format that was asked for cannot be made here, by its name; empty where all can."""
    from lib.stages.export.stage import FORMATS

    problems = {name: FORMATS[name].problem() for name in settings.export_formats}
    widths = {shape[1] for name, shape in shapes.items() if len(shape) == 2 and ".layers." in name}
    for name in problems.keys() & {"gptq", "autoround"} if group_size(widths) is None else ():
        problems[name] = "rows that no group of 16 weights divides"
    return {name: problem for name, problem in problems.items() if problem}


def conversion_problem(config: Mapping[str, Any]) -> str | None:
    """Why 05 could not convert a model of this configuration, as far as that alone tells; None where nothing is known
    against it."""
    from lib.stages.convert.official import kept_sources, known_classes
    from lib.stages.convert.tensors import ForeignModelError, read_convertible

    with tempfile.TemporaryDirectory(prefix="workbook-config-") as name:
        files.write_json(Path(name) / "config.json", dict(config))
        try:
            read_convertible(Path(name))
        except ForeignModelError as error:
            sources, kinds = kept_sources(), config.get("architectures") or [""]
            return None if sources and kinds[0] in known_classes(sources) else error.found
        except InputError as error:
            return error.found
    return None
