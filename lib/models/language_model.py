"""The language model inside a model that reads pictures or sounds, too (Qwen3.5, Gemma 3), as a folder of its own.

Such a folder keeps the language model's configuration under `text_config` and its tensors behind `language_model.`.
Training, merging and converting take causal language models, so its part is written out once, under the names that
transformers gives it alone. The weights stay what they are, bit for bit.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.errors import refusal
from lib.models.configurations import check_configuration, read_configuration, shapes_of
from lib.models.tokenizer_files import FILES, TEMPLATES, copy_tokenizer
from lib.models.weights import SINGLE, Weights, open_weights, pack_header, slabs
from lib.progress import Progress, say
from lib.runs import files, manifest
from lib.runs.files import read_json, remembered_sha256, require_space, write_json
from lib.runs.machine import no_warnings

RECORD = "language_model.json"
VERSION = 1
"""Raised when another folder comes out of the same model."""
_INSIDE = re.compile(r"(?:model\.language_model\.|language_model\.model\.)(.+)")
_HEAD = re.compile(r"(?:language_model\.)?(lm_head\..+)")
_FURTHER = re.compile(r"mtp_")
"""Keys of layers that guess further tokens, which transformers does not load."""
_OTHERS = ("generation_config.json", "LICENSE", "README.md")
_SLAB = 1 << 22


def name_alone(name: str) -> str | None:
    """A tensor's name in the language model alone; None for one of another part."""
    if match := _INSIDE.fullmatch(name):
        return f"model.{match[1]}"
    if match := _HEAD.fullmatch(name):
        return match[1]
    return name if name.startswith(("model.layers.", "model.embed_tokens.", "model.norm.")) else None


def holds_more(config: Mapping[str, Any], weights: Weights) -> bool:
    """Whether a folder holds more than a causal language model, or names its tensors as if it did."""
    return isinstance(config.get("text_config"), dict) or any(_INSIDE.fullmatch(name) for name in weights.tensors)


def text_configuration(config: Mapping[str, Any], path: Path | str) -> dict[str, Any]:
    """config.json (of `path`) of the language model alone; of a model that is nothing else, as it is.

    Raises:
        InputError: a kind of language model that transformers does not know.
    """
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return dict(config)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = inner.get("model_type")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise refusal("models/unknown-language-model", config=path, kind=kind)
    shared = {key: config[key] for key in ("dtype", "torch_dtype", "tie_word_embeddings") if key in config}
    own = {key: value for key, value in inner.items() if not _FURTHER.match(key) and key != "auto_map"}
    return {**own, **shared, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]}


def language_model_of(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The language model of a folder that `holds_more`, kept under .cache/language-models and written only once.

    Returns:
        Its folder, and {"weights", "of" (weights of the whole), "left_out": {part: tensors}}.

    Raises:
        InputError: a kind that transformers does not know, tensors that it misses, or no room.
    """
    weights = open_weights(folder)
    sources = [path for path in _small_files(folder) if path.is_file()] + [*weights.files, folder / "config.json"]
    key = {"version": VERSION, "files": {str(path.relative_to(folder)): remembered_sha256(path) for path in sources}}
    made: list[Path] = []

    def build(target: Path) -> dict[str, Any]:
        made.append(target)
        return _write(folder, weights, target)

    place = files.home() / ".cache" / "language-models"
    found = manifest.ensure("text", key, build, place)
    if made:
        say(f"{folder.name}: its language model was written to {found}")
    return found, read_json(found / RECORD)


def notes_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """What every page must say of such a base; nothing where it held nothing else."""
    if not record["left_out"]:
        return ()
    parts = ", ".join(f"{part} ({count})" for part, count in record["left_out"].items())
    part, whole = (f"{record[key] / 1e6:,.0f}" for key in ("weights", "of"))
    return (f"the base's language model alone ({part} of {whole} million weights); tensors left out: {parts}",)


def _small_files(folder: Path) -> list[Path]:
    return [*(folder / name for name in (*FILES, *_OTHERS)), *sorted((folder / TEMPLATES).glob("*.jinja"))]


def check_part(folder: Path, weights: Weights) -> dict[str, Any]:
    """What `language_model_of` would make of a folder: its record.

    Raises:
        InputError: what that refuses of headers and configuration.
    """
    return _plan(folder, weights)[2]


def _plan(folder: Path, weights: Weights) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """The configuration, the new name of every kept tensor, and the record."""
    path = folder / "config.json"
    config = check_configuration(path, text_configuration(read_configuration(folder), path))
    names: dict[str, str] = {}
    olds: dict[str, str] = {}
    for name in weights.tensors:
        if (new := name_alone(name)) is not None:
            if (first := olds.setdefault(new, name)) != name:
                raise refusal("models/doubled-tensor", folder=folder, first=first, second=name)
            names[name] = new
    _refuse_incomplete(folder, config, weights, names)
    if config.get("tie_word_embeddings"):  # transformers reads no output matrix then, and GGUF would have one
        names = {name: new for name, new in names.items() if new != "lm_head.weight"}
    parts = [re.sub(r"^model\.", "", name).split(".")[0] for name in weights.tensors if name not in names]
    kept = sum(weights.tensors[name].size for name in names)
    record = {"weights": kept, "of": weights.parameters, "left_out": dict(sorted(Counter(parts).items()))}
    return config, names, record


def _write(folder: Path, weights: Weights, target: Path) -> dict[str, Any]:
    config, names, record = _plan(folder, weights)
    kept = sorted(names, key=names.__getitem__)
    size = sum(weights.tensors[name].nbytes for name in kept)
    require_space(target, size, f"the language model of {folder.name}")
    progress = Progress("copying its weights (MB)", size // 10**6, pieces=10**6)
    with (target / SINGLE).open("wb") as stream, progress:
        entries = {names[n]: (t.dtype, t.shape, t.nbytes) for n in kept if (t := weights.tensors[n])}
        stream.write(pack_header(entries, {}))
        for tensor in map(weights.tensors.__getitem__, kept):
            for _, first, count in slabs(tensor, _SLAB):
                values = tensor.read(first, count)
                stream.write(memoryview(values).cast("B"))
                progress.advance(values.nbytes)
    write_json(target / "config.json", config)
    copy_tokenizer(folder, target)
    for name in _OTHERS:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    write_json(target / RECORD, record)
    return record


def known_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The weights of a causal language model that only its configuration is known of: told by `shapes_of`, or for other
    families by its class in transformers, built without memory.

    Raises:
        KeyError: a configuration that transformers does not know, or cannot build.
    """
    try:
        return shapes_of(config)
    except KeyError:
        return _class_shapes(config)


def _class_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    own = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype", "auto_map", "reasons")}
    kind = str(own.pop("model_type", None))
    try:
        with torch.device("meta"), no_warnings():
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **own))
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise KeyError(kind) from error
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}


def _refuse_incomplete(folder: Path, config: dict[str, Any], weights: Weights, names: Mapping[str, str]) -> None:
    """Compare the kept tensors with those of the class in transformers."""
    try:
        wanted = _class_shapes(config)
    except KeyError as error:
        raise refusal("models/unknown-language-model", config=folder / "config.json", kind=error.args[0]) from None
    found = {new: weights.tensors[name].shape for name, new in names.items()}
    if "lm_head.weight" not in wanted:
        found.pop("lm_head.weight", None)
    if odd := sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name)):
        first = odd[0]
        raise refusal(
            "models/incomplete-language-model",
            folder=folder,
            name=first,
            found=found.get(first, "no such tensor"),
            wanted=wanted.get(first, "none of that name"),
            more=len(odd),
        )
