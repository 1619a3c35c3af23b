"""What an export is asked for: names of formats, and the folder of each checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lib.errors import InputError, refusal
from lib.runs.files import data_file

FOLDERS = {name: "int4" if name == "nf4" else name for name in data_file("stages/export/formats.yaml")}
"""Format of transformers → its folder."""
_RECIPES = tuple(data_file("stages/quantize/recipes.yaml")["file_types"])
MERGED, GGUF, REPORT = "merged_model", "gguf", "export_report.json"


def read_formats(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Formats of transformers and recipes of llama.cpp from "fp16,int4,gguf:Q4_K_M", each once.

    Raises:
        InputError: an unknown name.
    """
    known = {folder: name for name, folder in FOLDERS.items()} | {name: name for name in FOLDERS}
    formats: dict[str, None] = {}
    recipes: dict[str, None] = {}
    for name in filter(None, (part.strip() for part in text.split(","))):
        kind, colon, recipe = name.partition(":")
        if kind.lower() == GGUF and colon:
            if recipe.upper() not in _RECIPES:
                raise refusal("pipeline/unknown-recipe", recipe=recipe, known=", ".join(_RECIPES))
            recipes[recipe.upper()] = None
        elif name.lower() in known:
            formats[known[name.lower()]] = None
        else:
            raise refusal("pipeline/unknown-format", name=name, known=", ".join(FOLDERS.values()))
    if not formats and not recipes:
        raise InputError("--formats without a name.", "e.g. fp16,int8,int4.", "name at least one format.")
    return tuple(formats), tuple(recipes)


def title_of(checkpoint: str) -> str:
    """A name for files: the last part of the checkpoint's."""
    return Path(checkpoint).name or "model"


def folders_for(checkpoints: Sequence[str], output: Path) -> list[Path]:
    """The folder of each checkpoint: the output itself for a single one, else a folder in it, named like the checkpoint
    (and, where two are called alike, like the folder that it lies in).

    Raises:
        InputError: a checkpoint named twice.
    """
    if len(checkpoints) == 1:
        return [output]
    paths = [Path(checkpoint) for checkpoint in checkpoints]
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [f"{path.absolute().parent.name}-{path.name}" for path in paths]
    if len(set(names)) < len(names):
        raise refusal("pipeline/same-names", names=", ".join(map(str, paths)))
    return [output / name for name in names]
