"""LoRA adapters as peft stores them: told from full models by content, read from headers, checked against a base.

The content of the files decides what a folder is, never their names.
"""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lib.errors import InputError, refusal
from lib.models.configurations import HEADS, read_adapter_configuration, refuse_other_task
from lib.models.gguf_file import TABLES
from lib.models.weights import StoredTensor, infinite, largest_magnitude, read_file, read_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before the name of a base model's tensor."""
_LOW_RANK = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<role>A|B(?P<bias>\.bias)?|magnitude_vector)(\.weight)?"
)
_TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta")
_WRAPPED = re.compile(
    r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_fpw_module|_forward_module)\."
)
"""What torch.compile, DDP, FSDP, checkpointing, FairScale and Lightning put into the names of a state_dict()."""
_NAMED = re.compile(
    r"(\.lora_(?:embedding_)?[AB]|\.lora_magnitude_vector|\.trainable_tokens_delta|\.modules_to_save)"
    r"\.(?!(?:weight|bias)$)([^.]+)"
)
"""A role and the adapter's name, which save_pretrained() takes out."""
_FOREIGN: dict[str, list[str]] = TABLES["foreign_adapters"]
"""Names of tensors → who writes them, and what to do."""


def has_lora(names: Any) -> bool:
    """Whether tensor names are those of an adapter (peft's prefix, or a low-rank pair)."""
    return any(
        PREFIX in name or ".lora_" in name or any(re.search(pattern, name) for pattern in _FOREIGN) for name in names
    )


def _is_head(names: Iterable[str]) -> bool:
    """Whether a file holds nothing but the head of a reward model or a critic, as RL trainers keep it apart."""
    return {name.split(".")[0] for name in names} <= set(HEADS)


def _contents(folder: Path) -> set[str]:
    """What the weights of a folder are: "model", "adapter", both, or nothing. Damaged files count as nothing."""
    found = set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            tensors, _ = read_file(path)
        except InputError:
            continue
        if tensors and not _is_head(tensors):
            found.add("adapter" if has_lora(tensors) else "model")
    return found


def folder_kind(folder: Path) -> Literal["model", "adapter", "unknown"]:
    """What a folder is, judged by its weights or, where those cannot be read, by its configuration files."""
    found = _contents(folder)
    if "model" in found:
        return "model"
    if "adapter" in found or adapter_config(folder).get("peft_type"):
        return "adapter"
    return "model" if (folder / "config.json").is_file() or any(folder.glob("*.safetensors")) else "unknown"


def adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder; empty if it is missing or cannot be read."""
    try:
        return read_object(folder / "adapter_config.json")
    except InputError:
        return {}


def base_named(folder: Path, given: str | None = None) -> str:
    """The base of an adapter: the one that the user names, else that of adapter_config.json.

    Raises:
        InputError: neither names one; or as `read_adapter_configuration`.
    """
    base = given or read_adapter_configuration(folder).get("base_model_name_or_path")
    if not base:
        raise refusal("models/no-base-named", folder=folder)
    return str(base)


def refuse_adapter(folder: Path) -> None:
    """Refuse a LoRA adapter where a full model is needed.

    Raises:
        InputError: says for which base model it is, and how both are given.
    """
    if folder_kind(folder) == "adapter":
        config = adapter_config(folder)
        base = config.get("base_model_name_or_path") or "the model it was trained on"
        raise refusal("models/adapter-for-model", folder=folder, rank=config.get("r", "unknown"), base=base)


def refuse_adapter_alone(folder: Path) -> None:
    """Refuse a LoRA adapter that a command takes with its base.

    Raises:
        InputError: says which option names the base.
    """
    if folder_kind(folder) == "adapter":
        base = adapter_config(folder).get("base_model_name_or_path") or "the model it was trained on"
        raise refusal("models/no-base-model-given", folder=folder, base=base)


def require_adapter(folder: Path) -> None:
    """Refuse what is not a LoRA adapter in safetensors.

    Raises:
        InputError: a full model, a pickle, or a folder without adapter.
    """
    config, found = adapter_config(folder), _contents(folder)
    if "adapter" in found and config:
        return
    if found == {"model"}:
        raise refusal("models/model-for-adapter", folder=folder)
    if not found:
        _refuse_pickle(folder)
    lacks = "no readable adapter_config.json" if not config else f"no readable {WEIGHTS}"
    raise InputError(f"{folder} holds {lacks}.", "a peft adapter folder.", "check the path, or copy it again.")


def _refuse_pickle(folder: Path) -> None:
    if not (folder / WEIGHTS).is_file() and any(folder.glob("adapter_model*.bin")):
        raise refusal("models/pickled-adapter", folder=folder)


@dataclass
class LowRank:
    """The tensors that change one module's weight W: W + s·B·A, of an embedding W + s·(B·A)ᵀ.

    Attributes:
        tensors: by role: "A", "B", "bias" (of B), "magnitude" (of DoRA).
    """

    embedding: bool = False
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    @property
    def lacks(self) -> str | None:
        """The matrix that is missing, as peft names it."""
        kind = "lora_embedding_" if self.embedding else "lora_"
        return next((f"{kind}{role}" for role in "AB" if role not in self.tensors), None)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and B."""
        return self.tensors["A"].shape, self.tensors["B"].shape

    def shapes_for(self, weight: tuple[int, ...], rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of A and B that change a weight of this shape."""
        rows, columns = weight[::-1] if self.embedding else weight
        return (rank, columns), (rows, rank)


@dataclass(frozen=True)
class Adapter:
    """An adapter folder: its configuration and its tensors.

    Attributes:
        tensors: by peft's names, which are those in the file where peft wrote it.
        pairs: low-rank pairs by module of the base.
        tokens: trained rows of embeddings, by module. whole: other tensors, by the base's name for what they replace.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    pairs: dict[str, LowRank]
    tokens: dict[str, StoredTensor]
    whole: dict[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def require_finite(self) -> None:
        """Refuse NaN and infinity.

        Raises:
            InputError: names the first tensor that holds one.
        """
        for name, tensor in self.tensors.items():
            if not math.isfinite(largest_magnitude(tensor.read(), tensor.dtype)):
                raise infinite(f"{name} of the adapter", self.folder)


def _stored(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of an adapter's folder by the names in the file, if peft can have written them.

    Raises:
        InputError: no such file, names of another program, or the rest of a sharded training.
    """
    path = folder / WEIGHTS
    others = sorted(other.name for other in folder.glob("*.safetensors"))
    tensors, _ = read_file(path if path.is_file() or not others else folder / others[0])
    for pattern, (whose, do) in _FOREIGN.items():
        if name := next((name for name in tensors if re.search(pattern, name)), None):
            raise refusal("models/foreign-adapter", folder=folder, whose=whose, name=name, do=do)
    if heads := [name for name in others if (held := read_file(folder / name)[0]) and _is_head(held)]:
        raise refusal("models/value-head", folder=folder, heads=", ".join(heads))
    if not path.is_file() and others:
        raise refusal("models/other-adapter-file", folder=folder, others=", ".join(others[:4]))
    if empty := next((name for name, tensor in tensors.items() if tensor.shape == (0,)), None):
        raise refusal("models/empty-tensor", folder=folder, empty=empty)
    return tensors


def _by_peft_names(folder: Path, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors by the names that save_pretrained() gives them, whoever saved them.

    Raises:
        InputError: the tensors of several adapters, or one name for two tensors.
    """
    found: dict[str, StoredTensor] = {}
    adapters: set[str] = set()
    twice: set[str] = set()
    for name, tensor in stored.items():
        plain = _WRAPPED.sub("", name)
        adapters |= {match[2] for match in _NAMED.finditer(plain)}
        plain = _NAMED.sub(r"\1", plain).replace(".modules_to_save.", ".")
        if ".original_module." in plain:
            continue  # the base's own, of which modules_to_save is the trained copy
        plain = PREFIX + plain.rpartition(PREFIX)[2]
        if plain in found:
            twice |= {found[plain].name, name}
        found[plain] = tensor
    if names := adapters if len(adapters) > 1 else twice:
        raise refusal("models/several-adapters", folder=folder, names=", ".join(sorted(names)[:4]))
    return dict(sorted(found.items()))


def copy_weights(adapter: Adapter, path: Path) -> None:
    """Write the adapter's tensors to `path` by peft's names; as it is where it has them."""
    if all(name == tensor.name for name, tensor in adapter.tensors.items()):
        shutil.copyfile(adapter.folder / WEIGHTS, path)
        return
    from safetensors.torch import save_file

    tensors = {name: tensor.tensor().contiguous() for name, tensor in adapter.tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def read_adapter(folder: Path) -> Adapter:
    """adapter_config.json and the header of adapter_model.safetensors.

    Raises:
        InputError: missing or damaged files, a pickle, or another kind of adapter.
    """
    _refuse_pickle(folder)
    stored = _stored(folder)
    config = read_adapter_configuration(folder)
    tensors = _by_peft_names(folder, stored)
    adapter = Adapter(folder, config, tensors, {}, {}, {})
    inside = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    refuse_other_task(folder, inside, task=str(config.get("task_type") or ""))
    for inner, tensor in inside.items():
        if match := _TOKENS.fullmatch(inner):
            adapter.tokens[match[1]] = tensor
        elif match := _LOW_RANK.fullmatch(inner):
            pair = adapter.pairs.setdefault(match["module"], LowRank())
            role = "bias" if match["bias"] else match["role"].removesuffix("_vector")
            pair.embedding |= match["embedding"] is not None
            pair.tensors[role] = tensor
        else:
            adapter.whole[inner] = tensor
    return adapter


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


def shape_of(adapter: Adapter) -> AdapterShape:
    """What an adapter's configuration and headers say.

    Raises:
        InputError: it holds no low-rank pair.
    """
    config, pairs, tensors = adapter.config, adapter.pairs, adapter.tensors.values()
    if not pairs:
        raise InputError(f"{adapter.folder} holds no low-rank pair.", "a trained adapter.", "train or copy it again.")
    linear = [pair.tensors["A"].shape for pair in pairs.values() if "A" in pair.tensors and not pair.embedding]
    return AdapterShape(
        variant="DoRA" if config.get("use_dora") else "rsLoRA" if config.get("use_rslora") else "LoRA",
        rank=rank if type(rank := config.get("r")) is int else None,
        alpha=alpha if type(alpha := config.get("lora_alpha")) in (int, float) else None,
        ranks=dict(sorted(Counter(shape[0] for shape in linear if shape).items())),
        modules=len(pairs),
        targets=sorted({module.rpartition(".")[2] for module in pairs}),
        parameters=sum(tensor.size for tensor in tensors),
        dtype=Counter(tensor.dtype for tensor in tensors).most_common(1)[0][0],
        base=str(config.get("base_model_name_or_path") or ""),
    )
