"""Large files that the package shares with other products: hard links, or copies where the disk has none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from lib.errors import InputError
from lib.run import Run
from lib.run.files import read_json

FORMATS = ("merged_model", "fp16", "int8", "int4", "gguf")
"""Folders of the export tree."""

_EXPORTS = {"fp16": ("fp16",), "int8": ("int8",), "int4": ("nf4", "gptq")}
"""Formats of the product `exports` that may fill a folder, the first that was made."""


def link(source: str | Path, target: str | Path) -> None:
    """`target` with the content of `source`: the same bytes on the disk where that is possible."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def read_formats(text: str) -> list[str]:
    """Names from "fp16,int8", each once, in the order of the tree.

    Raises:
        InputError: an unknown name.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in FORMATS]:
        raise InputError(f"--formats {', '.join(unknown)}.", f"some of {', '.join(FORMATS)}.", "correct the names.")
    return [name for name in FORMATS if name in names]


def inputs_of(formats: Sequence[str]) -> list[str]:
    """The products that the folders come from, beside those that every package needs."""
    return [*(["merged"] if "merged_model" in formats else []), *(["exports"] if {*formats} & {*_EXPORTS} else [])]


def link_tree(run: Run, formats: Sequence[str], folder: Path) -> dict[str, str]:
    """Make the asked folders under `folder`.

    Returns:
        {folder: what it holds}.

    Raises:
        InputError: a product or a format that the run does not have.
    """
    made = {}
    for name in formats:
        if name == "gguf":
            (folder / name).mkdir()
            for product in ("gguf", "quantized"):
                for path in sorted(run.require(product).path.glob("*.gguf")):
                    link(path, folder / name / path.name)
            made[name] = "every GGUF file of the run"
            continue
        source, made[name] = _source(run, name)
        shutil.copytree(source, folder / name, copy_function=link)
    return made


def _source(run: Run, name: str) -> tuple[Path, str]:
    if name == "merged_model":
        return run.require("merged").path, "the merged model, 16 bits or as the base"
    exports = run.require("exports").path
    records = {record["format"]: record for record in read_json(exports / "exports.json")["made"]}
    for kind in _EXPORTS[name]:
        if kind in records:
            return exports / records[kind]["folder"], f"{kind}: {records[kind]['title']}"
    raise InputError(
        f"run {run.name!r} holds the exports {', '.join(records) or 'of no format'}.",
        f"{' or '.join(_EXPORTS[name])} for the folder {name}/.",
        f"add {_EXPORTS[name][0]} to export_formats and run notebooks/06_quantize.ipynb, or leave {name} out.",
    )
