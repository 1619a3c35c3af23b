"""Tokenizer and chat template of a folder, as its files say: by transformers' order for what may stand there twice."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lib.errors import refusal, refusing
from lib.models.weights import INDEX, SINGLE, read_object
from lib.runs.files import data_file, write_json

Read = Callable[[str], dict[str, Any]]
"""File name → its JSON object; empty where there is no such file."""

TEMPLATES = "additional_chat_templates"
FILES: list[str] = data_file("models/architectures.yaml")["tokenizer_files"]
"""What a tokenizer's folder may hold, beside the folder `TEMPLATES`."""


def reader(folder: Path) -> Read:
    """Reads the JSON objects of a folder."""
    return lambda name: read_object(folder / name) if (folder / name).is_file() else {}


def vocabulary(read: Read) -> tuple[dict[str, int], dict[str, int]]:
    """Ordinary and added tokens with their ids.

    Ordinary ones are those of tokenizer.json, else of vocab.json; added ones are those of tokenizer_config.json where
    it lists any, else of tokenizer.json and added_tokens.json.
    """
    tokenizer, settings = read("tokenizer.json"), read("tokenizer_config.json")
    model, decoder = tokenizer.get("model"), settings.get("added_tokens_decoder")
    plain = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(plain, list):  # a unigram model lists (token, score)
        plain = {str(entry[0]): i for i, entry in enumerate(plain) if isinstance(entry, list) and entry}
    if not isinstance(plain, dict):
        plain = read("vocab.json")
    listed = _listed(decoder)
    if not listed:  # older folders keep theirs in a file of their own
        named = {name: i for name, i in read("added_tokens.json").items() if type(i) is int}
        listed = named | _listed(tokenizer.get("added_tokens"))
    return {name: i for name, i in plain.items() if type(i) is int}, listed


def _listed(tokens: Any) -> dict[str, int]:
    """Content → id of added tokens: a list of objects, or objects by their id."""
    if isinstance(tokens, dict):
        tokens = [
            {**e, "id": int(i)} for i, e in tokens.items() if isinstance(e, dict) and re.fullmatch("[0-9]{1,9}", i)
        ]
    return {
        entry["content"]: entry["id"]
        for entry in (tokens if isinstance(tokens, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and type(entry.get("id")) is int
    }


def chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Name → chat template: the .jinja files; where there are none, tokenizer_config.json.

    A chat_template.json is read by processors of images and sound alone, never by a tokenizer.

    Args:
        settings: tokenizer_config.json.

    Raises:
        InputError: a file that is not UTF-8.
    """
    files = {path.name.removesuffix(".jinja"): path for path in sorted((folder / TEMPLATES).glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files = {"default": folder / "chat_template.jinja"} | files
    found: Any = {name: _text(path) for name, path in files.items()} or settings.get("chat_template")
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    elif not isinstance(found, dict):
        found = {"default": found}
    return {str(name): text for name, text in found.items() if isinstance(text, str) and text}


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files as they are, but for what asks for code of the folder's own (auto_map), never run."""
    for path in [source / name for name in FILES] + sorted((source / TEMPLATES).glob("*.jinja")):
        if path.is_file():
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            settings = read_object(path) if path.name == "tokenizer_config.json" else {}
            if "auto_map" in settings:
                write_json(target, {key: value for key, value in settings.items() if key != "auto_map"})
            else:
                shutil.copyfile(path, target)


def _text(path: Path) -> str:
    with refusing((OSError, UnicodeDecodeError), "models/template-not-utf8", path=path):
        return path.read_text(encoding="utf-8")


_CUTS = ("model", "normalizer", "pre_tokenizer", "post_processor")
"""Keys of tokenizer.json that decide where a text is cut, and what is put around it."""
_AROUND = ("add_bos_token", "add_eos_token")
_OF_A_TOKEN = ("lstrip", "rstrip", "single_word", "special")


def differences(folder: Path, base: Path) -> dict[str, str]:
    """What an adapter's folder brings otherwise than its base's tokenizer has it, in words.

    Args:
        base: a folder with the base's tokenizer.

    Returns:
        "vocabulary" (other tokens, or other cuts into them), "special" (another begin or end, other kinds of added
        tokens), "template".

    Raises:
        InputError: tokens that the base does not have, without the tokenizer that they belong to.
    """
    own, theirs, found = reader(folder), reader(base), {}
    mine, its = ({**plain, **added} for plain, added in (vocabulary(own), vocabulary(theirs)))
    whole = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    if not its and not whole:
        return {}  # a base without a tokenizer: nothing to compare with
    if odd := sorted(name for name in (mine.keys() | its.keys() if whole else mine) if mine.get(name) != its.get(name)):
        shown = ", ".join(odd[:4]) + (", …" if len(odd) > 4 else "")
        if not whole:
            raise refusal("models/tokens-without-tokenizer", folder=folder, shown=shown)
        found["vocabulary"] = f"its tokenizer has other tokens than the base's ({len(odd):,}: {shown})"
    elif whole and (parts := _other_cuts(own, theirs)):
        found["vocabulary"] = f"its tokenizer encodes text otherwise than the base's ({', '.join(parts)})"
    if whole and (parts := _other_specials(own, theirs)):
        found["special"] = f"its tokenizer has other special tokens than the base's ({', '.join(parts)})"
    mine, its = (
        chat_templates(path, read("tokenizer_config.json")).get("default")
        for path, read in ((folder, own), (base, theirs))
    )
    if mine and _plain(mine) != _plain(its or ""):
        found["template"] = "its chat template is not the base's"
    return found


def _other_cuts(own: Read, theirs: Read) -> list[str]:
    """Parts of tokenizer.json and switches by which the same text becomes other ids."""
    sides = [read("tokenizer.json") for read in (own, theirs)]
    if not all(sides):
        return []
    found = [key for key in _CUTS if sides[0].get(key) != sides[1].get(key)]
    found = [key for key in found if _cut(key, sides[0].get(key)) != _cut(key, sides[1].get(key))]
    settings = [read("tokenizer_config.json") for read in (own, theirs)]
    written = all("'single'" in str(side.get("post_processor")) for side in sides)  # says it where no switch does
    for key in _AROUND:
        said = [side.get(key) for side in settings]
        if bool(said[0]) != bool(said[1]) and not (None in said and written):
            found.append(key)
    return found


def _cut(key: str, part: Any) -> Any:
    """A part of tokenizer.json without what its writers word differently: defaults, null, and what changes no id."""

    def plain(entry: dict[str, Any]) -> dict[str, Any]:
        if entry.get("type") == "ByteLevel":  # behind the cutting it moves offsets alone
            entry = {} if key == "post_processor" else {"use_regex": True, **entry, "trim_offsets": None}
        return {name: value for name, value in entry.items() if value and name not in ("pair", "unk_token")}

    if key == "model" and isinstance(part, dict):
        merges = part.get("merges") or []
        part = {**part, "merges": [pair if isinstance(pair, str) else " ".join(map(str, pair)) for pair in merges]}
        part |= {"vocab": None} if isinstance(part.get("vocab"), dict) else {}
    return json.loads(json.dumps(part), object_hook=plain) or {}


def _other_specials(own: Read, theirs: Read) -> list[str]:
    """Marks of begin and end that both name, each otherwise; and added tokens of other kinds."""
    found, kinds = [], []
    sides = [{**read("special_tokens_map.json"), **read("tokenizer_config.json")} for read in (own, theirs)]
    for key in ("bos_token", "eos_token"):
        said = [value.get("content") if isinstance(value := side.get(key), dict) else value for side in sides]
        if said[0] != said[1] and all(said):
            found.append(f"{key} {said[0]!r}")
    for read in (own, theirs):
        listed = read("tokenizer_config.json").get("added_tokens_decoder") or read("tokenizer.json").get("added_tokens")
        tokens = listed.values() if isinstance(listed, dict) else listed if isinstance(listed, list) else []
        dicts = [token for token in tokens if isinstance(token, dict)]
        kinds.append({str(token.get("content")): [bool(token.get(key)) for key in _OF_A_TOKEN] for token in dicts})
    return found + [name for name in kinds[0].keys() & kinds[1].keys() if kinds[0][name] != kinds[1][name]][:4]


def _plain(template: str) -> str:
    """A template without the marks of what is learned, which change nothing that it writes."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template).strip()


def doubles(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """What stands in a folder twice, and which of both is read."""
    found, written = [], settings.get("chat_template")
    if (folder / SINGLE).is_file() and (folder / INDEX).is_file():
        found.append(f"both {SINGLE} and {INDEX}: the one file is read, the index and its shards count for nothing")
    own_file = folder / "chat_template.jinja"
    config = reader(folder)("config.json")
    if (old := config.get("rope_scaling")) and (new := config.get("rope_parameters")) and old != new:
        found.append("rope_scaling and another rope_parameters in config.json: rope_scaling is read")
    if written and own_file.is_file():
        if written != _text(own_file):
            found.append(
                "chat_template.jinja and another template in tokenizer_config.json: chat_template.jinja is read"
            )
    elif not written and (folder / "chat_template.json").is_file() and not own_file.is_file():
        found.append("chat_template.json is read for images and sound only: the tokenizer has no template by it")
    own = _listed(reader(folder)("tokenizer.json").get("added_tokens"))
    if (wanted := _listed(settings.get("added_tokens_decoder"))) and own and own != wanted:
        found.append("tokenizer.json and tokenizer_config.json list other added tokens: tokenizer_config.json is read")
    if all((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        plain = vocabulary(reader(folder))[0]
        listed = read_object(folder / "vocab.json")
        if any(plain.get(name) != i for name, i in listed.items()):
            found.append("tokenizer.json and vocab.json have other tokens: tokenizer.json is read")
    return found
