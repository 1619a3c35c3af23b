"""A full model or a LoRA adapter? Told apart by what the files hold, never by their names.
Does a LoRA adapter fit a base model? Read from the headers; only the adapter's own numbers are looked at.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.models.weights import StoredTensor, Weights, open_weights, read_file

# A full model or a LoRA adapter? Told apart by what the files hold, never by their names.

_LORA_MARKS = (".lora_A.", ".lora_B.", ".lora_embedding_", ".lora_magnitude_vector")


def has_lora(names: Any) -> bool:
    """Whether tensor names are those of an adapter (peft's prefix, or a low-rank pair)."""
    return any(name.startswith("base_model.model.") or any(m in f"{name}." for m in _LORA_MARKS) for name in names)


def contents(folder: Path) -> set[str]:
    """What the weights of a folder are: "model", "adapter", both, or nothing. Damaged files count as nothing."""
    found = set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            tensors, _ = read_file(path)
        except InputError:
            continue
        if tensors:
            found.add("adapter" if has_lora(tensors) else "model")
    return found


def adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder; empty when there is none, or none that can be read."""
    try:
        content = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def refuse_adapter(folder: Path) -> None:
    """Refuse a LoRA adapter where a full model is needed.

    Raises:
        InputError: says for which base model it is, and how both are given.
    """
    config = adapter_config(folder)
    if contents(folder) == {"adapter"} or (config.get("peft_type") and "model" not in contents(folder)):
        base = config.get("base_model_name_or_path") or "the model it was trained on"
        raise InputError(
            f"{folder} is a LoRA adapter (rank {config.get('r', 'unknown')}, for {base}), not a full model.",
            "a full model: config.json, all weights as safetensors, tokenizer.",
            f"set base_model to {base} and adapter to this folder.",
        )


def require_adapter(folder: Path) -> None:
    """Refuse what is not a LoRA adapter in safetensors.

    Raises:
        InputError: a full model, a pickle, or a folder without adapter.
    """
    config = adapter_config(folder)
    found = contents(folder)
    if "adapter" in found and config:
        return
    if "model" in found and "adapter" not in found:
        raise InputError(
            f"{folder} is a full model, not a LoRA adapter.",
            "adapter_config.json and adapter_model.safetensors.",
            "set base_model to this folder and adapter to an adapter (or leave it empty to train one).",
        )
    if not found and sorted(folder.glob("adapter_model*.bin")):
        raise InputError(
            f"{folder} holds a pickled adapter (.bin).",
            "adapter_model.safetensors (a pickle can run any code).",
            "save it again with save_pretrained(safe_serialization=True).",
        )
    lacks = "no readable adapter_config.json" if not config else "no readable adapter_model.safetensors"
    raise InputError(f"{folder} holds {lacks}.", "a peft adapter folder.", "check the path, or copy it again.")


# Does a LoRA adapter fit a base model? Read from the headers; only the adapter's own numbers are looked at.

_PREFIX = "base_model.model."
_ROLE = re.compile(
    r"(?P<module>.+)\.(?P<role>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight|\.bias)?"
)


@dataclass(frozen=True)
class AdapterShape:
    """What an adapter's files say.

    Attributes:
        variant: "LoRA", "rsLoRA" or "DoRA". rank, alpha: as configured.
        ranks: pairs by their rank, as stored. modules: number of pairs.
        targets: last names of the changed modules, sorted. parameters: numbers stored. dtype: of most tensors.
        base: the base model it names.
    """

    variant: str
    rank: int | None
    alpha: float | None
    ranks: dict[int, int]
    modules: int
    targets: list[str]
    parameters: int
    dtype: str
    base: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_shape(folder: Path) -> AdapterShape:
    """What an adapter's configuration and headers say.

    Raises:
        InputError: another kind of adapter, damaged, or without tensors.
    """
    config = adapter_config(folder)
    if str(config.get("peft_type", "")).upper() != "LORA":
        raise InputError(f"{folder}: peft_type {config.get('peft_type')!r}.", "LORA.", "use a LoRA adapter.")
    tensors, _ = read_file(folder / "adapter_model.safetensors")
    pairs, _ = _pairs(tensors)
    if not pairs:
        raise InputError(f"{folder} holds no low-rank pair.", "a trained adapter.", "train or copy it again.")
    ranks = Counter(r["lora_A"].shape[0] for r in pairs.values() if "lora_A" in r and r["lora_A"].shape)
    return AdapterShape(
        variant="DoRA" if config.get("use_dora") else "rsLoRA" if config.get("use_rslora") else "LoRA",
        rank=rank if type(rank := config.get("r")) is int else None,
        alpha=alpha if type(alpha := config.get("lora_alpha")) in (int, float) else None,
        ranks=dict(sorted(ranks.items())),
        modules=len(pairs),
        targets=sorted({module.rpartition(".")[2] for module in pairs}),
        parameters=sum(tensor.size for tensor in tensors.values()),
        dtype=Counter(tensor.dtype for tensor in tensors.values()).most_common(1)[0][0],
        base=str(config.get("base_model_name_or_path") or ""),
    )


def check_fit(adapter: Path, base: Path) -> AdapterShape:
    """The adapter's shape, when every tensor of it has its place in the base model and is a finite number.

    Raises:
        InputError: a module that the base does not have, a wrong shape, half a pair, NaN or infinity.
    """
    shape, weights = read_shape(adapter), open_weights(base)
    tensors, _ = read_file(adapter / "adapter_model.safetensors")
    pairs, whole = _pairs(tensors)
    for module, roles in pairs.items():
        if problem := _problem(module, roles, weights):
            raise _unfit(adapter, base, problem)
    for name, tensor in whole.items():
        if not _has_place(name, tensor, weights):
            raise _unfit(adapter, base, f"{name} {tensor.shape} has no place there")
    _require_finite(adapter, tensors)
    return shape


def _pairs(tensors: dict[str, StoredTensor]) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, StoredTensor]]:
    """Low-rank tensors by module and role, and whole tensors (modules_to_save, bias) by the base's name."""
    pairs: dict[str, dict[str, StoredTensor]] = {}
    whole: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(_PREFIX)
        match = _ROLE.fullmatch(inner)
        if match and not name.endswith(".bias"):
            pairs.setdefault(match["module"], {})[match["role"]] = tensor
        elif not match:
            whole[inner] = tensor
    return pairs, whole


def _problem(module: str, roles: dict[str, StoredTensor], base: Weights) -> str | None:
    weight = base.tensors.get(f"{module}.weight")
    if weight is None or len(weight.shape) != 2:
        return f"it changes {module}, which the base does not have"
    first, second = ("lora_embedding_A", "lora_embedding_B") if "lora_embedding_A" in roles else ("lora_A", "lora_B")
    if first not in roles or second not in roles:
        return f"{module} lacks {first if first not in roles else second}"
    rows, columns = weight.shape if first == "lora_A" else weight.shape[::-1]
    a, b = roles[first].shape, roles[second].shape
    if len(a) != 2 or len(b) != 2 or a[1] != columns or b[0] != rows or a[0] != b[1]:
        return f"{module}: A {a} and B {b} for a weight {weight.shape}"
    return None


def _has_place(name: str, tensor: StoredTensor, base: Weights) -> bool:
    """Whether a whole tensor replaces one of the base, or its trained rows belong to an embedding of it."""
    embedding = base.tensors.get("model.embed_tokens.weight")
    if name.endswith(".token_adapter.trainable_tokens_delta"):
        return embedding is not None and len(tensor.shape) == 2 and tensor.shape[1:] == embedding.shape[1:]
    place = base.tensors.get(name.replace(".base_layer.", "."))
    if place is None and name == "lm_head.weight":  # a tied base stores the one matrix under its other name
        place = embedding
    return place is not None and place.shape == tensor.shape


def _require_finite(adapter: Path, tensors: dict[str, StoredTensor]) -> None:
    import torch

    for name, tensor in tensors.items():
        if not tensor.size:
            continue
        low, high = torch.aminmax(tensor.tensor())
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise InputError(
                f"tensor {name} in {adapter} holds NaN or infinity.", "finite weights.", "train or copy it again."
            )


def _unfit(adapter: Path, base: Path, problem: str) -> InputError:
    named = adapter_config(adapter).get("base_model_name_or_path") or "the one it was trained on"
    return InputError(
        f"the adapter {adapter} does not fit the base model {base}: {problem}.",
        "an adapter of this base model.",
        f"set base_model to {named}, or adapter to another one.",
    )
