"""Beginnings of the pair A, B that depend on the base's weights: PiSSA and OLoRA, LoftQ.

PiSSA and OLoRA begin as a part of the base, and are stored as plain LoRA on the base as it was. peft takes s·B₀·A₀ out
of every targeted weight W, and W − s·B₀·A₀ + s·B·A is trained: PiSSA takes the largest singular values (Meng et al.
2024, arXiv 2404.02948), OLoRA the first columns of a QR decomposition (Büyükakyüz 2024, arXiv 2406.01775). That is

    W + s·[B, −B₀]·[A; A₀],

a LoRA of twice the rank and alpha on W itself: what peft's `path_initial_model_for_weight_conversion` makes at the end
of a training. Here every checkpoint is stored so. It merges into the original base, and it holds both pairs, so that an
interrupted training goes on exactly. In 16 bits W − s·B₀·A₀ was rounded in training, and W is not: half a last place.

LoftQ (Li et al. 2023, arXiv 2310.08659, with one step) begins as the best pair of its rank for what rounding the base
to 4 bits took, W − Q. It is a LoRA on Q, the base that was trained on, and nothing else: merged into W it would add
again what W never lost.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from lib.models.adapters import CONFIG, WEIGHTS
from lib.models.weights import Weights
from lib.progress import Progress
from lib.runs.files import read_json, write_json
from lib.settings import TAKEN_OUT

LOFTQ_CONFIG = {"loftq_bits": 4, "loftq_iter": 1}
"""Mark in adapter_config.json of an adapter that belongs to the rounded base alone. `init_lora_weights` stays true
there: peft would begin the pair anew when it loads the adapter."""


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
        config = read_json(folder / CONFIG)
        more = math.sqrt(2) if config["use_rslora"] else 2
        doubled = {"r": 2 * config["r"], "lora_alpha": more * config["lora_alpha"], "init_lora_weights": True}
        write_json(folder / CONFIG, config | doubled)

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


def make_up_for_rounding(model: Any, weights: Weights) -> None:
    """LoftQ: let s·B·A of every adapted layer in 4 bits begin as W − Q, as far as its rank goes.

    That is what peft's `replace_lora_weights_loftq` does on CUDA, but for the scale s, which that leaves out: with
    alpha = 2r it begins as far from W as before, on the other side.

    Args:
        model: a PeftModel over a base in NF4, before its first update. weights: of the base as it was.
    """
    import bitsandbytes as bnb
    from peft.tuners.lora import Linear4bit

    layers = {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, Linear4bit)}
    with Progress("beginning with what 4 bits took (layers)", len(layers)) as progress, torch.no_grad():
        for name, layer in layers.items():
            rounded = layer.get_base_layer().weight
            lost = weights.tensors[f"{name}.weight"].tensor().to(rounded.device, torch.float32)
            lost -= bnb.functional.dequantize_4bit(rounded.data, rounded.quant_state).float()
            u, s, v = torch.linalg.svd(lost, full_matrices=False)
            for adapter, rank in layer.r.items():
                root = (s[:rank] / layer.scaling[adapter]).sqrt()
                layer.lora_A[adapter].weight.copy_(root[:, None] * v[:rank])
                layer.lora_B[adapter].weight.copy_(u[:, :rank] * root)
                if adapter in layer.lora_variant:  # the length of DoRA's rows
                    layer.lora_variant[adapter].init(layer, adapter)
            progress.advance()
    for config in model.peft_config.values():
        config.loftq_config = LOFTQ_CONFIG
