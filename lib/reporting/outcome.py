"""Whether an executed notebook really ran to its end; papermill's own cell states are not believed.

When a kernel dies, papermill 2.7 marks every cell as completed, also those that never ran; when a cell calls
``sys.exit(0)``, it stops there and reports success. So every code cell must carry an execution number.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.reporting import execute
from lib.reporting.process import Ended

_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_CHATTER = re.compile(r"^(\[IPKernelApp\] WARNING|Unable to parse line|Kernel died while waiting|kernel exit code:|$)")
_REFUSED = re.compile(r"Found: .+ Expected: .+ Do this: ", re.DOTALL)  # InputError and its kinds, by their text
_ADDED = {"papermill-error-cell-tag", "injected-parameters"}


@dataclass(frozen=True)
class Failure:
    """Why a notebook failed.

    Attributes:
        sentence: for the reader, without a traceback.
        exit_code: 2 when the input was refused, 143 when the kernel was ended by SIGTERM, 1 otherwise.
        detail: the last lines of the traceback or of the process's messages; empty for refused input.
    """

    sentence: str
    exit_code: int
    detail: str = ""


def _plain(text: str) -> str:
    return _COLOURS.sub("", text)


def _code_cells(notebook: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Code cells with something in them, numbered as in the source notebook (cells that papermill added left out)."""
    cells = [c for c in notebook["cells"] if not _ADDED & set(c.get("metadata", {}).get("tags", []))]
    return [(i, c) for i, c in enumerate(cells, 1) if c["cell_type"] == "code" and c["source"].strip()]


def _error_of(cell: dict[str, Any]) -> dict[str, Any] | None:
    return next((o for o in cell.get("outputs", []) if o["output_type"] == "error"), None)


def _raised(number: int, error: dict[str, Any]) -> Failure:
    name, value = error["ename"], _plain(error["evalue"])
    if _REFUSED.match(value):
        return Failure(value, 2)
    if name == "Terminated":
        return Failure(f"ended in cell {number}: {value}.", execute.TERMINATED)
    if name == "SystemExit":
        return Failure(f"cell {number} called sys.exit({value}) and stopped the notebook.", 1)
    if name == "KeyboardInterrupt":
        return Failure(f"interrupted in cell {number}.", 1)
    detail = _plain("\n".join(error.get("traceback", []))).splitlines()[-15:]
    first = value.splitlines()[0] if value.strip() else ""
    return Failure(f"cell {number} raised {name}: {first}", 1, "\n".join(detail))


def _death(log: str) -> str:
    """How a kernel ended, in words."""
    codes = re.findall(rf"{re.escape(execute.KERNEL_EXIT)} (-?\d+)", log)
    code = int(codes[-1]) if codes else -signal.SIGKILL
    if code >= 0:
        return f"it ended itself with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    if code == -signal.SIGKILL:
        return f"{name}: probably out of memory"
    if name in ("SIGTERM", "SIGINT", "SIGHUP"):
        return f"{name}: somebody ended it"
    return f"{name}: a native library crashed"


def judge(executed: Path, ended: Ended, timeout: float) -> Failure | None:
    """None when the notebook ran to its end, else why not."""
    import nbformat

    last_words = "\n".join(line for line in _plain(ended.log).splitlines() if not _CHATTER.match(line))[-2000:]
    if not executed.is_file():
        why = f"ran longer than {timeout:.0f} s" if ended.timed_out else "ended before its first cell"
        return Failure(f"the notebook {why}.", 1, last_words)
    try:
        cells = _code_cells(nbformat.read(executed, as_version=4))
    except (nbformat.reader.NotJSONError, nbformat.ValidationError):
        return Failure("the executed notebook is damaged: its process was killed while it saved.", 1, last_words)
    reached = [n for n, c in cells if c.get("metadata", {}).get("papermill", {}).get("start_time")]
    where = f"cell {reached[-1]}" if reached else "its first cell"
    if ended.timed_out:
        return Failure(f"the notebook ran longer than {timeout:.0f} s and was stopped in {where}.", 1)
    if ended.exit_code == execute.TERMINATED:
        return Failure(f"ended by SIGTERM in {where}; finished products are kept.", execute.TERMINATED)
    for number, cell in cells:
        if error := _error_of(cell):
            return _raised(number, error)
    if ended.exit_code == execute.DIED:
        return Failure(f"the kernel died ({_death(ended.log)}) in {where}.", 1, last_words)
    if ended.exit_code != execute.OK:
        return Failure(f"the process that ran the notebook ended with code {ended.exit_code}.", 1, last_words)
    never = [number for number, cell in cells if cell.get("execution_count") is None]
    if never:
        return Failure(f"cell {never[0]} never ran.", 1, last_words)
    return None
