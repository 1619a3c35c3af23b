"""Data sets of the hub and of ModelScope: plain files, read like local ones. Scripts are never run."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from lib.data.reading import SPLIT_OF_NAME, SPLITS
from lib.errors import InputError
from lib.models import hub
from lib.models.hub.choosing import is_data

_SHARD = re.compile(r"-\d+-of-\d+(-[0-9a-f]+)?$")
_ONE = "download it and set dataset to the file or folder you mean."


def fetch_files(source: str, revision: str) -> tuple[dict[str, list[Path]], str, str]:
    """Files by split, a description of the source, and its commit (or hash).

    Raises:
        InputError: it cannot be had, or its files do not say which split they are.
    """
    remote = hub.parse(source, revision, "dataset")
    found = hub.fetch(source, revision, "dataset")
    where = "hub" if remote.place == "hub" else "ModelScope"
    words = f"{where} data set {remote.id}, revision {found.revision[:23]}"
    return split_files(found.path, remote.words), words, found.revision


def split_files(folder: Path, words: str) -> dict[str, list[Path]]:
    """Data files of a repository by split: as its card says, else by the names of files and folders.

    Raises:
        InputError: several tables, or files whose split cannot be told.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    paths = {name: path for name, path in paths.items() if is_data(name)}
    found = _by_card(folder / "README.md", sorted(paths), words)
    if found is None:
        found = _by_name(sorted(paths), words)
    for split, names in found.items():
        _one_table(split, names, words)
    return {split: [paths[name] for name in found[split]] for split in (*SPLITS, "all") if split in found}


def _by_card(card: Path, names: list[str], words: str) -> dict[str, list[str]] | None:
    """As `configs` in the head of README.md says; None when it says nothing."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = re.match(r"---\n(.*?)\n---", text, re.S)
    try:
        content = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        content = None
    configs = content.get("configs") if isinstance(content, dict) else None
    configs = [c for c in configs or [] if isinstance(c, dict) and c.get("data_files")]
    if not configs:
        return None
    chosen = [c for c in configs if c.get("default") or c.get("config_name") == "default"] or configs
    if len(chosen) > 1:
        have = ", ".join(str(c.get("config_name")) for c in chosen)
        raise InputError(f"{words} has the configurations {have}.", "one table with its splits.", _ONE)
    found: dict[str, list[str]] = {}
    for entry in _entries(chosen[0]["data_files"]):
        patterns = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
        split = SPLIT_OF_NAME.get(str(entry.get("split", "all")).lower(), "all" if "split" not in entry else "")
        if split:
            found.setdefault(split, []).extend(n for n in names if any(fnmatch(n, str(p)) for p in patterns))
    found = {split: files for split, files in found.items() if files}
    return found if found.keys() & {"train", "all"} else None


def _entries(value: Any) -> list[dict[str, Any]]:
    """`data_files` in its three spellings: one path, a list of paths, a list of splits with paths."""
    if isinstance(value, dict):
        return [{"split": split, "path": path} for split, path in value.items()]
    listed = value if isinstance(value, list) else [value]
    if all(isinstance(entry, dict) and "path" in entry for entry in listed):
        return listed
    return [{"path": [entry for entry in listed if isinstance(entry, str)]}]


def _by_name(names: list[str], words: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        if split := _split_of(name):
            found.setdefault(split, []).append(name)
    if not found and len(names) == 1:
        return {"all": names}
    if "train" not in found:
        raise InputError(f"{words} holds {', '.join(names[:8])}.", "a file of the split train.", _ONE)
    return found


def _split_of(name: str) -> str | None:
    """The split that a file's name says, or the nearest folder's that says one."""
    *folders, file = name.lower().split("/")
    stem = _SHARD.sub("", file.rpartition(".")[0])
    for part in (stem, *reversed(folders)):
        if part in SPLIT_OF_NAME:
            return SPLIT_OF_NAME[part]
    said = {SPLIT_OF_NAME[word] for word in re.split(r"[^a-z]+", stem) if word in SPLIT_OF_NAME}
    return said.pop() if len(said) == 1 else None


def _one_table(split: str, names: list[str], words: str) -> None:
    """Refuse files of one split that are not the parts of one table."""
    forms = {re.sub(r"\d+(-[0-9a-f]{8,})?", "#", name) for name in names}
    if len(forms) > 1:
        have = f"{', '.join(names[:4])} for {split}"
        raise InputError(f"{words} has several tables: {have}.", "one table with its splits.", _ONE)
