"""A LoRA adapter as stored by peft: what each of its tensors changes, or why it cannot be merged.

Scaling of a module: alpha / r, or alpha / √r with rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732); r and
alpha may differ by module (`rank_pattern`, `alpha_pattern`). DoRA (Liu et al. 2024, arXiv 2402.09353) rescales every
row of W + scaling·B·A to a trained length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.models.weights import StoredTensor, read_file
from lib.run.files import read_json

RULES = (
    "peft_type is LORA, weights are safetensors (no pickle)",
    "no fan_in_fan_out, layer replication, mixture, quantization-aware or base-changing variant of LoRA",
    "no LoRA on lm_head or embed_tokens of a model with tied embeddings, no trained tokens of its lm_head alone",
    "every adapter tensor is used exactly once; every A has its B; ranks equal the configuration",
    "every targeted module exists in the base with the adapter's shape, and every targeted module has its pair",
    "no NaN and no infinity in adapter, base or result",
    "input folders and output folder differ",
)
"""What is checked before and during a merge; each violation refuses it."""

_UNSUPPORTED = {
    "fan_in_fan_out": "transposed weights (fan_in_fan_out), which Qwen does not have",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA on bare parameters",
    "alora_invocation_tokens": "activated LoRA, which depends on the prompt",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "a router of adapters",
    "velora_config": "VeLoRA",
    "monteclora_config": "Monte Carlo LoRA",
    "kasa_config": "KaSA",
    "loftq_config": "LoftQ, which changes the base",
    "megatron_config": "Megatron layers",
}
_SAFE_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass
class Update:
    """How one weight of the base changes.

    Attributes:
        kind: "linear" (W + scaling·B·A), "embedding" (W + scaling·(B·A)ᵀ), "bias" (b + scaling·bias of B),
            "replace" (a fully trained copy), or "rows" (some rows are fully trained).
        tensors: the adapter's tensors by role: "A", "B", "magnitude", "value".
        rows: for "rows": which row of the weight each row of "value" replaces.
    """

    kind: str
    scaling: float = 1.0
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """An adapter folder: its configuration and its tensors."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def refuse(self, found: str, expected: str, do: str) -> InputError:
        """The error for this adapter."""
        return InputError(f"{self.folder}: {found}.", f"{expected}.", f"{do}.")


def read_adapter(folder: Path) -> Adapter:
    """Read adapter_config.json and the header of adapter_model.safetensors.

    Raises:
        InputError: missing files, a pickle, another kind of adapter, or an option that cannot be merged.
    """
    config_file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config_file.is_file():
        raise InputError(f"no adapter_config.json in {folder}.", "a peft adapter folder.", "check the path.")
    if not weights_file.is_file() and list(folder.glob("adapter_model*.bin")):
        raise InputError(
            f"{folder} holds a pickled adapter (.bin).",
            "adapter_model.safetensors (a pickle can run any code).",
            "save it again with save_pretrained(safe_serialization=True).",
        )
    config = read_json(config_file)
    if not isinstance(config, dict) or str(config.get("peft_type", "")).upper() != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise InputError(f"{config_file}: peft_type {kind!r}.", "LORA.", "merge this adapter with peft itself.")
    tensors, _ = read_file(weights_file)
    adapter = Adapter(folder, config, tensors)
    for key, words in _UNSUPPORTED.items():
        if config.get(key):
            raise adapter.refuse(f"{words} ({key})", "plain LoRA, rsLoRA or DoRA", "merge it with peft and check it")
    init = config.get("init_lora_weights", True)
    if init not in _SAFE_INITS:
        raise adapter.refuse(
            f"init_lora_weights {init!r}, which changed the base during training",
            "an adapter for the unchanged base",
            "save it with path_initial_model_for_weight_conversion, so that peft converts it to plain LoRA",
        )
    if not tensors:
        raise adapter.refuse("no tensor", "a trained adapter", "train it again")
    return adapter
