"""What an adapter changes in a base, tensor by tensor, or why it cannot be merged: everything that headers can show.

Scaling of a module: alpha / r, or alpha / √r with rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732); r and
alpha may differ by module (`rank_pattern`, `alpha_pattern`). DoRA (Liu et al. 2024, arXiv 2402.09353) rescales every
row of W + scaling·B·A to a trained length.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lib.errors import InputError, refusal
from lib.models.adapters import CONFIG, PREFIX, Adapter, AdapterShape, LowRank, folder_kind, read_adapter, shape_of
from lib.models.configurations import check_language_model, read_configuration
from lib.models.weights import StoredTensor, Weights, largest_magnitude, open_weights
from lib.runs.files import data_file

_TABLES = data_file("models/merge_plan.yaml")
RULES: list[str] = _TABLES["rules"]
"""What is checked before and during a merge; each violation refuses it."""

_SAFE_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
"""The output matrix and the input embedding; a tied model stores only the second."""


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

    @property
    def is_sum(self) -> bool:
        """Whether the weight is summed; the others are copies."""
        return self.kind not in ("replace", "rows")


@dataclass(frozen=True)
class MergePlan:
    """A base, an adapter that fits it, and what changes.

    Attributes:
        base: its weights; with an output matrix of its own where the adapter unties the model.
        config: config.json of the merged model.
        adapter: None where the base is taken as it is, or a model in its place.
        trained: the model that stands in the base's place, every weight of it trained; else None.
        updates: by name of the base's tensor.
    """

    base: Weights
    config: dict[str, Any]
    adapter: Adapter | None
    updates: dict[str, Update]
    trained: Weights | None = None


def plan_merge(base: Path, folder: Path | None) -> MergePlan:
    """What merging the adapter in `folder` changes in the model folder `base`; without one, nothing.

    A model folder in its place, as `finetuning_type: full` makes it, replaces every weight.

    Raises:
        InputError: anything that `RULES` forbids and that headers can show; or a quantized base.
    """
    whole = folder is not None and not (folder / CONFIG).is_file() and folder_kind(folder) == "model"
    adapter = read_adapter(folder) if folder and not whole else None
    if adapter:
        refuse_unsupported(adapter)
    config = read_configuration(base, "the folder of the whole base model")
    if config.get("quantization_config"):
        raise refusal("models/quantized-base", path=base)
    weights = check_language_model(base, config)
    tied = bool(config.get("tie_word_embeddings"))
    if adapter and tied and _unties(adapter):
        weights, config, tied = _with_own_head(weights), config | {"tie_word_embeddings": False}, False
    trained = open_weights(folder) if whole else None
    updates = _plan_updates(adapter, weights, tied) if adapter else _in_its_place(weights, trained, tied)
    for tensor in weights.tensors.values():
        tensor.require_floats()
    return MergePlan(weights, config, adapter, updates, trained)


def _in_its_place(base: Weights, trained: Weights | None, tied: bool) -> dict[str, Update]:
    """A trained model's tensors in the place of the base's.

    Raises:
        InputError: it has other tensors than the base, or other shapes.
    """
    if trained is None:
        return {}
    tensors = dict(trained.tensors)
    if tied and HEAD in base.tensors:  # a base that stores its shared matrix twice
        tensors.setdefault(HEAD, tensors[EMBEDDING])
    if odd := sorted(tensors.keys() ^ base.tensors.keys()):
        raise refusal("models/other-model", folder=trained.folder, base=base.folder, names=", ".join(odd[:4]))
    if odd := [name for name, tensor in tensors.items() if tensor.shape != base.tensors[name].shape]:
        raise refusal("models/other-model", folder=trained.folder, base=base.folder, names=", ".join(odd[:4]))
    return {name: Update("replace", tensors={"value": tensor}) for name, tensor in tensors.items()}


def check_fit(folder: Path, base: Path) -> AdapterShape:
    """The adapter's shape, provided that it is finite and can be merged into the base: asked before anything is
    trained, evaluated or merged.

    Raises:
        InputError: as `plan_merge`; NaN or infinity.
    """
    adapter = read_adapter(folder)
    shape = shape_of(adapter)
    try:
        plan_merge(base, folder)
    except InputError as error:
        whose, _, problem = error.found.rstrip(".").partition(f"{folder}: ")
        if whose or not problem:  # of the base
            raise
        named = shape.base or "no base"
        raise refusal(
            "models/adapter-of-other-base", folder=folder, base=base, problem=problem, error=error, named=named
        ) from None
    adapter.require_finite()
    return shape


def refuse_unsupported(adapter: Adapter) -> None:
    """Refuse what no base makes right.

    Raises:
        InputError: a kind of LoRA that is not merged here, or no tensor.
    """
    for key, words in _TABLES["unsupported"].items():
        if adapter.config.get(key):
            raise refusal("models/unsupported", adapter=adapter, words=words, key=key)
    init = adapter.config.get("init_lora_weights", True)
    if init not in _SAFE_INITS:
        raise refusal("models/changed-base", adapter=adapter, init=init)
    if not adapter.tensors:
        raise refusal("models/no-tensor", adapter=adapter)


def remarks(adapter: Adapter) -> list[str]:
    """What is worth knowing of an adapter that can be merged."""
    odd = {key: value for key, value in adapter.config.items() if value and key not in _TABLES["known"]}
    found = [f"keys that this version does not know, and leaves out: {odd}"] if odd else []
    changes = [tensor for pair in adapter.pairs.values() for role, tensor in pair.tensors.items() if role != "A"]
    idle = not (adapter.config.get("lora_alpha", 8) or adapter.config.get("alpha_pattern"))
    idle = idle or not any(largest_magnitude(tensor.read(), tensor.dtype) for tensor in changes)
    return found + ["the adapter changes no weight"] * (idle and not (adapter.whole or adapter.tokens))


def _pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name (peft's rule)."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _targeted(config: dict[str, Any], module: str) -> bool:
    """Whether the configuration puts a pair on this module, by peft's rules (check_target_module_exists)."""

    def named(wanted: str | list[str] | None) -> bool:
        """A regular expression, or names or name endings."""
        if isinstance(wanted, str):
            return re.fullmatch(wanted, module) is not None
        return any(f".{module}".endswith(f".{name}") for name in wanted or ())

    saved = any(f".{name}." in f".{module}." for name in config.get("modules_to_save") or ())
    if saved or named(config.get("exclude_modules")):
        return False
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or [r"[^.]*"]
    if layers is not None and layers != []:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        places = (re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", module) for pattern in patterns)
        place = next((int(place[1]) for place in places if place), None)
        if place not in ([layers] if isinstance(layers, int) else layers):
            return False
    wanted = config.get("target_modules")
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        return f"{module}.weight" not in (HEAD, EMBEDDING)
    return named(wanted)


def _unties(adapter: Adapter) -> bool:
    """Whether merging gives a tied base an output matrix of its own.

    A fully trained lm_head or embed_tokens (modules_to_save) changes one use of the shared matrix only; with
    `ensure_weight_tying` peft trains both uses as one, and the model stays tied.
    """
    saved = tuple(adapter.config.get("modules_to_save") or ())
    stored = [name.removesuffix(".weight") for name in (HEAD, EMBEDDING) if f"{PREFIX}{name}" in adapter.tensors]
    as_one = adapter.config.get("ensure_weight_tying") and len(stored) == 2
    return not as_one and any(module.endswith(saved) for module in stored)


def _with_own_head(base: Weights) -> Weights:
    """The weights of a tied model, with the shared matrix a second time, as its output matrix."""
    tensors = [*base.tensors.values(), replace(base.tensors[EMBEDDING], name=HEAD)]
    tensors.sort(key=lambda tensor: (base.files.index(tensor.file), tensor.name))
    return replace(base, tensors={tensor.name: tensor for tensor in tensors})


def _plan_updates(adapter: Adapter, base: Weights, tied: bool) -> dict[str, Update]:
    if tied:
        _check_tied(adapter)
    updates = _replacements(adapter, base) | _trained_tokens(adapter, base, tied)
    for module, pair in adapter.pairs.items():
        _check_pair(adapter, module, pair, base)
        weight, bias = f"{module}.weight", f"{module}.bias"
        if weight in updates:
            raise refusal("models/trained-twice", adapter=adapter, module=module)
        rank, alpha = _rank(adapter, module), adapter.config.get("lora_alpha", 8)
        alpha = _pattern(adapter.config.get("alpha_pattern"), module, alpha)
        scaling = alpha / math.sqrt(rank) if adapter.config.get("use_rslora") else alpha / rank
        matrices = {role: tensor for role, tensor in pair.tensors.items() if role != "bias"}
        updates[weight] = Update("embedding" if pair.embedding else "linear", scaling, matrices)
        if "bias" in pair.tensors:
            if bias not in base.tensors:
                raise refusal("models/no-such-bias", adapter=adapter, module=module)
            updates[bias] = Update("bias", scaling, {"value": pair.tensors["bias"]})
    for name, update in updates.items():
        value, place = update.tensors.get("value"), base.tensors[name]
        if value is not None and update.kind != "rows" and value.shape != place.shape:
            raise refusal("models/other-shape", adapter=adapter, name=name, value=value, place=place)
    _check_complete(adapter, base)
    return updates


def _saved(config: dict[str, Any], name: str) -> bool:
    """Whether a tensor is of a module that modules_to_save names, or inside one (peft's rule: the name ends so)."""
    parts, saved = name.split("."), tuple(config.get("modules_to_save") or ())
    return any(".".join(parts[:i]).endswith(saved) for i in range(1, len(parts)))


def _rank(adapter: Adapter, module: str) -> int:
    return _pattern(adapter.config.get("rank_pattern"), module, adapter.config.get("r", 8))


def _replacements(adapter: Adapter, base: Weights) -> dict[str, Update]:
    """Fully trained copies of the base's tensors (modules_to_save, bias); unchanged copies are left out."""
    updates: dict[str, Update] = {}
    for name, tensor in adapter.whole.items():
        target = name.replace(".base_layer.", ".")
        trained = _saved(adapter.config, target)
        trained |= target.endswith(".bias") and adapter.config.get("bias", "none") != "none"
        if target == HEAD and HEAD not in base.tensors and adapter.config.get("ensure_weight_tying"):
            continue  # the copy of embed_tokens, which is merged
        if target in base.tensors and trained:
            updates[target] = Update("replace", tensors={"value": tensor})
        elif ".token_adapter." in name:
            raise refusal("models/tokens-of-copied-head", adapter=adapter, module=name.partition(".token_adapter.")[0])
        elif not _is_copy(tensor, base.tensors.get(target)):
            raise refusal("models/unexplained-tensor", adapter=adapter, name=name)
    return updates


def _is_copy(tensor: StoredTensor, original: StoredTensor | None) -> bool:
    """peft stores the base's embeddings beside LoRA on them; such a copy changes nothing."""
    if original is None or original.shape != tensor.shape:
        return False
    return bool((tensor.tensor() == original.tensor()).all())


def _trained_tokens(adapter: Adapter, base: Weights, tied: bool) -> dict[str, Update]:
    """Rows of embeddings that were trained whole (peft's trainable_token_indices)."""
    wanted = adapter.config.get("trainable_token_indices") or {}
    wanted = {"embed_tokens": wanted} if isinstance(wanted, list) else wanted
    updates: dict[str, Update] = {}
    for module, tensor in adapter.tokens.items():
        target, last = f"{module}.weight", module.rpartition(".")[2]
        rows = next((rows for name, rows in wanted.items() if f".{module}".endswith(f".{name}")), None)
        shared = tied and last == "lm_head"
        if rows is None or (target not in base.tensors and not shared):
            raise refusal("models/unexplained-tokens", adapter=adapter, module=module)
        if shared:
            raise refusal("models/tokens-of-shared-head", adapter=adapter)
        place = base.tensors[target]
        have, width = place.shape
        fits = len(set(rows)) == len(rows) and all(type(row) is int and 0 <= row < have for row in rows)
        if not fits or tensor.shape != (len(rows), width):
            raise refusal("models/tokens", adapter=adapter, module=module, tensor=tensor, place=place, rows=len(rows))
        updates[target] = Update("rows", tensors={"value": tensor}, rows=tuple(rows))
    if missing := [key for key in wanted if not any(f".{module}".endswith(f".{key}") for module in adapter.tokens)]:
        raise refusal("models/missing-tokens", adapter=adapter, missing=missing)
    return updates


def _check_tied(adapter: Adapter) -> None:
    """LoRA on the one matrix that a tied model uses at both ends; peft merges it wrongly, without a warning."""
    head, embedding = (adapter.tensors.get(f"{PREFIX}{name}") for name in (HEAD, EMBEDDING))
    as_one = adapter.config.get("ensure_weight_tying") and head is not None and embedding is not None
    if as_one and not _is_copy(head, embedding):
        raise refusal("models/different-copies", adapter=adapter)
    for module in adapter.pairs:
        if module.rpartition(".")[2] in ("lm_head", "embed_tokens"):
            raise refusal("models/shared-matrix", adapter=adapter, module=module)


def _check_pair(adapter: Adapter, module: str, pair: LowRank, base: Weights) -> None:
    """A pair belongs to a module of the base that the configuration names, and has the shapes that both say."""
    config, weight = adapter.config, base.tensors.get(f"{module}.weight")
    if weight is None:
        raise refusal("models/no-such-module", adapter=adapter, module=module)
    if not _targeted(config, module):
        keys = ("exclude_modules", "layers_to_transform")
        chosen = " with ".join(["target_modules", *(key for key in keys if config.get(key) is not None)])
        raise refusal("models/unnamed-module", adapter=adapter, module=module, chosen=chosen)
    if pair.lacks:
        raise refusal("models/half-a-pair", adapter=adapter, module=module, pair=pair)
    have, want = pair.shapes, pair.shapes_for(weight.shape, _rank(adapter, module))
    if have != want:
        raise refusal("models/pair-shapes", adapter=adapter, module=module, have=have, want=want, weight=weight)
    magnitude = pair.tensors.get("magnitude")
    if bool(config.get("use_dora")) != (magnitude is not None):
        raise refusal("models/half-dora", adapter=adapter, module=module)
    if magnitude is not None and pair.embedding:
        raise refusal("models/dora-on-embedding", adapter=adapter, module=module)
    if magnitude is not None and magnitude.shape != weight.shape[:1]:
        raise refusal("models/other-magnitude", adapter=adapter, module=module, magnitude=magnitude, weight=weight)


def _check_complete(adapter: Adapter, base: Weights) -> None:
    """A truncated adapter: a tensor that its configuration says it trained is not there."""
    config, kind = adapter.config, adapter.config.get("bias") or "none"
    kept = {name.replace(".base_layer.", ".") for name in adapter.whole}
    biases = {f"{module}.bias" for module in adapter.pairs} if kind == "lora_only" else base.tensors
    trained = {
        "modules_to_save names it": {name for name in (*base.tensors, HEAD) if _saved(config, name)},
        f"bias is {kind!r}": {name for name in biases if name.endswith(".bias") and kind != "none"} & {*base.tensors},
    }
    for why, names in trained.items():
        if missing := sorted(names - kept):
            raise refusal("models/no-copy", adapter=adapter, missing=missing, why=why)
    if config.get("lora_bias") and not all(pair.embedding or "bias" in pair.tensors for pair in adapter.pairs.values()):
        raise refusal("models/no-bias-of-b", adapter=adapter)
    for name, tensor in base.tensors.items():
        module = name.removesuffix(".weight")
        matrix = name.endswith(".weight") and len(tensor.shape) == 2
        if matrix and _targeted(config, module) and module not in adapter.pairs:
            raise refusal("models/missing-pair", adapter=adapter, module=module)
