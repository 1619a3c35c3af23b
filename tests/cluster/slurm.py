"""A Slurm cluster of one node on this machine, for tests: munged, slurmctld and slurmd of Debian's slurm-wlm and munge.

Everything lies in one temporary folder and ends with the context. No accounting, no cgroups, no task affinity.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "srun")
CONFIG = """\
ClusterName=workbook
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=10
KillWait=30
MinJobAge=600
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def absent() -> str:
    """What is missing for a cluster here, in words; empty where nothing is."""
    paths = f"{os.environ.get('PATH', '')}:/usr/sbin"
    lacking = [name for name in PROGRAMS if not shutil.which(name, path=paths)]
    if lacking:
        return f"no {', '.join(lacking)}: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "a cluster of its own needs root"


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: it did not.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.2)


class Cluster:
    """The running cluster: `environment` is that of its users, `run` a command as one of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.host = folder, socket.gethostname()
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("state", "spool", "bin"):
            (folder / name).mkdir()
        ports = {"controller_port": _free_port(), "node_port": _free_port()}
        memory = psutil.virtual_memory().total >> 20
        text = CONFIG.format(folder=folder, host=self.host, cpus=os.cpu_count(), memory=memory, **ports)
        (folder / "slurm.conf").write_text(text, encoding="utf-8")
        # the executor's job steps drop SLURM_CONF, which is how this cluster is found
        srun = folder / "bin" / "srun"
        srun.write_text(
            f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"\n', encoding="utf-8"
        )
        srun.chmod(0o755)
        paths = f"{folder}/bin:{os.environ['PATH']}:/usr/sbin"
        self.environment = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf", "PATH": paths}

    def start(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
        options = [f"--{option}={self.folder / name}" for option, name in {**files, "seed-file": "munge.seed"}.items()]
        self._daemon("munged", "--foreground", "--force", *options)
        wait_for((self.folder / "munge.socket").exists, 20, "munged")
        self._daemon("slurmctld", "-D")
        self.start_node()

    def start_node(self) -> None:
        self._daemon("slurmd", "-D", "-N", self.host)
        wait_for(lambda: "idle" in self.run("sinfo", "--noheader", "--format=%t"), 60, "an idle node")

    def lose_node(self) -> None:
        """Everything of the node ends at once, as when its power fails; wait until the controller has noticed."""
        slurmd = self.daemons.pop("slurmd")
        steps = [p for p in psutil.process_iter(["name", "cmdline"]) if "slurmstepd" in (p.info["name"] or "")]
        doomed = [child for step in steps for child in (step, *step.children(recursive=True))]
        for pid in (slurmd.pid, *(process.pid for process in doomed)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        slurmd.wait()
        wait_for(lambda: "down" in self.run("sinfo", "--noheader", "--format=%t"), 120, "a node that is down")

    def jobs(self, states: str = "RUNNING") -> dict[str, str]:
        """Names of rules, with wildcards, by number of a job."""
        lines = self.run("squeue", "--noheader", f"--states={states}", "--format=%i|%k").splitlines()
        return dict(line.split("|", 1) for line in lines)

    def run(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        return done.stdout

    def stop(self) -> None:
        self.run("scancel", "--user=root")
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: not self.jobs("RUNNING,COMPLETING"), 60, "the end of all jobs")
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(20)
            daemon.kill()

    def _daemon(self, name: str, *options: str) -> None:
        program = shutil.which(name, path=self.environment["PATH"])
        log = (self.folder / f"{name}.out").open("ab")
        self.daemons[name] = subprocess.Popen([str(program), *options], env=self.environment, stdout=log, stderr=log)


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster in an empty folder, whose path must be short (of a socket)."""
    made = Cluster(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
