"""A Hugging Face tokenizer from a bare .gguf file, so that GGUF models are prompted by the same code as all others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.models.gguf_file import read_metadata

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # token types of the format
_PLAIN = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def tokenizer_from_gguf(path: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer stored in a GGUF file: byte-level BPE with Qwen2's rules (NFC, pre-tokenizer) and its template.

    Token ids equal llama.cpp's on NFC text; on other text this follows Qwen2 (llama.cpp does not normalise).

    Raises:
        InputError: not a GGUF file; another kind of tokenizer; no chat template.
    """
    path = Path(path)
    metadata = read_metadata(path)
    kind, rules = (metadata.get(f"tokenizer.ggml.{key}", "none") for key in ("model", "pre"))
    if (kind, rules) != ("gpt2", "qwen2"):
        raise InputError(
            f"{path} has a tokenizer of kind {kind!r} with rules {rules!r}.",
            "kind 'gpt2' with rules 'qwen2', as Qwen2, Qwen2.5 and Qwen3 models have.",
            "give the model's folder instead, whose tokenizer files are read.",
        )
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    template = metadata.get("tokenizer.chat_template")
    for name, value in (("tokens", tokens), ("merges", merges), ("chat template", template)):
        if not value:
            raise InputError(f"{path} has no {name}.", f"a file with its {name}.", "convert the model again.")
    types = metadata.get("tokenizer.ggml.token_type", [])
    return _build(metadata, tokens, types if len(types) == len(tokens) else [1] * len(tokens), merges, template)


def _build(
    metadata: dict[str, Any], tokens: list[str], types: list[int], merges: list[str], template: str
) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    added = [i for i, kind in enumerate(types) if kind in (_CONTROL, _USER_DEFINED)]
    raw = Tokenizer.from_str(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [_added(i, tokens[i], types[i] == _CONTROL) for i in added],
                "normalizer": {"type": "NFC"},
                "pre_tokenizer": _pre_tokenizer(),
                "post_processor": {"type": "ByteLevel", **_PLAIN},
                "decoder": {"type": "ByteLevel", **_PLAIN},
                "model": {
                    "type": "BPE",
                    "vocab": {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED},
                    "merges": [merge.split(" ", 1) for merge in merges],
                },
            }
        )
    )
    named = {
        role: tokens[metadata[f"tokenizer.ggml.{key}"]]
        for role, key in (("eos_token", "eos_token_id"), ("pad_token", "padding_token_id"))
        if metadata.get(f"tokenizer.ggml.{key}", len(tokens)) < len(tokens)
    }
    others = [tokens[i] for i in added if types[i] == _CONTROL and tokens[i] not in named.values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        **named,
        extra_special_tokens=others,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def _added(number: int, content: str, special: bool) -> dict[str, Any]:
    switches = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": special, **switches}


def _pre_tokenizer() -> dict[str, Any]:
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    split = {"type": "Split", "pattern": {"Regex": PRETOKENIZE_REGEX}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", **_PLAIN}]}
