"""What a folder or file on the disk is, and what it lacks: models, adapters, GGUF files. Nothing is loaded or run."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.models import tokenizer_files
from lib.models.adapters import folder_kind, has_lora, read_adapter, shape_of
from lib.models.configurations import check_configuration, check_sizes, refuse_other_task
from lib.models.gguf_file import NUMBERS, TABLES, TensorInfo, computes_in_float32, data_end, read_gguf
from lib.models.language_model import check_part, holds_more, notes_of
from lib.models.runtime_folders import Runtime, runtime_of
from lib.models.unpack_source import ids_beyond, read_source
from lib.models.weights import Weights, impostor, open_weights, read_object
from lib.prompts.templates import describe_template
from lib.runs.files import user_path

_SHOWN_TOKENS = 30


@dataclass
class _Findings:
    """What was found out about a folder or file: a problem makes it unusable; a note is merely worth knowing."""

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def attempt(self, read: Callable[[], Any], otherwise: Any = None) -> Any:
        """What `read` returns; if it refuses, `otherwise`, and the refusal becomes a problem."""
        try:
            return read()
        except InputError as error:
            found = error.found.rstrip(".").replace(f"{self.path}/", "")
            if not any(problem.startswith(found) for problem in self.problems):
                self.problems.append(found)
            return otherwise

    def read_object(self, name: str) -> dict[str, Any]:
        """A JSON object of the folder; empty when it is missing, or damaged, which is a problem."""
        if not (self.path / name).is_file():
            return {}
        return self.attempt(lambda: read_object(self.path / name), {})

    def template(self, text: Any) -> dict[str, Any] | None:
        """A chat template described; None where there is none."""
        if not isinstance(text, str) or not text:
            return None
        described = describe_template(text)
        if problem := described.pop("problem"):
            self.problems.append(problem)
        problem = described.pop("no_system_turn")
        described["takes_system_turn"] = None if described["own_system_turn"] is None else problem is None
        if problem:
            self.notes.append(TABLES["no_system_turn"].format(problem=problem))
        return described


def inspect(path: Path | str) -> dict[str, Any]:
    """Describe a model folder, an adapter folder or a GGUF file.

    Returns:
        {"path", "kind" ("model", "adapter", "gguf", "gguf adapter", "onnx", "mnn" or "unknown"), "bytes", facts by
        kind,
        "notes", "problems"}; with a problem it cannot be used, a note is only worth knowing.

    Raises:
        InputError: nothing there.
    """
    path = Path(path)
    found = _Findings(path)
    head: dict[str, Any] = {"path": str(path)}
    if path.is_file():
        head |= {"kind": "gguf", "bytes": path.stat().st_size}
        _describe_gguf(found)
        head["kind"] = "gguf adapter" if "lora_alpha" in found.facts else "gguf"
    elif path.is_dir():
        runtime = runtime_of(path)
        kind = runtime.module if runtime else folder_kind(path)
        head |= {"bytes": sum(p.stat().st_size for p in path.rglob("*") if p.is_file()), "kind": kind}
        if kind == "unknown":
            have = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            found.problems.append(f"neither a model nor an adapter: the folder holds {have}")
        _look_at_files(found)
        if runtime:
            _describe_runtime(found, runtime)
        elif kind != "unknown":
            {"adapter": _describe_adapter, "model": _describe_model}[kind](found)
    else:
        raise InputError(f"no file or folder {path}.", "a model folder, an adapter folder or a GGUF file.", "check it.")
    return {**head, **found.facts, "notes": found.notes, "problems": list(dict.fromkeys(found.problems))}


def _look_at_files(found: _Findings) -> None:
    """What the first bytes and the names of a folder's files show."""
    for path in sorted(p for p in found.path.iterdir() if p.is_file()):
        try:
            with path.open("rb") as stream:
                words, do = impostor(stream.read(64)) or ("", "")
        except OSError as error:
            found.problems.append(f"{path.name} cannot be read ({error.strerror})")
            continue
        page = words == "a web page" and path.suffix in (".json", ".safetensors", ".txt", ".model")
        if page or words == "a Git LFS pointer":
            found.problems.append(f"{path.name} is {words}, not the file itself: {do}")
        elif path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
            found.notes.append(f"{path.name} is a pickle, which can run any code: only workbook unpickle reads it")
        elif path.suffix in (".incomplete", ".part"):
            found.notes.append(f"{path.name} is an unfinished download")
        elif path.suffix == ".py":
            found.notes.append(f"{path.name} is code of the repository: the workbook never runs it")


def _describe_runtime(found: _Findings, runtime: Runtime) -> None:
    """A folder for another program than transformers."""
    found.facts |= found.attempt(lambda: runtime.check(found.path), {})
    _describe_tokenizer(found)


def _describe_tokenizer(found: _Findings) -> None:
    """Vocabulary and template from the JSON files, without the tokenizer library."""
    settings = found.read_object("tokenizer_config.json")
    vocabulary, added = tokenizer_files.vocabulary(found.read_object)
    templates = found.attempt(lambda: tokenizer_files.chat_templates(found.path, settings), {})
    found.notes += found.attempt(lambda: tokenizer_files.doubles(found.path, settings), [])
    found.facts |= {
        "vocabulary": len({*vocabulary, *added}) if vocabulary else None,
        "added_tokens": sorted(added, key=lambda name: added[name])[:_SHOWN_TOKENS],
        "added_token_count": len(added),
        "largest_id": max([*vocabulary.values(), *added.values()], default=None),
        "template": found.template(templates.get("default")),
    }


_VARIANTS: dict[str, str] = TABLES["variants"]
"""Key of adapter_config.json → what a value of it means."""


def _describe_adapter(found: _Findings) -> None:
    """What an adapter changes, for which base model, and what is missing."""
    config = found.read_object("adapter_config.json")
    if not (found.path / "adapter_config.json").is_file():
        found.problems.append("no adapter_config.json: rank, alpha and base model are not known")
    found.facts |= {
        "peft_type": config.get("peft_type"),
        "base_model": config.get("base_model_name_or_path") or None,
        "base_revision": config.get("revision"),
        "target_modules": config.get("target_modules"),
        "variant": None,
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "parameters": None,
    }
    shape = found.attempt(lambda: shape_of(read_adapter(found.path))) if config else None
    if shape:
        if set(shape.ranks) != {shape.rank} and not config.get("rank_pattern"):
            found.problems.append(f"adapter_config.json says rank {shape.rank}, the tensors have {sorted(shape.ranks)}")
        found.facts |= {"variant": shape.variant, "rank": shape.rank, "alpha": shape.alpha}
        found.facts |= {"changed_modules": shape.modules, "targets": shape.targets}
        found.facts |= {"parameters": shape.parameters, "dtype": shape.dtype}
    if not found.facts["base_model"]:
        found.notes.append("it does not name its base model")
    for key, words in _VARIANTS.items():
        if value := config.get(key):
            names = ", ".join(map(str, value)) if isinstance(value, (list, dict)) else value
            found.notes.append(f"{words} {names} ({key})")
    if any((found.path / name).is_file() for name in _TOKENIZER):
        _describe_tokenizer(found)
        _compare_with_base(found)


_TOKENIZER = ("tokenizer.json", "vocab.json", "tokenizer_config.json", "added_tokens.json", "chat_template.jinja")


def base_on_disk(name: Any) -> Path | None:
    """The folder that an adapter names as its base; None where this disk has none of that name."""
    with contextlib.suppress(InputError):  # no path at all
        return path if name and (path := user_path(str(name))).is_dir() else None
    return None


def _compare_with_base(found: _Findings) -> None:
    """Whether an adapter's own tokenizer and template are the base's, where that lies on this disk."""
    if base := base_on_disk(found.facts["base_model"]):
        for words in found.attempt(lambda: tokenizer_files.differences(found.path, base), {}).values():
            found.notes.append(f"{words}: `workbook merge` takes the adapter's (--tokenizer)")
    else:
        found.notes.append("a tokenizer or template of its own: where it differs from the base's, merging takes it")


_SIZES: dict[str, str] = TABLES["sizes"]
"""What is said of a model → its key in config.json."""


def _integer(value: Any) -> int | None:
    """A whole number of a configuration; None for anything else."""
    return value if type(value) is int else None


def _describe_model(found: _Findings) -> None:
    """Architecture, weights, tokenizer, and what is missing or does not fit together."""
    if not (found.path / "config.json").is_file():
        found.problems.append("no config.json")
    config = found.read_object("config.json")
    sound = found.attempt(lambda: check_configuration(found.path / "config.json", config), {})
    if config and not isinstance(config.get("model_type"), str):
        found.problems.append("config.json names no model_type")
    if config.get("auto_map"):
        found.notes.append("config.json asks for code of the repository (auto_map), which is never run")
    names = config.get("architectures")
    named = isinstance(names, list) and names and isinstance(names[0], str)
    found.facts |= {
        "architecture": names[0] if named else config.get("model_type"),
        "model_type": config.get("model_type"),
        **{name: _integer(config.get(key)) for name, key in _SIZES.items()},
        "vocabulary_in_config": _integer(config.get("vocab_size")),
    }
    _describe_weights(found, config, sound)
    _describe_tokenizer(found)
    if not any((found.path / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        found.problems.append("no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    elif found.facts["template"] is None:
        found.problems.append(TABLES["no_template"])
    rows = found.facts.get("embedding_rows") or found.facts["vocabulary_in_config"]
    largest = found.facts["largest_id"]
    if rows and largest is not None and largest >= rows:
        found.problems.append(f"the tokenizer's largest id is {largest:,}, but the model has {rows:,} embeddings")
    if not (found.path / "generation_config.json").is_file():
        found.notes.append("no generation_config.json: the defaults of transformers decide how text is generated")
    quantized = config.get("quantization_config")
    if isinstance(quantized, dict):
        method = quantized.get("quant_method", "unknown method")
        found.notes.append(f"already quantized ({method}): take the original to train")


def _describe_weights(found: _Findings, config: Mapping[str, Any], sound: Mapping[str, Any]) -> None:
    """Parameters, dtypes, tying and shards, from the headers; `sound`: the configuration if its values are."""
    said = config.get("tie_word_embeddings")
    found.facts |= {"parameters": None, "dtype": None, "tied": said if isinstance(said, bool) else None}
    weights: Weights | None = found.attempt(lambda: open_weights(found.path))
    if weights is None:
        return
    if has_lora(weights.tensors):
        found.problems.append("the weights are those of a LoRA adapter")
    dtypes: Counter[str] = Counter()
    for tensor in weights.tensors.values():
        dtypes[tensor.dtype] += tensor.size
    if len(dtypes) > 1:
        found.notes.append("several number formats: " + ", ".join(f"{k} {v:,}" for k, v in dtypes.most_common()))
    found.attempt(lambda: refuse_other_task(found.path, weights.tensors, sound.get("architectures") or ()))
    found.attempt(lambda: check_sizes(weights, sound))
    if sound and holds_more(sound, weights):
        found.notes += notes_of(found.attempt(lambda: check_part(found.path, weights), {"left_out": {}}))
    own = "lm_head.weight" in weights.tensors  # input and output share one matrix where it is absent
    embedding = weights.tensors.get("model.embed_tokens.weight")
    found.facts |= {
        "parameters": weights.parameters,
        "dtype": dtypes.most_common(1)[0][0],
        "tied": said is True or (said is None and not own),
        "embedding_rows": embedding.shape[0] if embedding and embedding.shape else None,
        "weight_files": len(weights.files),
    }


def _describe_gguf(found: _Findings) -> None:
    """Architecture, types of the tensors, vocabulary, template, and whether the file is whole."""
    header = found.attempt(lambda: read_gguf(found.path))
    if header is None:
        found.facts["architecture"] = None
        return
    import gguf

    metadata, tensors = header.metadata, header.tensors
    architecture = metadata.get("general.architecture")
    if metadata.get("general.type") == "adapter":
        found.facts |= {
            "architecture": architecture,
            "name": metadata.get("general.name"),
            "lora_alpha": metadata.get("adapter.lora.alpha"),
            "pairs": sum(tensor.name.endswith(".lora_a") for tensor in tensors),
            "parameters": sum(tensor.size for tensor in tensors),
        }
        found.notes.append("a LoRA adapter, which llama.cpp loads beside a GGUF file of its base (--lora)")
        _check_length(found, tensors)
        return
    if not isinstance(architecture, str):
        found.problems.append("it names no architecture")
    tokens, file_type = metadata.get("tokenizer.ggml.tokens"), metadata.get("general.file_type")
    recipes = {kind.value: kind.name.removeprefix("MOSTLY_") for kind in gguf.LlamaFileType}
    types = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    counted = Counter(types.get(tensor.type, f"type {tensor.type}") for tensor in tensors)
    found.facts |= {
        "architecture": architecture,
        "name": metadata.get("general.name"),
        "file_type": recipes.get(file_type) if isinstance(file_type, int) else None,
        **{name: _integer(metadata.get(f"{architecture}.{NUMBERS[key]}")) for name, key in _SIZES.items()},
        "parameters": sum(tensor.size for tensor in tensors),
        "tensors": len(tensors),
        "types": dict(counted.most_common()),
        "tied": not any(tensor.name == "output.weight" for tensor in tensors),
        "vocabulary": len(tokens) if isinstance(tokens, list) else None,
        "pre_tokenizer": metadata.get("tokenizer.ggml.pre"),
        "template": found.template(metadata.get("tokenizer.chat_template")),
    }
    _check_gguf(found, metadata, tensors)


def _check_length(found: _Findings, tensors: Sequence[TensorInfo]) -> None:
    need, size = data_end(tensors), found.path.stat().st_size
    if need is None:
        found.notes.append("a tensor type that this version does not know: whether the file is whole was not checked")
    elif need > size:
        found.problems.append(f"incomplete: {size:,} of {need:,} bytes are there; download or make it again")


def _check_gguf(found: _Findings, metadata: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> None:
    vocabulary = found.facts["vocabulary"]
    _check_length(found, tensors)
    if not tensors:
        found.problems.append("it holds no tensor" + (" (a vocabulary only)" if vocabulary else ""))
    if vocabulary is None:
        found.problems.append("no vocabulary")
    elif found.facts["template"] is None:
        found.notes.append("no chat template")
    embedding = next((tensor.shape for tensor in tensors if tensor.name == "token_embd.weight"), ())
    if vocabulary and embedding and embedding[0] < vocabulary:
        found.problems.append(f"{vocabulary:,} tokens, but {embedding[0]:,} embeddings")
    found.notes += ids_beyond(metadata) if vocabulary else []
    if odd := [t.name for t in tensors if t.type != 0 and computes_in_float32(t.name, t.shape)]:
        found.problems.append(f"llama.cpp computes with float32 in {odd[0]}, and ends at other numbers")
    found.notes.append(_as_base(found.path, found.facts["template"]))
    if budget := metadata.get("quantize.mix.budget_bytes"):
        chosen = f"types chosen by measurement under a budget of {str(budget)[:18]} bytes"
        found.notes.append(f"{chosen}: the file type is only the recipe of the commonest one")
    parts = _integer(metadata.get("split.count"))
    if parts and parts > 1:
        found.notes.append(f"one of {parts} parts of a split file")


def _as_base(path: Path, template: Mapping[str, Any] | None) -> str:
    """Whether the file can be a base model, by the same check as before unpacking."""
    try:
        source = read_source(path)
    except InputError as error:
        return f"no base model (base_model, workbook unpack): {error.found.rstrip('.')}"
    if template is None:
        return "no base_model, workbook unpack only: no chat template"
    if template["takes_system_turn"] is not True:
        why = "writes no system turn" if template["takes_system_turn"] is False else "cannot be used"
        return f"no base_model, workbook unpack only: its chat template {why}"
    kind = source.main_type
    return f"can be a base model (base_model, workbook unpack): its {kind} weights are turned back into numbers"
