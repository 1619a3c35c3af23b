"""The rows that a run takes: tables from files, folders and hubs, through the `datasets` library.

Data sets of the hub and of ModelScope are plain files, read like local ones; scripts are never run.
"""

from __future__ import annotations

import contextlib
import csv
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lib.errors import InputError
from lib.hub import fetching, sources
from lib.hub.sources import SourceError, is_data, looks_like_path
from lib.models.base_model import called, fallback_note, none_left
from lib.runs.files import runs_folder, sha256_file, sha256_json, user_path
from lib.settings import SAMPLE_DATASET, Settings
from lib.stages.data import sample
from lib.stages.data.text_files import (
    FORMATS,
    Known,
    bad_json_line,
    data_files,
    file_fingerprint,
    json_rows,
    readable_copy,
    recognize,
)

if TYPE_CHECKING:
    from datasets import Dataset


SPLITS = ("train", "validation", "test")
SPLIT_OF_NAME = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass
class Table:
    """What was read.

    Attributes:
        splits: "train", "validation", "test" as given, or {"all": …} for a source without splits.
        source: in words, where the rows really came from.
        changes: what had to be changed to read the files, counted.
        revision: commit of a hub data set, hash of a ModelScope one; empty for files.
        hashes: SHA-256 of the files that were read, by name.
    """

    splits: dict[str, Dataset]
    source: str
    changes: Counter[str] = field(default_factory=Counter)
    revision: str = ""
    hashes: dict[str, str] = field(default_factory=dict)

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
        columns = next(iter(self.splits.values())).column_names if self.splits else ()
        return recognize(self.rows, columns, self.hashes.values())


@contextlib.contextmanager
def quiet_datasets() -> Iterator[Any]:
    """The `datasets` module without its progress bars and chatter, which would land in the report pages."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    bars = datasets.are_progress_bars_disabled()
    levels = datasets.logging.get_verbosity(), hub_logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    try:
        yield datasets
    finally:
        datasets.logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
        if not bars:
            datasets.enable_progress_bars()


def cache_folder() -> Path:
    """Where `datasets` keeps the tables it has read: runs/_cache."""
    return runs_folder() / "_cache"


def local_path(source: str) -> Path | None:
    """The file or folder a source names; None when it can only be a hub id.

    Raises:
        InputError: it is written like a path and nothing is there.
    """
    path = user_path(source)
    if path.exists():
        return path
    if looks_like_path(source) or Path(source).suffix.lower() in FORMATS:
        raise SourceError(
            f"dataset: no file or folder {path}.",
            "a file (csv, tsv, json, jsonl, parquet), a folder with train, validation and test files, or a hub id.",
            "correct dataset; a relative path is looked for in the current folder, then in the project.",
            "no file or folder there",
        )
    return None


def read_table(source: str, revision: str = "main") -> Table:
    """Read a file, a folder or a hub data set; values stay as they are, only the bytes are made readable.

    Raises:
        InputError: nothing there, nothing readable, or the hub cannot give it.
    """
    path = local_path(source)
    changes: Counter[str] = Counter()
    commit = ""
    if path is None:
        files, words, commit = fetch_files(source, revision)
    elif path.is_file():
        files, words = {"all": [path]}, f"file {path.name}"
    else:
        files, words = _split_files(path), f"folder {path.name}"
    splits = {name: _read_files(paths, changes) for name, paths in files.items()}
    hashes = {path.name: sha256_file(path) for paths in files.values() for path in paths}
    table = Table(splits, words, changes, commit, hashes)
    if table.known:
        table.source = f"{table.known.name}, {words}"
    return table


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """Data files of a folder by split; shards (train-00000-of-00002) belong together."""
    files = data_files(folder)
    if not files:
        have = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise InputError(
            f"{folder} holds {have}.", "files train, validation, test (csv, tsv, json, jsonl or parquet).", "add them."
        )
    found: dict[str, list[Path]] = {}
    for path in files:
        stem = path.stem.lower()
        name = SPLIT_OF_NAME.get(stem) or SPLIT_OF_NAME.get(re.sub(r"-\d+-of-\d+$", "", stem))
        if name:
            found.setdefault(name, []).append(path)
    if not found and len(files) == 1:
        return {"all": files}
    for name, paths in found.items():
        if len(paths) > 1 and any(not re.search(r"-\d+-of-\d+$", p.stem) for p in paths):
            names = ", ".join(p.name for p in paths)
            raise InputError(f"{folder} holds {names} for {name}.", "one file a split.", "remove the others.")
    if "train" not in found:
        names = ", ".join(p.name for p in files[:8])
        raise InputError(f"{folder} holds {names}.", "a file train.csv (tsv, json, jsonl, parquet).", "rename it.")
    return {name: found[name] for name in SPLITS if name in found}


def _read_files(paths: list[Path], changes: Counter[str]) -> Dataset:
    tables = [_read_file(path, changes) for path in paths]
    if len(tables) == 1:
        return tables[0]
    with quiet_datasets() as datasets:
        return datasets.concatenate_datasets(tables)


def _read_file(path: Path, changes: Counter[str]) -> Dataset:
    """One file as a `datasets` table, cached under its content's hash."""
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"{path} ends in {path.suffix!r}.", f"one of {', '.join(FORMATS)}.", "convert or rename it.")
    cache = cache_folder()
    readable, changed = readable_copy(path, cache)
    changes.update(changed)
    options = _csv_options(path, readable, kind) if kind in ("csv", "tsv") else {}
    builder = "csv" if kind == "tsv" else kind
    with quiet_datasets() as datasets:
        try:
            # each content has a cache folder of its own, so a changed file can never be served from the cache
            table = datasets.load_dataset(
                builder,
                data_files=str(readable),
                split="train",
                cache_dir=str(cache / file_fingerprint(readable)[:16]),
                **options,
            )
        except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
            if "corresponds to no data" in str(error):
                raise _no_rows(path) from None
            if kind == "json" and (line := bad_json_line(readable)):
                raise InputError(
                    f"{path}, line {line[0]} is not JSON ({line[1]}).",
                    "a list of objects, or one object a line.",
                    "correct that line.",
                ) from None
            reason = " ".join(str(error.__cause__ or error).split())[:200]
            expected = f"well-formed {kind.upper()}" + (" (a header line, tabs, no quoting)." if kind == "tsv" else ".")
            raise InputError(f"{path} cannot be read ({reason}).", expected, "correct the file.") from None
    if not len(table):
        raise _no_rows(path)
    return _dates_as_written(table, readable) if kind == "json" else table


def _dates_as_written(table: Dataset, path: Path) -> Dataset:
    """A JSON table with the columns that the reader took for dates as they stand in the file."""
    import pyarrow

    schema = table.data.schema
    dated = [name for name in table.column_names if "timestamp" in str(schema.field(name).type)]
    if not dated:
        return table
    rows = json_rows(path)
    with quiet_datasets() as datasets:
        read = datasets.Dataset(pyarrow.table({name: [row.get(name) for row in rows] for name in dated}))
        return datasets.concatenate_datasets([table.remove_columns(dated), read], axis=1)


def _no_rows(path: Path) -> InputError:
    return InputError(f"{path} holds no rows.", "a file with rows.", "fetch or export it again.")


def _csv_options(path: Path, readable: Path, kind: str) -> dict[str, Any]:
    """Options of the csv reader: every value stays text ("null" and "007" are reviews, not numbers)."""
    import datasets

    form: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {"delimiter": ","}
    with readable.open(encoding="utf-8", newline="") as stream:
        header = next(csv.reader(stream, **form))
    if len(set(header)) != len(header) or not all(name.strip() for name in header):
        raise InputError(
            f"{path} begins with {', '.join(map(repr, header))[:200]}.",
            "a first line with one distinct name a column.",
            "add or correct the header line.",
        )
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return {**form, "features": features, "keep_default_na": False, "na_filter": False}


# Data sets of the hub and of ModelScope: plain files, read like local ones. Scripts are never run.

_SHARD = re.compile(r"-\d+-of-\d+(-[0-9a-f]+)?$")
_ONE = "download it and set dataset to the file or folder you mean."


def fetch_files(source: str, revision: str) -> tuple[dict[str, list[Path]], str, str]:
    """Files by split, a description of the source, and its commit (or hash).

    Raises:
        InputError: it cannot be had, or its files do not say which split they are.
    """
    remote = sources.parse(source, revision, "dataset")
    found = fetching.fetch(source, revision, "dataset")
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


# The data set asked for, or the first listed fallback that can be had.


@dataclass(frozen=True)
class ChosenData:
    """Attributes: source as written in the parameter file; the table; what every page must say about it."""

    source: str
    table: Table
    notes: tuple[str, ...]


def choose_data(settings: Settings) -> ChosenData:
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
        return ChosenData(source, table, (*fallback_note("data set", settings.dataset, name, failures), *stamp))
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
    return Table(sample.sample_tables(), words)


def _check_listed(table: Table, entry: Mapping[str, Any]) -> None:
    """Refuse a fallback that is not what the parameter file lists."""
    do = "check where it comes from; correct the entry of fallbacks if these are the rows you mean."
    if "rows" in entry and table.rows != entry["rows"]:
        raise InputError(f"fallback {entry['dataset']}: {table.rows:,} rows.", f"{entry['rows']:,} rows.", do)
    if "sha256" in entry and table.sha256 != str(entry["sha256"]).lower():
        names = ", ".join(table.hashes) or "no file"
        raise InputError(f"fallback {entry['dataset']}: SHA-256 {table.sha256} ({names}).", f"{entry['sha256']}.", do)
