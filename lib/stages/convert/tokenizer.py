"""The tokenizer of a model folder: what it does, and the GGUF keys that say so."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from lib.errors import InputError, one_line, refusal
from lib.models.gguf_tokenizer import RULES
from lib.models.tokenizer_files import chat_templates
from lib.models.weights import read_object
from lib.runs.files import data_file
from lib.stages.convert.tensors import ForeignModelError

# What the tokenizer of a model folder does: its vocabulary, its added tokens, and the ids of llama.cpp's check text.
#
# transformers decides what a folder's tokenizer is. Loading it takes seconds, so a folder whose files leave
# transformers nothing to change is read with the tokenizers library alone; the two ways are equal there, which tests
# check.

_TABLES = data_file("stages/convert/pre_tokenizers.yaml")
CHECK_TEXT: str = _TABLES["check_text"]
"""The text whose token ids identify a pre-tokenizer in llama.cpp's converter."""


@dataclass(frozen=True)
class AddedToken:
    """A token beside the trained vocabulary; `text` is what the tokenizer makes of its id."""

    id: int
    content: str
    special: bool
    text: str


@dataclass(frozen=True)
class Tokenizer:
    """What a tokenizer does.

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
    wanted_split, wanted_level = RULES["qwen2"]["steps"]
    return (
        not any(model.get(key) for key in _TABLES["other_models"])
        and split == wanted_split
        and {**level, "trim_offsets": False} == wanted_level
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
        names = [settings.get(f"{kind}_token") for kind in _TABLES["special"]]
        names += [name for key in _TABLES["lists"] for name in settings.get(key) or []]
        ids = {int(i): token["content"] for i, token in declared.items()}
        return (
            settings.get("tokenizer_class") in ("Qwen2Tokenizer", "Qwen2TokenizerFast")
            and has_qwen2_structure(stored)
            and (stored.get("post_processor") or {"type": "ByteLevel"}).get("type") == "ByteLevel"
            and not any(settings.get(key) for key in _TABLES["switches"])
            and len(added) == len(stored["added_tokens"])
            and all(added[_content(name)]["special"] for name in names if name is not None)
            and (settings.get("added_tokens_decoder") is None or ids == {t["id"]: name for name, t in added.items()})
            and all("__type" in name for name in names if isinstance(name, dict))
            and all(
                bool(added[token["content"]].get(key)) == bool(token.get(key))
                for token in declared.values()
                for key in _TABLES["of_a_token"]
            )
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def _content(token: Any) -> Any:
    """The text of a special token, which settings give alone or with its switches."""
    return token.get("content") if isinstance(token, dict) else token


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
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        added = []
        for number, token in tokenizer.added_tokens_decoder.items():
            text = token.content
            if not token.normalized:  # llama.cpp expects the text as it comes out of the tokenizer
                text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
            added.append(AddedToken(number, token.content, token.special, text))
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        return Tokenizer(tokenizer.get_vocab(), added, tokenizer.encode(CHECK_TEXT), backend)
    except BaseException as error:  # a malformed tokenizer.json gives a bare Exception, or a panic of the Rust code
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise refusal("convert/unreadable-tokenizer", folder=folder, said=one_line(error)) from None


# The tokenizer of a model folder as GGUF keys: tokens, types, merges, special tokens, chat template.
#
# Key order and rules are those of the converter of llama.cpp (`get_vocab_base`, `SpecialVocab`).

_GRANITE_ROWS = 49152


def recognise(tokenizer: Tokenizer) -> tuple[str, str]:
    """Name of the pre-tokenizer in GGUF, and how it was recognised, without the network.

    Raises:
        InputError: neither the check text nor the structure is known.
    """
    digest = hashlib.sha256(str(tokenizer.check_ids).encode()).hexdigest()
    if digest in _TABLES["known"]:
        return _TABLES["known"][digest], "the ids of llama.cpp's check text"
    if has_qwen2_structure(tokenizer.backend):
        return "qwen2", "the same normalizer, split pattern and byte-level BPE as Qwen2 (another vocabulary)"
    raise refusal("convert/unknown-cuts", ForeignModelError, check=digest[:8])


def add_tokenizer(writer: GGUFWriter, folder: Path, vocab_size: int) -> dict[str, Any]:
    """Add the tokenizer of a model folder to `writer`, in the official order.

    Args:
        vocab_size: rows of the embedding (config.json); ids without a token are padded with [PADi].

    Returns:
        "tokens", "padding_tokens", "pre_tokenizer", "recognised" and "unsaid" of a `ConversionReport`.

    Raises:
        InputError: missing or damaged files, more ids than rows, an unknown pre-tokenizer or post-processor.
    """
    stored, settings = (
        read_object(folder / name, "a fast tokenizer's files") for name in ("tokenizer.json", "tokenizer_config.json")
    )
    if not isinstance(model := stored.get("model", {}), dict):
        raise refusal("convert/odd-tokenizer", folder=folder, odd=f"model is no object but {str(model)[:40]}")
    pieces = (folder / "tokenizer.model").is_file() or model.get("byte_fallback") or model.get("type") != "BPE"
    if writer.arch == "llama" and pieces:
        raise refusal("convert/sentence-pieces", ForeignModelError, folder=folder)
    tokenizer = read_tokenizer(folder, stored, settings)
    highest = max(tokenizer.vocabulary.values())
    if highest >= vocab_size:
        raise refusal("convert/too-few-rows", folder=folder, highest=highest, vocab_size=vocab_size)
    pre, recognised = recognise(tokenizer)
    tokens, types = _tokens(tokenizer, vocab_size)
    merges, templates = _merges(stored, folder), chat_templates(folder, settings)
    special, add = special_tokens(stored, settings, read_object(folder / "config.json"), folder)
    if (lowest := min([*tokenizer.vocabulary.values(), *special.values()])) < 0:
        raise refusal("convert/odd-tokenizer", folder=folder, odd=f"a token has the id {lowest}")
    for kind in ("bos", "eos"):
        name = _content(settings.get(f"{kind}_token"))
        if (number := tokenizer.vocabulary.get(name, filed := special.get(kind))) != filed:
            raise refusal("convert/two-meanings", folder=folder, kind=kind, name=name, number=number, filed=filed)
    if settings.get("split_special_tokens"):
        raise refusal("convert/split-special-tokens", folder=folder)
    if writer.arch == "llama" and isinstance(prefix := settings.get("add_prefix_space"), bool):
        writer.add_add_space_prefix(prefix)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    said = {f"add_{kind}_token_id": number for kind, number in special.items()}
    said |= {f"add_add_{kind}_token": value for kind, value in add.items()}
    for name, value in said.items():
        if handler := getattr(writer, name, None):
            handler(value)
    if set(templates) == {"default"}:
        writer.add_chat_template(templates["default"])
    elif templates:
        writer.add_chat_template([{"name": name, "template": text} for name, text in templates.items()])
    if writer.arch == "llama" and len(tokens) == _GRANITE_ROWS:
        writer.add_add_bos_token(False)  # the official converter takes Llama models of this size for small Granite ones
    padding = types.count(TokenType.UNUSED)
    said = {"tokens": len(tokens), "padding_tokens": padding, "pre_tokenizer": pre, "recognised": recognised}
    return {**said, "unsaid": _unsaid(stored, settings)}


def _unsaid(stored: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Added tokens by which llama.cpp cuts other texts, because GGUF has no word for what they are."""
    found = {}
    for token in (*stored.get("added_tokens", []), *(settings.get("added_tokens_decoder") or {}).values()):
        odd = [key for key in ("lstrip", "rstrip", "single_word") if token.get(key)]
        if odd := odd + ["U+2581"] * ("\u2581" in token["content"]):
            found[token["content"]] = f"{token['content']} ({', '.join(odd)}): GGUF cannot say it, other ids around it"
    return list(found.values())


def _looks_special(token: str) -> bool:
    """Names of control tokens that some models mark as ordinary added tokens."""
    around = (token.startswith(left) and token.endswith(right) for left, right in _TABLES["brackets"])
    return token in _TABLES["marks"] or any(around)


def _tokens(tokenizer: Tokenizer, vocab_size: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    for token, i in tokenizer.vocabulary.items():
        tokens[i], types[i] = token, int(TokenType.NORMAL)
    for added in tokenizer.added:
        if added.special or _looks_special(added.content):
            tokens[added.id], types[added.id] = added.text, int(TokenType.CONTROL)
        else:
            tokens[added.id], types[added.id] = added.text.replace("\u2581", " "), int(TokenType.USER_DEFINED)
    return tokens, types


def _merges(stored: dict[str, Any], folder: Path) -> list[str]:
    merges = stored.get("model", {}).get("merges") or []
    if not merges:
        raise InputError(f"no merges in {folder / 'tokenizer.json'}.", "a BPE tokenizer.", "save the tokenizer again.")
    if isinstance(merges[0], str):
        return list(merges)
    return [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in merges]


def special_tokens(
    stored: dict[str, Any], settings: dict[str, Any], config: dict[str, Any], folder: Path
) -> tuple[dict[str, int], dict[str, bool]]:
    """Ids of special tokens, and which of them llama.cpp adds by itself.

    The post-processor decides first, then tokenizer_config.json, then config.json (gguf-py, SpecialVocab).

    Raises:
        InputError: a post-processor that adds tokens in a way GGUF cannot say.
    """
    names = {kind: _content(settings.get(f"{kind}_token")) for kind in _TABLES["special"]}
    names["bos"] = names["bos"] or names["cls"]
    names["eos"] = names["eos"] or names["sep"]
    add: dict[str, bool] = {}
    post = stored.get("post_processor") or {"processors": []}
    for processor in post.get("processors", [post]):
        if processor.get("type") == "ByteLevel":
            add = {"bos": False, "eos": False, **add}
        elif not _adds_nothing(processor):  # the official converter looks into no nested sequence
            add |= _added_by_template(processor, settings, names, folder)
    ids = {token["content"]: token["id"] for token in reversed(stored.get("added_tokens", []))}  # the first one counts
    found = {}
    for kind, name in names.items():
        if isinstance(value := settings.get(f"add_{kind}_token"), bool):
            add.setdefault(kind, value)
        if isinstance(name, str) and isinstance(ids.get(name), int):
            found[kind] = ids[name]
    for kind in names:
        if type(number := config.get(f"{kind}_token_id")) is int and 0 <= number < 2**31:
            found.setdefault(kind, number)
    return found, add


def _template_names(processor: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Special tokens around one text and around two; A and B stand for the texts."""
    single, pair = (
        [str((part.get("SpecialToken") or part.get("Sequence") or {}).get("id")) for part in processor.get(key, [])]
        for key in ("single", "pair")
    )
    return single, pair


def _adds_nothing(processor: dict[str, Any]) -> bool:
    """Whether texts come out as they went in; transformers 5 saves such a template with every plain tokenizer."""
    if processor.get("type") == "Sequence":
        return all(_adds_nothing(part) for part in processor.get("processors", []))
    if processor.get("type") == "TemplateProcessing":
        return _template_names(processor) in ((["A"], []), (["A"], ["A", "B"]))
    return processor.get("type") == "ByteLevel"


def _added_by_template(
    processor: dict[str, Any], settings: dict[str, Any], names: dict[str, Any], folder: Path
) -> dict[str, bool]:
    """The one template that causal models use: `start text`, and for two texts `start text start text`.

    A start token that the settings do not name is put into `names`.
    """
    unknown = "" if processor.get("type") == "TemplateProcessing" else str(processor.get("type"))
    single, pair = _template_names(processor)
    start = single[0] if len(single) == 2 and single[1] == "A" else None
    usual = start and start not in (names["eos"], names["sep"])
    if not unknown and not (usual and pair in ([], [start, "A", "B"], [start, "A", start, "B"])):
        unknown = "TemplateProcessing of an unusual form"
    written = (settings.get("bos_token") or settings.get("cls_token"), settings.get("cls_token"))
    if not unknown and start not in written:  # compared as written, as the official converter does
        names["bos"], names["cls"] = names["bos"] or start, names["cls"] or start
        if start not in (names["bos"], names["cls"]):
            unknown = f"TemplateProcessing with {start!r}, which is not the start token,"
    if unknown:
        raise refusal("convert/unknown-post-processor", unknown=unknown, file=folder / "tokenizer.json")
    # start A start B: the second start is no separator
    return {"bos": True, "sep": False} if len(pair) == 4 else {"bos": True}
