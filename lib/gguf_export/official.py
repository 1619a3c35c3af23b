"""Converting with the official script of a llama.cpp checkout: for models that this converter does not know."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.gguf_export.converting import OUTTYPES, check_output, load_check
from lib.models.gguf_file import read_metadata, read_tensors
from lib.models.weights import open_weights
from lib.progress import Progress
from lib.run.files import atomic_path, require_space

SCRIPT = "convert_hf_to_gguf.py"


def convert_officially(model_dir: Path, output: Path, outtype: str, checkout: Path) -> dict[str, Any]:
    """Run `convert_hf_to_gguf.py` of `checkout` with this Python and publish its file once llama.cpp has opened it.

    The script's own code is run (it is not reviewed here); code inside the model folder is not.

    Raises:
        InputError: no script there, weights that are not safetensors, or the script or llama.cpp fails; nothing is left
            at `output` then.
    """
    started = time.monotonic()
    model_dir, output, script = Path(model_dir), Path(output), Path(checkout) / SCRIPT
    if outtype not in OUTTYPES:
        raise InputError(f"outtype {outtype!r}.", f"one of {', '.join(OUTTYPES)}.", "choose one of them.")
    if not script.is_file():
        raise InputError(
            f"no {SCRIPT} in {checkout}.", "a checkout of llama.cpp.", "give the folder that holds the script."
        )
    weights = open_weights(model_dir)
    check_output(output, weights)
    require_space(output.parent, weights.parameters * (4 if outtype == "f32" else 2) + (64 << 20), output.name)
    with atomic_path(output) as temporary:
        _run(script, model_dir, temporary, outtype)
        loaded = load_check(temporary)
    metadata = read_metadata(output)
    return {
        "model": str(model_dir),
        "output": str(output),
        "converter": f"{SCRIPT} of {checkout}",
        "architecture": metadata.get("general.architecture"),
        "outtype": outtype,
        "tensors": len(read_tensors(output)),
        "bytes_after": output.stat().st_size,
        "loaded": loaded,
        "seconds": round(time.monotonic() - started, 2),
    }


def _run(script: Path, model_dir: Path, output: Path, outtype: str) -> None:
    arguments = [str(model_dir.resolve()), "--outtype", outtype, "--outfile", str(output.resolve())]
    command = [sys.executable, str(script.resolve()), *arguments]
    with Progress(f"{SCRIPT} of llama.cpp"):
        done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not output.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1][:300] if lines else f"exit code {done.returncode}"
        missing = "install what its requirements name (for example sentencepiece)."
        raise InputError(
            f"{SCRIPT} failed ({reason}).",
            "a GGUF file.",
            missing if "ModuleNotFoundError" in reason else "check that this llama.cpp knows the model.",
        )
