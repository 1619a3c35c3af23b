"""Adapter and base of the Qwen2.5-0.5B shape to a merged folder and its F16 GGUF: one pass beside two tools.

    python benchmarks/merge_gguf.py --json OUT.json [--runs N]

Ours: `workbook merge --gguf`. Peers: peft's merge, then the official converter of llama.cpp on the merged folder. Both
must give equal files, so both folders have the same name.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.merge import our_command, peft_side, same_weights
from benchmarks.peers import peer_llama_cpp
from benchmarks.shapes import cache, shape_folder
from lib.errors import InputError
from lib.models.gguf_file import read_tensors


def main() -> None:
    """Measure, compare the files, write the result."""
    chosen = harness.arguments(__doc__)
    llama_cpp = peer_llama_cpp()
    base, adapter = shape_folder()
    ours, peer = cache() / "one-pass", cache() / "two-tools"
    for folder in (ours, peer):
        folder.mkdir(exist_ok=True)
    merging = peft_side(base, adapter, peer / "merged")
    result = harness.compare(
        "merge_gguf",
        harness.Side(
            "workbook merge --gguf",
            [our_command(base, adapter, ours / "merged", "--gguf", ours / "merged.gguf")],
            [ours / "merged", ours / "merged.gguf"],
        ),
        harness.Side(
            f"{merging.name}, then convert_hf_to_gguf.py of llama-cpp-python {llama_cpp.version}",
            [*merging.commands, llama_cpp.convert_command(peer / "merged", peer / "merged.gguf")],
            [*merging.outputs, peer / "merged.gguf"],
            llama_cpp.environment,
        ),
        chosen.runs,
        [base, adapter],
    )
    if not (same_weights(ours / "merged", peer / "merged") and _same_tensors(ours, peer)):
        raise InputError("the products differ.", "equal tensors.", "report this.")
    harness.write(chosen.json, {**result, "identical": True})


def _same_tensors(ours: Path, peer: Path) -> bool:
    """Equal tensors in both GGUF files; keys differ where transformers rewrites tokenizer and generation files."""
    left, right = ours / "merged.gguf", peer / "merged.gguf"
    table = [[(t.name, t.type, t.shape) for t in read_tensors(path)] for path in (left, right)]
    size = [path.stat().st_size - min(t.start for t in read_tensors(path)) for path in (left, right)]
    if table[0] != table[1] or size[0] != size[1]:
        return False
    with left.open("rb") as first, right.open("rb") as second:
        first.seek(-size[0], 2)
        second.seek(-size[1], 2)
        while chunk := first.read(1 << 24):
            if chunk != second.read(1 << 24):
                return False
    return True


if __name__ == "__main__":
    main()
