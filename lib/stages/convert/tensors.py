"""What a model becomes in GGUF, and how the file is written: keys, and tensors converted in slabs with NumPy alone."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lib.errors import InputError, refusal, refusing
from lib.models import gguf_file
from lib.models.configurations import BUFFERS, check_sizes, read_configuration, refuse_other_task
from lib.models.weights import (
    FLOAT16_MAX,
    Shaped,
    StoredTensor,
    Weights,
    convert,
    infinite,
    largest_magnitude,
    slabs,
    widen,
)
from lib.runs.files import write_at

# Which models can be converted, and their hyperparameters as GGUF keys.
#
# The order and the types of the keys are those of the converter of llama.cpp (`conversion/base.py`,
# set_gguf_parameters; `conversion/llama.py`), so that the files are equal byte for byte.

_NEEDED = {"linear": ("factor",), "yarn": ("factor", "original_max_position_embeddings")}
_NEEDED |= {"llama3": ("factor", "low_freq_factor", "high_freq_factor")}
"""Kind of rope scaling → keys that transformers does not take it without."""


class ForeignModelError(InputError):
    """A class or a tokenizer that this converter does not know, and llama.cpp's own may."""


def read_convertible(folder: Path) -> dict[str, Any]:
    """config.json of a model folder that can be converted, with its defaults; its model_type is GGUF's architecture.

    Raises:
        InputError: no config, an unsupported class, quantized weights, a rope type or a folder kind that the converter
            does not know.
    """
    stored = read_configuration(folder)
    _refuse_nested_rope(folder, stored)
    config = _plain_config(stored) or _full_config(folder)
    by_type = {name: kind for kind, name in gguf_file.ARCHITECTURES.items()}
    own = by_type.get(config["model_type"], config["model_type"])
    kind = (config.get("architectures") or [own])[0]
    kind = own if kind == own.replace("ForCausalLM", "Model") else kind  # transformers goes by model_type
    refuse_other_task(folder, {}, [kind])
    if kind not in gguf_file.ARCHITECTURES:
        known = ", ".join(gguf_file.ARCHITECTURES)
        raise refusal("convert/unknown-class", ForeignModelError, kind=kind, folder=folder, known=known)
    found, wanted = config.get("model_type"), gguf_file.ARCHITECTURES[kind]
    if found != wanted:
        raise refusal("convert/class-and-type", folder=folder, kind=kind, found=found, wanted=wanted)
    _refuse_special(folder, config)
    return config


def _refuse_nested_rope(folder: Path, config: dict[str, Any]) -> None:
    """Refuse rope parameters by kinds of layers, as models of other families have them: of these three transformers
    reads none of them, or does not load the model."""
    for key in ("rope_scaling", "rope_parameters") if config.get("model_type") in gguf_file.ROPE_TYPES else ():
        if nested := [name for name, value in (config.get(key) or {}).items() if isinstance(value, (dict, list))]:
            raise refusal("convert/nested-rope", folder=folder, key=key, name=nested[0], kind=config["model_type"])


_NULLABLE = ("rope_scaling", "rope_parameters", "sliding_window", "layer_types", "head_dim", "bos_token_id")
_NULLABLE += ("eos_token_id", "pad_token_id", "quantization_config", "dtype", "torch_dtype")
"""Keys of config.json that may be null; of others transformers is asked."""


def _plain_config(config: dict[str, Any]) -> dict[str, Any] | None:
    """config.json as it is, when it leaves nothing that matters to a default; None when transformers must fill it in.

    Importing transformers takes longer than converting a small model.
    """
    name = gguf_file.ARCHITECTURES.get(next(iter(config.get("architectures") or ()), ""))
    needed = {*gguf_file.NUMBERS, "vocab_size", "tie_word_embeddings", "rms_norm_eps"}
    needed |= {"head_dim"} if name != "qwen2" else set()
    whole = name and name == config.get("model_type") and gguf_file.rope_of(config).get("rope_theta") is not None
    odd = any(value is None and key not in _NULLABLE for key, value in config.items())
    odd |= not isinstance(config.get("rms_norm_eps"), float)
    odd |= len(config.get("layer_types") or "") not in (0, config.get("num_hidden_layers"))
    return config if whole and not odd and all(config.get(key) is not None for key in needed) else None


def _full_config(folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    with refusing(Exception, "convert/unreadable-configuration", folder=folder):  # transformers raises many kinds
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True).to_dict()


def _not_computed(config: dict[str, Any]) -> str | None:
    """What of a model llama.cpp would leave out without a word."""
    for key, values in gguf_file.TABLES["computed"].items():
        for found in (config, gguf_file.rope_of(config)):
            if found.get(key) not in values:
                return f"{key} {found[key]!r}"
    if config["model_type"] == "qwen3" and config.get("attention_bias"):
        return "attention_bias True"  # llama.cpp reads those of query, key and value alone
    if config["model_type"] == "qwen2" and gguf_file.head_size(config) * config["num_attention_heads"] != (
        hidden := config["hidden_size"]
    ):  # llama.cpp's qwen2 has square queries
        return f"head_dim {config['head_dim']} (its heads are not hidden_size {hidden} together)"
    layers = config.get("layer_types") or []
    slides = config.get("use_sliding_window") and (config.get("max_window_layers") or 0) < config["num_hidden_layers"]
    odd = sorted({"sliding_attention"} if slides else set(layers) - {"full_attention"})
    return f"layers of {', '.join(odd)}" if odd else None


def _refuse_special(folder: Path, config: dict[str, Any]) -> None:
    if config.get("quantization_config"):
        raise refusal("convert/quantized-model", folder=folder)
    card, rope, place = folder / "README.md", gguf_file.rope_of(config), folder / "config.json"
    kind, official = rope.get("rope_type"), "use llama.cpp's converter."
    rope_types = gguf_file.ROPE_TYPES[config["model_type"]]
    if (folder / "modules.json").is_file() or config.get("is_causal") is False:
        raise InputError(f"an embedding model in {folder}.", "a causal language model.", official)
    if card.is_file() and "# qwen3-reranker" in card.read_text(encoding="utf-8", errors="replace").lower():
        raise InputError(f"a reranker in {folder}.", "a causal language model.", official)
    if odd := _not_computed(config):
        raise InputError(f"{odd} in {place}.", "a model that llama.cpp computes as transformers does.", "take another.")
    if kind not in (None, "default", *rope_types):
        raise InputError(f"rope type {kind!r} in {place}.", f"default, {', '.join(rope_types)}.", official)
    if lacks := [key for key in _NEEDED.get(kind, ()) if rope.get(key) is None]:
        raise refusal("convert/incomplete-rope", kind=kind, lacks=", ".join(lacks), place=place)
    own = 0.1 * math.log(max(1, rope.get("factor") or 1)) + 1  # of llama.cpp, whatever the file says
    asked = 1 if rope.get("mscale") and rope.get("mscale_all_dim") else rope.get("attention_factor")
    if kind == "yarn" and asked is not None and not math.isclose(asked, own, rel_tol=1e-3):
        raise refusal("convert/own-yarn", place=place, own=own, official=official)


def write_parameters(writer: gguf.GGUFWriter, config: dict[str, Any], file_type: int) -> None:
    """Add the hyperparameters to `writer`, in the official order."""
    for name, key in gguf_file.NUMBERS.items():
        writer.add_uint32(f"{writer.arch}.{key}", config[name])
    _write_rope(writer, gguf_file.rope_of(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_file_type(file_type)
    if writer.arch == "llama":
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(gguf_file.head_size(config))


def _write_rope(writer: gguf.GGUFWriter, rope: dict[str, Any]) -> None:
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            for key in ("beta_fast", "beta_slow"):
                if rope.get(key) is not None:
                    getattr(writer, f"add_rope_scaling_yarn_{key}")(rope[key])
    if rope.get("rope_theta") is not None:
        writer.add_rope_freq_base(rope["rope_theta"])


# The tensors of a GGUF: names, types, and their bytes made in slabs, with NumPy alone.


@dataclass(frozen=True)
class PlannedTensor(Shaped):
    """One tensor of the GGUF.

    Attributes:
        name, type: in the GGUF; shape: rows last but one, as in PyTorch; nbytes: without padding.
        source: where its values are stored; None when they are `values`.
        heads: attention heads whose rows are re-paired (Llama's rotary order); 0 = rows stay.
        values: of a tensor that only the GGUF has (float32).
    """

    name: str
    type: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    nbytes: int
    source: StoredTensor | None
    heads: int = 0
    values: np.ndarray | None = None

    @property
    def row(self) -> int:
        """Values of a row; quantization blocks never cross one."""
        return self.shape[-1] if self.shape else 1


def plan_tensors(weights: Weights, config: dict[str, Any], outtype: str) -> list[PlannedTensor]:
    """Name and type of every tensor, in the order of the official converter.

    One-dimensional tensors and norms stay float32; a row that Q8_0's blocks of 32 do not divide becomes float16.

    Raises:
        InputError: a tensor that the architecture does not have, or one that is missing.
    """
    refuse_other_task(weights.folder, weights.tensors)
    check_sizes(weights, config)
    names = {name: ours for ours, name in gguf_file.names_of(config | {"tie_word_embeddings": False}).items()}
    wanted, float32 = gguf.GGMLQuantizationType[outtype.upper()], gguf.GGMLQuantizationType.F32
    plan, factors = [], gguf_file.rope_factors(config)
    if factors is not None:
        plan.append(PlannedTensor(gguf_file.ROPE_FACTORS, float32, factors.shape, factors.nbytes, None, values=factors))
    for name, source in weights.tensors.items():
        if name.endswith(BUFFERS):
            continue
        source.require_floats()
        new, kind = names[name], wanted
        if len(source.shape) <= 1 or new.endswith("_norm.weight") or not new.endswith(".weight"):
            kind = float32
        elif kind == gguf.GGMLQuantizationType.Q8_0 and source.shape[-1] % 32:
            kind = gguf.GGMLQuantizationType.F16
        block, size = gguf.GGML_QUANT_SIZES[kind]
        nbytes, heads = source.size // block * size, gguf_file.rotary_heads(name, config)
        plan.append(PlannedTensor(new, kind, source.shape or (1,), nbytes, source, heads))
    return plan


def encode(tensor: PlannedTensor, values: np.ndarray, dtype: str) -> np.ndarray:
    """Whole rows of a tensor in its GGUF type, as bytes; rounding is to nearest, ties to even, as the official one.

    Args:
        values: one-dimensional, as `lib.models.weights` holds `dtype`.

    Raises:
        InputError: NaN or infinity, or a value that float16 cannot hold.
    """
    _check_values(values, dtype, tensor)
    if tensor.heads:
        values = gguf_file.pair_rows(values.reshape(tensor.shape), tensor.heads).reshape(-1)
    if tensor.type.name == "Q8_0":
        data = gguf.quants.quantize(widen(values, dtype).reshape(-1, tensor.row), tensor.type)
    else:
        data = convert(values, dtype, tensor.type.name)
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


def _check_values(values: np.ndarray, dtype: str, tensor: PlannedTensor) -> None:
    largest = largest_magnitude(values, dtype)
    where, path = (tensor.source.name, tensor.source.file) if tensor.source else (tensor.name, Path("config.json"))
    if not math.isfinite(largest):
        raise infinite(where, path)
    limit = {"F16": FLOAT16_MAX, "Q8_0": FLOAT16_MAX * 127}.get(tensor.type.name, math.inf)
    if largest > limit:
        raise InputError(  # as `infinite`: threads race for the first one
            f"a weight of size {largest:.6g} in {where} ({path}); {tensor.type.name} ends at {limit:.6g}.",
            "values that the type can hold.",
            "use outtype bf16 (or f32).",
        )


# A GGUF file being written: its header first, then the data of every tensor at its own place, in any order.


class GgufFile:
    """An open file of a planned size. Parts may be put from several threads."""

    def __init__(self, path: Path, header: bytes, plan: list[PlannedTensor]) -> None:
        self._plan, self._offsets = plan, dict[str, int]()
        end = gguf_file.padded(len(header))
        for tensor in plan:
            self._offsets[tensor.name] = end
            end += gguf_file.padded(tensor.nbytes)
        self._by_source = {tensor.source.name: tensor for tensor in plan if tensor.source is not None}
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
        os.ftruncate(self._file, end)  # the padding between tensors is the zeros of the hole
        write_at(self._file, header, 0)

    def close(self) -> None:
        os.close(self._file)

    def put(self, name: str, first: int, values: np.ndarray, dtype: str) -> None:
        """Write whole rows of the tensor that the model folder calls `name`, from its value number `first` on."""
        if name in self._by_source:
            self._put(self._by_source[name], first, values, dtype)

    def whole(self, name: str) -> bool:
        """Whether all rows of this tensor must be put at once."""
        tensor = self._by_source.get(name)
        return tensor is not None and bool(tensor.heads)

    def _put(self, tensor: PlannedTensor, first: int, values: np.ndarray, dtype: str) -> None:
        data = encode(tensor, values, dtype)
        offset = self._offsets[tensor.name] + first // tensor.row * (tensor.nbytes // (tensor.size // tensor.row))
        write_at(self._file, data, offset)

    def put_own(self) -> None:
        """Write the tensors that no model folder has."""
        for tensor in self._plan:
            if tensor.values is not None:
                self._put(tensor, 0, tensor.values.reshape(-1), "F32")

    def jobs(self) -> Iterator[Callable[[], int]]:
        """One job a slab: read it from the model folder, convert it, write it; each gives the bytes it read."""
        for tensor in self._plan:
            if tensor.source is not None:
                for _, first, count in slabs(tensor, tensor.size if tensor.heads else gguf_file.SLAB):
                    yield partial(self._copy, tensor, tensor.source, first, count)

    def _copy(self, tensor: PlannedTensor, source: StoredTensor, first: int, count: int) -> int:
        values = source.read(first, count)
        self._put(tensor, first, values, source.dtype)
        return values.nbytes
