"""What real phones measured of the compared files: results that `workbook serve --phone` took in, or that were sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.run import Run
from lib.run.devices import FOLDER, read_result
from lib.run.files import sha256_file


def measured(run: Run, files: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The results in the run's folder devices/.

    Args:
        files: entries of the run's comparison.

    Returns:
        Results with "type", that of the entry whose file has the result's SHA-256, oldest first; a sentence for each
        result that is left out.
    """
    names: dict[str, str] = {}
    for product in ("gguf", "quantized"):
        outputs = run.require(product).entry.outputs
        names |= {output["sha256"]: name for name, output in outputs.items() if name.endswith(".gguf")}
    types = {entry.get("file"): entry["type"] for entry in files}
    names = {digest: name for digest, name in names.items() if name in types}
    found, left_out = [], []
    for path in sorted((run.folder / FOLDER).glob("*.json")):
        try:
            result = match(path, names)
        except InputError as error:
            left_out.append(f"{path.name} is left out. {error}")
        else:
            found.append({**result, "type": types[result["compared"]]})
    return found, left_out


def match(path: Path, names: Mapping[str, str]) -> dict[str, Any]:
    """A phone's result with "compared", the name of the file that it is about.

    Args:
        names: {SHA-256: name} of the compared files.

    Raises:
        InputError: no result, or one about another file.
    """
    result = read_result(path)
    if result["sha256"] not in names:
        raise InputError(
            f"{path.name} is about a file with SHA-256 {result['sha256'][:12]}…, which is not compared here.",
            f"one about {', '.join(sorted(names.values()))}.",
            "measure again with a package of one of these files.",
        )
    return {**result, "compared": names[result["sha256"]]}


def match_files(results: Sequence[Path], compared: Iterable[Path]) -> list[dict[str, Any]]:
    """The same for files named by hand.

    Raises:
        InputError: as `match`.
    """
    names = {sha256_file(path): path.name for path in compared if path.is_file()} if results else {}
    return [match(path, names) for path in results]
