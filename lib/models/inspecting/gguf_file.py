"""A GGUF file: architecture, types of its tensors, vocabulary, template, and whether it is whole."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.models.gguf_file import TensorInfo, read_metadata, read_tensors
from lib.models.inspecting.disk import whole
from lib.models.inspecting.templates import describe_template

_NUMBERS = {
    "layers": "block_count",
    "hidden_size": "embedding_length",
    "heads": "attention.head_count",
    "key_value_heads": "attention.head_count_kv",
    "feed_forward": "feed_forward_length",
    "context": "context_length",
}


def describe(path: Path, render: bool) -> dict[str, Any]:
    """Facts, notes and problems of a GGUF file."""
    try:
        metadata, tensors = read_metadata(path), read_tensors(path)
    except InputError as error:
        return {"architecture": None, "notes": [], "problems": [error.found.rstrip(".")]}
    notes: list[str] = []
    problems: list[str] = []
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        problems.append("it names no architecture")
    tokens = metadata.get("tokenizer.ggml.tokens")
    facts = {
        "architecture": architecture,
        "name": metadata.get("general.name"),
        "file_type": _file_type(metadata.get("general.file_type")),
        **{name: whole(metadata.get(f"{architecture}.{key}")) for name, key in _NUMBERS.items()},
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "tensors": len(tensors),
        "types": _types(tensors),
        "tied": not any(tensor.name == "output.weight" for tensor in tensors),
        "vocabulary": len(tokens) if isinstance(tokens, list) else None,
        "pre_tokenizer": metadata.get("tokenizer.ggml.pre"),
        "template": _template(metadata, render, problems),
    }
    _check(path, metadata, tensors, facts, notes, problems)
    return {**facts, "notes": notes, "problems": problems}


def _check(
    path: Path,
    metadata: dict[str, Any],
    tensors: list[TensorInfo],
    facts: dict[str, Any],
    notes: list[str],
    problems: list[str],
) -> None:
    need, size = _end(tensors), path.stat().st_size
    if need is None:
        notes.append("a tensor type that this version does not know: whether the file is whole was not checked")
    elif need > size:
        problems.append(f"incomplete: {size:,} of {need:,} bytes are there; download or make it again")
    if not tensors:
        problems.append("it holds no tensor" + (" (a vocabulary only)" if facts["vocabulary"] else ""))
    if facts["vocabulary"] is None:
        problems.append("no vocabulary")
    elif facts["template"] is None:
        notes.append("no chat template")
    embedding = next((tensor.shape for tensor in tensors if tensor.name == "token_embd.weight"), ())
    if facts["vocabulary"] and embedding and embedding[0] < facts["vocabulary"]:
        problems.append(f"{facts['vocabulary']:,} tokens, but {embedding[0]:,} embeddings")
    notes.append(_as_base(path))
    if budget := metadata.get("quantize.mix.budget_bytes"):
        found = f"types chosen by measurement under a budget of {budget} bytes"
        notes.append(f"{found}: the file type is only the recipe of the commonest one")
    parts = whole(metadata.get("split.count"))
    if parts and parts > 1:
        notes.append(f"one of {parts} parts of a split file")


def _as_base(path: Path) -> str:
    """Whether the file can be a base model; the same is asked when it is unpacked."""
    from lib.models.unpacking.source import read_source

    try:
        source = read_source(path)
    except InputError as error:
        return f"no base model (base_model, workbook unpack): {error.found.rstrip('.')}"
    if not source.metadata.get("tokenizer.chat_template"):
        return "no base_model, workbook unpack only: no chat template"
    kind = source.main_type
    return f"can be a base model (base_model, workbook unpack): its {kind} weights are turned back into numbers"


def _template(metadata: dict[str, Any], render: bool, problems: list[str]) -> dict[str, Any] | None:
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str) or not template:
        return None
    found = describe_template(template, render)
    if found["problem"]:
        problems.append(found["problem"])
    return {key: value for key, value in found.items() if key != "problem"}


def _file_type(number: Any) -> str | None:
    import gguf

    try:
        return gguf.LlamaFileType(number).name.removeprefix("MOSTLY_")
    except ValueError:
        return None


def _types(tensors: list[TensorInfo]) -> dict[str, int]:
    """Number of tensors by type."""
    import gguf

    known = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    return dict(Counter(known.get(tensor.type, f"type {tensor.type}") for tensor in tensors).most_common())


def _end(tensors: list[TensorInfo]) -> int | None:
    """Byte behind the last tensor; None when a type is not known."""
    import gguf

    end = 0
    for tensor in tensors:
        try:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.type)]
        except (ValueError, KeyError):
            return None
        end = max(end, tensor.start + math.prod(tensor.shape) // block * size)
    return end
