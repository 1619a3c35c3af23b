"""The rows that a run takes: from files, folders and hubs.

Data sets of the hub and of ModelScope are plain files, read like local ones; scripts are never run.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from lib.errors import InputError
from lib.hub import fetching, sources
from lib.hub.sources import SourceError, is_data, looks_like_path
from lib.models.base_model import called, fallback_note, none_left
from lib.runs.files import sha256_file, sha256_json, user_path, utf8
from lib.settings import SAMPLE_DATASET, Settings
from lib.stages.data import sample

Rows = list[dict[str, Any]]
"""A table: its rows, every one with all columns."""

SPLITS = ("train", "validation", "test")
SPLIT_OF_NAME = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass(frozen=True)
class Known:
    """A data set known by its content.

    Attributes:
        name: its own name. rows, columns: of the table as published. sha256: of the file as published.
        stamp: what every page of a run on it must say.
    """

    name: str
    rows: int
    columns: frozenset[str]
    sha256: str
    stamp: str


HOTELS = Known(
    "ChnSentiCorp_htl_all",
    7766,
    frozenset(("label", "review")),
    "1d414b9c65caf3a836abdb4efded621968502ad3338e1a9d885ae131c86083f0",
    "the rows are ChnSentiCorp_htl_all (7,766 hotel reviews), not ChnSentiCorp: not comparable with results on it",
)
"""Shares its name with ChnSentiCorp (9,600 / 1,200 / 1,200 reviews of hotels, laptops and books) and 3,094 texts."""


@dataclass
class Table:
    """What was read.

    Attributes:
        splits: "train", "validation", "test" as given, or {"all": …} for a source without splits.
        source: in words, where the rows really came from.
        changes: what had to be changed to read the files, counted.
        revision: commit of a hub data set, hash of a ModelScope one; empty for files.
        hashes: SHA-256 of the files that were read, by name.
        asked: as written in the parameter file. notes: what every page must say about the choice (`choose_data`).
    """

    splits: dict[str, Rows]
    source: str
    changes: Counter[str] = field(default_factory=Counter)
    revision: str = ""
    hashes: dict[str, str] = field(default_factory=dict)
    asked: str = ""
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Rows as read, of all splits."""
        return sum(len(split) for split in self.splits.values())

    @property
    def sha256(self) -> str:
        """SHA-256 of the one file, or a hash over the names and hashes of several."""
        return next(iter(self.hashes.values())) if len(self.hashes) == 1 else sha256_json(self.hashes)

    def test_from_validation(self) -> bool:
        """Let the validation split stand in for a test split that is missing; whether it did."""
        if "test" in self.splits or "validation" not in self.splits:
            return False
        self.splits["test"] = self.splits.pop("validation")
        return True

    @property
    def known(self) -> Known | None:
        """The data set that these rows are, where it is one that is easily taken for another."""
        columns = {name.strip().lower() for name in next(iter(self.splits.values()))[0]}
        same = self.rows == HOTELS.rows and columns == HOTELS.columns
        return HOTELS if same or HOTELS.sha256 in self.hashes.values() else None


def read_table(source: str, revision: str = "main") -> Table:
    """Read a file, a folder or a hub data set; values stay as they are, only the bytes are made readable.

    Raises:
        SourceError: nothing there, or the hub cannot give it.
        InputError: nothing readable, or files that do not say which split they are.
    """
    path, commit = user_path(source), ""
    if path.is_file():
        files, words = {"all": [path]}, f"file {path.name}"
    elif path.exists():
        files, words = _split_folder(path), f"folder {path.name}"
    elif looks_like_path(source) or path.suffix.lower() in FORMATS:
        raise SourceError(
            f"dataset: no file or folder {path}.",
            "a file (csv, tsv, json, jsonl, parquet), a folder with train, validation and test files, or a hub id.",
            "correct dataset; a relative path is looked for in the current folder, then in the project.",
            "no file or folder there",
        )
    else:
        remote = sources.parse(source, revision, "dataset")
        found = fetching.fetch(source, revision, "dataset")
        where, commit = "hub" if remote.place == "hub" else "ModelScope", found.revision
        files, words = (
            _split_repository(found.path, remote.words),
            f"{where} data set {remote.id}, revision {commit[:23]}",
        )
    changes: Counter[str] = Counter()
    splits = {name: [row for part in paths for row in read_file(part, changes)] for name, paths in files.items()}
    hashes = {path.name: sha256_file(path) for paths in files.values() for path in paths}
    table = Table(splits, words, +changes, commit, hashes)
    if table.known:
        table.source = f"{table.known.name}, {words}"
    return table


def _split_folder(folder: Path) -> dict[str, list[Path]]:
    """Data files of a folder by split; shards (train-00000-of-00002) belong together."""
    files = data_files(folder)
    if not files:
        have = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise InputError(
            f"{folder} holds {have}.", "files train, validation, test (csv, tsv, json, jsonl or parquet).", "add them."
        )
    found = _by_split([path.name for path in files], lambda name: SPLIT_OF_NAME.get(_stem(name)))
    for split, names in found.items():
        if split != "all" and len(names) > 1 and any(_stem(name) == Path(name).stem.lower() for name in names):
            raise InputError(
                f"{folder} holds {', '.join(names)} for {split}.", "one file a split.", "remove the others."
            )
    if not found.keys() & {"train", "all"}:
        names = ", ".join(path.name for path in files[:8])
        raise InputError(f"{folder} holds {names}.", "a file train.csv (tsv, json, jsonl, parquet).", "rename it.")
    return {split: [folder / name for name in found[split]] for split in (*SPLITS, "all") if split in found}


def _by_split(names: list[str], split_of: Callable[[str], str | None]) -> dict[str, list[str]]:
    """The names of files by the split that each says; a single one that says none holds all rows."""
    found: dict[str, list[str]] = {}
    for name in names:
        if split := split_of(name):
            found.setdefault(split, []).append(name)
    return found or ({"all": names} if len(names) == 1 else {})


def _stem(name: str) -> str:
    """A file's name in small letters, without its suffix and the number of a shard."""
    return re.sub(r"-\d+-of-\d+(-[0-9a-f]+)?$", "", Path(name).stem.lower())


# One file: from its bytes to text that every parser reads alike, with everything changed on the way counted, to rows.

FORMATS = {".csv": "csv", ".tsv": "tsv", ".txt": "tsv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""Suffix of a data file -> how it is read. TSV is unquoted."""

SURROGATE = re.compile("[\ud800-\udfff]")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file; of a folder, over the names and SHA-256 of the data files in it (hidden files left out)."""
    if path.is_dir():
        return sha256_json({file.name: sha256_file(file) for file in data_files(path)})
    return sha256_file(path)


def data_files(folder: Path) -> list[Path]:
    """The files of a folder that the workbook can read, by name."""
    files = (p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    return sorted(p for p in files if p.suffix.lower() in FORMATS)


def read_file(path: Path, changes: Counter[str]) -> Rows:
    """The rows of one file; values stay as they are, only the bytes are made readable.

    Removed and counted: a byte-order mark, NUL characters, CR, lone surrogates (JSON escapes).

    Raises:
        InputError: another format, empty, a Git LFS pointer, a web page, not UTF-8, or not well-formed.
    """
    kind, raw = FORMATS.get(path.suffix.lower()), path.read_bytes()
    if kind is None:
        raise InputError(f"{path} ends in {path.suffix!r}.", f"one of {', '.join(FORMATS)}.", "convert or rename it.")
    _check_content(path, raw[:4096])
    try:
        if kind == "parquet":
            rows = _parquet_rows(path, raw)
        else:
            text = _readable(path, raw, kind, changes)
            rows = _json_rows(path, text, changes) if kind == "json" else _csv_rows(path, text, kind)
    except InputError:
        raise
    except (ValueError, OSError, NotImplementedError, RecursionError) as error:  # those of json, pandas and pyarrow
        reason = " ".join(str(error).split())[:200]
        expected = f"well-formed {kind.upper()}" + (" (a header line, tabs, no quoting)." if kind == "tsv" else ".")
        raise InputError(f"{path} cannot be read ({reason}).", expected, "correct the file.") from None
    if not rows:
        raise InputError(f"{path} holds no rows.", "a file with rows.", "fetch or export it again.")
    return rows


def _empty(path: Path) -> InputError:
    return InputError(f"{path} is empty.", "a file with rows.", "fetch or export it again.")


def _check_content(path: Path, head: bytes) -> None:
    """Refuse what is not data: an empty file, a Git LFS pointer, an HTML page, another encoding of Unicode."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        raise _empty(path)
    if head.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{path} is a Git LFS pointer, not the data.", "the file itself.", "run `git lfs pull` where it came from."
        )
    if start.startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise InputError(
            f"{path} is a web page, not data.", "the file itself.", "download it again with the site's raw-file link."
        )
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path} is UTF-16.", "UTF-8.", "save it again as UTF-8.")


def _readable(path: Path, raw: bytes, kind: str, changes: Counter[str]) -> str:
    """The text of a file with LF alone. A CR ends a line only where the file has no LF; else it is a space."""
    text = utf8(path, raw)
    if text.startswith("\ufeff"):
        changes["byte-order mark"] += 1
        text = text[1:]
    ends_lines = "\n" not in text and kind != "json"
    for what, old, new in (
        ("NUL characters", "\0", ""),
        ("CRLF line ends", "\r\n", "\n"),
        ("CR line ends", "\r", "\n") if ends_lines else ("stray CR characters", "\r", " "),
    ):
        changes[what] += text.count(old)
        text = text.replace(old, new)
    if not text.strip():
        raise _empty(path)
    return text


def _csv_rows(path: Path, text: str, kind: str) -> Rows:
    """Every value stays text ("null" and "007" are reviews, not numbers)."""
    import pandas as pd

    form: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {"delimiter": ","}
    header = next(csv.reader(io.StringIO(text), **form))
    if len(set(header)) != len(header) or not all(name.strip() for name in header):
        raise InputError(
            f"{path} begins with {', '.join(map(repr, header))[:200]}.",
            "a first line with one distinct name a column.",
            "add or correct the header line.",
        )
    # where every row has one field more than the header, pandas takes the first ones for the names of the rows
    table = pd.read_csv(io.StringIO(text), dtype=object, na_filter=False, **form)
    return table.to_dict("records")


def _json_rows(path: Path, text: str, changes: Counter[str]) -> Rows:
    """The objects of a JSON file: a list, or one a line; every one with all keys."""
    whole = text.lstrip().startswith("[")
    rows: Rows = []
    for number, part in enumerate([text] if whole else text.split("\n"), 1):
        try:
            rows += json.loads(part) if whole else [json.loads(part)] if part.strip() else []
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, line {number + error.lineno - 1} is not JSON ({error.msg}).",
                "a list of objects, or one object a line.",
                "correct that line.",
            ) from None
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("not every row is an object")
    if _SURROGATE_ESCAPE.search(text):
        rows = _without_surrogates(rows, changes)
    columns = dict.fromkeys(name for row in rows for name in row)
    return [columns | row for row in rows]


def _without_surrogates(value: Any, changes: Counter[str]) -> Any:
    """A JSON value without lone surrogates, which no UTF-8 file and no tokenizer can hold."""
    if isinstance(value, str):
        text, count = SURROGATE.subn("", value)
        changes["lone surrogates"] += count
        return text
    if isinstance(value, list):
        return [_without_surrogates(item, changes) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(key, changes): _without_surrogates(item, changes) for key, item in value.items()}
    return value


def _parquet_rows(path: Path, raw: bytes) -> Rows:
    if raw[:4] != b"PAR1" or raw[-4:] != b"PAR1":
        raise InputError(f"{path} does not start and end as Parquet does.", "a whole Parquet file.", "fetch it again.")
    import pyarrow.parquet

    return pyarrow.parquet.read_table(pyarrow.BufferReader(raw)).to_pylist()


# Data sets of the hub and of ModelScope: plain files, read like local ones. Scripts are never run.

_ONE = "download it and set dataset to the file or folder you mean."


def _split_repository(folder: Path, words: str) -> dict[str, list[Path]]:
    """Data files of a repository by split: as its card says, else by the names of files and folders."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    paths = {name: path for name, path in paths.items() if is_data(name)}
    found = _by_card(folder / "README.md", sorted(paths), words)
    if found is None:
        found = _by_split(sorted(paths), _split_of)
        if not found.keys() & {"train", "all"}:
            raise InputError(f"{words} holds {', '.join(sorted(paths)[:8])}.", "a file of the split train.", _ONE)
    for split, names in found.items():
        if len({re.sub(r"\d+(-[0-9a-f]{8,})?", "#", name) for name in names}) > 1:  # not the parts of one table
            have = f"{', '.join(names[:4])} for {split}"
            raise InputError(f"{words} has several tables: {have}.", "one table with its splits.", _ONE)
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


def _split_of(name: str) -> str | None:
    """The split that a file's name says, or the nearest folder's that says one."""
    *folders, file = name.lower().split("/")
    stem = _stem(file)
    for part in (stem, *reversed(folders)):
        if part in SPLIT_OF_NAME:
            return SPLIT_OF_NAME[part]
    said = {SPLIT_OF_NAME[word] for word in re.split(r"[^a-z]+", stem) if word in SPLIT_OF_NAME}
    return said.pop() if len(said) == 1 else None


# The data set asked for, or the first listed fallback that can be had.


def choose_data(settings: Settings) -> Table:
    """Read `dataset`; where it cannot be had, the `fallbacks` in order, each checked as it is listed.

    Raises:
        InputError: none can be had; or the first that can be had is unreadable or not the one that was listed.
    """
    listed: list[Mapping[str, Any]] = [{"dataset": settings.dataset, "revision": settings.revision}]
    listed += [entry for entry in settings.fallbacks if "dataset" in entry]
    failures: list[SourceError] = []
    for entry in listed:
        source = str(entry["dataset"])
        try:
            table = _read_chosen(source, str(entry.get("revision", "main")), settings)
        except SourceError as error:
            failures.append(error)
            continue
        if failures:
            _check_listed(table, entry)
        name = f"{table.known.name} ({called(source)})" if table.known else source
        stamp = (table.known.stamp,) if table.known else ()
        notes = (*fallback_note("data set", settings.dataset, name, failures), *stamp)
        return replace(table, asked=source, notes=notes)
    raise none_left(failures, [str(entry["dataset"]) for entry in listed])


def _read_chosen(source: str, revision: str, settings: Settings) -> Table:
    if source != SAMPLE_DATASET:
        return read_table(source, revision)
    if len(settings.label_names) != 2:
        raise InputError(
            f"label_names with {len(settings.label_names)} names for the sample corpus.",
            "two: negative, positive.",
            "give two names, or set dataset to your own data.",
        )
    words = f"the embedded sample corpus, grammar version {sample.VERSION}"
    return Table(sample.reviews(), words)


def _check_listed(table: Table, entry: Mapping[str, Any]) -> None:
    """Refuse a fallback that is not what the parameter file lists."""
    do = "check where it comes from; correct the entry of fallbacks if these are the rows you mean."
    if "rows" in entry and table.rows != entry["rows"]:
        raise InputError(f"fallback {entry['dataset']}: {table.rows:,} rows.", f"{entry['rows']:,} rows.", do)
    if "sha256" in entry and table.sha256 != str(entry["sha256"]).lower():
        names = ", ".join(table.hashes) or "no file"
        raise InputError(f"fallback {entry['dataset']}: SHA-256 {table.sha256} ({names}).", f"{entry['sha256']}.", do)
