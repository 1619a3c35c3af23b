"""The tokenizer inside a .gguf file as a Hugging Face tokenizer: loaded, or as the files of a model folder.

Also: the bytes that each token id adds to a text, for showing an answer while it is written.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import refusal
from lib.models.gguf_file import check_model_gguf, read_metadata, unusable
from lib.runs.files import data_file, write_json, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


RULES: dict[str, dict[str, Any]] = data_file("models/tokenizer_rules.yaml")
"""Name of the pre-tokenizer in GGUF → how a tokenizer works before and beside its merges, as the file explains."""
PLAIN_BYTES = RULES["qwen2"]["steps"][-1]


# The tokenizer inside a .gguf file as a Hugging Face tokenizer: loaded, or as the files of a model folder.
#
# transformers' own reading of such files is not used: it adds byte fallback and forgets that some tokenizers (SmolLM's)
# cut numbers into single digits.

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # token types of the format
_ROLES = {f"{kind}_token": f"{kind}_token_id" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
_ROLES |= {"unk_token": "unknown_token_id", "pad_token": "padding_token_id"}
_ROLES |= {"sep_token": "seperator_token_id"}  # as the format spells it
_NAMED_TEMPLATE = "tokenizer.chat_template."
_ALWAYS_QWEN2 = "qwen2"  # transformers reads every tokenizer of this model type with Qwen2's rules


def tokenizer_from_gguf(path: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer stored in a GGUF file: byte-level BPE with the rules that the file names, and its template.

    Token ids equal llama.cpp's, except that Qwen2's rules bring a text into NFC first (llama.cpp does not normalise).

    Raises:
        InputError: not a GGUF file; another kind of tokenizer; no vocabulary, merges or chat template.
    """
    path = Path(path)
    metadata = read_metadata(check_model_gguf(path))
    stored = tokenizer_json(metadata, path)
    refuse_templates(metadata, path)
    if not metadata.get("tokenizer.chat_template"):
        raise unusable(path, "no chat template", "a file with its chat template")
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    named, others = _special_tokens(metadata, stored)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(stored)),
        **named,
        extra_special_tokens=others,
        chat_template=metadata["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
    )


def same_vocabulary(path: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a GGUF file has every token of a tokenizer under the same id.

    Raises:
        InputError: not a GGUF file.
    """
    tokens = read_metadata(path).get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return False
    return all(i < len(tokens) and tokens[i] == token for token, i in tokenizer.get_vocab().items())


def write_tokenizer(metadata: Mapping[str, Any], source: Path, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template of a GGUF file into a model folder.

    Args:
        metadata: of the file `source`, which errors name.

    Raises:
        InputError: as `tokenizer_from_gguf`, but a file without template is taken.
    """
    stored = tokenizer_json(metadata, source)
    named, others = _special_tokens(metadata, stored)
    architecture = metadata.get("general.architecture")
    settings: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer" if architecture == _ALWAYS_QWEN2 else "PreTrainedTokenizerFast",
        **{role: named.get(role) for role in _ROLES},
        "additional_special_tokens": others,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in stored["added_tokens"]
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{architecture}.context_length", 4096),
    }
    if architecture == "llama" and metadata.get("tokenizer.ggml.add_space_prefix") is False:
        settings["add_prefix_space"] = False  # true says nothing: llama.cpp puts no space before byte-level BPE
    write_json(folder / "tokenizer.json", stored)
    write_json(folder / "tokenizer_config.json", settings)
    for key, template in metadata.items():
        if key == "tokenizer.chat_template":
            write_text(folder / "chat_template.jinja", template)
        elif key.startswith(_NAMED_TEMPLATE):
            (folder / "additional_chat_templates").mkdir(exist_ok=True)
            name = key.removeprefix(_NAMED_TEMPLATE)
            write_text(folder / "additional_chat_templates" / f"{name}.jinja", template)


def refuse_unwritable(metadata: Mapping[str, Any], source: Path) -> None:
    """Refuse a tokenizer that `write_tokenizer` cannot write as it is.

    Raises:
        InputError: as `tokenizer_json` and `refuse_templates`; a qwen2 model whose rules are not Qwen2's.
    """
    tokenizer_json(metadata, source)
    refuse_templates(metadata, source)
    name = metadata["tokenizer.ggml.pre"]
    same = {**RULES[name], "starts": False} == RULES[_ALWAYS_QWEN2]
    if metadata.get("general.architecture") == _ALWAYS_QWEN2 and not same:
        raise refusal("models/gguf-qwen2-rules", source=source, name=name)


def refuse_templates(metadata: Mapping[str, Any], source: Path) -> None:
    """Refuse chat templates that are not text, or whose names cannot be file names.

    Raises:
        InputError: says which key.
    """
    for key, template in metadata.items():
        if key != _NAMED_TEMPLATE[:-1] and not key.startswith(_NAMED_TEMPLATE):
            continue
        name = key.removeprefix(_NAMED_TEMPLATE)
        if not isinstance(template, str) or not re.fullmatch(r"[\w.-]{1,60}", name, re.ASCII):
            raise refusal("models/gguf-template", source=source, key=key[:120], template=template)


def tokenizer_json(metadata: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The tokenizer of a GGUF file as tokenizer.json.

    Raises:
        InputError: no byte-level BPE whose rules are known, no tokens or merges, a token twice, or an end token that is
            put behind every text.
    """
    rules, (tokens, merges, types, vocabulary) = _rules(metadata, source), read_vocabulary(metadata, source)
    switches = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    used = sorted(vocabulary.values())
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": tokens[i], **switches, "special": types[i] == _CONTROL}
            for i in used
            if types[i] in (_CONTROL, _USER_DEFINED)
        ],
        "normalizer": rules["normalizer"],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": rules["steps"]},
        "post_processor": _post_processor(metadata, rules["starts"], tokens, source),
        "decoder": PLAIN_BYTES,
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            **dict.fromkeys(("fuse_unk", "byte_fallback"), False),
            "ignore_merges": rules["ignore_merges"],
            "vocab": vocabulary,
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }


def refuse_bad_vocabulary(metadata: Mapping[str, Any], source: Path) -> None:
    """Refuse byte-level BPE that would cut a text otherwise than the model was trained; llama.cpp says nothing.

    Raises:
        InputError: as `read_vocabulary`.
    """
    if metadata.get("tokenizer.ggml.model") == "gpt2":
        read_vocabulary(metadata, source)


def read_vocabulary(
    metadata: Mapping[str, Any], source: Path
) -> tuple[list[str], list[str], list[int], dict[str, int]]:
    """Tokens, merges, types of the tokens, and the ids of those that are used, of byte-level BPE.

    Raises:
        InputError: no tokens or merges, a token twice, or merges of parts that are no tokens, which llama.cpp passes
            over and the tokenizers library refuses.
    """
    tokens, merges = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "merges"))
    for name, value in (("tokens", tokens), ("merges", merges)):
        if not value or not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise unusable(source, f"no {name}", f"a file with its {name}")
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(types, list) or not all(type(kind) is int for kind in types):
        raise unusable(source, "token types that are no list", "a number for each token")
    if len(types) != len(tokens):
        raise unusable(source, f"{len(tokens)} tokens, {len(types)} token types", "a type for each")
    used = [i for i, kind in enumerate(types) if kind != _UNUSED]
    vocabulary = {tokens[i]: i for i in used}
    if len(vocabulary) != len(used):
        token, count = Counter(tokens[i] for i in used).most_common(1)[0]
        raise unusable(source, f"the token {token!r} {count} times", "each token once")
    for merge in merges:  # the tokenizers library would say the same without the file's name
        left, _, right = merge.partition(" ")
        if not (left and right) or not {left, right, left + right} <= vocabulary.keys():
            raise unusable(source, f"the merge {merge!r} of parts that are no tokens", "merges of its own tokens")
    return tokens, merges, types, vocabulary


def _rules(metadata: Mapping[str, Any], source: Path) -> dict[str, Any]:
    kind, name = (metadata.get(f"tokenizer.ggml.{key}", "none") for key in ("model", "pre"))
    if kind != "gpt2" or not isinstance(name, str) or name not in RULES:
        raise refusal("models/gguf-rules", source=source, kind=kind, name=name, known=", ".join(map(repr, RULES)))
    changes = [key for key in ("lowercase", "strip_accents") if metadata.get(f"tokenizer.ggml.normalizer.{key}")]
    if changes:
        raise refusal("models/gguf-changes-texts", source=source, changes=", ".join(changes))
    return RULES[name]


def _post_processor(metadata: Mapping[str, Any], starts: bool, tokens: list[str], source: Path) -> dict[str, Any]:
    """A post-processor that adds nothing, or the start token before every text."""
    if metadata.get("tokenizer.ggml.add_eos_token"):
        raise refusal("models/gguf-ends-texts", source=source)
    if not metadata.get("tokenizer.ggml.add_bos_token", starts):
        return PLAIN_BYTES
    number = metadata.get("tokenizer.ggml.bos_token_id")
    if type(number) is not int or not 0 <= number < len(tokens):
        raise unusable(source, "a start token before every text that is not named", "tokenizer.ggml.bos_token_id")
    start = tokens[number]
    first, second = ({"SpecialToken": {"id": start, "type_id": i}} for i in (0, 1))
    texts = [{"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")]
    template = {
        "type": "TemplateProcessing",
        "single": [first, texts[0]],
        "pair": [first, texts[0], second, texts[1]],
        "special_tokens": {start: {"id": start, "ids": [number], "tokens": [start]}},
    }
    return {"type": "Sequence", "processors": [PLAIN_BYTES, template]}


def _special_tokens(metadata: Mapping[str, Any], stored: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Text of every special token that the file names, by its role; and control tokens without a role of their own."""
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {role: metadata.get(f"tokenizer.ggml.{key}") for role, key in _ROLES.items()}
    named = {role: tokens[i] for role, i in ids.items() if type(i) is int and 0 <= i < len(tokens)}
    control = (token["content"] for token in stored["added_tokens"] if token["special"])
    return named, [content for content in control if content not in named.values()]


# From token ids to the bytes that each token adds to a text: what a display gets while an answer is written.

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[bytes]:
    """The bytes of each token; together they are the decoded text.

    Raises:
        InputError: a tokenizer that is neither byte-level BPE nor SentencePiece with bytes for unknown characters.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    steps = {"decoders": []} if decoder is None else json.loads(decoder.__getstate__())
    kinds = [step["type"] for step in steps.get("decoders", [steps])]
    if not {"ByteLevel", "ByteFallback"} & set(kinds):
        raise refusal("models/unknown-decoder", kinds=", ".join(kinds) or "nothing")
    by_character = {character: byte for byte, character in bytes_to_unicode().items()}  # of byte-level BPE

    def read(name: str) -> bytes:
        if "ByteLevel" in kinds:
            return bytes(by_character[character] for character in name)
        match = _BYTE.fullmatch(name)
        return bytes([int(match[1], 16)]) if match else name.replace("\u2581", " ").encode()

    added = {number: content.encode() for content, number in tokenizer.get_added_vocab().items()}
    names = tokenizer.convert_ids_to_tokens(list(ids))  # none behind the vocabulary's end (padding rows of the model)
    return [added[i] if i in added else read(name or "") for i, name in zip(ids, names, strict=True)]
