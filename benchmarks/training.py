"""Training on ChnSentiCorp rows in the Qwen2.5-0.5B shape: the workbook beside TRL's SFTTrainer and a plain Trainer.

    python benchmarks/training.py --json OUT.json [--runs N] [--rows N]

Whole processes in turn; the clock of "samples_per_second" runs from the first update to the last, without imports and
loading; memory is that of the whole process. Every side has the prompt of params/chnsenticorp-offline.yaml, bfloat16,
rank 16 on all linear layers with dropout 0.05, eight rows an update, no gradient checkpointing. The peers draw their
rows at random and pad to the longest, which is their default.

The loss curve: the workbook and a plain Trainer on the same rows in the same order without dropout; every update's loss
must agree within 1 %.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from importlib.metadata import version

from benchmarks import harness
from benchmarks.peers import packages
from benchmarks.shapes import shape_folder
from lib.errors import InputError
from lib.prompts.tasks import ClassificationTask
from lib.runs.files import PROJECT
from lib.settings import load

TRL = "1.16.0"
BATCH = 8
SIDES = {
    "workbook": "workbook",
    "trainer": f"transformers {version('transformers')} Trainer",
    "trl": f"TRL {TRL} SFTTrainer",
}
_SCRIPT = Path(__file__).with_name("training_sides.py")


def read_rows(count: int, base: Path) -> list[dict[str, Any]]:
    """The first training rows of ChnSentiCorp as {"ids", "prompt"}.

    Raises:
        InputError: the corpus is not beside the project.
    """
    from lib.models.loading import load_tokenizer

    shared = Path(os.environ.get("WORKBOOK_SHARED", PROJECT.parent / "shared")) / "data/chnsenticorp/train.tsv"
    if not shared.is_file():
        raise InputError(f"no {shared}.", "ChnSentiCorp.", "set WORKBOOK_SHARED.")
    settings, tokenizer = load(PROJECT / "params/chnsenticorp-offline.yaml"), load_tokenizer(base)
    names = tuple(settings.label_names)
    task = ClassificationTask(names, settings.system_prompt, settings.user_prompt, settings.max_seq_length)
    rows = []
    with shared.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE):
            made = task.encode(tokenizer, {"text": row["text_a"], "label": int(row["label"])})
            rows.append({"ids": made.ids, "prompt": len(made.prompt_ids)})
            if len(rows) == count:
                return rows
    raise InputError(f"{shared} holds {len(rows)} rows.", f"{count}.", "ask for fewer.")


def run_side(side: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One process of a side; its figures with memory in MiB."""
    job_file, out = folder / "job.json", folder / "out.json"
    job_file.write_text(json.dumps(job), encoding="utf-8")
    added = {"OMP_WAIT_POLICY": "PASSIVE"}  # for all sides, as the workbook sets it: beside other work spinning costs
    if side == "trl":
        added["PYTHONPATH"] = str(packages("trl", f"trl=={TRL}"))
    figures = harness.measure([sys.executable, str(_SCRIPT), side, str(job_file), str(out)], added)
    made = {**json.loads(out.read_text(encoding="utf-8")), "peak_anonymous_mib": figures["peak_anonymous_mib"]}
    rate, memory = made["samples_per_second"], made["peak_anonymous_mib"]
    print(f"{SIDES[side]}: {rate:.2f} samples/s, {memory:.0f} MiB", file=sys.stderr, flush=True)
    return made


def loss_curves(job: dict[str, Any], folder: Path) -> dict[str, list[float]]:
    """Losses of every update of workbook and plain Trainer over the same batches.

    Raises:
        InputError: they differ by more than 1 %.
    """
    same = {**job, "dropout": 0.0, "ordered": True}
    curves = {side: run_side(side, same, folder)["losses"] for side in ("workbook", "trainer")}
    for ours, theirs in zip(curves["workbook"], curves["trainer"], strict=True):
        if abs(ours - theirs) > 0.01 * theirs:
            raise InputError(f"losses {curves}.", "equal within 1 %.", "report this.")
    return curves


def main() -> None:
    """Measure all sides in turn, compare, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, metavar="OUT.json", help="file to write; the chart beside")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="runs a side [default: %(default)s]")
    parser.add_argument("--rows", type=int, default=32, metavar="N", help="rows a run [default: %(default)s]")
    chosen = parser.parse_args()
    base, _ = shape_folder()
    rows = read_rows(chosen.rows, base)
    job = {"base": str(base), "rows": rows, "batch": BATCH, "dropout": 0.05, "ordered": False}
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(chosen.runs):
            for side in list(SIDES)[:: 1 if number % 2 == 0 else -1]:
                results[side].append(run_side(side, job, folder))
        curves = loss_curves(job, folder)
    keys = ("samples_per_second", "peak_anonymous_mib")
    figures = {
        side: {
            "name": SIDES[side],
            **{key: round(statistics.median(r[key] for r in made), 3) for key in keys},
            "samples_per_second_of_runs": [round(r["samples_per_second"], 3) for r in made],
        }
        for side, made in results.items()
    }
    lengths = [len(row["ids"]) for row in rows]
    result = {
        "name": "training",
        "machine": harness.machine_line(),
        "load_average": round(os.getloadavg()[1], 2),
        "runs": chosen.runs,
        "rows": {"n": len(rows), "mean_tokens": round(statistics.mean(lengths), 1), "longest": max(lengths)},
        "memory_measure": harness.MEMORY,
        "sides": figures,
        "losses_same_batches": curves,
        "ratios": {
            f"{name}_over_{peer}": round(figures["workbook"][key] / figures[peer][key], 3)
            for peer in ("trl", "trainer")
            for name, key in zip(("samples_per_second", "memory"), keys, strict=True)
        },
    }
    harness.write_rates(chosen.json, result)


if __name__ == "__main__":
    main()
