"""What the two evaluation benchmarks share: rows, one process a side, equal answers, medians and ratios."""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness
from lib.errors import InputError
from lib.prompts.tasks import ClassificationTask
from lib.runs.files import PROJECT
from lib.runs.machine import physical_cores
from lib.settings import Settings


@dataclass(frozen=True)
class Side:
    """One side: its key in `benchmarks.evaluation_sides.SIDES`, its name in words, what it needs."""

    key: str
    name: str
    environment: Mapping[str, str]
    more: Mapping[str, Any]


def arguments(description: str | None) -> argparse.Namespace:
    """--json OUT.json [--runs N] [--rows N] [--threads N]."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, metavar="OUT.json", help="file to write; the chart beside")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="runs a side [default: %(default)s]")
    parser.add_argument("--rows", type=int, default=24, metavar="N", help="rows a run [default: %(default)s]")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="of every side [default: all cores]")
    chosen = parser.parse_args()
    if min(chosen.runs, chosen.rows, chosen.threads) < 1:
        parser.error("--runs, --rows and --threads must be at least 1")
    return chosen


def task() -> ClassificationTask:
    """The prompt of the parameter files for ChnSentiCorp."""
    s = Settings()
    return ClassificationTask(tuple(s.label_names), s.system_prompt, s.user_prompt, 192)


def read_rows(count: int, tokenizer: Any) -> tuple[list[dict[str, Any]], str]:
    """Test rows that fit the prompt whole, and what they are: of ChnSentiCorp, else of the generated sample.

    Raises:
        InputError: there are fewer.
    """
    shared = Path(os.environ.get("WORKBOOK_SHARED", PROJECT.parent / "shared")) / "data/chnsenticorp/test.tsv"
    if shared.is_file():
        with shared.open(encoding="utf-8", newline="") as stream:
            found = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
        pairs, source = [(row["text_a"], int(row["label"])) for row in found], "ChnSentiCorp, test rows"
    else:
        from lib.stages.data.sample import reviews

        pairs = [(row["text"], row["label"]) for row in reviews()["test"]]
        source = "generated sample, test rows"
    rows = [{"id": f"{i:05d}", "text": text, "label": label} for i, (text, label) in enumerate(pairs)]
    fitting = (row for row in rows if not task().encode(tokenizer, {"text": row["text"]}).truncated)
    chosen = [row for row, _ in zip(fitting, range(count), strict=False)]
    if len(chosen) < count:
        raise InputError(f"{len(chosen)} rows that fit.", f"{count}.", "ask for fewer.")
    return chosen, source


def make_job(model: Path, rows: list[dict[str, Any]], tokenizer: Any, threads: int) -> dict[str, Any]:
    """What every side gets."""
    prompts = [task().prompt(tokenizer, {"text": row["text"]}) for row in rows]
    return {
        "model": str(model),
        "rows": rows,
        "prompts": prompts,
        "task": task().to_json(),
        "batch": 8,
        "threads": threads,
    }


def run_side(side: Side, job: Mapping[str, Any]) -> dict[str, Any]:
    """One whole process; what it wrote, with its rate and memory."""
    with tempfile.TemporaryDirectory() as name:
        job_file, out = Path(name) / "job.json", Path(name) / "out.json"
        job_file.write_text(json.dumps({**job, **side.more}), encoding="utf-8")
        code = f"from benchmarks.evaluation_sides import run; run({side.key!r}, {str(job_file)!r}, {str(out)!r})"
        threads = str(job["threads"])
        environment = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": threads, **side.environment}
        figures = harness.measure([sys.executable, "-c", code], environment)
        made = json.loads(out.read_text(encoding="utf-8"))
    made |= {key: figures[key] for key in ("wall_seconds", "cpu_seconds", "peak_anonymous_mib")}
    made["samples_per_second"] = len(job["rows"]) / made["seconds"]
    made["samples_per_cpu_second"] = len(job["rows"]) / made["scoring_cpu_seconds"]
    rate, memory = made["samples_per_second"], made["peak_anonymous_mib"]
    print(f"{side.name}: {rate:.2f} samples/s, {memory:.0f} MiB", file=sys.stderr, flush=True)
    return made


def same_answers(job: Mapping[str, Any], ours: Mapping[str, Any], peer: Mapping[str, Any], tie: float) -> list[str]:
    """Ids of the rows with another answer, all of which must be near ties.

    Raises:
        InputError: a row is answered otherwise although the margin is `tie` nats or more.
    """
    different = [row["id"] for row in job["rows"] if ours["answers"][row["id"]] != peer["answers"][row["id"]]]
    if sure := {name: ours["margins"][name] for name in different if abs(ours["margins"][name]) >= tie}:
        raise InputError(f"other answers at margins {sure}.", "equal answers but for near ties.", "report this.")
    return different


def accuracy(job: Mapping[str, Any], made: Mapping[str, Any], without: Sequence[str]) -> float:
    """Share of right answers on the rows that are not left out."""
    right = [made["answers"][row["id"]] == row["label"] for row in job["rows"] if row["id"] not in without]
    return sum(right) / len(right)


def measure(
    name: str, sides: Sequence[Side], job: Mapping[str, Any], source: str, runs: int, tie: float
) -> dict[str, Any]:
    """Run all sides in turn, ours first in the list; the result without ratios of its own.

    Args:
        tie: nats; answers at smaller margins may differ (and are listed).
    """
    made: dict[str, list[dict[str, Any]]] = {side.key: [] for side in sides}
    for number in range(runs):
        for side in list(sides)[:: 1 if number % 2 == 0 else -1]:
            made[side.key].append(run_side(side, job))
    ours, *peers = sides
    keys = ("samples_per_second", "samples_per_cpu_second", "peak_anonymous_mib", "wall_seconds", "cpu_seconds")
    figures = {
        side.key: {
            "name": side.name,
            **{key: round(statistics.median(one[key] for one in made[side.key]), 3) for key in keys},
            "samples_per_second_of_runs": [round(one["samples_per_second"], 3) for one in made[side.key]],
        }
        for side in sides
    }
    equal = {}
    for side in peers:
        pairs = list(zip(made[ours.key], made[side.key], strict=True))
        ties = sorted({i for mine, theirs in pairs for i in same_answers(job, mine, theirs, tie)})
        equal[side.key] = {"other_answers_at_near_ties": ties, "accuracy": accuracy(job, pairs[0][0], ties)}
        if any(accuracy(job, mine, ties) != accuracy(job, theirs, ties) for mine, theirs in pairs):
            raise InputError(f"another accuracy with {side.name}.", "the same.", "report this.")
    return {
        "name": name,
        "machine": harness.machine_line(),
        "load_average": round(os.getloadavg()[1], 2),
        "runs": runs,
        "rows": {"n": len(job["rows"]), "source": source},
        "threads": job["threads"],
        "memory_measure": harness.MEMORY,
        "sides": figures,
        "equal": {"tie_nats": tie, **equal},
        "ratios": ratios(figures, ours.key, [side.key for side in peers]),
    }


def ratios(figures: Mapping[str, Any], ours: str, peers: Sequence[str]) -> dict[str, float]:
    """Ours over each peer; "samples_per_second" and "memory" alone are those over the first peer."""
    names = {"samples_per_second": "samples_per_second", "memory": "peak_anonymous_mib"}
    names["samples_per_cpu_second"] = "samples_per_cpu_second"  # does not see what else the machine does
    found = {}
    for place, peer in enumerate(peers):
        for name, key in names.items():
            ratio = round(figures[ours][key] / figures[peer][key], 3)
            found |= {name: ratio} if place == 0 else {}
            if len(peers) > 1:
                found[f"{name}_over_{peer}"] = ratio
    return found
