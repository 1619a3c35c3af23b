"""A rank-16 adapter merged into the Qwen2.5-0.5B shape: `workbook merge` beside peft.

    python benchmarks/merge.py --json OUT.json [--runs N]

peft: load the base, put the adapter on, `merge_and_unload()`, `save_pretrained()`. Whole processes, imports included.
Both must write equal weights.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.shapes import cache, shape_folder
from lib.errors import InputError
from lib.runs.files import sha256_file

PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, output = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
model.merge_and_unload().save_pretrained(output)
AutoTokenizer.from_pretrained(base).save_pretrained(output)
"""


def peft_side(base: Path, adapter: Path, output: Path) -> harness.Side:
    """Merging with peft."""
    command = [sys.executable, "-c", PEFT, str(base), str(adapter), str(output)]
    return harness.Side(f"peft {version('peft')}", [command], [output])


def our_command(base: Path, adapter: Path, output: Path, *more: object) -> list[str]:
    """Merging with the workbook."""
    return harness.workbook("merge", "--base-model", base, "--adapter", adapter, "--output-dir", output, *more)


def main() -> None:
    """Measure, compare the weights, write the result."""
    chosen = harness.arguments(__doc__)
    base, adapter = shape_folder()
    ours, peer = cache() / "merged-ours", cache() / "merged-peer"
    result = harness.compare(
        "merge",
        harness.Side("workbook merge", [our_command(base, adapter, ours)], [ours]),
        peft_side(base, adapter, peer),
        chosen.runs,
        [base, adapter],
    )
    if not same_weights(ours, peer):
        raise InputError("the merged weights differ from peft's.", "equal bytes.", "report this.")
    harness.write(chosen.json, {**result, "identical": True})


def same_weights(ours: Path, peer: Path) -> bool:
    """Whether both folders hold one file of weights with equal tensors (the order inside the files may differ)."""
    from lib.models.weights import open_weights

    if sha256_file(ours / "model.safetensors") == sha256_file(peer / "model.safetensors"):
        return True
    left, right = open_weights(ours).tensors, open_weights(peer).tensors
    return left.keys() == right.keys() and all(bool((left[n].raw() == right[n].raw()).all()) for n in left)


if __name__ == "__main__":
    main()
