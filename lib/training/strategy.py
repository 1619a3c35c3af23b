"""Which way of training fits this machine, with its arithmetic: from a parameter file and the model's shape alone."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from lib import device
from lib.errors import InputError
from lib.models.quiet import no_warnings, quiet
from lib.models.resolving import how_to_get
from lib.run.folders import user_path
from lib.settings import OFFLINE_BASE
from lib.training import memory
from lib.training.targets import with_adapter

if TYPE_CHECKING:
    from lib.settings import Settings

MOST = 0.9
"""Share of the free memory that a plan may need; the estimate is good to about a tenth."""

ANSWER_TOKENS = 4
"""Loss tokens of a labelled row that are reckoned with: a label of up to three tokens, and the end of the turn."""

OFFLOAD = (
    "Offload (weights kept in the processor's memory or on a disk while a GPU trains) is not something "
    "this workbook does."
)


@dataclass(frozen=True)
class Plan:
    """One way to train.

    Attributes:
        name: in words. changes: the settings that differ from those asked for.
        estimate: bytes by purpose of one process; need: bytes on one device, of all processes that share it.
        possible: whether this machine can start so many processes.
        fits: whether the need is at most MOST of what is free, too.
    """

    name: str
    changes: dict[str, Any]
    estimate: memory.Estimate
    need: int
    possible: bool
    fits: bool

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "estimate": self.estimate.to_json()}


@dataclass(frozen=True)
class Strategy:
    """All plans in the order of preference, and the first that fits (None: none does)."""

    model: str
    weights: int
    tokens: int
    device: str
    devices: int
    free: int
    dtype: str
    plans: tuple[Plan, ...]
    chosen: Plan | None

    def to_json(self) -> dict[str, Any]:
        """For machines; sizes in bytes."""
        plain = {
            key: getattr(self, key) for key in ("model", "weights", "tokens", "device", "devices", "free", "dtype")
        }
        chosen = self.chosen.name if self.chosen else None
        return {**plain, "plans": [plan.to_json() for plan in self.plans], "recommended": chosen, "offload": OFFLOAD}


def recommend(settings: Settings, source: str | None = None) -> Strategy:
    """Estimate every plan for `base_model` (or the model folder `source`) and choose the first that fits.

    Rows are reckoned as long as `max_seq_length`, and answers of conversations too: real rows need less.

    Raises:
        InputError: the model's configuration is not on this machine (nothing is downloaded).
    """
    quiet()
    name = source or settings.base_model
    dtype = device.compute_dtype(settings.dtype)[0]
    kind, free, devices = _machine()
    base_model = _skeleton(name, dtype)
    weights = sum(parameter.numel() for parameter in base_model.parameters())
    adapted = with_adapter(copy.deepcopy(base_model).requires_grad_(False), settings)
    process = psutil.Process().memory_info().rss if kind == "cpu" else 0
    plans = []
    for words, changes in _ways(settings, kind, devices):
        asked = settings.model_copy(update=changes)
        estimated = memory.estimate(_shape(adapted, asked), process)
        need = estimated.total * (asked.num_processes if kind == "cpu" else 1)
        possible = kind == "cpu" or asked.num_processes <= devices
        plans.append(Plan(words, changes, estimated, need, possible, possible and need <= MOST * free))
    chosen = next((plan for plan in plans if plan.fits), None)
    return Strategy(
        name, weights, settings.max_seq_length, device.device_name(), devices, free, dtype, tuple(plans), chosen
    )


def _machine() -> tuple[str, int, int]:
    """Kind of device, bytes free on one (the fullest), and how many could train together."""
    kind = device.torch_device()
    if kind != "cuda":
        return kind, device.available_memory(), 1
    import torch

    count = torch.cuda.device_count()
    return kind, min(torch.cuda.mem_get_info(index)[0] for index in range(count)), count


def _ways(settings: Settings, kind: str, devices: int) -> list[tuple[str, dict[str, Any]]]:
    """All plans as words and changes, in the order of preference."""
    ways: list[tuple[str, dict[str, Any]]] = [("as the parameter file says", {})]
    if kind == "cuda" and devices > 1 and settings.num_processes != devices:
        words, changes = _divided(settings, devices)
        ways.insert(0, (f"{devices} processes, one on each GPU{words}", changes))
    root: dict[str, Any] = {}
    if settings.num_processes > 1:
        words, single = _divided(settings, 1)
        ways.append((f"a single process{words}", single))
        root = single if kind != "cuda" or settings.num_processes > devices else {}
    for words, changes in _alternatives(settings.model_copy(update=root)):
        together = {**root, **changes}
        words += ", a single process" if root else ""
        ways.append((words, {key: value for key, value in together.items() if getattr(settings, key) != value}))
    return ways


def _divided(settings: Settings, processes: int) -> tuple[str, dict[str, Any]]:
    """The changes for so many processes with as many rows an update; and a word where that cannot be divided."""
    rows, passes = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    update = rows * passes * settings.num_processes
    if update % processes:
        more = rows * passes * processes
        return f" (an update of {more} rows, not {update})", {"num_processes": processes}
    each = update // processes
    fitting = max(size for size in range(1, min(rows, each) + 1) if each % size == 0)
    changes = {"num_processes": processes, "per_device_train_batch_size": fitting}
    changes["gradient_accumulation_steps"] = each // fitting
    return "", {key: value for key, value in changes.items() if getattr(settings, key) != value}


def _alternatives(settings: Settings) -> list[tuple[str, dict[str, Any]]]:
    """What to change, the least harmful first: first what leaves the updates as they are, then 4 bits."""
    rows, passes = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    small: dict[str, Any] = {}
    if rows > 1:
        small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows * passes}
    plans = [("one row a forward pass", small)] if small else []
    again = {**small, "gradient_checkpointing": True}
    if not settings.gradient_checkpointing:
        plans.append(("gradient checkpointing", again))
    if not settings.load_in_4bit and device.bitsandbytes_problem() is None:
        four = {"load_in_4bit": True, "dtype": "auto"}
        if not settings.gradient_checkpointing:
            plans.append(("QLoRA", {**small, **four}))
        plans.append(("QLoRA with gradient checkpointing", {**again, **four}))
    return plans


def _shape(model: Any, settings: Settings) -> memory.Shape:
    """Sizes of a plan; `model` has the adapter, which is the same in all plans, and no weights."""
    answer = ANSWER_TOKENS if settings.task == "classification" else settings.max_seq_length
    return memory.shape_of(model, settings, settings.max_seq_length, answer, settings.load_in_4bit)


def _skeleton(name: str, dtype: str) -> Any:
    """The model without weights, from its configuration."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), no_warnings():
        return AutoModelForCausalLM.from_config(
            _config(name), dtype=getattr(torch, dtype), trust_remote_code=False, attn_implementation="sdpa"
        )


def _config(name: str) -> Any:
    from transformers import AutoConfig

    if name == OFFLINE_BASE:
        from lib.models.offline_base import BaseRecipe, model_config
        from lib.models.offline_tokenizer import TokenizerRecipe

        return model_config(BaseRecipe(), TokenizerRecipe().vocabulary)
    folder = user_path(name)
    if folder.is_file() and folder.suffix.lower() == ".gguf":
        from lib.models.resolving import refuse_without_template
        from lib.models.unpacking.configuration import transformers_config
        from lib.models.unpacking.source import read_source

        refuse_without_template(str(folder))
        return transformers_config(read_source(folder).config, folder)
    if name.lower().endswith(".gguf"):
        raise InputError(f"no file {folder}.", "a .gguf file.", f"{how_to_get(folder)}.")
    file = folder / "config.json" if folder.is_dir() else folder if folder.name == "config.json" else _cached(name)
    if file is None or not file.is_file():
        raise InputError(
            f"no config.json of {name} on this machine (nothing is downloaded here).",
            "a model folder, or a model that notebook 01 has downloaded before.",
            "give the model's folder: workbook doctor PARAMS --model FOLDER.",
        )
    try:
        return AutoConfig.from_pretrained(str(file.parent), trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{file} cannot be used ({reason}).", "a causal language model.", "check the model.") from None


def _cached(name: str) -> Path | None:
    """config.json in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name.partition("@")[0], "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
