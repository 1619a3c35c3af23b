"""A GGUF file looked at before anything is unpacked: everything that can be refused without reading the weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.models.gguf_file import (
    ARCHITECTURES,
    OWN_FOLDER,
    ROPE_FACTORS,
    TensorInfo,
    data_end,
    head_size,
    read_metadata,
    read_tensors,
    rotary_heads,
    tensor_names,
    unpair_rows,
    unusable,
)
from lib.models.gguf_tokenizer import refuse_unwritable
from lib.models.unpack_configuration import Keys, config_of, generation_of

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType


SLAB = 4 << 20
"""Weights dequantized at a time (16 MiB of float32)."""

_BIASES = {
    "attention_bias": tuple(
        (f"attn_{p}.bias", f"self_attn.{q}_proj.bias") for p, q in zip(("q", "k", "v", "output"), "qkvo", strict=True)
    ),
    "mlp_bias": tuple((f"ffn_{p}.bias", f"mlp.{p}_proj.bias") for p in ("gate", "up", "down")),
}
"""Key of config.json → biases of every block that it stands for, in GGUF and in transformers."""
_HAS_BIASES = {"llama": ("attention_bias", "mlp_bias"), "qwen3": ("attention_bias",), "qwen2": ()}


@dataclass(frozen=True)
class PackedTensor:
    """One tensor of the model.

    Attributes:
        name: in transformers; type: in the file; shape: rows first.
        heads: attention heads whose rows llama.cpp has in another order; 0 = none.
    """

    name: str
    file: Path
    start: int
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    heads: int

    @property
    def size(self) -> int:
        """Number of its weights."""
        return math.prod(self.shape)

    def slabs(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, float32 rows) of each part, dequantized by the gguf library and put into transformers' order."""
        import gguf

        rows, width = (self.shape[0], math.prod(self.shape[1:]))
        block, nbytes = gguf.GGML_QUANT_SIZES[self.type]
        row_bytes = width * nbytes // block
        whole = rows // self.heads if self.heads else 1
        step = max(1, SLAB // (width * whole)) * whole
        for first in range(0, rows, step):
            count = min(step, rows - first)
            raw = _read(self.file, self.start + first * row_bytes, count * row_bytes)
            values = gguf.quants.dequantize(raw.reshape(count, row_bytes), self.type)
            values = np.asarray(values, np.float32).reshape(count, *self.shape[1:])
            yield first, unpair_rows(values, count // whole) if self.heads else values


def _read(path: Path, start: int, count: int) -> np.ndarray:
    """Bytes of a file; unlike a memory map they leave no pages of it in this process's resident memory."""
    data = np.empty(count, np.uint8)
    view, got = memoryview(data), 0
    try:
        with path.open("rb", buffering=0) as stream:
            stream.seek(start)
            while got < count:
                read = stream.readinto(view[got:])
                if not read:
                    raise unusable(path, "cut while it was read", "a complete file")
                got += read
    except OSError as error:
        raise unusable(path, f"cannot be read ({error.strerror})", "a readable file") from None
    return data


@dataclass(frozen=True)
class Source:
    """A GGUF file that can be unpacked.

    Attributes:
        config, generation: contents of config.json and generation_config.json (without the dtype).
        tensors: sorted by their names in transformers.
        types: number of weights by type, the commonest first.
    """

    path: Path
    metadata: dict[str, Any]
    config: dict[str, Any]
    generation: dict[str, Any]
    tensors: tuple[PackedTensor, ...]
    types: dict[str, int]

    @property
    def main_type(self) -> str:
        """The type that most weights have."""
        return next(iter(self.types))

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(self.types.values())


def read_source(path: Path | str) -> Source:
    """Everything of a GGUF file but its weights.

    Raises:
        InputError: not a whole file; one part of several; an architecture, a tokenizer or a rope scaling that is not
            known; a tensor that is missing, unknown, of a wrong shape or of a type that cannot be dequantized.
    """
    path = Path(path)
    metadata, found = read_metadata(path), read_tensors(path)
    parts = metadata.get("split.count", 1)  # asked first: later parts hold no other keys
    if parts not in (0, 1):
        found = f"one of {parts} parts of a split file"
        raise unusable(path, found, "one whole file", "join them: llama-gguf-split --merge")
    keys = Keys(metadata, path)
    if keys.architecture not in ARCHITECTURES.values():
        expected = f"one of: {', '.join(sorted(ARCHITECTURES.values()))}"
        raise unusable(path, f"a GGUF file of architecture {keys.architecture!r}", expected, OWN_FOLDER)
    refuse_unwritable(metadata, path)
    tensors = {tensor.name: tensor for tensor in found}
    if len(tensors) != len(found):
        raise unusable(path, "two tensors of one name", "each once")
    factors = _rope_factors(tensors.pop(ROPE_FACTORS, None), path) if keys.architecture == "llama" else None
    names, biases = _names(keys, tensors)
    embedding = tensors.get("token_embd.weight")
    rows = embedding.shape[0] if embedding and embedding.shape else 0
    config = config_of(keys, rows, "output.weight" not in tensors, biases, factors)
    _check_names(keys, tensors, names)
    tokens = len(metadata["tokenizer.ggml.tokens"])
    if tokens > rows:
        raise unusable(path, f"{tokens} tokens, {rows} rows of embedding", "a row for every token")
    packed = [_packed(keys, tensors[ours], theirs, config) for ours, theirs in names.items()]
    packed.sort(key=lambda tensor: tensor.name)
    counts = Counter[str]()
    for tensor in packed:
        counts[tensor.type.name] += tensor.size
    return Source(path, metadata, config, generation_of(metadata), tuple(packed), dict(counts.most_common()))


def _names(keys: Keys, tensors: dict[str, TensorInfo]) -> tuple[dict[str, str], dict[str, bool]]:
    """Name in GGUF → in transformers of all tensors the model must have, and which optional biases it has."""
    blocks = keys.whole("block_count")
    if blocks > len(tensors):  # a damaged header must not make us list billions of names
        raise unusable(keys.path, f"{blocks} blocks, {len(tensors)} tensors", "all tensors")
    names = tensor_names(keys.architecture, blocks, "output.weight" not in tensors)
    biases = {}
    for key in _HAS_BIASES[keys.architecture]:
        biases[key] = f"blk.0.{_BIASES[key][0][0]}" in tensors
        if biases[key]:
            for block in range(blocks):
                names |= {f"blk.{block}.{a}": f"model.layers.{block}.{b}" for a, b in _BIASES[key]}
    return names, biases


def _check_names(keys: Keys, tensors: dict[str, TensorInfo], names: dict[str, str]) -> None:
    for kind, odd in (("lacks", sorted(names.keys() - tensors)), ("also has", sorted(tensors.keys() - names))):
        if odd:
            expected = f"the tensors of a {keys.architecture} model that transformers knows"
            raise unusable(keys.path, f"it {kind} {len(odd)} tensors (first {odd[0]})", expected, OWN_FOLDER)


def _shape(name: str, config: dict[str, Any]) -> tuple[int, ...]:
    """The shape that a tensor must have, rows first; by its name in transformers."""
    width, hidden, head = config["hidden_size"], config["intermediate_size"], head_size(config)
    queries, keys = (head * config[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    shapes = {
        "embed_tokens": (config["vocab_size"], width),
        "lm_head": (config["vocab_size"], width),
        "q_proj": (queries, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "o_proj": (width, queries),
        "gate_proj": (hidden, width),
        "up_proj": (hidden, width),
        "down_proj": (width, hidden),
        "q_norm": (head,),
        "k_norm": (head,),
    }
    module, kind = name.split(".")[-2:]
    shape = shapes.get(module, (width,))
    return shape[:1] if kind == "bias" else shape


def _packed(keys: Keys, tensor: TensorInfo, name: str, config: dict[str, Any]) -> PackedTensor:
    import gguf

    shape = _shape(name, config)
    if tensor.shape != shape:
        found = f"tensor {tensor.name} of shape {tensor.shape}"
        raise unusable(keys.path, found, f"{shape}, as the file's keys say")
    kind = _known_type(tensor, keys.path)
    block, end, size = gguf.GGML_QUANT_SIZES[kind][0], data_end([tensor]) or 0, keys.path.stat().st_size
    row = shape[-1] if len(shape) > 1 else 1  # a vector is read in any number of its values
    if row % block or end > size:
        lack = f"ends at byte {end:,} of {size:,}" if end > size else f"has rows of {row}, blocks of {block}"
        raise unusable(keys.path, f"tensor {tensor.name} {lack}", "a whole file")
    heads = rotary_heads(keys.architecture, name, config)
    return PackedTensor(name, keys.path, tensor.start, kind, shape, heads)


def _known_type(tensor: TensorInfo, path: Path) -> GGMLQuantizationType:
    """The type of a tensor, if the gguf library dequantizes it."""
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(tensor.type)
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        names = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
        found = f"tensor {tensor.name} of type {names.get(tensor.type, tensor.type)}"
        expected = "a type that the gguf library turns back into numbers"
        raise unusable(path, found, expected, "take a file of another type, or the model's own folder") from None
    return kind


def _rope_factors(tensor: TensorInfo | None, path: Path) -> np.ndarray | None:
    if tensor is None:
        return None
    if tensor.type != 0 or len(tensor.shape) != 1 or tensor.shape[0] > 1 << 16:
        found = f"{ROPE_FACTORS} of type {tensor.type} and shape {tensor.shape}"
        raise unusable(path, found, "a float32 vector")
    if tensor.start + 4 * tensor.shape[0] > path.stat().st_size:
        raise unusable(path, f"{ROPE_FACTORS} lies behind its end", "a whole file")
    values = _read(path, tensor.start, 4 * tensor.shape[0]).view(np.float32)
    if not np.isfinite(values).all() or (values < 1).any():
        raise unusable(path, f"{ROPE_FACTORS} below 1 or not finite", "factors")
    return values


# A way off the grid of a quantized file: the same function, computed by weights that lie between its steps.
#
# Weights that were dequantized lie on the grid of their type, and the same type rounds W + δ back to W: it undoes a
# fine-tuning, and looks better than other types where nothing was trained. In a transformer some channels can be scaled
# in one tensor and scaled back in the next, without changing what is computed:
#
#     RMSNorm(x)·γs, and the columns of q, k, v (or of gate and up) divided by s,
#     rows of v (and its bias) times s, and the columns of o divided by s (a group of query heads shares one of v),
#     rows of up (and its bias) times s, and the columns of down divided by s.
#
# Blocks of a quantized type run along a row, so dividing columns by different numbers takes every matrix of a layer off
# the grid. The residual stream, and with it the embedding and the output matrix, stays as it is.

SEED = 20261128
RANGE = (0.8, 1.25)
"""Smallest and largest scale; they are log-uniform between. Why these: docs/LOG.md."""


class Rescaling:
    """Scales of every layer of a model, drawn by `seed`."""

    def __init__(self, config: dict[str, Any], seed: int = SEED, bounds: tuple[float, float] = RANGE) -> None:
        self.config, self.seed, self.bounds = config, seed, bounds
        self.layer, self.scales = -1, dict[str, np.ndarray]()

    def apply(self, name: str, first: int, values: np.ndarray) -> np.ndarray:
        """Rows of a tensor, scaled in float32.

        Args:
            name: of the tensor in transformers; first: number of the first row; values: float32 rows, or a vector.
        """
        if not name.startswith("model.layers."):
            return values
        _, _, layer, *rest = name.split(".")
        rows, columns = self._of(int(layer), rest[-2], rest[-1])
        if rows is not None:
            part = rows[first : first + len(values)]
            values = values * (part if values.ndim == 1 else part[:, None])
        return values / columns if columns is not None else values

    def _of(self, layer: int, module: str, kind: str) -> tuple[np.ndarray | None, np.ndarray | None]:
        """What rows are multiplied with, and what columns are divided by."""
        scales = self._layer(layer)
        rows = {
            "input_layernorm": "attention",
            "post_attention_layernorm": "feed_forward",
            "v_proj": "value",
            "up_proj": "up",
        }.get(module)
        columns = {
            **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attention"),
            **dict.fromkeys(("gate_proj", "up_proj"), "feed_forward"),
            "o_proj": "output",
            "down_proj": "up",
        }.get(module)
        return scales[rows] if rows else None, scales[columns] if columns and kind == "weight" else None

    def _layer(self, layer: int) -> dict[str, np.ndarray]:
        if layer != self.layer:
            config, head = self.config, head_size(self.config)
            keys, width = config["num_key_value_heads"], config["hidden_size"]
            random = np.random.default_rng([self.seed, layer])
            low, high = np.log(self.bounds)
            sizes = {"attention": width, "feed_forward": width, "value": keys * head}
            sizes["up"] = config["intermediate_size"]
            scales = {k: np.exp(random.uniform(low, high, n)).astype(np.float32) for k, n in sizes.items()}
            group = config["num_attention_heads"] // keys
            scales["output"] = np.repeat(scales["value"].reshape(keys, head), group, axis=0).reshape(-1)
            self.layer, self.scales = layer, scales
        return self.scales
