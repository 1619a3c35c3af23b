"""A GGUF file examined before it is unpacked: its model's configuration, and everything that can be refused without
reading the weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import refusal, refusing
from lib.models import gguf_file
from lib.models.configurations import check_configuration, shapes_of
from lib.models.gguf_file import OWN_FOLDER, PackedTensor, TensorInfo, head_size, rotary_heads, unusable
from lib.models.gguf_tokenizer import refuse_unwritable

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType
    from transformers import PreTrainedConfig


# config.json and generation_config.json of a model folder, rebuilt from the keys of a GGUF file.

_MOST_FLOAT32 = float(np.finfo(np.float32).max)
_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}


class Keys:
    """The keys of a GGUF file, read with their types."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self.metadata, self.path = metadata, path
        self.architecture = str(metadata.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key behind the architecture's name."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive whole number.

        Raises:
            InputError: absent without a default, or another value.
        """
        value = self.get(key, default)
        if type(value) is not int or value <= 0:
            raise self._wrong(key, value, "a positive whole number")
        return value

    def real(self, key: str, default: float | None = None, least: float = 0.0, most: float = math.inf) -> float:
        """A positive number between two bounds: the shortest decimal fraction that gives the file's float32.

        Raises:
            InputError: absent without a default, or another value; too large or too small for float32.
        """
        value = self.get(key, default)
        known = type(value) in (int, float) and abs(value) < _MOST_FLOAT32
        number = shortest(value) if known else 0.0
        if not (known and number > 0 and least <= number <= most):
            bounded = (least, most) != (0.0, math.inf)
            raise self._wrong(key, value, f"a number from {least:g} to {most:g}" if bounded else "a positive number")
        return number

    def require_numbers(self) -> None:
        """Refuse values that are no numbers to compute with: llama.cpp goes on, and nothing that it answers is one.

        Raises:
            InputError: names the key.
        """
        for key in ("rope.freq_base", "rope.scaling.factor", "attention.layer_norm_rms_epsilon"):
            if self.get(key, 1.0) != 0 or key != "rope.scaling.factor":
                self.real(key, 1.0)

    def _wrong(self, key: str, value: Any, expected: str) -> Exception:
        found = "no key" if value is None else f"{value!r} as"
        return unusable(self.path, f"{found} {self.architecture}.{key}", expected)


def shortest(value: float) -> float:
    """The float with the fewest decimal digits that rounds to the same float32."""
    return float(str(np.float32(value)))


def _refuse_special(keys: Keys) -> None:
    """Refuse what config.json of the three architectures cannot say: experts, partial rotation, windows, rope factors.

    llama.cpp multiplies by attn_factor and yarn_attn_factor what transformers' attention_factor replaces; −1 is its
    word for the default of yarn_ext_factor, and scale_linear its older one for the factor of linear scaling.

    Raises:
        InputError: says which key.
    """
    metadata, name = keys.metadata, keys.architecture
    key_length = keys.get("attention.key_length", keys.whole("embedding_length") // keys.whole("attention.head_count"))
    for ending, (values, expected) in gguf_file.TABLES["plain"].items():
        key = ending if ending == "general.type" else f"{name}.{ending}"
        known = [key_length if value == "key_length" else value for value in values]
        if key in metadata and metadata[key] not in known:
            raise unusable(keys.path, f"{key} {metadata[key]!r}", expected, OWN_FOLDER)


def config_of(keys: Keys, rows: int, tied: bool, biases: Mapping[str, bool], factors: np.ndarray | None) -> dict:
    """config.json.

    Args:
        rows: of the token embedding.
        tied: no output matrix of its own.
        biases: "attention_bias" and "mlp_bias" of classes that have them.
        factors: divisors of the rotary frequencies, of the tensor rope_freqs; None = not in the file.

    Raises:
        InputError: a key is absent or wrong, or a rope scaling that transformers cannot be told.
    """
    _refuse_special(keys)
    name = keys.architecture
    heads, width = keys.whole("attention.head_count"), keys.whole("embedding_length")
    kv = keys.whole("attention.head_count_kv", heads)
    config: dict[str, Any] = {
        "architectures": [next(kind for kind, ours in gguf_file.ARCHITECTURES.items() if ours == name)],
        "model_type": name,
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": keys.whole("feed_forward_length"),
        "num_hidden_layers": keys.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "hidden_act": "silu",
        "max_position_embeddings": keys.whole("context_length"),
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon", most=1.0),
        "rope_theta": keys.real("rope.freq_base", 10000.0, least=1.0),
        "rope_scaling": None,
        "tie_word_embeddings": tied,
        **biases,
        **_special_ids(keys.metadata),
    }
    own_length = name != "qwen2" or keys.get("attention.key_length") is not None
    if own_length:
        config["head_dim"] = keys.whole("attention.key_length", width // heads)
    divides = name == "llama" or not own_length  # transformers' LlamaConfig demands it
    if heads % kv or (divides and width % heads) or head_size(config) % 2:
        raise refusal("models/gguf-heads", keys=keys, heads=heads, kv=kv, width=width)
    config["rope_scaling"] = _scaling(keys, config, factors)
    return config


def _special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Ids of special tokens; those that the vocabulary has no token for (−1, also as 2**32 − 1) name none."""
    found = {ours: metadata.get(f"tokenizer.ggml.{key}") for ours, key in _IDS.items()}
    return {key: value for key, value in found.items() if _is_token(value, metadata)}


def ids_beyond(metadata: Mapping[str, Any]) -> list[str]:
    """What names a token that the vocabulary does not have; "none" is no such name."""
    none = (None, -1, 2**32 - 1)
    found = {key: metadata.get(f"tokenizer.ggml.{key}") for key in (*_IDS.values(), "eot_token_id")}
    odd = {key: value for key, value in found.items() if value not in none and not _is_token(value, metadata)}
    return [f"{key} {value!r} names no token of the vocabulary" for key, value in odd.items()]


def _is_token(value: Any, metadata: Mapping[str, Any]) -> bool:
    return type(value) is int and 0 <= value < len(metadata["tokenizer.ggml.tokens"])


def _scaling(keys: Keys, config: dict[str, Any], factors: np.ndarray | None) -> dict[str, Any] | None:
    """rope_scaling of config.json; None = the frequencies are as trained."""
    kind, factor = keys.get("rope.scaling.type"), keys.get("rope.scaling.factor")
    if kind is None and factor is not None:
        kind = "linear"  # as llama.cpp takes it
    stretched = kind not in (None, "none") and factor is not None
    if factors is not None and not (factors == 1).all():
        if stretched:
            raise _unknown_rope(keys, f"both {kind} scaling and rope_freqs")
        return _llama3(keys, config, factors)
    if not stretched:
        return None
    if kind not in gguf_file.ROPE_TYPES[keys.architecture]:
        raise _unknown_rope(keys, f"rope scaling {kind!r}")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": keys.real("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = keys.whole("rope.scaling.original_context_length")
        for name in (
            "beta_fast",
            "beta_slow",
        ):  # what llama.cpp computes with, whatever a file says (architectures.yaml)
            if keys.get(f"rope.scaling.yarn_{name}") is not None:
                scaling[name] = keys.real(f"rope.scaling.yarn_{name}")
    return scaling


def _unknown_rope(keys: Keys, what: str) -> Exception:
    kinds = ", ".join(gguf_file.ROPE_TYPES[keys.architecture])
    return unusable(keys.path, what, f"none, or one of: {kinds}", OWN_FOLDER)


def _llama3(keys: Keys, config: dict[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """The parameters of rope type llama3 whose factors these are.

    Wavelengths are divided by `factor`, left alone, or blended: 1/f = (1 − s)/factor + s with
    s = (trained/wavelength − low)/(high − low), which is linear in 1/wavelength. Two blended factors give its slope
    and offset; with low = 1, as in all Llama models, those are trained/(high − 1) and 1/(high − 1).

    Raises:
        InputError: no parameters give these factors.
    """
    size, theta = head_size(config), config["rope_theta"]
    largest = shortest(float(factors.max()))
    base = {"rope_type": "llama3", "factor": largest, "low_freq_factor": 1.0}
    guesses = [base | {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}]
    blended = np.flatnonzero((factors > 1) & (factors < factors.max()))
    if len(blended) >= 2:
        frequency = theta ** (-2.0 * blended / size) / (2 * np.pi)
        smooth = (1 / factors[blended].astype(np.float64) - 1 / largest) / (1 - 1 / largest)
        slope, offset = np.polyfit(frequency, smooth, 1)
        if offset < 0:
            high = round(1 - 1 / offset, 3)
            trained = round(slope * (high - 1))
            guesses.append(base | {"high_freq_factor": high, "original_max_position_embeddings": trained})
    for guess in guesses:
        again = gguf_file.rope_factors(config | {"rope_scaling": guess})
        if again is not None and again.shape == factors.shape and np.allclose(again, factors, rtol=1e-5, atol=0):
            return guess
    raise _unknown_rope(keys, "factors of rotary frequencies (rope_freqs) that are not those of Llama 3")


def transformers_config(config: Mapping[str, Any], path: Path) -> PreTrainedConfig:
    """The configuration as transformers has it, without loading anything.

    Raises:
        InputError: transformers does not take it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    odd = (ValueError, TypeError, KeyError, OverflowError, StrictDataclassError)
    with refusing(odd, "models/gguf-keys", path=path, kind=config["model_type"]):
        return AutoConfig.for_model(**{key: value for key, value in config.items() if key != "architectures"})


def generation_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: tokens that end an answer, and the sampling that the file recommends."""
    found: dict[str, Any] = _special_ids(metadata)
    turn = metadata.get("tokenizer.ggml.eot_token_id")
    if _is_token(turn, metadata) and "eos_token_id" in found and turn != found["eos_token_id"]:
        found["eos_token_id"] = [found["eos_token_id"], turn]
    for key, (name, least, most) in gguf_file.TABLES["sampling"].items():
        value = metadata.get(f"general.sampling.{key}")
        if type(value) in ((int,) if name == "top_k" else (int, float)) and least <= value <= min(most, _MOST_FLOAT32):
            found[name] = shortest(value) if type(value) is float else value
    if found.get("temperature", 1) <= 0:  # llama.cpp then takes the likeliest token; transformers refuses the number
        del found["temperature"]
        found["do_sample"] = False
    elif any(name in found for name in ("temperature", "top_k", "top_p", "min_p")):
        found["do_sample"] = True
    return found


# The file as a whole.


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
    """Everything in a GGUF file except its weights.

    Raises:
        InputError: not a whole file; one part of several; an architecture, a tokenizer or a rope scaling that is not
            known; a tensor that is missing, unknown, of a wrong shape or of a type that cannot be dequantized.
    """
    path = Path(path)
    header = gguf_file.read_gguf(gguf_file.check_model_gguf(path))
    metadata, found = header.metadata, header.tensors
    parts = metadata.get("split.count", 1)  # asked first: later parts hold no other keys
    if parts not in (0, 1):
        raise refusal("models/gguf-parts", path=path, parts=parts)
    keys = Keys(metadata, path)
    if keys.architecture not in gguf_file.ARCHITECTURES.values():
        known = ", ".join(sorted(gguf_file.ARCHITECTURES.values()))
        raise refusal("models/gguf-architecture", keys=keys, known=known)
    refuse_unwritable(metadata, path)
    tensors = {tensor.name: tensor for tensor in found}
    if len(tensors) != len(found):
        raise unusable(path, "two tensors of one name", "each once")
    factors = _rope_factors(tensors.pop(gguf_file.ROPE_FACTORS, None), path) if keys.architecture == "llama" else None
    names, biases = _names(keys, tensors)
    embedding = tensors.get("token_embd.weight")
    rows = embedding.shape[0] if embedding and embedding.shape else 0
    config = config_of(keys, rows, "output.weight" not in tensors, biases, factors)
    for kind, odd in (("lacks", sorted(names.keys() - tensors)), ("also has", sorted(tensors.keys() - names))):
        if odd:
            raise refusal("models/gguf-tensors", keys=keys, kind=kind, count=len(odd), odd=odd)
    tokens = len(metadata["tokenizer.ggml.tokens"])
    if tokens > rows:
        raise unusable(path, f"{tokens} tokens, {rows} rows of embedding", "a row for every token")
    check_configuration(path, config)
    shapes = shapes_of(config)
    packed = [_packed(path, tensors[ours], theirs, shapes[theirs], config) for ours, theirs in names.items()]
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
    known = gguf_file.BIASES[keys.architecture]
    biases = {key: f"blk.0.{next(iter(names))}" in tensors for key, names in known.items()}
    config = {"model_type": keys.architecture, "num_hidden_layers": blocks, **biases}
    return gguf_file.names_of({**config, "tie_word_embeddings": "output.weight" not in tensors}), biases


def _packed(path: Path, tensor: TensorInfo, name: str, shape: tuple[int, ...], config: dict[str, Any]) -> PackedTensor:
    """A tensor of the file under its name in transformers, if it has the shape that the configuration says."""
    import gguf

    if tensor.shape != shape:
        raise refusal("models/gguf-shape", path=path, tensor=tensor, shape=shape)
    kind = _known_type(tensor, path)
    block, end, size = gguf.GGML_QUANT_SIZES[kind][0], gguf_file.data_end([tensor]) or 0, path.stat().st_size
    row = shape[-1] if len(shape) > 1 else 1  # a vector is read in any number of its values
    if row % block or end > size:
        lack = f"ends at byte {end:,} of {size:,}" if end > size else f"has rows of {row}, blocks of {block}"
        raise unusable(path, f"tensor {tensor.name} {lack}", "a whole file")
    return PackedTensor(name, kind, shape, tensor.start, path, rotary_heads(name, config))


def _known_type(tensor: TensorInfo, path: Path) -> GGMLQuantizationType:
    """The type of a tensor, if the gguf library dequantizes it."""
    import gguf

    names = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    name, odd = names.get(tensor.type, tensor.type), (ValueError, KeyError, NotImplementedError)
    with refusing(odd, "models/gguf-tensor-type", path=path, tensor=tensor, name=name):
        kind = gguf.GGMLQuantizationType(tensor.type)
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        return kind


def _rope_factors(tensor: TensorInfo | None, path: Path) -> np.ndarray | None:
    if tensor is None:
        return None
    if tensor.type != 0 or len(tensor.shape) != 1 or tensor.shape[0] > 1 << 16:
        raise refusal("models/gguf-rope-factors", path=path, tensor=tensor)
    if tensor.start + 4 * tensor.shape[0] > path.stat().st_size:
        raise unusable(path, f"{gguf_file.ROPE_FACTORS} lies behind its end", "a whole file")
    values = gguf_file.read_bytes(path, tensor.start, 4 * tensor.shape[0]).view(np.float32)
    if not np.isfinite(values).all() or (values < 1).any():
        raise unusable(path, f"{gguf_file.ROPE_FACTORS} below 1 or not finite", "factors")
    return values
