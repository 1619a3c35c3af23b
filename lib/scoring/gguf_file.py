"""First look at a GGUF file, before native code opens it."""

from __future__ import annotations

from pathlib import Path

from lib.errors import InputError

MAGIC = b"GGUF"
_SMALLEST = 24  # magic, version, number of tensors, number of metadata entries


def check_gguf(path: Path | str) -> Path:
    """The path, if the file exists and starts as a GGUF file does.

    Raises:
        InputError: says what the file is instead: missing, a folder, empty, unfinished (zeros), a Git LFS pointer, an
            HTML page, a pickle, a safetensors file.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder.", "a .gguf file.", "name the file inside it.")
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.gguf"))[:3] if path.parent.is_dir() else []
        do = f"use one of those in the folder: {', '.join(near)}." if near else "check the path."
        raise InputError(f"no file {path}.", "a .gguf file.", do)
    with path.open("rb") as stream:
        head = stream.read(512)
    if head[:4] == MAGIC and len(head) >= _SMALLEST:
        return path
    raise InputError(f"{path} {_describe(head)}.", "a file that starts with GGUF.", _cure(head))


def _describe(head: bytes) -> str:
    if not head:
        return "is empty"
    if not head.strip(b"\0"):
        return "starts with zeros, as a file does whose writing was interrupted"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself"
    if head.lstrip()[:1] == b"<":
        return "is an HTML or XML page, not a model"
    if head[:2] == b"PK":
        return "is a ZIP archive or a PyTorch pickle"
    if head[8:9] == b"{":
        return "looks like a safetensors file"
    if head[:4] == MAGIC:
        return "is cut off inside its header"
    return f"starts with {head[:8]!r}"


def _cure(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return "run `git lfs pull` in that folder."
    if head.lstrip()[:1] == b"<":
        return "download the file again: the server sent a page."
    if head[8:9] == b"{":
        return "convert the model first: workbook convert MODEL_DIR OUT.gguf."
    return "make or download the file again."
