"""config.json and generation_config.json of a model folder, rebuilt from the keys of a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import InputError
from lib.models.gguf_file import ARCHITECTURES, OWN_FOLDER, ROPE_TYPES, head_size, rope_factors, unusable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_RANGES = {"temperature": (0, math.inf), "top_k": (1, math.inf), "top_p": (0, 1), "min_p": (0, 1)}
_MOST_FLOAT32 = float(np.finfo(np.float32).max)
_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
_YARN = {
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


class Keys:
    """The keys of a GGUF file, read with their types."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self.metadata, self.path = metadata, path
        self.architecture = str(metadata.get("general.architecture"))

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive whole number, by its key behind the architecture's name.

        Raises:
            InputError: absent without a default, or another value.
        """
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if type(value) is not int or value <= 0:
            raise self._wrong(f"{self.architecture}.{key}", value, "a positive whole number")
        return value

    def real(self, key: str, default: float | None = None, least: float = 0.0, most: float = math.inf) -> float:
        """A positive number between two bounds: the shortest decimal fraction that gives the file's float32.

        Raises:
            InputError: absent without a default, or another value; too large or too small for float32.
        """
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        known = type(value) in (int, float) and abs(value) < _MOST_FLOAT32
        number = shortest(value) if known else 0.0
        if not (known and number > 0 and least <= number <= most):
            expected = (
                "a positive number" if (least, most) == (0.0, math.inf) else f"a number from {least:g} to {most:g}"
            )
            raise self._wrong(f"{self.architecture}.{key}", value, expected)
        return number

    def _wrong(self, key: str, value: Any, expected: str) -> InputError:
        found = "no key" if value is None else f"{value!r} as"
        return unusable(self.path, f"{found} {key}", expected)


def shortest(value: float) -> float:
    """The float with the fewest decimal digits that is the same float32."""
    return float(str(np.float32(value)))


def refuse_special(keys: Keys) -> None:
    """Refuse what config.json of the three architectures cannot say: experts, partial rotation, windows, rope factors.

    llama.cpp multiplies by attn_factor and yarn_attn_factor what transformers' attention_factor replaces; −1 is its
    word for the default of yarn_ext_factor, and scale_linear its older one for the factor of linear scaling.

    Raises:
        InputError: says which key.
    """
    metadata, name = keys.metadata, keys.architecture
    head = keys.whole("embedding_length") // keys.whole("attention.head_count")
    key_length = metadata.get(f"{name}.attention.key_length", head)
    plain = {
        "general.type": (("model",), "a whole model"),
        f"{name}.expert_count": ((0,), "a model without experts"),
        f"{name}.attention.sliding_window": ((0,), "attention to all tokens"),
        f"{name}.attention.causal": ((True,), "a causal language model"),
        f"{name}.attention.value_length": ((key_length,), "keys and values of one length"),
        f"{name}.rope.dimension_count": ((key_length,), "rotation of whole heads"),
        f"{name}.attention.scale": ((0.0,), "attention scaled by the length of keys"),
        f"{name}.pooling_type": ((0,), "a causal language model"),
        f"{name}.rope.scale_linear": ((0, 1), "rope.scaling.factor in its place"),
        f"{name}.rope.scaling.attn_factor": ((1,), "attention that rope scaling does not change"),
        f"{name}.rope.scaling.yarn_attn_factor": ((1,), "the attention factor that follows from the scaling's factor"),
        f"{name}.rope.scaling.yarn_ext_factor": ((1, -1), "all of YaRN's extrapolation"),
        f"{name}.rope.scaling.yarn_log_multiplier": ((0,), "the attention factor that follows from the factor"),
    }
    for key, (values, expected) in plain.items():
        if key in metadata and metadata[key] not in values:
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
    refuse_special(keys)
    name = keys.architecture
    heads, width = keys.whole("attention.head_count"), keys.whole("embedding_length")
    config: dict[str, Any] = {
        "architectures": [next(kind for kind, ours in ARCHITECTURES.items() if ours == name)],
        "model_type": name,
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": keys.whole("feed_forward_length"),
        "num_hidden_layers": keys.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "hidden_act": "silu",
        "max_position_embeddings": keys.whole("context_length"),
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon", most=1.0),
        "rope_theta": keys.real("rope.freq_base", 10000.0, least=1.0),
        "rope_scaling": None,
        "tie_word_embeddings": tied,
        **biases,
        **_special_ids(keys.metadata),
    }
    if name != "qwen2" or f"{name}.attention.key_length" in keys.metadata:
        config["head_dim"] = keys.whole("attention.key_length", width // heads)
    _check_heads(config, keys)
    config["rope_scaling"] = _scaling(keys, config, factors)
    return config


def _check_heads(config: dict[str, Any], keys: Keys) -> None:
    heads, kv, width = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    divides = keys.architecture == "llama" or config.get("head_dim") is None  # transformers' LlamaConfig demands it
    if heads % kv or (divides and width % heads) or head_size(config) % 2:
        found = f"{heads} heads, {kv} of keys and values, {width} wide"
        raise unusable(keys.path, found, "heads in equal groups, of an even length")


def _special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Ids of special tokens; those that the vocabulary has no token for (−1, also as 2**32 − 1) name none."""
    found = {ours: metadata.get(f"tokenizer.ggml.{key}") for ours, key in _IDS.items()}
    return {key: value for key, value in found.items() if _is_token(value, metadata)}


def _is_token(value: Any, metadata: Mapping[str, Any]) -> bool:
    return type(value) is int and 0 <= value < len(metadata["tokenizer.ggml.tokens"])


def _scaling(keys: Keys, config: dict[str, Any], factors: np.ndarray | None) -> dict[str, Any] | None:
    """rope_scaling of config.json; None = the frequencies are as trained."""
    kind = keys.metadata.get(f"{keys.architecture}.rope.scaling.type")
    factor = keys.metadata.get(f"{keys.architecture}.rope.scaling.factor")
    if kind is None and factor is not None:
        kind = "linear"  # as llama.cpp takes it
    stretched = kind not in (None, "none") and factor is not None
    if factors is not None and not (factors == 1).all():
        if stretched:
            raise _unknown_rope(keys, f"both {kind} scaling and rope_freqs")
        return _llama3(keys, config, factors)
    if not stretched:
        return None
    if kind not in ROPE_TYPES[keys.architecture]:
        raise _unknown_rope(keys, f"rope scaling {kind!r}")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": keys.real("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = keys.whole("rope.scaling.original_context_length")
        for key, name in _YARN.items():
            if f"{keys.architecture}.rope.scaling.{key}" in keys.metadata:
                scaling[name] = keys.real(f"rope.scaling.{key}")
    return scaling


def _unknown_rope(keys: Keys, what: str) -> InputError:
    return unusable(keys.path, what, f"none, or one of: {', '.join(ROPE_TYPES[keys.architecture])}", OWN_FOLDER)


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
    blended = np.flatnonzero((factors > 1) & (factors < factors.max())) if factors.ndim == 1 else np.array([])
    if len(blended) >= 2:
        frequency = theta ** (-2.0 * blended / size) / (2 * np.pi)
        smooth = (1 / factors[blended].astype(np.float64) - 1 / largest) / (1 - 1 / largest)
        slope, offset = np.polyfit(frequency, smooth, 1)
        if offset < 0:
            high = round(1 - 1 / offset, 3)
            trained = round(slope * (high - 1))
            guesses.append(base | {"high_freq_factor": high, "original_max_position_embeddings": trained})
    for guess in guesses:
        again = rope_factors(config | {"rope_scaling": guess})
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

    try:
        return AutoConfig.for_model(**{key: value for key, value in config.items() if key != "architectures"})
    except (ValueError, TypeError, KeyError, OverflowError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        found = f"keys that transformers does not take ({reason})"
        expected = f"a {config['model_type']} model that transformers knows"
        raise unusable(path, found, expected, OWN_FOLDER) from None


def _can_sample(name: str, value: Any) -> bool:
    """Whether transformers takes a sampling value; llama.cpp's words for "off" (top_k 0) it does not, and they are the
    default there."""
    if type(value) not in (int, float) or abs(value) > _MOST_FLOAT32 or (name == "top_k" and type(value) is not int):
        return False
    least, most = _RANGES.get(name, (0, math.inf))
    return least <= value <= most and (value > 0 or name in ("temperature", "min_p"))


def generation_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: tokens that end an answer, and the sampling that the file recommends."""
    found: dict[str, Any] = _special_ids(metadata)
    turn = metadata.get("tokenizer.ggml.eot_token_id")
    if _is_token(turn, metadata) and "eos_token_id" in found and turn != found["eos_token_id"]:
        found["eos_token_id"] = [found["eos_token_id"], turn]
    for key, name in _SAMPLING.items():
        value = metadata.get(f"general.sampling.{key}")
        if _can_sample(name, value):
            found[name] = shortest(value) if type(value) is float else value
    if found.get("temperature", 1) <= 0:  # llama.cpp then takes the likeliest token; transformers refuses the number
        del found["temperature"]
        found["do_sample"] = False
    elif any(name in found for name in ("temperature", "top_k", "top_p", "min_p")):
        found["do_sample"] = True
    return found
