"""config.json and adapter_config.json through a schema, before anything is built, multiplied or matched with them.

Only keys that the workbook or the libraries below it compute with are checked; others are kept as they are.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lib.errors import InputError

MOST = 2**31 - 1
"""Of any size: llama.cpp and GGUF keep them in 32 bits."""
MOST_LAYERS = 10_000
"""The deepest language model has fewer than 200; names of a billion layers would be built one by one."""
PATIENCE = 1.0
"""Seconds that a pattern of an adapter may take: a^n patterns never end, in peft neither."""


ACTIVATIONS = (
    *("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate", "gelu_python"),
    *("gelu_10", "quick_gelu", "relu", "relu2", "relu6", "leaky_relu", "laplace", "linear", "mish", "sigmoid", "tanh"),
)
"""Names that transformers knows (transformers.activations.ACT2FN)."""


def _exact(value: Any) -> Any:
    """Numbers as they are: true is no number, and 2.0 is no whole one."""
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


Size = Annotated[int, BeforeValidator(_exact), Field(ge=1, le=MOST)]
Layers = Annotated[int, BeforeValidator(_exact), Field(ge=1, le=MOST_LAYERS)]
Positive = Annotated[float, BeforeValidator(_exact), Field(gt=0, le=1e30, allow_inf_nan=False)]
Scale = Annotated[float, BeforeValidator(_exact), Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


class _Schema(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class Configuration(_Schema):
    """Keys of config.json; null and absent are the same."""

    model_type: str | None = None
    architectures: list[str] | None = None
    hidden_size: Size | None = None
    intermediate_size: Size | None = None
    num_hidden_layers: Layers | None = None
    num_attention_heads: Size | None = None
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    vocab_size: Size | None = None
    max_position_embeddings: Size | None = None
    rms_norm_eps: Positive | None = None
    rope_theta: Positive | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    hidden_act: Literal[ACTIVATIONS] | None = None
    layer_types: list[str] | None = None
    sliding_window: Annotated[int, BeforeValidator(_exact), Field(ge=0, le=MOST)] | None = None
    tie_word_embeddings: bool | None = None
    quantization_config: dict[str, Any] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"] | None = None
    """A name with a slash is code from a hub."""


class AdapterConfiguration(_Schema):
    """Keys of adapter_config.json that a LoRA adapter is merged or loaded by."""

    peft_type: str | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: Size
    lora_alpha: Scale = 8
    rank_pattern: dict[str, Size] | None = None
    alpha_pattern: dict[str, Scale] | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    bias: Literal["none", "all", "lora_only"] | None = None
    fan_in_fan_out: bool | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    lora_bias: bool | None = None
    init_lora_weights: bool | str | None = None


def check_configuration(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """config.json as it is, when every key that is computed with has a value of its kind.

    Raises:
        InputError: names the key, its value and what it should be.
    """
    found = _checked(Configuration, path, config)
    heads, shared = found.num_attention_heads, found.num_key_value_heads
    if heads and found.hidden_size and not found.head_dim and found.hidden_size % heads:
        raise _odd(path, "num_attention_heads", heads, f"a divisor of hidden_size ({found.hidden_size})")
    if heads and shared and heads % shared:
        raise _odd(path, "num_key_value_heads", shared, f"a divisor of num_attention_heads ({heads})")
    return config


def check_adapter_configuration(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """adapter_config.json of a LoRA adapter as it is, when every key it is merged by has a value of its kind.

    Raises:
        InputError: names the key, its value and what it should be.
    """
    found = _checked(AdapterConfiguration, path, config)
    for key in ("target_modules", "exclude_modules"):
        if isinstance(pattern := getattr(found, key), str):
            check_pattern(path, key, pattern)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(found, key) or {}:
            check_pattern(path, key, pattern)
    return config


_TRIAL = """
import re, sys
pattern = re.compile(sys.argv[1])
for name in ("model.layers.10.self_attn.q_proj", "a" * 40 + "!", "model." + "layers.1." * 12, "q_proj_" * 9):
    pattern.fullmatch(name), pattern.match(name)
"""


@functools.cache
def _ends(pattern: str) -> bool:
    """Whether matching names like a model's takes less than `PATIENCE`: tried by the engine that peft uses."""
    try:
        command = [sys.executable, "-I", "-S", "-c", _TRIAL, pattern]
        return subprocess.run(command, timeout=PATIENCE, capture_output=True).returncode == 0
    except (subprocess.TimeoutExpired, ValueError):
        return False


def check_pattern(path: Path, key: str, pattern: str) -> None:
    """Refuse what is no regular expression, and repeats inside repeats that do not end within a second.

    Raises:
        InputError: names the key and the pattern.
    """
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise _odd(path, key, pattern, f"a regular expression ({error})") from None
    if "(" in pattern and len(re.findall(r"[*+{]", pattern)) > 1 and not _ends(pattern):
        raise _odd(path, key, pattern, "a regular expression that ends on names of modules")


def _checked(schema: type[_Schema], path: Path, config: dict[str, Any]) -> Any:
    try:
        return schema.model_validate(config)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        value, name = config, ""
        for part in first["loc"]:  # keys and indices, and between them names of the schema's types
            if (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int)):
                value, name = value[part], f"{name}.{part}" if name else str(part)
        name = name or str(first["loc"][0])
        if first["type"] == "missing":
            raise InputError(
                f"{path} has no {name}.", "the configuration of a LoRA adapter.", "copy it again."
            ) from None
        message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        raise _odd(path, name, value if name in config or "." in name else None, message) from None
    except RecursionError:
        raise InputError(f"{path} is nested too deep.", "a flat object.", "download it again.") from None


def _odd(path: Path, key: str, value: Any, expected: str) -> InputError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}… ({len(shown):,} characters)"
    return InputError(f"{path}: {key} is {shown}.", f"{expected}.", "download it again, or correct that key.")
