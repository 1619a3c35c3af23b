"""The Qwen2.5-0.5B shape to an F16 GGUF: `workbook convert` beside the official converter of llama.cpp.

    python benchmarks/convert.py --json OUT.json [--runs N]

Whole processes, imports included. The two files must be equal byte for byte.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.peers import peer_llama_cpp
from benchmarks.shapes import cache, shape_folder
from lib.errors import InputError
from lib.runs.files import sha256_file


def main() -> None:
    """Measure, compare the files, write the result."""
    chosen = harness.arguments(__doc__)
    peer = peer_llama_cpp()
    model, _ = shape_folder()
    ours, theirs = cache() / "converted-ours.gguf", cache() / "converted-peer.gguf"
    result = harness.compare(
        "convert",
        harness.Side("workbook convert", [harness.workbook("convert", model, ours)], [ours]),
        harness.Side(
            f"convert_hf_to_gguf.py of llama-cpp-python {peer.version}",
            [peer.convert_command(model, theirs)],
            [theirs],
            peer.environment,
        ),
        chosen.runs,
        [model],
    )
    if sha256_file(ours) != sha256_file(theirs):
        raise InputError("the two GGUF files differ.", "equal bytes.", "report this.")
    harness.write(chosen.json, {**result, "identical": True})


if __name__ == "__main__":
    main()
