"""Post-processors that add nothing are taken, in any nesting, and read as the official converter reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from lib.errors import InputError
from lib.stages.convert.tokenizer import add_tokenizer
from tests.stages.convert.convertible import write_model

LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
A, B = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
PLAIN = {"type": "TemplateProcessing", "single": [A], "pair": [A, B], "special_tokens": {}}
MIDDLE = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
SEPARATED = {
    **PLAIN,
    "pair": [A, MIDDLE, B],
    "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [264], "tokens": ["<|endoftext|>"]}},
}


def keys(folder: Path) -> dict[str, Any]:
    """What the tokenizer's keys say."""
    writer = gguf.GGUFWriter(None, "llama")
    add_tokenizer(writer, folder, 300)
    return {key: value.value for key, value in writer.kv_data[0].items() if "space_prefix" not in key}


def official_keys(folder: Path, **newer: bool) -> dict[str, Any]:
    """Those that the gguf library writes, with what it adds by itself in a newer version."""
    writer, found = gguf.GGUFWriter(None, "llama"), gguf.SpecialVocab(folder, load_merges=True)
    found.add_special_token |= newer
    found.add_to_gguf(writer, quiet=True)
    return {key: value.value for key, value in writer.kv_data[0].items()}


def sequence(*parts: dict) -> dict:
    return {"type": "Sequence", "processors": list(parts)}


def model(folder: Path, processor: dict | None) -> Path:
    """A small Llama whose tokenizer is loaded as its tokenizer.json says, with this post-processor."""
    write_model(folder, kind="llama", tied=False, head_dim=16)
    changes = {"tokenizer": {"post_processor": processor}}
    changes["tokenizer_config"] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, change in changes.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


@pytest.mark.parametrize(
    "processor",
    [
        None,
        LEVEL,
        PLAIN,
        {**PLAIN, "pair": []},
        sequence(),
        sequence(PLAIN),
        sequence(LEVEL, PLAIN),
        sequence(PLAIN, LEVEL),
        sequence(sequence(PLAIN, sequence()), LEVEL),
        sequence(sequence(LEVEL)),
    ],
)
def test_what_adds_nothing_is_read_as_the_official_converter_does(processor: dict | None, tmp_path: Path) -> None:
    folder = model(tmp_path / "model", processor)
    kinds = [part["type"] for part in (processor or sequence()).get("processors", [processor])]
    newer = {"eos": False} if "ByteLevel" in kinds else {}  # gguf 0.19 of PyPI says only bos where llama.cpp says both
    found, official = keys(folder), official_keys(folder, **newer)
    assert {key: found.pop(key) for key in official} == official
    assert {key.rpartition(".")[2] for key in found} == {"model", "pre", "tokens", "token_type"}


@pytest.mark.parametrize("processor", [SEPARATED, sequence(sequence(SEPARATED))], ids=["separator", "nested"])
def test_what_adds_something_else_is_refused(processor: dict, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="post-processor"):
        keys(model(tmp_path / "model", processor))


def test_what_transformers_saves_is_taken(tmp_path: Path) -> None:
    """transformers 5 writes a template that adds nothing for a tokenizer without post-processor."""
    from transformers import AutoTokenizer

    folder = model(tmp_path / "model", None)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    saved = json.loads((folder / "tokenizer.json").read_text())["post_processor"]
    assert saved["type"] == "TemplateProcessing" and len(saved["single"]) == 1
    found, official = keys(folder), official_keys(folder)
    assert {key: found[key] for key in official} == official
