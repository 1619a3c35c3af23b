"""config.json and adapter_config.json through a schema, before anything is built, multiplied or matched with them.

Only keys that the workbook or the libraries below it compute with are checked; others are kept as they are.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from lib.errors import InputError, refusal
from lib.models.gguf_file import ARCHITECTURES, TABLES, head_size, names_of
from lib.models.weights import Shaped, Weights, open_weights, read_object

MOST = 2**31 - 1
"""Of any size: llama.cpp and GGUF keep them in 32 bits."""
MOST_LAYERS = 10_000
"""The deepest language model has fewer than 200; names of a billion layers would be built one by one."""
PATIENCE = 1.0
"""Seconds that a pattern of an adapter may take: a^n patterns never end, in peft neither."""


ACTIVATIONS = tuple(TABLES["activations"])
"""Names that transformers knows (transformers.activations.ACT2FN)."""


def _exact(value: Any) -> Any:
    """Numbers as they are: true is no number, and 2.0 is no whole one."""
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


def _broken(value: Any) -> Any:
    """transformers takes no whole number where it wants a float."""
    if not isinstance(value, float):
        raise ValueError("should be a number with a point")
    return value


def _whole(value: Any) -> Any:
    """As `_exact`, where 2.0 is 2: what samplers take."""
    return int(value) if isinstance(value, float) and value.is_integer() else _exact(value)


Size = Annotated[int, BeforeValidator(_exact), Field(ge=1, le=MOST)]
Layers = Annotated[int, BeforeValidator(_exact), Field(ge=1, le=MOST_LAYERS)]
Positive = Annotated[float, BeforeValidator(_exact), Field(gt=0, le=1e30, allow_inf_nan=False)]
Scale = Annotated[float, BeforeValidator(_exact), Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


Whole = Annotated[int, BeforeValidator(_whole), Field(ge=-MOST, le=MOST)]
Real = Annotated[float, BeforeValidator(_exact), Field(ge=-3.4e38, le=3.4e38, allow_inf_nan=False)]

Id = Annotated[int, BeforeValidator(_exact), Field(ge=-1, le=MOST)]
"""Of a token; -1 is none."""


def _schema(name: str, kinds: Mapping[Any, str], **needed: Any) -> type[BaseModel]:
    """A schema whose keys may be absent or null, by what their values must be; further keys are kept as they are."""
    keys = {key: (kind | None, None) for kind, names in kinds.items() for key in names.split()}
    return create_model(name, __config__=ConfigDict(extra="allow", strict=True), **keys, **needed)


Rope = _schema(
    "Rope",
    {
        str: "rope_type type",
        Positive: "rope_theta factor low_freq_factor high_freq_factor",
        Scale: "attention_factor beta_fast beta_slow",
        Size: "original_max_position_embeddings",
    },
)
"""Keys of rope_scaling and rope_parameters."""

_DTYPES = ("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")
Configuration = _schema(
    "Configuration",
    {
        str: "model_type",
        Literal["auto", *_DTYPES]: "dtype torch_dtype",
        list[str]: "architectures",
        Annotated[list[str], Field(min_length=1)]: "layer_types",
        Size: "hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim vocab_size "
        "max_position_embeddings",
        Layers: "num_hidden_layers",
        Positive: "rms_norm_eps rope_theta",
        Rope: "rope_scaling rope_parameters",
        Id | list[Id]: "bos_token_id eos_token_id",
        Id: "pad_token_id",
        Literal[ACTIVATIONS]: "hidden_act",
        Annotated[int, BeforeValidator(_exact), Field(ge=0, le=MOST)]: "sliding_window max_window_layers "
        "num_nextn_predict_layers num_labels",
        bool: "tie_word_embeddings use_cache use_sliding_window",
        Annotated[float, BeforeValidator(_broken)]: "initializer_range",
        Annotated[float, BeforeValidator(_exact), Field(ge=0, le=1)]: "attention_dropout",
        dict[Annotated[str, Field(pattern="^[0-9]+$")], str]: "id2label",
        Literal[True]: "return_dict",
        Literal[False]: "output_attentions output_hidden_states",
        dict[str, Any]: "quantization_config",
        Literal["model.safetensors", "model.safetensors.index.json"]: "transformers_weights",  # what others read, too
        Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"]: "attn_implementation",  # a/b: a hub's code
    },
    own=(Literal["eager", "sdpa"] | None, Field(None, alias="_attn_implementation")),  # which no argument overrides
)
"""Keys of config.json."""

AdapterConfiguration = _schema(
    "AdapterConfiguration",
    {
        str: "peft_type task_type base_model_name_or_path revision",
        dict[str, Size]: "rank_pattern",
        dict[str, Scale]: "alpha_pattern",
        str | list[str]: "target_modules exclude_modules layers_pattern",
        list[str]: "modules_to_save target_parameters",
        list[int] | dict[str, list[int]]: "trainable_token_indices",
        int | list[int]: "layers_to_transform",
        Literal["none", "all", "lora_only"]: "bias",
        bool: "fan_in_fan_out use_rslora use_dora lora_bias",
        Annotated[float, BeforeValidator(_exact), Field(ge=0, le=1)]: "lora_dropout",
        bool | str: "init_lora_weights",
    },
    r=(Size, ...),
    lora_alpha=(Scale, 8),
)
"""Keys of adapter_config.json that a LoRA adapter is merged or loaded by."""


GenerationConfiguration = _schema(
    "GenerationConfiguration",
    {
        str: "sequence",
        Whole: "top_k penalty_last_n mirostat",
        Real: "top_p min_p xtc_probability xtc_threshold temperature penalty_repeat repetition_penalty mirostat_tau "
        "mirostat_eta",
    },
)
"""Keys of generation_config.json that GGUF has words for: llama.cpp's names, and transformers' repetition_penalty."""


def read_sampling(folder: Path) -> dict[str, Any]:
    """The values of generation_config.json that GGUF has words for; empty where the folder has no such file.

    Raises:
        InputError: a damaged file; or a value that is no number of its kind, or none that 32 bits hold.
    """
    path = folder / "generation_config.json"
    found = _checked(GenerationConfiguration, path, read_object(path)) if path.is_file() else None
    return found.model_dump(include={*GenerationConfiguration.model_fields}, exclude_none=True) if found else {}


def read_configuration(folder: Path, what: str = "a model folder") -> dict[str, Any]:
    """config.json of a model folder, checked.

    Raises:
        InputError: as `read_object` and `check_configuration`.
    """
    return check_configuration(folder / "config.json", read_object(folder / "config.json", what))


def read_adapter_configuration(folder: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter's folder, checked.

    Raises:
        InputError: as `read_object` and `check_adapter_configuration`; or it is no LoRA.
    """
    path = folder / "adapter_config.json"
    config = read_object(path, "a peft adapter folder")
    if str(kind := config.get("peft_type")).upper() != "LORA":
        raise InputError(f"{folder}: peft_type {kind!r}.", "LORA.", "use a LoRA adapter.")
    return check_adapter_configuration(path, config)


def as_peft_reads(config: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's configuration without what merging takes for nothing and peft stumbles over."""
    kept = {key: value for key, value in config.items() if value is not None and value != []}
    return {key: value for key, value in kept.items() if key != "layers_pattern" or "layers_to_transform" in kept}


def check_configuration(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """config.json as it is, when every key that is computed with has a value of its kind.

    Raises:
        InputError: names the key, its value and what it should be.
    """
    found = _checked(Configuration, path, config)
    heads, shared = found.num_attention_heads, found.num_key_value_heads
    if heads and found.hidden_size and not found.head_dim and found.hidden_size % heads:
        raise _odd(path, "num_attention_heads", heads, f"a divisor of hidden_size ({found.hidden_size})")
    pad, rows = found.pad_token_id, found.vocab_size
    if pad and rows and pad >= rows:
        raise _odd(path, "pad_token_id", pad, f"a token of the vocabulary (vocab_size {rows}), or null")
    if "sliding_attention" in (found.layer_types or ()) and not found.sliding_window:
        raise _odd(path, "sliding_window", found.sliding_window, "tokens that layers of sliding_attention see")
    if heads and shared and heads % shared:
        raise _odd(path, "num_key_value_heads", shared, f"a divisor of num_attention_heads ({heads})")
    _refuse_nothing(path, config)
    return config


def _refuse_nothing(path: Path, config: dict[str, Any]) -> None:
    """Refuse null, or nothing inside, where transformers takes an absent key alone for its default.

    Raises:
        InputError: names the key.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if (rope if "rope_theta" in rope else config).get("rope_theta", 0) is None:
        raise _odd(path, "rope_theta", None, "a number, or no such key")
    if config.get("model_type") == "qwen2" and config.get("head_dim", 0) is None:
        raise _odd(path, "head_dim", None, "a whole number, or no such key")
    packed = config.get("quantization_config")
    if packed is not None and not any(packed.get(key) for key in ("quant_method", "load_in_4bit", "load_in_8bit")):
        raise _odd(path, "quantization_config", packed, "a quant_method inside, or no such key (of plain weights)")


def check_adapter_configuration(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """adapter_config.json of a LoRA adapter as it is, when every key it is merged by has a value of its kind.

    Raises:
        InputError: names the key, its value and what it should be.
    """
    found = _checked(AdapterConfiguration, path, config)
    for key in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        value = getattr(found, key) or ()
        for pattern in [value] if isinstance(value, str) else value:
            if isinstance(value, str) or key.endswith("_pattern"):  # elsewhere lists are of names
                check_pattern(path, key, pattern)
    return config


HEADS = ("score", "classifier", "classification_head", "qa_outputs", "v_head", "dense_head")
"""Last layers of models that do not answer in words."""
_OTHER_CLASS = re.compile(
    r"For(SequenceClassification|TokenClassification|QuestionAnswering|RewardModel|MultipleChoice|MaskedLM"
    r"|NextSentencePrediction|FeatureExtraction|TextEncoding|SequenceRegression|ProcessReward)$|RewardModel$"
)
OTHER_TASKS: dict[str, str] = TABLES["other_tasks"]
"""task_type of peft that no causal language model has → what it trains."""


def head_of(names: Mapping[str, Shaped]) -> str | None:
    """The head of a classifier among tensors (by the base's names), in words; None where there is none."""
    for name, tensor in names.items():
        module, _, last = name.rpartition(".")
        if module.split(".")[0] in HEADS and last == "weight" and len(tensor.shape) == 2:
            return f"head `{module}` with {tensor.shape[0]:,} outputs"
    return None


def refuse_other_task(
    folder: Path, tensors: Mapping[str, Shaped], classes: Iterable[str] = (), task: str | None = None
) -> None:
    """Refuse a model or adapter that does not answer in words.

    Args:
        tensors: by the base's names. classes: `architectures` of a model.
        task: task_type of an adapter; None = a model.

    Raises:
        InputError: says what it is.
    """
    kind = OTHER_TASKS.get((task or "").upper())
    signs = [f"task_type {task}"] if kind else [name for name in classes if _OTHER_CLASS.search(name)][:1]
    signs += [head] if (head := head_of(tensors)) else []
    if signs:
        what = ("" if task is None else "an adapter of ") + (kind or "a classifier or scorer")
        raise refusal("models/other-task", folder=folder, what=what, signs=", ".join(signs))


def attention_rows(config: Mapping[str, Any]) -> dict[str, int]:
    """Rows of the attention's weights, of models whose queries are one vector a head; empty for other models."""
    kind, heads, hidden = map(config.get, ("model_type", "num_attention_heads", "hidden_size"))
    head = config.get("head_dim") or (hidden // heads if hidden and heads and kind in ("llama", "qwen2") else None)
    if not head or not heads or kind not in ("llama", "qwen2", "qwen3"):
        return {}
    shared = config.get("num_key_value_heads") or 0  # what is absent is not compared
    return {"num_attention_heads × head_dim": heads * head, "num_key_value_heads × head_dim": shared * head}


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The weights of a model of the Llama, Qwen2 or Qwen3 family that only its configuration is known of.

    Raises:
        KeyError: a configuration of another family, or without a size.
    """
    head = head_size(config)
    sizes = {**config, **attention_rows({**config, "head_dim": head}), "head": head}
    shapes = {}
    for name in names_of(config).values():
        module, _, kind = (match[2] if (match := LAYER.fullmatch(name)) else name).rpartition(".")
        keys = TABLES["shapes"].get(module, ["hidden_size"])  # a norm
        shapes[name] = tuple(sizes[key] for key in (keys[:1] if kind == "bias" else keys))
    return shapes


LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
BUFFERS = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")
"""Ends of names that older versions saved, and that no program reads."""


def check_sizes(weights: Weights, config: Mapping[str, Any]) -> None:
    """Compare config.json with the tensors, before anything is built from its sizes.

    Raises:
        InputError: other layers, a tensor of another shape than a key says, or (of the architectures that GGUF is
            written of) tensors that transformers would leave out, or miss.
    """
    path, layers = weights.folder / "config.json", config.get("num_hidden_layers")
    seen = {int(match[1]) for name in weights.tensors if (match := LAYER.fullmatch(name))}
    more = config.get("num_nextn_predict_layers") or 0  # layers that guess further tokens stand behind the others
    if layers and seen and not set(range(layers)) <= seen <= set(range(layers + more)):
        raise refusal("models/other-layers", path=path, layers=layers, seen=len(seen))
    if config.get("quantization_config"):
        return  # packed: other shapes
    if (kind := config.get("model_type")) in ARCHITECTURES.values():
        wanted = {*names_of({**config, "num_hidden_layers": layers or len(seen)}).values()}
        have = {name for name in weights.tensors if not name.endswith(BUFFERS)} - ({"lm_head.weight"} - wanted)
        if lacks := sorted(wanted - have):
            if wanted - {"lm_head.weight"} <= {f"model.{name}" for name in have}:
                raise refusal("models/saved-without-head", folder=weights.folder, name=min(have))
            raise refusal("models/lacks-tensors", weights=weights, count=len(lacks), kind=kind, lacks=lacks)
        if odd := sorted(have - wanted):
            raise refusal("models/has-other-tensors", weights=weights, count=len(odd), kind=kind, odd=odd)
    sizes = {**config, **attention_rows(config)}
    for name, tensor in weights.tensors.items():
        module = LAYER.sub(r"\2", name).removesuffix(".weight")  # of a bias it is none of them
        for key, size in zip(TABLES["shapes"].get(module, ()), tensor.shape, strict=False):
            if sizes.get(key) and sizes[key] != size:
                raise refusal("models/other-sizes", path=path, key=key, size=sizes[key], name=name, tensor=tensor)


def check_language_model(folder: Path, config: Mapping[str, Any]) -> Weights:
    """The weights of a causal language model whose (checked) config.json belongs to them.

    Raises:
        InputError: no or damaged weights, a classifier, or sizes that differ.
    """
    weights = open_weights(folder)
    refuse_other_task(folder, weights.tensors, config.get("architectures") or ())
    check_sizes(weights, config)
    return weights


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
    if "(" in pattern and re.search(r"[*+{]", pattern) and not _ends(pattern):
        raise _odd(path, key, pattern, "a regular expression that ends on names of modules")


def _checked(schema: type[BaseModel], path: Path, config: dict[str, Any]) -> Any:
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
            raise refusal("models/lacks-key", path=path, name=name) from None
        message = first["msg"].removeprefix("Value error, ").removeprefix("Input ").removeprefix("should be ")
        raise _odd(path, name, value if name in config or "." in name else None, message) from None


def _odd(path: Path, key: str, value: Any, expected: str) -> InputError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}… ({len(shown):,} characters)"
    return InputError(f"{path}: {key} is {shown}.", f"{expected}.", "download it again, or correct that key.")
