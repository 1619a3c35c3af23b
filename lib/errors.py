"""The one kind of error a user should ever see: found, expected, do this; and the end that SIGTERM asks for."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar


class InputError(ValueError):
    """Input the workbook cannot use, said so that the reader knows what to do next.

    Args:
        found: what is there (the path, key or value).
        expected: what would have been right.
        do: the next step, preferably a command or a setting.
    """

    def __init__(self, found: str, expected: str, do: str) -> None:
        self.found, self.expected, self.do = found, expected, do
        super().__init__(f"Found: {found} Expected: {expected} Do this: {do}")

    def __reduce__(self) -> tuple:
        return (InputError, (self.found, self.expected, self.do))


Refused = TypeVar("Refused", bound=InputError)


@functools.cache
def _refusals(room: str) -> dict[str, dict[str, str]]:
    """The table of a room of `lib`, by the name of its folder."""
    import yaml

    (path,) = (path for path in Path(__file__).parent.rglob("refusals.yaml") if path.parent.name == room)
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def refusal(place: str, kind: type[Refused] = InputError, /, **values: Any) -> Refused:  # type: ignore[assignment]
    """The error whose sentences stand under a name in `refusals.yaml` of a room; "models/no-grid" is that of models.

    "lib" is the room of the files beside this one.

    Args:
        kind: the error's class, where it is one of its own.
        values: what the sentences say in braces, as `str.format` takes it.
    """
    room, _, name = place.partition("/")
    return kind(**{part: text.format(**values) for part, text in _refusals(room)[name].items()})


@contextlib.contextmanager
def refusing(
    kinds: type[BaseException] | tuple[type[BaseException], ...], place: str, /, **values: Any
) -> Iterator[None]:
    """Say what a library raises in the words of `refusal`: {error} is the error, {said:.200} the same on one line."""
    try:
        yield
    except kinds as error:
        if isinstance(error, InputError):
            raise
        raise refusal(place, **values, error=error, said=one_line(error, 1000)) from None


def one_line(error: BaseException, most: int = 200) -> str:
    """What a library's error says, on one line and not longer than `most` characters."""
    return " ".join(str(error).split())[:most]


class Terminated(SystemExit):
    """The process was asked to end by SIGTERM: uncaught, it ends Python with exit code 143 and no traceback."""

    def __init__(self, why: str = "ended by SIGTERM") -> None:
        super().__init__(143)
        self.why = why

    def __str__(self) -> str:
        return self.why


@contextlib.contextmanager
def on_signals(handle: Callable[..., None], *numbers: signal.Signals) -> Iterator[None]:
    """Let `handle` answer these signals (in the main thread only, as Python demands)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def sigterm_raises() -> contextlib.AbstractContextManager[None]:
    """Turn SIGTERM into `Terminated`."""

    def stop(*_: object) -> None:
        raise Terminated

    return on_signals(stop, signal.SIGTERM)


EXTRAS = {
    **dict.fromkeys(("accelerate", "bitsandbytes", "peft", "torch", "torchao"), "torch"),
    "llama_cpp": "gguf",
    **dict.fromkeys(("fastapi", "segno", "sse_starlette", "starlette", "uvicorn"), "serve"),
    **dict.fromkeys(("starlette_context", "pydantic_settings"), "serve"),
    **dict.fromkeys(("compressed_tensors", "llmcompressor"), "gptq"),
    **dict.fromkeys(("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai"), "onnx"),
    **dict.fromkeys(("IPython", "jupyter_client", "matplotlib", "nbclient", "nbconvert"), "lab"),
    **dict.fromkeys(("bs4", "cycler", "nbformat", "papermill", "pygments", "traitlets"), "lab"),
    "modelscope": "modelscope",
}
"""The extra of pyproject.toml that brings a library, by the name under which it is imported."""


def missing_library(*names: str) -> InputError:
    """What to do where libraries of an extra, or a dependency of this project, are not installed."""
    extra = EXTRAS.get(names[0].partition(".")[0])
    absent = f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not installed."
    if extra is None:
        return InputError(absent, "the packages of requirements.txt.", "run make, or pip install -r requirements.txt.")
    return InputError(absent, f"the libraries of the extra {extra}.", f"run make, or pip install -e '.[{extra}]'.")


def in_words(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    first = str(error).strip().splitlines()[:1]
    return f"{type(error).__name__}: {first[0] if first else 'no message'}"


def as_input_error(error: BaseException) -> InputError | None:
    """The error, if it is for the user to mend: of the input, of a name, of what is installed; else None."""
    if isinstance(error, InputError):
        return error
    if isinstance(error, ModuleNotFoundError):
        return missing_library(error.name or str(error))
    if isinstance(error, UnicodeEncodeError):  # half a surrogate pair stands for each byte that is no UTF-8
        return refusal("lib/not-utf8", text=error.object[max(0, error.start - 80) : error.end + 80])
    return closed_to_reading(error) or other_version(error)


_DENIED = re.compile(r"PermissionError: \[Errno 13\] Permission denied: '([^'\n]+)'")


def closed_to_reading(error: BaseException | str) -> InputError | None:
    """What to do about a file or folder that is there, and that this user may not read; None for another error.

    Args:
        error: or the text of one that another process raised.
    """
    said = _DENIED.search(error) if isinstance(error, str) else None
    name = said[1] if said else error.filename if isinstance(error, PermissionError) else None
    if not isinstance(name, str):
        return None
    path = Path(name).absolute()
    while not os.path.lexists(path) and path.parent != path:  # a file inside a closed folder cannot be seen
        path = path.parent
    if os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        return None
    return refusal("lib/closed", path=path)


def other_version(error: BaseException) -> InputError | None:
    """What to do where an installed library lacks what its locked version has; None for another error."""
    module = getattr(error, "obj", None) if isinstance(error, AttributeError) else None
    name = getattr(module, "__name__", None) if isinstance(module, ModuleType) else None
    if type(error) is ImportError:
        name = error.name
    if not name or name.partition(".")[0] == "lib":
        return None
    do = "run make, or pip install -r requirements.txt."
    return InputError(f"another version of {name} ({one_line(error)}).", "that of requirements.txt.", do)
