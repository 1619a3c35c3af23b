"""`make test-cluster`: one sweep on this machine and on a Slurm cluster of one node, undisturbed and disturbed.

Not part of `make test` (its name begins with no `test_`): it starts daemons, needs root, Debian's slurm-wlm and munge,
and `make workflow`, and takes an hour on two busy cores. A disturbed sweep begins as a copy of the finished one without
one of its runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from lib.runs.files import PROJECT, read_json, sha256_file
from tests.cluster.slurm import Cluster, absent, cluster, wait_for

SNAKEMAKE = PROJECT / ".venv-workflow" / "bin" / "snakemake"
SET = {"max_train_rows": 300, "max_eval_rows": 60, "num_train_epochs": 2.0, "save_steps": 4, "generated_rows": 0}
SET |= {"ladder": ["Q8_0"], "export_formats": [], "perplexity_tokens": 512}
GRID = {"lora_r": [4, 8], "train_seed": [1, 2]}
RUNS = [f"quick-lora_r{rank}-s{seed}" for rank in (4, 8) for seed in (1, 2)]
AGAIN = RUNS[-1]
"""The run that is trained once more in every disturbed sweep."""
SLURM = [
    *("--workflow-profile", "workflow/profiles/slurm", "--slurm-status-command", "squeue", "--slurm-no-account"),
    *("--set-resources", "train:gpu=0", "--set-threads", "train=2", "--retries", "0", "--latency-wait", "5"),
    *("--slurm-init-seconds-before-status-checks", "5", "--default-resources"),
]
"""The profile without what this machine has not: GPUs, and processors for two trainings."""

pytestmark = [
    pytest.mark.skipif(bool(absent()), reason=absent()),
    pytest.mark.skipif(not SNAKEMAKE.is_file(), reason="no .venv-workflow: make workflow"),
]


class Sweep:
    """The sweep in a home of its own: `command` runs it, `start` does so in the background."""

    def __init__(
        self, home: Path, *options: str, files: bool = False, environment: dict[str, str] | None = None
    ) -> None:
        self.home, self.made = home, home / "runs" / "_sweeps" / "quick"
        home.mkdir(parents=True, exist_ok=True)
        config = {"params": "params/quick.yaml", "set": SET, "grid": GRID, "files": files, "python": sys.executable}
        path = home / "sweep.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        self.words = [str(SNAKEMAKE), "--configfile", str(path), *options]
        # the jobs import this clone's lib, whichever is installed
        self.environment = {**(environment or os.environ), "WORKBOOK_HOME": str(home), "PYTHONPATH": str(PROJECT)}

    def start(self) -> subprocess.Popen[str]:
        log = (self.home.parent / f"{self.home.name}.log").open("a", encoding="utf-8")
        options: dict[str, Any] = {"stdout": log, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        return subprocess.Popen(self.words, cwd=PROJECT, env=self.environment, **options)

    def command(self) -> int:
        return self.start().wait()

    def checkpoint(self) -> bool:
        """Whether the training of AGAIN has a whole checkpoint, and is not done."""
        return any((self.home / "runs" / AGAIN / ".adapter.part" / "checkpoints").glob("checkpoint-*/complete.json"))

    def interrupted(self) -> None:
        """Wait for the middle of the training."""
        wait_for(self.checkpoint, 300, f"a checkpoint of {AGAIN}")

    def resumed(self) -> bool:
        """Whether its training went on from a checkpoint."""
        return read_json(self.home / "runs" / AGAIN / "adapter" / "training.json")["resumed_from"] is not None

    def ended_tidily(self) -> bool:
        """Whether the job that was ended had the time to say so, behind its checkpoint."""
        said = (self.made / f"{AGAIN}.train.log").read_text(encoding="utf-8")
        return "Interrupted: nothing half-written" in said or "by SIGTERM" in said

    def results(self) -> dict[str, Any]:
        """What equal sweeps have in common: bytes of weights, every metric that is no speed, the choice's figures."""
        found: dict[str, Any] = {}
        for name in RUNS:
            folder = self.home / "runs" / name
            products = read_json(folder / "manifest.json")["products"]
            hashes = {
                f"{product}/{file}": sha256_file(folder / product / file)
                for product, entry in products.items()
                for file in entry["outputs"]
                if file.endswith((".safetensors", ".gguf", "test.jsonl", "train.jsonl")) and "/" not in file
            }
            found[name] = {"hashes": hashes}
            for product in ("data", "evaluation", "comparison"):
                if product in products:
                    found[name][product] = products[product]["metrics"]
        choice = read_json(self.made / "choice.json")
        assert read_json(self.home / "reports" / "model_analysis.json")["recipes"] == choice["recipes"]
        return {**found, "recipes": choice["recipes"], "rows": choice["rows"]}


@pytest.fixture(scope="session")
def place() -> Iterator[Path]:
    """A folder with a short path, since sockets lie in it; one that is given keeps what was finished there."""
    given = os.environ.get("CLUSTER_TEST_PLACE")
    folder = Path(given or tempfile.mkdtemp(prefix="wb-"))
    folder.chmod(0o755)
    yield folder
    if not given:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def node(place: Path) -> Iterator[Cluster]:
    shutil.rmtree(place / "slurm", ignore_errors=True)
    (place / "slurm").mkdir()
    with cluster(place / "slurm") as made:
        yield made


@pytest.fixture(scope="session")
def laptop(place: Path) -> Sweep:
    """The undisturbed sweep on this machine."""
    sweep = Sweep(place / "laptop", "--cores", "2")
    assert sweep.command() == 0
    return sweep


@pytest.fixture
def part(place: Path, laptop: Sweep, request: pytest.FixtureRequest) -> Path:
    """A home with the finished sweep but for one run and the choice."""
    home = place / request.node.name.translate(str.maketrans("", "", "[]"))
    shutil.rmtree(home, ignore_errors=True)
    _copy_without_one_run(laptop.home, home)
    return home


def _copy_without_one_run(source: Path, home: Path) -> None:
    shutil.copytree(source, home, dirs_exist_ok=True)
    for folder in (home / "runs" / AGAIN, home / "reports" / AGAIN):
        shutil.rmtree(folder)
    for receipt in (home / "runs" / "_sweeps" / "quick").glob("choice.*"):
        receipt.unlink()
    for receipt in (home / "runs" / "_sweeps" / "quick").glob(f"{AGAIN}.*"):
        receipt.unlink()


def on_slurm(home: Path, node: Cluster, minutes: int = 60, **options: Any) -> Sweep:
    return Sweep(home, *SLURM, f"runtime={minutes}", environment=node.environment, **options)


def same(one: Sweep, other: Sweep) -> None:
    """Equal results, and one page with every run and the choice."""
    assert one.results() == other.results()
    page = (one.home / "reports" / "index.html").read_text(encoding="utf-8")
    assert all(f'href="{name}/index.html"' in page for name in RUNS)
    assert "Which run?" in page and page.count("<caption>Recipes on the same 60 test rows") == 1


def train_job(node: Cluster) -> str:
    return next(number for number, words in node.jobs().items() if words == f"rule_train_wildcards_{AGAIN}")


def test_a_sweep_on_slurm_is_that_of_a_laptop(place: Path, laptop: Sweep, node: Cluster) -> None:
    """From an empty home, with files: the trainings are the laptop's, to the byte."""
    sweep = on_slurm(place / "slurm-home", node, files=True)
    assert sweep.command() == 0
    found, usual = sweep.results(), laptop.results()
    for name in RUNS:
        assert any(file.endswith("Q8_0.gguf") for file in found[name]["hashes"])
        assert found[name].pop("comparison")
        hashes = found[name]["hashes"]
        found[name]["hashes"] = {file: value for file, value in hashes.items() if file in usual[name]["hashes"]}
    assert found == usual
    same(laptop, laptop)
    assert sweep.command() == 0 and "Nothing to be done" in (place / "slurm-home.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("all_of_it", [True, False], ids=["power", "snakemake"])
def test_a_laptop_that_is_switched_off(part: Path, laptop: Sweep, all_of_it: bool) -> None:
    """Everything is killed; or Snakemake alone, whose job then goes on until it ends."""
    sweep = Sweep(part, "--cores", "2")
    process = sweep.start()
    sweep.interrupted()
    job = [child.pid for child in psutil.Process(process.pid).children(recursive=True)] if all_of_it else []
    for pid in (process.pid, *job):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    if not all_of_it:
        wait_for((sweep.home / "runs" / AGAIN / "evaluation").is_dir, 300, "the end of the job that was left alone")
        wait_for(lambda: not _of_home(sweep.home), 120, "its last process")
    assert sweep.command() == 0
    assert sweep.resumed() == all_of_it
    same(sweep, laptop)


def _of_home(home: Path) -> list[psutil.Process]:
    """The workbook's processes that write there."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "lib.cli" in process.cmdline() and process.environ().get("WORKBOOK_HOME") == str(home):
                found += [process, *process.children(recursive=True)]
    return found


def test_a_cancelled_job(part: Path, laptop: Sweep, node: Cluster) -> None:
    sweep = on_slurm(part, node)
    process = sweep.start()
    sweep.interrupted()
    node.run("scancel", train_job(node))
    assert process.wait() != 0 and sweep.ended_tidily()
    assert sweep.command() == 0 and sweep.resumed()
    same(sweep, laptop)


@pytest.mark.parametrize("deaf", [False, True], ids=["SIGTERM", "SIGKILL"])
def test_a_time_limit(part: Path, laptop: Sweep, node: Cluster, deaf: bool) -> None:
    """Of two minutes, in which the training is held until Slurm wakes it by SIGTERM; or never hears that."""
    sweep = on_slurm(part, node, minutes=2)
    process = sweep.start()
    sweep.interrupted()
    number, held = train_job(node), _of_home(part)

    def hold(name: str) -> None:
        for one in held:
            with contextlib.suppress(psutil.Error):
                one.send_signal(getattr(signal, name))

    def over() -> bool:
        hold("SIGSTOP")
        return number not in node.jobs()

    wait_for(over, 260, "the time limit")
    if deaf:
        wait_for(lambda: (hold("SIGSTOP"), number in node.jobs("TIMEOUT"))[1], 120, "SIGKILL")
    hold("SIGCONT")
    assert process.wait() != 0 and (deaf or sweep.ended_tidily())
    assert not _of_home(part)
    for _ in range(4):  # two minutes are short: every try makes a step or more
        if (code := sweep.command()) == 0:
            break
    assert code == 0 and sweep.resumed()
    same(sweep, laptop)


def test_a_node_that_vanishes(part: Path, laptop: Sweep, node: Cluster) -> None:
    """Slurm starts the job again when the node is back: the same command goes on."""
    sweep = on_slurm(part, node)
    process = sweep.start()
    sweep.interrupted()
    node.lose_node()
    assert not _of_home(part)
    node.start_node()
    if process.wait() != 0:
        assert sweep.command() == 0
    assert sweep.resumed()
    same(sweep, laptop)


@pytest.fixture
def small_disk(place: Path, laptop: Sweep) -> Iterator[Path]:
    disk = place / "disk"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600m", "tmpfs", str(disk)], check=True)
    try:
        _copy_without_one_run(laptop.home, disk / "home")
        yield disk / "home"
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk(small_disk: Path, laptop: Sweep, node: Cluster) -> None:
    sweep, filler = on_slurm(small_disk, node), small_disk / "filler"
    process = sweep.start()
    sweep.interrupted()
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    assert process.wait() != 0
    filler.unlink()
    assert "is full" in (sweep.made / f"{AGAIN}.train.log").read_text(encoding="utf-8")
    assert sweep.command() == 0 and sweep.resumed()
    same(sweep, laptop)


def test_a_single_job_without_snakemake(place: Path, node: Cluster) -> None:
    """workflow/single.sbatch: one run, cancelled and submitted again."""
    home = place / "single"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    environment = {**node.environment, "WORKBOOK_HOME": str(home), "PYTHONPATH": str(PROJECT), "PYTHON": sys.executable}
    options = [word for key, value in SET.items() for word in ("-p", key, json.dumps(value))]
    words = f"sbatch --parsable --mem=0 --cpus-per-task=2 --output={home}/job-%j.log workflow/single.sbatch".split()

    def submit() -> str:
        command = [*words, "report", "params/quick.yaml", "--to", "02", *options]
        return subprocess.check_output(command, cwd=PROJECT, env=environment, text=True).strip()

    number, part = submit(), home / "runs" / "quick" / ".adapter.part" / "checkpoints"
    wait_for(lambda: any(part.glob("checkpoint-*/complete.json")), 300, "a checkpoint")
    node.run("scancel", number)
    wait_for(lambda: number in node.jobs("CANCELLED"), 60, "the job's end")
    number = submit()
    wait_for(lambda: number in node.jobs("COMPLETED,FAILED"), 300, "the second job")
    assert number in node.jobs("COMPLETED"), (home / f"job-{number}.log").read_text(encoding="utf-8")
    assert read_json(home / "runs" / "quick" / "adapter" / "training.json")["resumed_from"] is not None
