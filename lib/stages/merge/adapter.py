"""A LoRA adapter as stored by peft: what each of its tensors changes, or why it cannot be merged.
What an adapter changes in a base, tensor by tensor, or why it cannot be merged: everything that headers can show.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.models.weights import StoredTensor, Weights, read_file
from lib.runs.files import read_json

# A LoRA adapter as stored by peft: what each of its tensors changes, or why it cannot be merged.
#
# Scaling of a module: alpha / r, or alpha / √r with rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732); r and
# alpha may differ by module (`rank_pattern`, `alpha_pattern`). DoRA (Liu et al. 2024, arXiv 2402.09353) rescales every
# row of W + scaling·B·A to a trained length.

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


# What an adapter changes in a base, tensor by tensor, or why it cannot be merged: everything that headers can show.

_PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B)")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.weight)?")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
"""The output matrix and the input embedding; a tied model stores only the second."""

_TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta")


def _pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name (peft's rule)."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _targeted(config: dict[str, Any], module: str) -> bool:
    """Whether target_modules names this module (peft's rule: a regular expression, or names or name endings)."""
    wanted = config.get("target_modules") or []
    if isinstance(wanted, str):
        return wanted == "all-linear" or re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted)


def _collect(adapter: Adapter, base: Weights) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, Update]]:
    """LoRA tensors by module and role, and the tensors that replace one of the base."""
    pairs: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    replaced: dict[str, Update] = {}
    saved = adapter.config.get("modules_to_save") or []
    for name, tensor in adapter.tensors.items():
        inner = name.removeprefix(_PREFIX)
        if _TOKENS.fullmatch(inner):
            continue
        if match := _LORA.fullmatch(inner):
            role = match[2].removeprefix("lora_").removesuffix(".weight").replace(".bias", "bias")
            pairs[match[1]][role.replace("embedding_", "e")] = tensor
            continue
        if match := _MAGNITUDE.fullmatch(inner):
            pairs[match[1]]["magnitude"] = tensor
            continue
        target = inner.replace(".base_layer.", ".")
        module, _, part = target.rpartition(".")
        whole = any(module.endswith(key) for key in saved)  # peft's rule
        bias = part == "bias" and adapter.config.get("bias", "none") != "none"
        if target == HEAD and HEAD not in base.tensors and adapter.config.get("ensure_weight_tying"):
            continue  # the copy of embed_tokens, which is merged
        if target in base.tensors and (whole or bias):
            replaced[target] = Update("replace", tensors={"value": tensor})
        elif not _is_copy(tensor, base.tensors.get(target)):
            raise adapter.refuse(
                f"tensor {name}, which nothing in the configuration or the base explains",
                "only tensors that belong to target_modules, modules_to_save or bias of this base",
                "use the base and the adapter_config.json it was trained with",
            )
    return pairs, replaced


def _is_copy(tensor: StoredTensor, original: StoredTensor | None) -> bool:
    """peft stores the base's embeddings beside LoRA on them; a copy changes nothing."""
    if original is None or original.shape != tensor.shape:
        return False
    return bool((tensor.tensor() == original.tensor()).all())


def unties(adapter: Adapter, base_config: dict[str, Any]) -> bool:
    """Whether merging gives a tied base an output matrix of its own.

    A fully trained lm_head or embed_tokens (modules_to_save) changes one use of the shared matrix only; with
    `ensure_weight_tying` peft trains both uses as one, and the model stays tied.
    """
    if not base_config.get("tie_word_embeddings"):
        return False
    saved = adapter.config.get("modules_to_save") or []
    stored = [name.removesuffix(".weight") for name in (HEAD, EMBEDDING) if f"{_PREFIX}{name}" in adapter.tensors]
    if adapter.config.get("ensure_weight_tying") and len(stored) == 2:
        return False
    return any(module.endswith(key) for module in stored for key in saved)


def with_own_head(base: Weights) -> Weights:
    """The weights of a tied model with the shared matrix once more as its output matrix."""
    shared = base.tensors[EMBEDDING]
    tensors = sorted([*base.tensors.values(), replace(shared, name=HEAD)], key=lambda tensor: tensor.name)
    ordered = {tensor.name: tensor for file in base.files for tensor in tensors if tensor.file == file}
    return replace(base, tensors=ordered)


def plan_updates(adapter: Adapter, base: Weights, base_config: dict[str, Any]) -> dict[str, Update]:
    """What changes, by name of the base's tensor.

    Args:
        base: `with_own_head` where the adapter `unties` the model.

    Raises:
        InputError: anything that `RULES` forbids and that headers can show.
    """
    config, tied = adapter.config, bool(base_config.get("tie_word_embeddings"))
    if tied and config.get("ensure_weight_tying"):
        _check_one_matrix(adapter)
    if tied:
        _check_tied(adapter)
    pairs, updates = _collect(adapter, base)
    updates |= _trained_tokens(adapter, base, tied)
    for module, roles in pairs.items():
        name = f"{module}.weight"
        _check_target(adapter, module, name in base.tensors)
        rank = _pattern(config.get("rank_pattern"), module, config.get("r", 8))
        alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
        scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        first, second = ("eA", "eB") if "eA" in roles or "eB" in roles else ("A", "B")
        kind = "embedding" if first == "eA" else "linear"
        _check_pair(adapter, module, roles, (first, second), rank, base.tensors[name].shape, kind)
        if name in updates:
            raise adapter.refuse(f"LoRA and fully trained weights for {module}", "one of them", "train it again")
        update = Update(kind, scaling, {"A": roles[first], "B": roles[second]})
        if config.get("use_dora") != ("magnitude" in roles) and (config.get("use_dora") or "magnitude" in roles):
            raise adapter.refuse(f"use_dora and the tensors of {module} disagree", "both or neither", "train it again")
        if "magnitude" in roles:
            _check_magnitude(adapter, module, roles["magnitude"], kind, base.tensors[name].shape)
            update.tensors["magnitude"] = roles["magnitude"]
        updates[name] = update
        if "Bbias" in roles:
            if f"{module}.bias" not in base.tensors:
                raise adapter.refuse(f"a bias for {module}, which has none", "a base with that bias", "train without")
            updates[f"{module}.bias"] = Update("bias", scaling, {"value": roles["Bbias"]})
    _check_replacements(adapter, updates, base)
    _check_complete(adapter, pairs, base)
    return updates


def _trained_tokens(adapter: Adapter, base: Weights, tied: bool) -> dict[str, Update]:
    """Rows of embeddings that were trained whole (peft's trainable_token_indices)."""
    wanted = adapter.config.get("trainable_token_indices") or {}
    wanted = {"embed_tokens": wanted} if isinstance(wanted, list) else wanted
    found: dict[str, Update] = {}
    for name, tensor in adapter.tensors.items():
        if not (match := _TOKENS.fullmatch(name.removeprefix(_PREFIX))):
            continue
        module = match[1]
        target, rows = f"{module}.weight", wanted.get(module.rpartition(".")[2])
        if rows is None or (target not in base.tensors and not (tied and module.endswith("lm_head"))):
            raise adapter.refuse(
                f"trained tokens of {module}, which the configuration or the base does not have",
                "trainable_token_indices that belong to these weights",
                "restore the original adapter_config.json, or give the base it was trained with",
            )
        if tied and module.endswith("lm_head"):
            raise adapter.refuse(
                "trained tokens of lm_head, and the base shares one matrix between input and output",
                "trained tokens of embed_tokens",
                "train without lm_head in trainable_token_indices",
            )
        have, width = base.tensors[target].shape
        fits = len(set(rows)) == len(rows) and all(type(row) is int and 0 <= row < have for row in rows)
        if not fits or tensor.shape != (len(rows), width):
            raise adapter.refuse(
                f"{len(rows)} trained tokens of {module}, stored as {tensor.shape}, for {have} rows of {width}",
                "distinct tokens of this base, a stored row for each",
                "give the base it was trained with",
            )
        found[target] = Update("rows", tensors={"value": tensor}, rows=tuple(rows))
    if missing := sorted(set(wanted) - {name.removesuffix(".weight").rpartition(".")[2] for name in found}):
        raise adapter.refuse(f"no trained tokens of {missing[0]}", "those the configuration names", "train it again")
    return found


def _check_target(adapter: Adapter, module: str, exists: bool) -> None:
    if not exists:
        raise adapter.refuse(
            f"LoRA on {module}, which the base does not have", "the base it was trained on", "give that base"
        )
    if not _targeted(adapter.config, module):
        raise adapter.refuse(
            f"tensors for {module}, which target_modules does not name",
            "an adapter_config.json that belongs to these weights",
            "restore the original adapter_config.json",
        )


def _check_one_matrix(adapter: Adapter) -> None:
    """Both uses of the shared matrix were trained as one, so their two copies must be equal."""
    head, embedding = (adapter.tensors.get(f"{_PREFIX}{name}") for name in (HEAD, EMBEDDING))
    if head is not None and embedding is not None and not _is_copy(head, embedding):
        raise adapter.refuse(
            "different copies of lm_head and embed_tokens, although ensure_weight_tying trained them as one",
            "equal copies",
            "train it again",
        )


def _check_tied(adapter: Adapter) -> None:
    """LoRA on the one matrix that a tied model uses at both ends; peft merges it wrongly without a word."""
    for name in adapter.tensors:
        match = _LORA.fullmatch(name.removeprefix(_PREFIX))
        if match and match[1].rpartition(".")[2] in ("lm_head", "embed_tokens"):
            raise adapter.refuse(
                f"LoRA on {match[1]}, and the base shares one matrix between input and output",
                "LoRA on other modules (merging it would change both uses of the matrix, and the model's answers)",
                "train without lm_head and embed_tokens in target_modules",
            )


def _check_pair(
    adapter: Adapter,
    module: str,
    roles: dict[str, StoredTensor],
    names: tuple[str, str],
    rank: int,
    shape: tuple[int, ...],
    kind: str,
) -> None:
    missing = [name for name in names if name not in roles]
    if missing:
        raise adapter.refuse(
            f"{module} lacks lora_{missing[0]}", "both matrices of each pair", "train or copy it again"
        )
    out, inner = shape if kind == "linear" else shape[::-1]
    have = (roles[names[0]].shape, roles[names[1]].shape)
    want = ((rank, inner), (out, rank))
    if have != want:
        raise adapter.refuse(
            f"{module}: A {have[0]} and B {have[1]}",
            f"A {want[0]} and B {want[1]} (rank {rank}, base weight {tuple(shape)})",
            "use the base and the adapter_config.json it was trained with",
        )


def _check_magnitude(adapter: Adapter, module: str, magnitude: StoredTensor, kind: str, shape: tuple[int, ...]) -> None:
    if kind == "embedding":
        raise adapter.refuse(f"DoRA on the embedding {module}", "DoRA on linear layers", "merge it with peft")
    if magnitude.shape != shape[:1]:
        raise adapter.refuse(
            f"{module}: magnitude of shape {magnitude.shape}", f"{shape[:1]}", "use the base it was trained on"
        )


def _check_replacements(adapter: Adapter, updates: dict[str, Update], base: Weights) -> None:
    for name, update in updates.items():
        if "value" not in update.tensors or update.kind == "rows":
            continue
        if update.tensors["value"].shape != base.tensors[name].shape:
            raise adapter.refuse(
                f"{name} of shape {update.tensors['value'].shape}",
                f"{base.tensors[name].shape} as in the base",
                "use the base it was trained on (a resized vocabulary cannot be merged)",
            )


def _check_complete(adapter: Adapter, pairs: dict[str, dict[str, StoredTensor]], base: Weights) -> None:
    """A truncated adapter: a module that target_modules names has no pair."""
    config = adapter.config
    wanted = config.get("target_modules")
    if isinstance(wanted, str) or config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return
    for name, tensor in base.tensors.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and len(tensor.shape) == 2 and _targeted(config, module) and module not in pairs:
            raise adapter.refuse(
                f"no tensors for {module}, which target_modules names", "a pair for each", "copy or train it again"
            )
