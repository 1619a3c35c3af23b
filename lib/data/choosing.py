"""The rows that a run takes: of the data set asked for, or of the first listed fallback that can be had."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lib.data import sample
from lib.data.reading import Table, read_table
from lib.errors import InputError
from lib.models.hub import SourceError
from lib.models.resolving import called, fallback_note, none_left
from lib.settings import SAMPLE_DATASET, Settings


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
            table = _read(source, str(entry.get("revision", "main")), settings)
        except SourceError as error:
            failures.append(error)
            continue
        if failures:
            _check(table, entry)
        name = f"{table.known.name} ({called(source)})" if table.known else source
        stamp = (table.known.stamp,) if table.known else ()
        return ChosenData(source, table, (*fallback_note("data set", settings.dataset, name, failures), *stamp))
    raise none_left(failures, [str(entry["dataset"]) for entry in listed])


def _read(source: str, revision: str, settings: Settings) -> Table:
    if source != SAMPLE_DATASET:
        return read_table(source, revision)
    if len(settings.label_names) != 2:
        raise InputError(
            f"label_names with {len(settings.label_names)} names for the sample corpus.",
            "two: negative, positive.",
            "give two names, or set dataset to your own data.",
        )
    words = f"the embedded sample corpus, grammar version {sample.VERSION}"
    return Table(sample.sample_tables(), words, Counter(), given=True)


def _check(table: Table, entry: Mapping[str, Any]) -> None:
    """Refuse a fallback that is not what the parameter file lists."""
    do = "check where it comes from; correct the entry of fallbacks if these are the rows you mean."
    if "rows" in entry and table.rows != entry["rows"]:
        raise InputError(f"fallback {entry['dataset']}: {table.rows:,} rows.", f"{entry['rows']:,} rows.", do)
    if "sha256" in entry and table.sha256 != str(entry["sha256"]).lower():
        names = ", ".join(table.hashes) or "no file"
        raise InputError(f"fallback {entry['dataset']}: SHA-256 {table.sha256} ({names}).", f"{entry['sha256']}.", do)
