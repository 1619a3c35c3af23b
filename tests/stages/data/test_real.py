"""ChnSentiCorp itself, where it lies beside the project: the counts that are known of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.stages.data.baseline import linear_floor
from lib.stages.data.cleaning import clean_split
from lib.stages.data.near_duplicates import audit, drop_copies, shares_of, split_by_cluster
from lib.stages.data.reading import read_table

NAMES = ["负面", "正面"]


@pytest.fixture(scope="module")
def splits(shared_data: Path, tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBOOK_HOME", str(tmp_path_factory.mktemp("home")))
        table = read_table(str(shared_data / "chnsenticorp"))
        assert not table.changes and "test" in table.splits
        return {name: clean_split(split, name, "", "", NAMES)[0] for name, split in table.splits.items()}


@pytest.fixture(scope="module")
def found(splits):
    return audit(splits)


# The numbers of the data's PROVENANCE.md (counted there independently).
def test_rows_copies_and_conflicts(splits, found):
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 9600, "validation": 1200, "test": 1200}
    train = found["duplicates"][0]
    assert train["surplus verbatim copies"] == 1351
    assert train["texts with conflicting labels"] == 24
    assert train["texts with conflicting labels after normalisation"] == 25
    assert found["duplicates"][-1]["texts with conflicting labels after normalisation"] == 37
    assert found["duplicates"][-1]["rows"] - found["duplicates"][-1]["surplus copies after normalisation"] == 9881


def test_leaks(splits, found):
    validation, test, between = found["overlaps"]
    assert (test["verbatim"], test["after normalisation"], test["or near-duplicate"]) == (331, 335, 337)
    assert (validation["verbatim"], between["verbatim"]) == (338, 40)
    assert sum(row.leaked for row in splits["test"]) == 337


def test_linear_floor(splits, found):
    floor = linear_floor(splits, NAMES, seed=42)["test"]
    assert floor["all"]["accuracy"] == pytest.approx(0.93, abs=0.01)
    assert floor["leak_free"]["accuracy"] == pytest.approx(0.91, abs=0.01)
    assert floor["leak_free"]["n"] == 1200 - 337


def test_hotel_reviews_quoted_csv(shared_data: Path, home: Path):
    table = read_table(str(shared_data / "chnsenticorp_htl_all"))
    assert len(table.splits["all"]) == 7766
    rows, counts = clean_split(table.splits["all"], "all", "", "", NAMES)
    assert counts == {"dropped: empty text": 1}
    assert [sum(row.label == label for row in rows) for label in (0, 1)] in ([2444, 5321], [2443, 5322])
    audit({"all": rows})
    kept, _ = drop_copies(rows)
    parts = split_by_cluster(kept, 42, shares_of(0.1))
    assert [len(part) for part in parts.values()] == [6212, 776, 776]
