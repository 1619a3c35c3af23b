"""What Snakemake costs beside the commands that it starts: planning of many runs, jobs a minute, seconds a job.

python benchmarks/engine.py                    this machine, 500 runs planned, 20 jobs run one at a time
python benchmarks/engine.py --slurm            jobs on a Slurm node of its own (root, slurm-wlm, munge), two at once

The jobs are those of workflow/Snakefile, but the workbook is a stand-in that prints {} at once: what is left is the
engine. Needs `make workflow`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))
SNAKEMAKE = str(PROJECT / ".venv-workflow" / "bin" / "snakemake")
STAND_IN = '#!/bin/sh\n[ "$2" = workflow.grid ] && exec {python} "$@"\necho "{{}}"\n'
SLURM = [
    *("--workflow-profile", "workflow/profiles/slurm", "--slurm-status-command", "squeue", "--slurm-no-account"),
    *("--set-resources", "train:gpu=0", "--set-threads", "train=1", "base=1", "--latency-wait", "5", "--retries", "0"),
    *("--slurm-init-seconds-before-status-checks", "5", "--default-resources", "runtime=60", "mem_mb=100"),
]


def seconds(folder: Path, name: str, runs: int, options: list[str], environment: dict[str, str]) -> float:
    """Wall time of Snakemake over a sweep of so many runs, trainings alone, in a home of its own."""
    home = folder / name
    home.mkdir()
    config: dict[str, Any] = {"params": "params/quick.yaml", "grid": {"train_seed": list(range(runs))}, "files": False}
    (home / "sweep.yaml").write_text(yaml.safe_dump(config | {"python": str(folder / "python")}), encoding="utf-8")
    words = [SNAKEMAKE, "--configfile", str(home / "sweep.yaml"), *options, "--quiet", "all"]
    began = time.monotonic()
    with (folder / f"{name}.log").open("wb") as log:
        done = subprocess.run(
            words,
            cwd=PROJECT,
            env={**environment, "WORKBOOK_HOME": str(home), "PYTHONPATH": str(PROJECT)},
            stdout=log,
            stderr=log,
            check=False,
        )
    if done.returncode:
        sys.exit((folder / f"{name}.log").read_text(encoding="utf-8"))
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--planned", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--slurm", action="store_true")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wb-")))
        folder.chmod(0o755)
        (folder / "python").write_text(STAND_IN.format(python=sys.executable), encoding="utf-8")
        (folder / "python").chmod(0o755)
        environment, options = dict(os.environ), ["--cores", "2"]
        if arguments.slurm:
            from tests.cluster.slurm import cluster

            (folder / "slurm").mkdir()
            environment, options = stack.enter_context(cluster(folder / "slurm")).environment, SLURM
        planning = seconds(folder, "planned", arguments.planned, [*options[:2], "-n"], environment)
        start = seconds(folder, "start", arguments.jobs, [*options[:2], "-n"], environment)
        whole = seconds(folder, "jobs", arguments.jobs, options, environment)
    jobs = arguments.jobs + 2  # the base and the choice
    print(f"{arguments.planned} runs planned: {planning:.1f} s (-n)")
    print(f"{jobs} jobs: {whole:.1f} s, {60 * jobs / whole:.0f} jobs a minute; planned in {start:.1f} s of them")
    print(f"engine: {(whole - start) / jobs:.2f} s a job")


if __name__ == "__main__":
    main()
