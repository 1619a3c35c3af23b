"""What is refused before any work: an output path that would destroy the source or cannot be written."""

from __future__ import annotations

from pathlib import Path

from lib.errors import InputError
from lib.run.folders import writable


def check_output(source: Path, output: Path) -> None:
    """Refuse an output that is the source itself (llama.cpp would destroy it) or cannot be written.

    Raises:
        InputError: same file by path, symbolic or hard link; a folder; an unwritable place.
    """
    if output.is_dir():
        raise InputError(f"{output} is a folder.", "the path of the new file.", f"write {output}/NAME-TYPE.gguf.")
    if output.is_symlink():
        raise InputError(f"{output} is a symbolic link.", "a plain path.", "remove the link, or choose another name.")
    if output.resolve() == source.resolve() or (output.exists() and output.samefile(source)):
        raise InputError(
            f"{output} is the source file itself.",
            "another file: quantizing reads while it writes.",
            "change OUT.gguf.",
        )
    if not output.name.endswith(".gguf"):
        raise InputError(f"the output name {output.name!r}.", "a name that ends with .gguf.", "add .gguf to it.")
    writable(output.parent)
