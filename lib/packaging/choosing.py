"""Which file goes into the package, and what the evidence says of that choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.run import Run
from lib.statistics import in_words, retention_warning

RECOMMENDED, AGAINST, WITHOUT = "recommended", "against the recommendation", "without sufficient evidence"


@dataclass(frozen=True)
class Choice:
    """The chosen file.

    Attributes:
        type: quantization type.
        source: the file.
        standing: RECOMMENDED, AGAINST or WITHOUT.
        words: the same in sentences, for card and report.
        entry, reference: of comparison.json.
    """

    type: str
    source: Path
    standing: str
    words: str
    entry: Mapping[str, Any]
    reference: Mapping[str, Any]


def choose(run: Run, comparison: Mapping[str, Any], wanted: str | None) -> Choice:
    """The file that the comparison recommends, or the one that the user asks for.

    Args:
        comparison: content of comparison.json.
        wanted: a type of the comparison; None = the recommended one.

    Raises:
        InputError: nothing is recommended and nothing was asked for; a type that was not compared.
    """
    advice = comparison["recommendation"]
    entries = {e["type"]: e for e in comparison["files"] if str(e.get("file", "")).endswith(".gguf")}
    if wanted is None and advice["type"] is None:
        raise InputError(
            f"the comparison of run {run.name!r} recommends no file ({advice['text']})",
            "a recommended file, or your own decision.",
            f"decide yourself with --type, one of {', '.join(entries)}; the model card will say so.",
        )
    known = {name.lower(): name for name in entries}
    chosen = known.get((wanted or advice["type"]).lower())
    if chosen is None:
        raise InputError(f"--type {wanted!r}.", f"a compared GGUF file: {', '.join(entries)}.", "name one of them.")
    entry = entries[chosen]
    standing, words = _standing(chosen, entry, advice)
    reference = entries[comparison["reference"]]
    return Choice(chosen, _source(run, entry["file"]), standing, words, entry, reference)


def _standing(chosen: str, entry: Mapping[str, Any], advice: Mapping[str, Any]) -> tuple[str, str]:
    if chosen == advice["type"]:
        return RECOMMENDED, advice["text"]
    own, warning = f"The verdict on this file: {in_words(entry)}.", retention_warning(entry)
    if warning not in advice["text"]:  # where no file is recommended, the text warns of every one already
        own += f" {warning}"
    if advice["type"] is None:
        return WITHOUT, f"{chosen} was chosen by the user; the evidence recommends no file. {own} {advice['text']}"
    text = f"{chosen} was chosen by the user against the recommendation, which is {advice['type']}. {own}"
    return AGAINST, f"{text} {advice['text']}"


def _source(run: Run, name: str) -> Path:
    for product in ("quantized", "gguf"):
        path = run.require(product).path / name
        if path.is_file():
            return path
    raise InputError(
        f"{name} is in neither quantized/ nor gguf/ of run {run.name!r}.",
        "the files that were compared.",
        "run notebooks/07_compare_quantized.ipynb again.",
    )
