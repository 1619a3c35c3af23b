"""Tables from files, folders and hubs, through the `datasets` library."""

from __future__ import annotations

import contextlib
import csv
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.data.known import Known, recognize
from lib.data.textfiles import FORMATS, bad_json_line, data_files, file_fingerprint, json_rows, readable_copy
from lib.errors import InputError
from lib.models.hub import SourceError, looks_like_path
from lib.run.files import sha256_file, sha256_json
from lib.run.folders import runs_folder, user_path

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
        given: True when the source brought its own split.
        revision: commit of a hub data set, hash of a ModelScope one; empty for files.
        hashes: SHA-256 of the files that were read, by name.
    """

    splits: dict[str, Dataset]
    source: str
    changes: Counter[str] = field(default_factory=Counter)
    given: bool = False
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
        from lib.data.hub import fetch_files

        files, words, commit = fetch_files(source, revision)
    elif path.is_file():
        files, words = {"all": [path]}, f"file {path.name}"
    else:
        files, words = _split_files(path), f"folder {path.name}"
    splits = {name: _read_files(paths, changes) for name, paths in files.items()}
    hashes = {path.name: sha256_file(path) for paths in files.values() for path in paths}
    given = "test" in splits or "validation" in splits
    table = Table(splits, words, changes, given, commit, hashes)
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
