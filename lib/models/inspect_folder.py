"""A tokenizer folder described from its JSON files, without the tokenizer library.
A folder with a LoRA adapter: what it changes, for which base model, and what is missing.
A folder with a full model: architecture, weights, tokenizer, and what is missing or does not fit together.
What a folder or file on the disk is, and what it lacks: models, adapters, GGUF files. Nothing is loaded or run.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.models import inspect_gguf
from lib.models.adapters import folder_kind, has_lora, read_shape
from lib.models.inspect_gguf import disk_problems, read_object, size_on_disk, whole
from lib.models.weights import INDEX, Weights, open_weights
from lib.prompts.templates import describe_template

# A tokenizer folder described from its JSON files, without the tokenizer library.

_SHOWN = 30


def describe_tokenizer(folder: Path, problems: list[str], render: bool) -> dict[str, Any]:
    """{"vocabulary", "added_tokens", "largest_id", "template"}; what is wrong is added to `problems`."""
    config = read_object(folder / "tokenizer_config.json", problems)
    vocabulary, added = _vocabulary(folder, config, problems)
    template = _template(folder, config, problems)
    described = describe_template(template, render) if template else None
    if described and described["problem"]:
        problems.append(described["problem"])
    ids = [*vocabulary.values(), *added.values()]
    return {
        "vocabulary": len({*vocabulary, *added}) if vocabulary else None,
        "added_tokens": [name for name, _ in sorted(added.items(), key=lambda item: item[1])][:_SHOWN],
        "added_token_count": len(added),
        "largest_id": max(ids, default=None),
        "template": {key: value for key, value in described.items() if key != "problem"} if described else None,
    }


def _vocabulary(folder: Path, config: dict[str, Any], problems: list[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Ordinary and added tokens with their ids."""
    tokenizer = read_object(folder / "tokenizer.json", problems)
    model = tokenizer.get("model")
    plain = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(plain, list):  # a unigram model lists (token, score)
        plain = {str(entry[0]): i for i, entry in enumerate(plain) if isinstance(entry, list) and entry}
    listed = tokenizer.get("added_tokens")
    if not isinstance(plain, dict):
        plain = read_object(folder / "vocab.json", problems)
        decoder = config.get("added_tokens_decoder")
        entries = decoder.items() if isinstance(decoder, dict) else ()
        listed = [{"id": int(i), **e} for i, e in entries if isinstance(e, dict) and str(i).isdigit()]
    vocabulary = {name: i for name, i in plain.items() if type(i) is int}
    added = {
        entry["content"]: entry["id"]
        for entry in (listed if isinstance(listed, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and type(entry.get("id")) is int
    }
    return vocabulary, added


def _template(folder: Path, config: dict[str, Any], problems: list[str]) -> str:
    """The chat template: its own file, or in tokenizer_config.json (of several the one called default)."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        try:
            return own.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            problems.append("chat_template.jinja is not UTF-8")
            return ""
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {e.get("name"): e.get("template") for e in value if isinstance(e, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else ""


# A folder with a LoRA adapter: what it changes, for which base model, and what is missing.

_VARIANTS = {
    "modules_to_save": "fully trained copies of",
    "rank_pattern": "other ranks for",
    "alpha_pattern": "other alphas for",
}


def describe_adapter(folder: Path, render: bool) -> dict[str, Any]:
    """Facts, notes and problems of an adapter folder."""
    notes: list[str] = []
    problems: list[str] = []
    config = read_object(folder / "adapter_config.json", problems)
    if not (folder / "adapter_config.json").is_file():
        problems.append("no adapter_config.json: rank, alpha and base model are not known")
    facts: dict[str, Any] = {
        "peft_type": config.get("peft_type"),
        "base_model": config.get("base_model_name_or_path") or None,
        "base_revision": config.get("revision"),
        "target_modules": config.get("target_modules"),
    }
    facts |= _shape(folder, config, problems)
    if not facts["base_model"]:
        notes.append("it does not name its base model")
    for key, words in _VARIANTS.items():
        if config.get(key):
            value = config[key]
            notes.append(f"{words} {', '.join(map(str, value)) if isinstance(value, (list, dict)) else value} ({key})")
    has_tokenizer = (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file()
    tokenizer = describe_tokenizer(folder, problems, render) if has_tokenizer else {}
    return {**facts, **tokenizer, "notes": notes, "problems": problems}


def _shape(folder: Path, config: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    empty = {"variant": None, "rank": config.get("r"), "alpha": config.get("lora_alpha"), "parameters": None}
    if not config:
        return empty
    try:
        shape = read_shape(folder)
    except InputError as error:
        problems.append(error.found.rstrip("."))
        return empty
    if set(shape.ranks) != {shape.rank} and not config.get("rank_pattern"):
        problems.append(f"adapter_config.json says rank {shape.rank}, the tensors have {sorted(shape.ranks)}")
    return {
        "variant": shape.variant,
        "rank": shape.rank,
        "alpha": shape.alpha,
        "changed_modules": shape.modules,
        "targets": shape.targets,
        "parameters": shape.parameters,
        "dtype": shape.dtype,
    }


# A folder with a full model: architecture, weights, tokenizer, and what is missing or does not fit together.

_NUMBERS = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "heads": "num_attention_heads",
    "key_value_heads": "num_key_value_heads",
    "feed_forward": "intermediate_size",
    "context": "max_position_embeddings",
    "vocabulary_in_config": "vocab_size",
}


def describe_model(folder: Path, render: bool) -> dict[str, Any]:
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


# What a folder or file on the disk is, and what it lacks: models, adapters, GGUF files. Nothing is loaded or run.


def inspect(path: Path | str, render: bool = True) -> dict[str, Any]:
    """Describe a model folder, an adapter folder or a GGUF file.

    Args:
        render: also try the chat template out, in a process of its own with little memory and time.

    Returns:
        {"path", "kind" ("model", "adapter", "gguf" or "unknown"), "bytes", facts by kind, "notes", "problems"}; with
        a problem it cannot be used, a note is only worth knowing.

    Raises:
        InputError: nothing there.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return {
            "path": str(path),
            "kind": "gguf",
            "bytes": path.stat().st_size,
            **inspect_gguf.describe_gguf_file(path, render),
        }
    if not path.is_dir():
        raise InputError(f"no file or folder {path}.", "a model folder, an adapter folder or a GGUF file.", "check it.")
    head: dict[str, Any] = {"path": str(path), "bytes": size_on_disk(path)}
    notes, problems = disk_problems(path)
    kind = folder_kind(path)
    facts: dict[str, Any] = {}
    if kind == "unknown":
        have = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        problems.insert(0, f"neither a model nor an adapter: the folder holds {have}")
    else:
        describe = describe_adapter if kind == "adapter" else describe_model
        facts = describe(path, render)
    return {
        **head,
        "kind": kind,
        **{key: value for key, value in facts.items() if key not in ("notes", "problems")},
        "notes": [*notes, *facts.get("notes", [])],
        "problems": list(dict.fromkeys([*problems, *facts.get("problems", [])])),
    }
