"""Which files of a repository are fetched, and whether there is room for them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from lib.errors import InputError
from lib.models.hub.sources import Remote, SourceError
from lib.models.hub.transport import RemoteFile

MODEL_PATTERNS = (
    *("*.json", "*.jinja", "*.safetensors", "merges.txt", "vocab.txt", "*.model"),
    *("README.md", "LICENSE*", "NOTICE*"),
)
"""Files of a model that are fetched, from the top of the repository: never pickles, never code."""
DATA_SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet")
_NO_DATA = ("dataset_infos.json", "requirements.txt", "readme.txt", "license.txt", "labels.txt")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SPARE = 64 << 20
"""Bytes that stay free on the disk."""


def is_data(path: str) -> bool:
    """Whether a file of a data set repository holds rows (or could)."""
    name = path.rpartition("/")[2].lower()
    return name.endswith(DATA_SUFFIXES) and name not in _NO_DATA and not name.startswith(".")


def choose(remote: Remote, files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """The files to fetch.

    Raises:
        SourceError: the repository holds nothing usable: no safetensors, only a script, no data files.
    """
    if remote.is_data:
        return _choose_data(remote, files)
    chosen = [
        file
        for file in files
        if "/" not in file.path
        and any(fnmatchcase(file.path, pattern) for pattern in MODEL_PATTERNS)
        and not file.path.startswith("consolidated")
    ]
    if not any(file.path.endswith(".safetensors") for file in chosen):
        pickles = [file.path for file in files if file.path.endswith(_PICKLES)]
        gguf = [file.path for file in files if file.path.endswith(".gguf")]
        only = f"only pickled weights ({pickles[0]})" if pickles else f"only GGUF ({gguf[0]})" if gguf else "no weights"
        raise SourceError(
            f"{remote.words} holds {only}.",
            "weights as safetensors (a pickle can run any code; a GGUF file cannot be trained).",
            f"choose a repository with safetensors for {remote.setting}.",
            f"holds {only}",
        )
    return chosen


def _choose_data(remote: Remote, files: Sequence[RemoteFile]) -> list[RemoteFile]:
    data = [file for file in files if is_data(file.path)]
    if data:
        return [*data, *(file for file in files if file.path == "README.md")]
    scripts = [file.path for file in files if file.path.endswith(".py")]
    if scripts:
        raise SourceError(
            f"{remote.words} is a script data set ({scripts[0]}); its code is never run.",
            "a data set of plain files (csv, tsv, json, jsonl, parquet).",
            "look for a plain-file copy, or set revision to refs/convert/parquet (files that the hub makes of many "
            "script data sets), or download it elsewhere and set dataset to the folder.",
            "is a script data set",
        )
    names = ", ".join(file.path for file in files[:5]) or "nothing"
    raise SourceError(
        f"{remote.words} holds {names}.",
        "csv, tsv, json, jsonl or parquet files.",
        "choose another data set, or unpack it and set dataset to the folder.",
        "holds no data files",
    )


def mega(count: float) -> str:
    """Bytes in MB, or in GB from 10 GB on."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e10 else f"{count / 1e6:,.0f} MB"


def require_room(remote: Remote, need: int, folder: Path, variable: str) -> None:
    """Refuse a download that the disk of `folder` cannot take.

    Raises:
        InputError: less than `need` bytes and `SPARE` are free.
    """
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if need and free < need + SPARE:
        raise InputError(
            f"{mega(free)} free on the disk of {folder}.",
            f"{mega(need)} for {remote.words}, and {mega(SPARE)} to spare.",
            f"free some space, or set {variable} to a folder on another disk.",
        )
