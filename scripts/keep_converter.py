"""python scripts/keep_converter.py SOURCES.tar.gz FOLDER: llama.cpp's converter out of llama-cpp-python's sources.

Only the standard library: the set-up calls it before anything else is installed.
"""

from __future__ import annotations

import shutil
import sys
import tarfile
from pathlib import Path

WANTED = ("LICENSE", "convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion", "gguf-py")


def keep(sources: Path, folder: Path) -> None:
    """Unpack what converting needs; the folder is there whole, or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with tarfile.open(sources) as archive:
        members = []
        for member in archive:
            inside = member.name.partition("/vendor/llama.cpp/")[2]
            if inside and inside.split("/")[0] in WANTED:
                member.name = inside
                members.append(member)
        archive.extractall(partial, members, filter="data")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


if __name__ == "__main__":
    keep(Path(sys.argv[1]), Path(sys.argv[2]))
