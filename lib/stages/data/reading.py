"""The rows that a run takes: from files, folders and hubs.

Data sets of the hub and of ModelScope are plain files, read like local ones; scripts are never run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lib.errors import InputError, refusal
from lib.hub import fetching, sources
from lib.hub.sources import SourceError, is_data, looks_like_path
from lib.models.base_model import called, fallback_note, first_available
from lib.runs.files import sha256_file, sha256_json, user_path
from lib.settings import SAMPLES, Settings
from lib.stages.data import sample
from lib.stages.data.beside import card_of, classes_beside
from lib.stages.data.data_files import FORMATS, NAMES, Rows, alone, by_name, data_files, named_classes, read_file
from lib.stages.data.labels import is_name

SPLITS = ("train", "validation", "test")
SPLIT_OF_NAME = by_name("splits")
HOTELS = "ChnSentiCorp_htl_all"
"""Shares its name with ChnSentiCorp (9,600 / 1,200 / 1,200 reviews of hotels, laptops and books) and 3,094 texts."""
HOTELS_STAMP = f"the rows are {HOTELS} (7,766 hotel reviews), not ChnSentiCorp: not comparable with results on it"
HOTELS_SHA256 = "1d414b9c65caf3a836abdb4efded621968502ad3338e1a9d885ae131c86083f0"
"""Of the file as published."""


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

    @property
    def is_hotels(self) -> bool:
        """Whether these rows are HOTELS, by the file or by size and columns, whatever they are called."""
        columns = {name.strip().lower() for name in next(iter(self.splits.values()))[0]}
        return (self.rows == 7766 and columns == {"label", "review"}) or HOTELS_SHA256 in self.hashes.values()


def read_table(source: str, revision: str = "main", label_column: str = "", label_names: Sequence[str] = ()) -> Table:
    """Read a file, a folder or a hub data set; values stay as they are, only the bytes are made readable.

    Numbers of classes that the data or a file beside it names become their names.

    Args:
        label_column, label_names: of a run with labels: the column of their numbers, and what sentences beside the data
            can say of them.

    Raises:
        SourceError: nothing there, or the hub cannot give it.
        InputError: nothing readable, or files that do not say which split they are.
    """
    path, commit = user_path(source), ""
    changes: Counter[str] = Counter()
    if path.is_file():
        files, words = {"all": [path]}, f"file {path.name}"
    elif path.is_dir():
        files, words = _split_folder(path, changes), f"folder {path.name}"
    elif looks_like_path(source) or path.suffix.lower() in FORMATS:
        raise refusal("data/no-file", SourceError, path=path)
    else:
        remote = sources.parse(source, revision, "dataset")
        found = fetching.fetch(source, revision, "dataset")
        path = found.path
        where, commit = "hub" if remote.place == "hub" else "ModelScope", found.revision
        files, words = (
            _split_repository(found.path, remote.words, changes),
            f"{where} data set {remote.id}, revision {commit[:23]}",
        )
    splits = {name: _read_files(paths, changes) for name, paths in files.items()}
    if "all" in splits:
        splits = _own_splits(words, splits["all"], changes, label_column)
    else:
        _refuse_other_splits(words, splits, label_column)
    told = label_names if any(_numbered(rows, label_column) for rows in splits.values()) else ()
    classes, unread = classes_beside(path, [file for paths in files.values() for file in paths], told)
    for rows in splits.values():
        named_classes(rows, classes, changes, label_column)
    hashes = {path.name: sha256_file(path) for paths in files.values() for path in paths}
    table = Table(splits, words, +(changes + unread), commit, hashes)
    if table.is_hotels:
        table.source = f"{HOTELS}, {words}"
    return table


def _numbered(rows: Rows, label_column: str) -> bool:
    """Whether a label may be a number, of which something beside the data could say what it means."""
    columns = [name for name in rows[0] if name == label_column or name.strip().lower() in NAMES["label_columns"]]
    return any(not is_name(cell) for row in rows for name in columns if (cell := alone(row[name])) not in (None, ""))


def _own_splits(words: str, rows: Rows, changes: Counter[str], label_column: str) -> dict[str, Rows]:
    """A table by the columns that say the split of every row (`split`, `is_test`); all its rows where none does."""
    columns, said = _said_splits(words, rows, label_column)
    if not columns:
        return {"all": rows}
    if not {"train"} < set(said):
        raise _half_said(words, columns[0], rows)
    changes[f"rows by the splits that the column {', '.join(map(repr, columns))} says"] += len(rows)
    parts: dict[str, Rows] = {}
    for split, row in zip(said, rows, strict=True):
        parts.setdefault(split, []).append({name: cell for name, cell in row.items() if name not in columns})
    return parts


def _refuse_other_splits(words: str, splits: Mapping[str, Rows], label_column: str) -> None:
    """Refuse training rows in files of other splits and other rows in those of train, as a column of theirs says."""
    for name, rows in splits.items():
        columns, said = _said_splits(f"{words}, {name}", rows, label_column)
        if other := Counter(split for split in said if (split == "train") != (name == "train")):
            [(split, count)] = other.most_common(1)
            raise refusal(
                "data/rows-of-another-split", words=words, count=count, name=name, column=columns[0], split=split
            )


_MOST_VALUES = 50
"""Different values, at most, of a column that says splits."""


def _said_splits(words: str, rows: Rows, label_column: str) -> tuple[list[str], list[str]]:
    """The columns that say the splits of rows, and the split of every row; nothing where no column does.

    Values decide: a column is followed whatever it is called if its values name several splits. One whose name is that
    of a split says it with 0 and 1, where it begins with `is`, means the test rows, or does not stand alone: a single
    `train` may say what is learned.

    Raises:
        InputError: not every value is understood, or columns contradict one another.
    """
    lower = {str(name).strip().lower(): name for name in rows[0]}
    label = label_column or next((lower[name] for name in NAMES["label_columns"] if name in lower), None)
    left: dict[str, dict[str, frozenset[str]]] = {}
    sure = False
    for column in (name for name in rows[0] if name != label):
        values: set[str] = set()
        for row in rows:
            values.add(_value(row[column]))
            if len(values) > _MOST_VALUES:
                break
        marks, certain = _marked_split(column)
        if not 1 < len(values) <= _MOST_VALUES:
            continue
        if marks and values & _FLAGS.keys():
            means = {value: {marks} if yes else _ALL - {marks} for value, yes in _FLAGS.items()}
            sure = sure or certain
        else:
            means = {value: {split} for value in values if (split := SPLIT_OF_NAME.get(_NO_WORD.sub("", value)))}
            several = set().union(*means.values())
            name = str(column).strip().lower()
            if not means and (name in NAMES["split_columns"][:5] or (certain and name.startswith(("is", "是否")))):
                raise _half_said(words, column, rows)
            named = name in NAMES["split_columns"] and bool(means)
            if not named and (len(several) < 2 or 2 * sum(_value(row[column]) in means for row in rows) <= len(rows)):
                continue
            sure = True
        if not values <= means.keys():
            raise _half_said(words, column, rows)
        left[column] = {value: frozenset(splits) for value, splits in means.items()}
    if not sure and len(left) < 2:
        return [], []
    said = [_ALL.intersection(*(means[_value(row[column])] for column, means in left.items())) for row in rows]
    if frozenset() in said:
        row = rows[said.index(frozenset())]
        have = ", ".join(f"{column} {row[column]}" for column in left)
        raise refusal("data/splits-contradict", words=words, have=have)
    return list(left), [next(name for name in ("train", "test", "validation") if name in splits) for splits in said]


_ALL, _FLAGS, _NO_WORD = frozenset(SPLITS), NAMES["flags"], re.compile(r"[\W\d_]+|(?<=.)(set|split|data|样本)$")


def _value(cell: Any) -> str:
    return str(cell).strip().lower()


def _marked_split(column: str) -> tuple[str, bool]:
    """The split whose rows a column of 0 and 1 marks by its name (is_test), and whether it does so alone.

    is_valid may say that a row is in order; is_deleted, ISBN or issue say nothing of splits.
    """
    begins, word = re.fullmatch(r"((?:is|in|for|是否|用于)?)(.*)", re.sub(r"[\W_]", "", str(column).lower())).groups()
    marks = SPLIT_OF_NAME.get(word, "")
    return marks, marks == "test" or bool(marks and begins and word != "valid")


def _half_said(words: str, column: str, rows: Rows) -> InputError:
    have = ", ".join(
        f"{value!r} ({count} rows)" for value, count in Counter(_value(r[column]) for r in rows).most_common(6)
    )
    return refusal("data/splits-half-said", words=words, column=column, have=have)


def _read_files(paths: Sequence[Path], changes: Counter[str]) -> Rows:
    """The rows of several files that are parts of one table.

    Raises:
        InputError: they have different columns.
    """
    parts = [read_file(path, changes) for path in paths]
    for path, rows in zip(paths, parts, strict=True):
        if rows[0].keys() != parts[0][0].keys():
            columns, others = (", ".join(names)[:200] for names in (parts[0][0], rows[0]))
            raise refusal("data/other-columns", first=paths[0].name, columns=columns, path=path, others=others)
    return [row for rows in parts for row in rows]


def _split_folder(folder: Path, changes: Counter[str]) -> dict[str, list[Path]]:
    """Data files of a folder by split; those of its own folders are not read."""
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        part = "" if (folder / "state.json").is_file() else '["train"]'
        raise refusal("data/saved-to-disk", folder=folder, part=part)
    files = data_files(folder)
    if not files:
        have = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise refusal("data/no-data-files", folder=folder, have=have)
    paths = {path.name: path for path in files}
    found = _by_name(paths)
    if not found and len({path.suffix.lower() for path in files}) == 1:
        found = {"all": list(paths)}  # without splits: parts of one table
    deeper = {path.relative_to(folder).as_posix(): path for path in folder.glob("[!.]*/*") if is_data(path.name)}
    return _checked(found, paths | deeper, str(folder), changes)


def _by_name(names: Iterable[str]) -> dict[str, list[str]]:
    """Files by the split that their names say."""
    found: dict[str, list[str]] = {}
    for name in names:
        if split := _split_of(name):
            found.setdefault(split, []).append(name)
    return found


_SHARD = re.compile(r"(\d+)[-_]of[-_](0\d+|\d{1,3})(?!\d)")


def _pattern(name: str) -> str:
    """A file's name without the number of a part."""
    return re.sub(r"\d+(-[0-9a-f]{8,})?", "#", name)


def _checked(
    found: Mapping[str, list[str]], paths: Mapping[str, Path], words: str, changes: Counter[str]
) -> dict[str, list[Path]]:
    """The paths of every split in order; the parts of each are one table and complete, files of none are counted."""
    if not found.keys() & {"train", "all"}:
        raise refusal("data/no-training-file", words=words, have=", ".join(list(paths)[:8]))
    shards: dict[tuple[str, str], set[str]] = {}
    for name in paths:
        if part := _SHARD.search(name):
            shards.setdefault((_pattern(name), part[2]), set()).add(part[1])
    for split, names in found.items():
        if split != "all" and len(set(map(_pattern, names))) > 1:
            several = f"several tables: {', '.join(names[:4])} for {split}"
            raise refusal("data/several-tables", words=words, several=several)
        parts = [(_pattern(name), part[2], part[1]) for name in names if (part := _SHARD.search(name))]
        counts = {pattern: count for pattern, count, _ in parts}
        if len(set(parts)) < len(parts) or any(counts[pattern] != count for pattern, count, _ in parts):
            several = f"parts twice, or of two tables: {', '.join(names[:4])}"
            raise refusal("data/several-tables", words=words, several=several)
        for (pattern, count), have in shards.items():
            if len(have) < int(count) and pattern in map(_pattern, names):
                parts = ", ".join(sorted(have))[:60]
                raise refusal(
                    "data/missing-parts", words=words, have=len(have), of=int(count), pattern=pattern, parts=parts
                )
    if unused := list(paths.keys() - {name for names in found.values() for name in names}):
        changes[f"not used: the files {', '.join(sorted(unused)[:8])}"] += len(unused)
    return {split: [paths[name] for name in found[split]] for split in (*SPLITS, "all") if split in found}


# Data sets of the hub and of ModelScope: plain files, read like local ones. Scripts are never run.


def _split_repository(folder: Path, words: str, changes: Counter[str]) -> dict[str, list[Path]]:
    """Data files of a repository by split: as its card says, else by the names of files and folders."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    paths = {name: paths[name] for name in sorted(paths) if is_data(name)}
    found = _by_card(card_of(folder) or {}, list(paths), words)
    if found is None:
        found = _by_name(paths) or ({"all": list(paths)} if len(paths) == 1 else {})
    return _checked(found, paths, words, changes)


def _by_card(card: dict[str, Any], names: list[str], words: str) -> dict[str, list[str]] | None:
    """As `configs` of a card says; None when it says nothing."""
    configs = card.get("configs")
    configs = [c for c in configs if isinstance(c, dict) and c.get("data_files")] if isinstance(configs, list) else []
    if not configs:
        return None
    chosen = [c for c in configs if c.get("default") or c.get("config_name") == "default"] or configs
    if len(chosen) > 1:
        several = f"the configurations {', '.join(str(c.get('config_name')) for c in chosen)}"
        raise refusal("data/several-tables", words=words, several=several)
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
    stem = re.sub(r"-\d+-of-\d+(-[0-9a-f]+)?$", "", Path(file).stem)  # without the number of a shard
    for part in (stem, *reversed(folders)):
        if part in SPLIT_OF_NAME:
            return SPLIT_OF_NAME[part]
    said = {SPLIT_OF_NAME[word] for word in re.split(r"[\W\d_]+", stem) if word in SPLIT_OF_NAME}
    return said.pop() if len(said) == 1 else None


# The data set asked for, or the first listed fallback that can be had.


def choose_data(settings: Settings) -> Table:
    """Read `dataset`; where it cannot be had, the `fallbacks` in order, each checked as it is listed.

    Raises:
        InputError: none can be had; or the first that can be had is unreadable or not the one that was listed.
    """

    def read(source: str, revision: str) -> Table:
        if source not in SAMPLES:
            names = settings.label_names if settings.task == "classification" else ()
            return read_table(source, revision, settings.label_column, names)
        if SAMPLES[source] != settings.task:
            raise refusal("data/sample-task", source=source, task=SAMPLES[source], other=settings.task)
        if settings.task == "classification" and len(settings.label_names) != 2:
            raise refusal("data/sample-names", count=len(settings.label_names))
        called_so = "sample corpus" if source == "sample" else f"corpus {source}"
        return Table(sample.CORPORA[source](), f"the embedded {called_so}, grammar version {sample.VERSION}")

    by_hand = [text for name, text in NAMES["by_hand"].items() if re.search(name, settings.dataset, re.IGNORECASE)]
    try:
        entry, table, failures = first_available("dataset", settings, read)
    except SourceError as error:
        raise SourceError(error.found, error.expected, " ".join([error.do, *by_hand]), error.why) from None
    if failures:
        _check_listed(table, entry)
    source = entry["dataset"]
    name = f"{HOTELS} ({called(source)})" if table.is_hotels else source
    stamp = (HOTELS_STAMP,) if table.is_hotels else ()
    stamp += tuple(by_hand if failures and source in SAMPLES else ())
    notes = (*fallback_note("data set", settings.dataset, name, failures), *stamp)
    return replace(table, asked=source, notes=notes)


def _check_listed(table: Table, entry: Mapping[str, Any]) -> None:
    """Refuse a fallback that is not what the parameter file lists."""
    do = "check where it comes from; correct the entry of fallbacks if these are the rows you mean."
    if "rows" in entry and table.rows != entry["rows"]:
        raise InputError(f"fallback {entry['dataset']}: {table.rows:,} rows.", f"{entry['rows']:,} rows.", do)
    if "sha256" in entry and table.sha256 != str(entry["sha256"]).lower():
        names = ", ".join(table.hashes) or "no file"
        raise InputError(f"fallback {entry['dataset']}: SHA-256 {table.sha256} ({names}).", f"{entry['sha256']}.", do)
