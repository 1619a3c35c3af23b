"""The default ladder on the Qwen2.5-0.5B shape: `workbook quantize` once, beside llama-quantize once a type.

    python benchmarks/quantize.py --json OUT.json [--runs N]

Both use the same shared libraries and as many threads as there are cores. Every pair of files must be equal.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.peers import pinned_version, tool
from benchmarks.shapes import cache, shape_folder
from lib.errors import InputError
from lib.runs.files import sha256_file
from lib.runs.machine import physical_cores
from lib.settings import Settings


def source_file() -> Path:
    """The F16 GGUF of the shape, converted once by the workbook."""
    model, _ = shape_folder()
    path = cache() / f"{model.name}-F16.gguf"
    if not path.is_file():
        subprocess.run(harness.workbook("convert", model, path), check=True, cwd=harness.PROJECT)
    return path


def main() -> None:
    """Measure, compare the files, write the result."""
    chosen = harness.arguments(__doc__)
    types, source, binary = Settings().ladder, source_file(), tool("llama-quantize")
    folders = {side: cache() / f"quantized-{side}" for side in ("ours", "peer")}
    folders["peer"].mkdir(exist_ok=True)
    name = source.name.removesuffix("-F16.gguf")
    ours = [folders["ours"] / f"{name}-{kind}.gguf" for kind in types]
    peer = [folders["peer"] / f"{kind}.gguf" for kind in types]
    threads = physical_cores()
    result = harness.compare(
        "quantize",
        harness.Side("workbook quantize", [harness.workbook("quantize", source, folders["ours"], *types)], ours),
        harness.Side(
            f"llama-quantize of llama-cpp-python {pinned_version()}",
            [[str(binary), str(source), str(out), t, str(threads)] for t, out in zip(types, peer, strict=True)],
            peer,
        ),
        chosen.runs,
        [source],
    )
    different = [t for t, a, b in zip(types, ours, peer, strict=True) if sha256_file(a) != sha256_file(b)]
    if different:
        raise InputError(f"{', '.join(different)} differ from llama-quantize's.", "equal files.", "report this.")
    harness.write(chosen.json, {**result, "types": types, "identical": True})


if __name__ == "__main__":
    main()
