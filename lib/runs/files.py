"""Where a run lives, and files that are complete or absent: hashing, atomic writing, durable renaming, room on disk."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import Timeout

from lib.errors import InputError, refusal, refusing
from lib.runs.locks import folder_alone, lock_file

HOME_VARIABLE = "WORKBOOK_HOME"
"""Environment variable: the folder that holds runs/ and reports/ (default: the project's root)."""

PROJECT = Path(__file__).resolve().parents[2]


def home() -> Path:
    """The folder that holds runs/ and reports/; never the current directory."""
    return _resolved(os.environ.get(HOME_VARIABLE) or str(PROJECT))


def runs_folder() -> Path:
    """The folder of all runs."""
    return home() / "runs"


def reports_folder() -> Path:
    """The folder of all reports."""
    return home() / "reports"


def user_path(text: str) -> Path:
    """A path the user wrote: absolute, or found from the current directory, or from the project's root."""
    path = _resolved(text)
    return path if path.exists() else _resolved(text, PROJECT)


def _resolved(text: str, folder: Path = Path()) -> Path:
    """The absolute path of what was written, from the current directory or another folder.

    Raises:
        InputError: ~somebody, of whom this machine has not heard, links in a circle, a NUL, or longer than any name.
    """
    with refusing((RuntimeError, ValueError, OSError), "runs/no-path", text=repr(str(text)[:200])):
        refuse_device(text)
        path = (folder / Path(text).expanduser()).resolve()
        path.exists()
        return path


def refuse_device(text: str | Path) -> None:
    """Refuse a path to what may have no end, or wait for ever, and would be replaced by an output.

    Raises:
        InputError: a device, a socket or a pipe; links in a circle.
    """
    try:
        mode = Path(text).expanduser().stat().st_mode
    except (OSError, ValueError, RuntimeError) as error:  # nothing there, or a text that is no path
        if getattr(error, "errno", None) == errno.ELOOP:
            raise refusal("runs/no-path", text=text) from None
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise refusal("runs/device", text=text)


def writable(folder: Path) -> Path:
    """Create `folder` and prove that it can be written, or say why not."""
    probe = folder / f".writable-{os.getpid()}"
    with refusing(OSError, "runs/not-writable", folder=folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    return folder


CHUNK = 1 << 22

FSYNC_VARIABLE = "WORKBOOK_FSYNC"
"""Environment variable: 0 = leave flushing to the caller. For benchmarks, which flush both sides alike and time it."""


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a value's canonical JSON (sorted keys, UTF-8)."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def flush_to_disk(path: Path) -> None:
    """fsync a file or a folder, so that a rename after it survives a power cut."""
    if os.environ.get(FSYNC_VARIABLE) == "0":
        return
    if os.name == "nt":  # flushes files that are open for writing, and no folders
        if path.is_dir():
            return
        descriptor = os.open(path, os.O_RDWR)
    else:
        descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_at(descriptor: int, data: Any, offset: int) -> None:
    """Write all of a buffer (bytes, or an array of bytes) at `offset` of an open file; threads may share the file."""
    view = memoryview(data)
    while len(view):
        written = _write_some(descriptor, view, offset)
        view, offset = view[written:], offset + written


_PLACE = threading.Lock()
"""Held by the one thread that moves the place of a file, where there is no pwrite (Windows)."""


def _write_some(descriptor: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, view, offset)
    with _PLACE:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, view[: 1 << 30])


def readable_by_group(path: Path) -> None:
    """Give a file the mode the umask would give it (safetensors writes 0600 whatever the umask)."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(stat.S_IMODE(0o666 & ~mask))


def settle(folder: Path) -> None:
    """Give every file under `folder` its mode and flush it to the disk, before the folder is renamed."""
    for path in folder.rglob("*"):
        if path.is_file():
            readable_by_group(path)
            flush_to_disk(path)


@contextlib.contextmanager
def atomic_path(final: Path, alone: bool = False) -> Iterator[Path]:
    """A path of this process's own to write to; renamed to `final` when the block succeeds, removed when it does not.

    Args:
        alone: refuse while another process writes `final`, as long work should. Of short writes the last one wins.

    Raises:
        InputError: `alone`, and another process is writing.
    """
    with _beside(final, alone) as temporary:
        yield temporary
        flush_to_disk(temporary)
        readable_by_group(temporary)
        temporary.replace(final)
        flush_to_disk(final.parent)


@contextlib.contextmanager
def _beside(output: Path, alone: bool) -> Iterator[Path]:
    """A path of the same name in a hidden folder of this process's own beside `output`, gone at the end.

    What a process left that was killed is removed: nobody holds its lock any more.
    """
    if output.exists() and not output.is_file() and not output.is_dir():  # root would replace /dev/null by a file
        raise InputError(f"{output} is no file.", "a file that can be replaced.", "choose another name.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        with folder_alone(output.parent):
            if not _remove_abandoned(output.parent, re.escape(_stem(output.name)), alone) and alone:
                raise refusal("runs/two-writers", output=output)
            home = Path(tempfile.mkdtemp(prefix=f".{_stem(output.name)}.", suffix=".part", dir=output.parent))
            held.callback(shutil.rmtree, home, ignore_errors=True)
            held.enter_context(lock_file(home / ".lock"))
        yield home / output.name  # a converter names the model after its file or folder


def _stem(name: str) -> str:
    """The name of an output, or what stands for one that leaves no room in a name of 255 bytes."""
    return name if len(os.fsencode(name)) <= 240 else f"{name[:40]}-{sha256_json(name)[:16]}"


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left of any output in a folder."""
    with folder_alone(folder):
        _remove_abandoned(folder, ".+")


def _remove_abandoned(folder: Path, pattern: str, alone: bool = False) -> bool:
    """Remove what killed processes left of outputs so called; False when a process is writing one now.

    Raises:
        InputError: `alone`, and a process of another machine is writing one, or left it.
    """
    free, called = True, re.compile(rf"\.{pattern}\.[^.]+\.part", re.S)
    for home in (home for home in folder.iterdir() if called.fullmatch(home.name)):
        try:
            with lock_file(home / ".lock", wait=False):
                shutil.rmtree(home, ignore_errors=True)
        except (Timeout, InputError) as error:
            if alone and isinstance(error, InputError):
                raise
            free = False
        except OSError:  # removed by its own process a moment ago
            continue
    return free


NO_SPACE = (
    *("No space left on device", "Disk quota exceeded", "File too large", "Read-only file system"),
    *("unexpected pos", "PytorchStreamWriter failed", "iostream error"),
)
"""How the system, safetensors (which wraps its words), torch's writer of zip files and llama.cpp call a full disk."""


def disk_error(error: BaseException | str, folder: Path | None = None) -> InputError | None:
    """What to do about an error, or its text, when it says that the disk (of `folder`) takes nothing; else None."""
    said = next((words for words in NO_SPACE if words in str(error)), None)
    place = getattr(error, "filename", None) or folder
    found = f"the disk{f' of {place}' if place else ''} is full or takes no writing ({said})."
    if said is None:
        if not isinstance(error, PermissionError):
            return None
        found = f"{place or 'a file'} is not open to this user ({error.strerror})."
    do = f"free some space, correct permissions, or set {HOME_VARIABLE}; then run it again: what is finished is kept."
    return InputError(found, "a disk and a folder that take the output.", do)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Recognize that the disk of `folder` is full, whichever library notices it.

    Raises:
        InputError: it is full, or does not belong to this user.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or not (refused := disk_error(error, folder)):
            raise
        raise refused from None


def require_new(folder: Path) -> None:
    """Refuse an output folder that is there already and not empty, or is a file.

    Raises:
        InputError: it is.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} already exists.", "a new or empty folder.", "remove it or choose another name.")


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A new folder of the same name elsewhere; it becomes `output` when the block succeeds.

    Raises:
        InputError: the disk refuses what is written there, or another process is writing it.
    """
    with refusing(OSError, "runs/no-output", output=output), _beside(output, alone=True) as folder:
        folder.mkdir()
        yield folder
        settle(folder)
        if output.is_dir():
            output.rmdir()
        folder.rename(output)
        flush_to_disk(output.parent)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Give `target` the content of `source`: by a hard link, or by a copy where the disk has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON as every reader takes it: null stands for numbers that JSON does not have (infinity, not a number)."""
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    except ValueError:
        from pydantic_core import to_jsonable_python

        finite = to_jsonable_python(value, inf_nan_mode="null")
        return json.dumps(finite, ensure_ascii=False, indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write JSON (`json_text`, UTF-8, indented, keys in the given order) atomically."""
    write_text(path, json_text(value, indent=1) + "\n")


class KeyTwiceError(ValueError):
    """JSON that names a key of an object twice."""


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object (`object_pairs_hook`); of a key that stands there twice the last value would win silently."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise KeyTwiceError(f"the key {name[:80]!r} twice in one object")
        found[name] = value
    return found


def read_json(path: Path) -> Any:
    """Read JSON; a damaged file raises an InputError that names it."""
    odd = (ValueError, RecursionError)  # also numbers of thousands of digits, brackets in brackets
    with refusing(odd, "runs/damaged-json", path=path):
        return json.loads(path.read_text(encoding="utf-8"))


def object_or_empty(path: Path) -> dict[str, Any]:
    """A JSON object; empty when it is absent or damaged, where that is said or mended elsewhere."""
    try:
        value = read_json(path)
    except (OSError, InputError):
        return {}
    return value if isinstance(value, dict) else {}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object (`json_text`) a line, atomically."""
    write_text(path, "".join(json_text(row) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object a line."""
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream if line.strip()]


def free_space(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free


@functools.cache
def data_file(name: str) -> Any:
    """What a YAML file of this library holds; `name`: below lib."""
    import yaml

    return yaml.safe_load((PROJECT / "lib" / name).read_text(encoding="utf-8"))


def require_space(folder: Path, need: int, what: str, variable: str = HOME_VARIABLE) -> None:
    """Refuse before the work when the disk of `folder` has less than `need` bytes (and 64 MiB) free.

    Args:
        variable: environment variable that moves the folder to another disk.
    """
    free = free_space(folder)
    if free < need + (64 << 20):
        raise refusal("runs/no-space", free=free / 1e6, folder=folder, need=need / 1e6, what=what, variable=variable)


def utf8(path: Path, raw: bytes) -> str:
    """The text of a user's file, a byte-order mark kept; other encodings are refused: a guess could change the rows.

    Raises:
        InputError: not UTF-8; with the line, and whether GB18030 would read it.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        try:
            raw.decode("gb18030")
            guess = " (it would be readable as GB18030)"
        except UnicodeDecodeError:
            guess = ""
        raise refusal("runs/not-utf8", path=path, line=line, error=error, guess=guess) from None


# SHA-256 of large files, computed once for each state of a file.
#
# A base model of several gigabytes is named by its hash in four notebooks. It is remembered in runs/_cache/sha256/
# under all that changes when a file is written, replaced or set back: its size, inode, and the times of its last
# change and of its last change of status. A file that was written a moment ago is not remembered: a second change
# within one tick of the file system's clock would look like none.

SETTLED = 2.0
"""Seconds since the last change after which a file's times are trusted (FAT's clock ticks that slowly)."""


def remembered_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes; the file is not read when this state of it was hashed before.

    Raises:
        OSError: the file cannot be read.
    """
    place = path.resolve()
    state = _file_state(place)
    memory = runs_folder() / "_cache" / "sha256" / sha256_json(state)
    with contextlib.suppress(OSError, ValueError):
        bytes.fromhex(known := memory.read_text())
        if len(known) == 64:
            return known
    digest = sha256_file(place)
    if _file_state(place) == state and time.time_ns() - place.stat().st_mtime_ns > SETTLED * 1e9:
        with contextlib.suppress(OSError):  # a hash that is not remembered is only computed again
            write_text(memory, digest)
    return digest


def _file_state(path: Path) -> list[Any]:
    found: os.stat_result = path.stat()
    return [str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
