"""What every folder is looked through for: its size, Git LFS pointers, web pages, pickles, unfinished downloads.
A GGUF file: architecture, types of its tensors, vocabulary, template, and whether it is whole.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.models.gguf_file import TensorInfo, read_metadata, read_tensors
from lib.prompts.templates import describe_template

# What every folder is looked through for: its size, Git LFS pointers, web pages, pickles, unfinished downloads.

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def size_on_disk(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def disk_problems(folder: Path) -> tuple[list[str], list[str]]:
    """Notes and problems that the first bytes and the names of a folder's files show."""
    notes, problems = [], []
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        try:
            with path.open("rb") as stream:
                head = stream.read(64)
        except OSError as error:
            problems.append(f"{path.name} cannot be read ({error.strerror})")
            continue
        if head.startswith(b"version https://git-lfs"):
            problems.append(f"{path.name} is a Git LFS pointer, not the file: run `git lfs pull` in its clone")
        elif head.lstrip()[:1] == b"<" and path.suffix in (".json", ".safetensors", ".txt", ".model"):
            problems.append(f"{path.name} is a web page, not the file: download it again")
        elif path.suffix in _PICKLES:
            notes.append(f"{path.name} is a pickle, which can run any code: the workbook never reads it")
        elif path.suffix in (".incomplete", ".part"):
            notes.append(f"{path.name} is an unfinished download")
        elif path.suffix == ".py":
            notes.append(f"{path.name} is code of the repository: the workbook never runs it")
    return notes, problems


def read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object; empty, with a problem noted, when it is damaged. A missing file is empty without one."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} is damaged ({' '.join(str(error).split())[:80]})")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path.name} holds no object")
        return {}
    return content


def whole(value: Any) -> int | None:
    """A whole number of a configuration; None for anything else."""
    return value if type(value) is int else None


# A GGUF file: architecture, types of its tensors, vocabulary, template, and whether it is whole.

_NUMBERS = {
    "layers": "block_count",
    "hidden_size": "embedding_length",
    "heads": "attention.head_count",
    "key_value_heads": "attention.head_count_kv",
    "feed_forward": "feed_forward_length",
    "context": "context_length",
}


def describe_gguf_file(path: Path, render: bool) -> dict[str, Any]:
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
    from lib.models.unpack_source import read_source

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
