"""In the environment .venv-mnn: a model folder written for MNN by its own exporter, without network."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from lib.runs.child import own_folder
from lib.runs.confinement import confine

BITS, BLOCK = 4, 64
_ROOM, _SECONDS = 32 << 30, 24 * 3600
_NOT_NEEDED = ("llm.mnn.json", "export_args.json")
"""The graph as text, which only adapters of MNN's own are put on, and the arguments with this machine's paths."""


def convert(argument: dict[str, Any]) -> dict[str, Any]:
    """Write a model folder's weights for MNN: rounded in blocks of 64, a scale and a zero point each, searched (HQQ).

    Args:
        argument: "source" (model folder) and "output" (folder to fill).

    Returns:
        "group_size".

    Raises:
        RuntimeError: the exporter failed; its last line says of what.
    """
    source, output, work = Path(argument["source"]), Path(argument["output"]), own_folder()
    exporter = Path(importlib.util.find_spec("llmexport").origin).parent  # type: ignore[union-attr, arg-type]
    import onnx  # noqa: F401 - imported before the network goes: their imports start programs
    import transformers  # noqa: F401

    _replace_logging()
    os.chdir(work)  # the exporter writes a log where it stands, and takes names such as "gte" in a path for a family
    Path("source").symlink_to(source.resolve())
    confined = confine([output, work], 4 * _size(source) + _ROOM, _SECONDS, but=("ctypes.",))
    tempfile.tempdir = str(work)
    sys.path.insert(0, str(exporter))
    options = {"path": "source", "export": "mnn", "dst_path": output.resolve(), "quant_bit": BITS, "quant_block": BLOCK}
    sys.argv = ["llmexport", "--hqq", *(str(part) for key in options for part in (f"--{key}", options[key]))]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            importlib.import_module("llmexport").main()  # the file: the package does not find its own parts
    except SystemExit as end:
        if end.code:
            raise RuntimeError(said.getvalue().strip().splitlines()[-1][:300]) from end
    for name in _NOT_NEEDED:
        (output / name).unlink(missing_ok=True)
    return {"group_size": BLOCK, "confined": confined}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _replace_logging() -> None:
    """MNN.tools would install a package while it is imported, to tell a log service what is converted and where."""
    for name in ("aliyun", "aliyun.log", "aliyun.log.logitem"):
        sys.modules[name] = ModuleType(name)
    for name in ("LogClient", "PutLogsRequest", "logitem"):
        setattr(sys.modules["aliyun.log"], name, None)
    sys.modules["aliyun.log.logitem"].LogItem = None  # type: ignore[attr-defined]
