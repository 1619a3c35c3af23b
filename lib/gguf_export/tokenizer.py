"""What the tokenizer of a model folder does: its vocabulary, its added tokens, and the ids of llama.cpp's check text.

transformers decides what a folder's tokenizer is. Loading it takes seconds, so a folder whose files leave transformers
nothing to change is read with the tokenizers library alone; the two ways are equal there, which tests check.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.models.pretokenizers import QWEN2_PATTERN

CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
"""The text whose token ids identify a pre-tokenizer in llama.cpp's converter."""

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_SWITCHES = ("add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens", "from_slow")


@dataclass(frozen=True)
class AddedToken:
    """A token beside the trained vocabulary; `text` is what the tokenizer makes of its id."""

    id: int
    content: str
    special: bool
    text: str


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as it works.

    Attributes:
        vocabulary: id of every token, added ones included.
        check_ids: ids of `CHECK_TEXT`, with the special tokens that the tokenizer adds by itself.
        backend: its pipeline, in the layout of tokenizer.json.
    """

    vocabulary: dict[str, int]
    added: list[AddedToken]
    check_ids: list[int]
    backend: dict[str, Any]


def has_qwen2_structure(backend: dict[str, Any]) -> bool:
    """Whether a tokenizer (its tokenizer.json) splits and encodes text as Qwen2's does, whatever its vocabulary."""
    model, pre, normalizer = backend.get("model", {}), backend.get("pre_tokenizer") or {}, backend.get("normalizer")
    parts = pre.get("pretokenizers", [])
    if model.get("type") != "BPE" or len(parts) != 2 or (normalizer or {"type": "NFC"}) != {"type": "NFC"}:
        return False
    split, level = parts
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    return (
        not any(model.get(key) for key in odd)
        and split.get("type") == "Split"
        and split.get("pattern") == {"Regex": QWEN2_PATTERN}
        and split.get("behavior") == "Isolated"
        and not split.get("invert")
        and level.get("type") == "ByteLevel"
        and not level.get("add_prefix_space")
        and not level.get("use_regex", True)
    )


def read_tokenizer(folder: Path, stored: dict[str, Any], settings: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a folder.

    Args:
        stored, settings: contents of tokenizer.json and tokenizer_config.json.

    Raises:
        InputError: the files cannot be read as a tokenizer.
    """
    return (_plain(folder, stored) if _is_plain(stored, settings) else None) or _transformers(folder)


def _is_plain(stored: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether transformers would use tokenizer.json as it is: a Qwen2 tokenizer whose two files agree."""
    try:
        added = {token["content"]: token for token in stored["added_tokens"]}
        declared = settings.get("added_tokens_decoder") or {}
        names = [settings.get(key) for key in _NAMED]
        names += [name for key in _LISTS for name in settings.get(key) or []]
        names = [name["content"] if isinstance(name, dict) else name for name in names if name is not None]
        ids = {int(i): token["content"] for i, token in declared.items()}
        return (
            settings.get("tokenizer_class") in ("Qwen2Tokenizer", "Qwen2TokenizerFast")
            and has_qwen2_structure(stored)
            and (stored.get("post_processor") or {"type": "ByteLevel"}).get("type") == "ByteLevel"
            and not any(settings.get(key) for key in (*_SWITCHES, "clean_up_tokenization_spaces"))
            and len(added) == len(stored["added_tokens"])
            and all(name in added and added[name]["special"] for name in names)
            and (not ids or ids == {token["id"]: name for name, token in added.items()})
            and all(_agrees(added[token["content"]], token) for token in declared.values())
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def _agrees(stored: dict[str, Any], declared: dict[str, Any]) -> bool:
    switches = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return all(bool(stored.get(key)) == bool(declared.get(key)) for key in switches)


def _plain(folder: Path, stored: dict[str, Any]) -> Tokenizer | None:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(folder / "tokenizer.json"))
    except Exception:  # bare Exception on a malformed file: transformers says what is wrong with it
        return None
    added = [AddedToken(t["id"], t["content"], t["special"], t["content"]) for t in stored["added_tokens"]]
    ids = backend.encode(CHECK_TEXT).ids
    vocabulary = {**stored["model"]["vocab"], **{token.content: token.id for token in added}}
    return Tokenizer(vocabulary, added, ids, stored)


def _transformers(folder: Path) -> Tokenizer:
    try:
        return _as_transformers_reads_it(folder)
    except BaseException as error:  # a malformed tokenizer.json gives a bare Exception, or a panic of the Rust code
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the tokenizer in {folder} ({reason}).", "a fast tokenizer.", "save it again.") from None


def _as_transformers_reads_it(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    added = []
    for number, token in tokenizer.added_tokens_decoder.items():
        text = token.content
        if not token.normalized:  # llama.cpp expects the text as it comes out of the tokenizer
            text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
        added.append(AddedToken(number, token.content, token.special, text))
    return Tokenizer(tokenizer.get_vocab(), added, tokenizer.encode(CHECK_TEXT), backend)
