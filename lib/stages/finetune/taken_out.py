"""PiSSA and OLoRA: the pair begins as a part of the base, and is stored as plain LoRA on the base as it was.

peft takes s·B₀·A₀ out of every targeted weight W, and W − s·B₀·A₀ + s·B·A is trained: PiSSA takes the largest singular
values (Meng et al. 2024, arXiv 2404.02948), OLoRA the first columns of a QR decomposition (Büyükakyüz 2024, arXiv
2406.01775). That is

    W + s·[B, −B₀]·[A; A₀],

a LoRA of twice the rank and alpha on W itself: what peft's `path_initial_model_for_weight_conversion` makes at the end
of a training. Here every checkpoint is stored so. It merges into the original base, and it holds both pairs, so that an
interrupted training goes on exactly. In 16 bits W − s·B₀·A₀ was rounded in training, and W is not: half a last place.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from lib.models.adapters import WEIGHTS
from lib.runs.files import read_json, write_json
from lib.settings import TAKEN_OUT

CONFIGURATION = "adapter_config.json"


class TakenOut:
    """The pairs that a fresh adapter took out of its base.

    Args:
        model: a PeftModel before its first update.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.first = model, _pairs(get_peft_model_state_dict(model))

    @classmethod
    def of(cls, model: Any) -> TakenOut | None:
        """None where the adapter takes nothing out of the base."""
        (config,) = getattr(model, "peft_config", {"": None}).values()
        return cls(model) if str(getattr(config, "init_lora_weights", "")).startswith(TAKEN_OUT) else None

    def store(self, folder: Path) -> None:
        """Turn the adapter that peft has written to `folder` into plain LoRA."""
        tensors = load_file(folder / WEIGHTS)
        for name, first in self.first.items():
            axis, first = (0, first) if ".lora_A." in name else (1, -first)
            tensors[name] = torch.cat([tensors[name], first.to(tensors[name].device)], axis).contiguous()
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config = read_json(folder / CONFIGURATION)
        more = math.sqrt(2) if config["use_rslora"] else 2
        doubled = {"r": 2 * config["r"], "lora_alpha": more * config["lora_alpha"], "init_lora_weights": True}
        write_json(folder / CONFIGURATION, config | doubled)

    def same(self, folder: Path) -> bool:
        """Whether a stored adapter began with the pairs that were taken out of this base."""
        _, first = self._divided(load_file(folder / WEIGHTS))
        return all(torch.equal(first[name], tensor) for name, tensor in self.first.items())

    def load(self, folder: Path) -> None:
        """Give the model the pair that was trained, from a stored adapter."""
        set_peft_model_state_dict(self.model, self._divided(load_file(folder / WEIGHTS))[0])

    def _divided(self, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """A stored adapter's tensors as they were trained, and the pairs that they began with."""
        trained, first = dict(tensors), {}
        for name in self.first:
            if ".lora_A." in name:
                trained[name], first[name] = tensors[name].chunk(2, 0)
            else:
                trained[name], taken = tensors[name].chunk(2, 1)
                first[name] = -taken
        return trained, first


def _pairs(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of the matrices A and B."""
    return {name: t.detach().cpu().clone() for name, t in tensors.items() if ".lora_A." in name or ".lora_B." in name}
