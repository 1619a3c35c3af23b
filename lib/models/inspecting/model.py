"""A folder with a full model: architecture, weights, tokenizer, and what is missing or does not fit together."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.models.inspecting.disk import read_object, whole
from lib.models.inspecting.tokenizer import describe_tokenizer
from lib.models.kinds import has_lora
from lib.models.weights import INDEX, Weights, open_weights

_NUMBERS = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "heads": "num_attention_heads",
    "key_value_heads": "num_key_value_heads",
    "feed_forward": "intermediate_size",
    "context": "max_position_embeddings",
    "vocabulary_in_config": "vocab_size",
}


def describe(folder: Path, render: bool) -> dict[str, Any]:
    """Facts, notes and problems of a model folder."""
    notes: list[str] = []
    problems: list[str] = []
    config = _config(folder, notes, problems)
    facts: dict[str, Any] = {
        "architecture": _first(config.get("architectures")) or config.get("model_type"),
        "model_type": config.get("model_type"),
        **{name: whole(config.get(key)) for name, key in _NUMBERS.items()},
    }
    facts |= _weights(folder, config, facts["layers"], notes, problems)
    tokenizer = describe_tokenizer(folder, problems, render)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        problems.append("no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    elif tokenizer["template"] is None:
        problems.append("no chat template: a base model without instruction tuning, or a file is missing")
    rows = facts.get("embedding_rows") or facts["vocabulary_in_config"]
    if rows and tokenizer["largest_id"] is not None and tokenizer["largest_id"] >= rows:
        problems.append(
            f"the tokenizer's largest id is {tokenizer['largest_id']:,}, but the model has {rows:,} embeddings"
        )
    if not (folder / "generation_config.json").is_file():
        notes.append("no generation_config.json: the defaults of transformers decide how text is generated")
    quantized = config.get("quantization_config")
    if isinstance(quantized, dict):
        notes.append(
            f"already quantized ({quantized.get('quant_method', 'unknown method')}): take the original to train"
        )
    return {**facts, **tokenizer, "notes": notes, "problems": problems}


def _config(folder: Path, notes: list[str], problems: list[str]) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        problems.append("no config.json")
    config = read_object(folder / "config.json", problems)
    if config and not isinstance(config.get("model_type"), str):
        problems.append("config.json names no model_type")
    if config.get("auto_map"):
        notes.append("config.json asks for code of the repository (auto_map), which is never run")
    return config


def _first(value: Any) -> str | None:
    return value[0] if isinstance(value, list) and value and isinstance(value[0], str) else None


def _weights(
    folder: Path, config: dict[str, Any], layers: int | None, notes: list[str], problems: list[str]
) -> dict[str, Any]:
    """Parameters, dtypes, tying and shards, from the headers."""
    missing = _missing_shards(folder)
    if missing:
        problems.append(f"{len(missing)} of the index's files are missing: {', '.join(missing[:4])}")
    try:
        weights = open_weights(folder)
    except InputError as error:
        if not missing:
            problems.append(error.found.rstrip("."))
        said = config.get("tie_word_embeddings")
        return {"parameters": None, "dtype": None, "tied": said if isinstance(said, bool) else None}
    if has_lora(weights.tensors):
        problems.append("the weights are those of a LoRA adapter")
    dtypes: Counter[str] = Counter()
    for tensor in weights.tensors.values():
        dtypes[tensor.dtype] += tensor.size
    embedding = weights.tensors.get("model.embed_tokens.weight")
    if len(dtypes) > 1:
        notes.append("several number formats: " + ", ".join(f"{k} {v:,}" for k, v in dtypes.most_common()))
    seen = {int(part) for name in weights.tensors for part in [name.removeprefix("model.layers.").partition(".")[0]]
            if name.startswith("model.layers.") and part.isdigit()}  # fmt: skip
    if layers and seen and seen != set(range(layers)):
        problems.append(f"config.json says {layers} layers, the weights have {len(seen)}")
    return {
        "parameters": weights.parameters,
        "dtype": dtypes.most_common(1)[0][0],
        "tied": _tied(config, weights, problems),
        "embedding_rows": embedding.shape[0] if embedding and embedding.shape else None,
        "weight_files": len(weights.files),
    }


def _tied(config: dict[str, Any], weights: Weights, problems: list[str]) -> bool:
    """Whether input and output share one matrix; said by the configuration, or by an absent output matrix."""
    own = "lm_head.weight" in weights.tensors
    said = config.get("tie_word_embeddings")
    if said is False and not own:
        problems.append(
            "config.json says the output matrix is separate (tie_word_embeddings: false), but it is missing"
        )
    return said is True or (said is None and not own)


def _missing_shards(folder: Path) -> list[str]:
    try:
        listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({str(name) for name in listed if not (folder / str(name)).is_file()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
