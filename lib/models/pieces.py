"""From token ids to the bytes that each token adds to a text: what a display gets while an answer is written."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lib.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


@functools.cache
def byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable bytes stand for themselves, the others from U+0100 on, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {**{chr(byte): byte for byte in plain}, **{chr(0x100 + i): byte for i, byte in enumerate(others)}}


def token_bytes(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[bytes]:
    """The bytes of each token; together they are the decoded text.

    Raises:
        InputError: a tokenizer that is neither byte-level BPE nor SentencePiece with bytes for unknown characters.
    """
    kinds = _decoders(tokenizer)
    added = {number: content for content, number in tokenizer.get_added_vocab().items()}
    byte_level = "ByteLevel" in kinds
    if not byte_level and "ByteFallback" not in kinds:
        raise InputError(
            f"a tokenizer that decodes by {', '.join(kinds) or 'nothing'}.",
            "ByteLevel (Qwen, Llama 3) or ByteFallback (Llama 2).",
            "choose another base_model, or set generated_rows: 0.",
        )
    names = tokenizer.convert_ids_to_tokens(list(ids))
    return [
        added[number].encode() if number in added else _from_bytes(name) if byte_level else _from_piece(name)
        for number, name in zip(ids, names, strict=True)
    ]


def _from_bytes(name: str | None) -> bytes:
    """A token of byte-level BPE; an id behind the vocabulary's end (padding rows of the model) adds nothing."""
    alphabet = byte_of_character()
    return bytes(alphabet[character] for character in name or "")


def _from_piece(name: str | None) -> bytes:
    """A token of SentencePiece."""
    match = _BYTE.fullmatch(name or "")
    return bytes([int(match[1], 16)]) if match else (name or "").replace("\u2581", " ").encode()


def _decoders(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Kinds of the steps by which the tokenizer decodes."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return []
    whole = json.loads(decoder.__getstate__())
    return [step["type"] for step in whole.get("decoders", [whole])]
