"""The tokenizer of a model folder as GGUF keys: tokens, types, merges, special tokens, chat template.

Key order and rules are those of the converter of llama.cpp (`get_vocab_base`, `SpecialVocab`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
"""The text whose token ids identify a pre-tokenizer in llama.cpp's converter."""

KNOWN_CHECKS = {"e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2"}
"""SHA-256 over the ids of `CHECK_TEXT` → name of the pre-tokenizer in GGUF."""

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF stores of a tokenizer.

    Attributes:
        tokens: text of every id, padded to the rows of the embedding with [PADi].
        types: gguf.TokenType of every id.
        pre: name of the pre-tokenizer; recognised: how it was found out, in words.
        merges: "left right", in order of rank.
        special: {"eos": id, …} in the order they are written; add: {"bos": False, …}.
        chat_template: Jinja text, a list of named ones, or None.
    """

    tokens: list[str]
    types: list[int]
    pre: str
    recognised: str
    merges: list[str]
    special: dict[str, int]
    add: dict[str, bool]
    chat_template: str | list[dict[str, str]] | None


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"no {path.name} in {path.parent}.", "a fast tokenizer's files.", "save the tokenizer there.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}).", "JSON.", "save the tokenizer again.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not an object.", "a tokenizer's file.", "save the tokenizer again.")
    return content


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


def recognise(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Name of the pre-tokenizer in GGUF, and how it was recognised; needs no network.

    Raises:
        InputError: neither the check text nor the structure is known.
    """
    ids = tokenizer.encode(CHECK_TEXT)
    digest = hashlib.sha256(str(ids).encode()).hexdigest()
    if digest in KNOWN_CHECKS:
        return KNOWN_CHECKS[digest], "the ids of llama.cpp's check text"
    if has_qwen2_structure(json.loads(tokenizer.backend_tokenizer.to_str())):
        return "qwen2", "the same normalizer, split pattern and byte-level BPE as Qwen2 (another vocabulary)"
    raise InputError(
        f"a tokenizer that splits text in an unknown way (check {digest[:8]}).",
        "the tokenizer of Qwen2, Qwen2.5 or Qwen3, or one with the same structure.",
        "use the tokenizer of the base model; llama.cpp would cut the text differently.",
    )


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """Read the tokenizer of a model folder.

    Args:
        vocab_size: rows of the embedding (config.json); ids without a token are padded.

    Raises:
        InputError: missing or damaged files, more ids than rows, an unknown pre-tokenizer or post-processor.
    """
    from transformers import AutoTokenizer

    stored, settings = _json(folder / "tokenizer.json"), _json(folder / "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        backend = tokenizer.backend_tokenizer
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the tokenizer in {folder} ({reason}).", "a fast tokenizer.", "save it again.") from None
    except Exception as error:  # tokenizers raises bare Exception on a malformed tokenizer.json
        raise InputError(f"the tokenizer in {folder} ({error}).", "a fast tokenizer.", "save it again.") from None
    highest = max(backend.get_vocab().values())
    if highest >= vocab_size:
        raise InputError(
            f"{folder}: token id {highest}, but the embedding has {vocab_size} rows.",
            "a row for every token.",
            "resize the model's embeddings to the tokenizer before training.",
        )
    pre, recognised = recognise(tokenizer)
    tokens, types = _tokens(tokenizer, vocab_size)
    config = _json(folder / "config.json")
    return Vocabulary(
        tokens=tokens,
        types=types,
        pre=pre,
        recognised=recognised,
        merges=_merges(stored, folder),
        special=_special(stored, settings, config),
        add=_add(stored, settings, folder),
        chat_template=_chat_template(folder, settings),
    )


def _looks_special(token: str) -> bool:
    """Names of control tokens that some models mark as ordinary added tokens."""
    brackets = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        token.startswith(left) and token.endswith(right) for left, right in brackets
    )


def _tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    for token, i in tokenizer.get_vocab().items():
        tokens[i], types[i] = token, int(TokenType.NORMAL)
    for i, added in tokenizer.added_tokens_decoder.items():
        token = added.content
        if not added.normalized:  # llama.cpp expects the text as it comes out of the tokenizer
            token = tokenizer.decode(tokenizer.encode(token, add_special_tokens=False))
        if added.special or _looks_special(token):
            types[i] = int(TokenType.CONTROL)
        else:
            token = token.replace("\u2581", " ")
            types[i] = int(TokenType.USER_DEFINED)
        tokens[i] = token
    return tokens, types


def _merges(stored: dict[str, Any], folder: Path) -> list[str]:
    merges = stored.get("model", {}).get("merges") or []
    if not merges:
        raise InputError(f"no merges in {folder / 'tokenizer.json'}.", "a BPE tokenizer.", "save the tokenizer again.")
    if isinstance(merges[0], str):
        return list(merges)
    return [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in merges]


def _special(stored: dict[str, Any], settings: dict[str, Any], config: dict[str, Any]) -> dict[str, int]:
    """Ids of special tokens: those that tokenizer_config.json names first, then those of config.json."""
    ids = {}
    for added in reversed(stored.get("added_tokens", [])):  # reversed: of equal texts the first one counts
        ids[added["content"]] = added["id"]
    found = {}
    eos = settings.get("eos_token") or settings.get("sep_token")
    bos = settings.get("bos_token") or settings.get("cls_token")
    for kind in _SPECIAL:
        token = {"bos": bos, "eos": eos}.get(kind, settings.get(f"{kind}_token"))
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and isinstance(ids.get(token), int):
            found[kind] = ids[token]
    for kind in _SPECIAL:
        number = config.get(f"{kind}_token_id")
        if kind not in found and isinstance(number, int) and not isinstance(number, bool):
            found[kind] = number
    return found


def _add(stored: dict[str, Any], settings: dict[str, Any], folder: Path) -> dict[str, bool]:
    """Which special tokens llama.cpp adds by itself; the post-processor decides, then tokenizer_config.json."""
    post = stored.get("post_processor")
    add: dict[str, bool] = {}
    for processor in (post or {"processors": []}).get("processors", [post]):
        if processor.get("type") != "ByteLevel":
            raise InputError(
                f"post-processor {processor.get('type')} in {folder / 'tokenizer.json'}.",
                "none, or ByteLevel as in Qwen's chat models.",
                "use the tokenizer of a causal Qwen model.",
            )
        add = {"bos": False, "eos": False}
    for kind in _SPECIAL:
        value = settings.get(f"add_{kind}_token")
        if isinstance(value, bool):
            add.setdefault(kind, value)
    return add


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | list[dict[str, str]] | None:
    template: Any = None
    if (folder / "chat_template.jinja").is_file():
        template = _text(folder / "chat_template.jinja")
        if more := list((folder / "additional_chat_templates").glob("*.jinja")):
            template = [{"name": "default", "template": template}]
            template += [{"name": path.stem, "template": _text(path)} for path in more]
    elif (folder / "chat_template.json").is_file():
        template = _json(folder / "chat_template.json").get("chat_template")
    template = settings.get("chat_template", template)
    return template if isinstance(template, str | list) else None


def _text(path: Path) -> str:
    with path.open(encoding="utf-8") as stream:
        return stream.read()


def write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Add the tokenizer to `writer`, in the official order."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for kind, number in vocabulary.special.items():
        if handler := getattr(writer, f"add_{kind}_token_id", None):
            handler(number)
    for kind, value in vocabulary.add.items():
        if handler := getattr(writer, f"add_add_{kind}_token", None):
            handler(value)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
