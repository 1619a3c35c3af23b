"""Post-processors that add nothing are taken, in any nesting, and read as the official converter reads them."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest

from lib.errors import InputError
from lib.stages.convert.tokenizer import read_vocabulary
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
    found, official = read_vocabulary(folder, 300, "llama"), gguf.SpecialVocab(folder, load_merges=True)
    kinds = [part["type"] for part in (processor or sequence()).get("processors", [processor])]
    newer = {"eos": False} if "ByteLevel" in kinds else {}  # gguf 0.19 of PyPI says only bos where llama.cpp says both
    assert found.add == official.add_special_token | newer
    assert found.special == official.special_token_ids and found.merges == official.merges


@pytest.mark.parametrize("processor", [SEPARATED, sequence(sequence(SEPARATED))], ids=["separator", "nested"])
def test_what_adds_something_else_is_refused(processor: dict, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="post-processor"):
        read_vocabulary(model(tmp_path / "model", processor), 300, "llama")


def test_what_transformers_saves_is_taken(tmp_path: Path) -> None:
    """transformers 5 writes a template that adds nothing for a tokenizer without post-processor."""
    from transformers import AutoTokenizer

    folder = model(tmp_path / "model", None)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    saved = json.loads((folder / "tokenizer.json").read_text())["post_processor"]
    assert saved["type"] == "TemplateProcessing" and len(saved["single"]) == 1
    assert read_vocabulary(folder, 300, "llama").add == gguf.SpecialVocab(folder).add_special_token
