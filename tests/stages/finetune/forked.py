"""Trainings in forked processes, for tests that kill many: libraries are loaded once.

``python -m tests.stages.finetune.forked MODE HOME`` prints one JSON object a line. HOME holds the run "fresh".
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# transformers loads weights in threads; in a forked process torch sometimes finds no thread pool for them and fails.
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"

import peft.peft_model  # noqa: F401
import torch
import transformers.trainer  # noqa: F401

from lib.models import offline_base
from lib.models.base_model import base_of
from lib.models.loading import causal_model
from lib.runs import machine
from lib.runs.run import open_run
from lib.settings import Settings
from lib.stages.finetune import processes, trainer
from lib.stages.finetune.session import TrainingInputs
from lib.stages.finetune.stage import finetune
from lib.stages.finetune.trainer import AnswerTrainer
from tests.stages.finetune.conftest import TINY, make_data, tiny_settings

SHORT = {"num_train_epochs": 1.0, "save_steps": 1}
"""Four updates, a checkpoint after each."""
KILLED_STEP = 3
POINTS = 5


def forked(work: Callable[[], dict[str, Any] | None]) -> tuple[dict[str, Any] | None, int]:
    """The result of `work` in a forked process, and its exit status (negative: signal)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            result = json.dumps(work())
            os.write(writing, result.encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read()
    return (json.loads(text) if text else None), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def train(name: str) -> dict[str, Any]:
    result = finetune(tiny_settings(**SHORT), open_run(name))
    return {"sha256": digest(result.product.path), "resumed_from": result.resumed_from, "messages": result.messages}


FILE_CALLS = (
    *("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "open", "write_record", "write_end_of_file"),
    *("serialize_file", "sha256"),
)


def watch_save(seen: Callable[[int, str], None]) -> None:
    """Call `seen` with the number and name of every file operation while the checkpoint of KILLED_STEP is written."""
    original = AnswerTrainer._save_checkpoint

    def save(self: Any, *arguments: Any) -> None:
        count = 0

        def profile(frame: Any, event: str, function: Any) -> None:
            nonlocal count
            if event in ("c_call", "c_return") and getattr(function, "__name__", "") in FILE_CALLS:
                seen(count, f"{event} {function.__name__}")
                count += 1

        if self.state.global_step == KILLED_STEP:
            sys.setprofile(profile)
        original(self, *arguments)
        sys.setprofile(None)

    AnswerTrainer._save_checkpoint = save


def kill_points(home: Path) -> None:
    """A training killed at file operations spread over one save, each then run again."""

    def count() -> dict[str, Any]:
        calls: list[str] = []
        watch_save(lambda number, name: calls.append(name))
        return {**train("straight"), "calls": calls}

    def killed(name: str, at: int) -> None:
        watch_save(lambda number, call: os.kill(os.getpid(), signal.SIGKILL) if number == at else None)
        train(name)

    shutil.copytree(home / "runs" / "fresh", home / "runs" / "straight", dirs_exist_ok=True)
    straight, _ = forked(count)
    calls = straight.pop("calls")
    print(json.dumps(straight), flush=True)
    last_rename = len(calls) - 1 - calls[::-1].index("c_call rename")
    spread = {round(i * (len(calls) - 1) / (POINTS - 1)) for i in range(POINTS)}
    for point in sorted(spread | {last_rename, last_rename + 1}):
        name = f"killed-{point}"
        shutil.copytree(home / "runs" / "fresh", home / "runs" / name)
        _, status = forked(lambda name=name, point=point: killed(name, point))
        again, _ = forked(lambda name=name: train(name))
        print(json.dumps({"call": calls[point], "status": status, **(again or {})}), flush=True)


def team(home: Path) -> None:
    """Two processes against one, and a team that one of its processes stops."""
    run = open_run("odd")
    make_data(run, train=65)  # the last update has one row, so the second process has none
    base = base_of(run)

    def members(folder: Path, settings: Settings, stop_rank_at: int | None = None) -> list[dict[str, Any]]:
        """What the training returns in both processes, which find each other as torchrun's do."""
        folder.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        inputs = TrainingInputs(settings, run.folder / "data", base, folder, stop_file=folder / "stop")

        def member(rank: int) -> dict[str, Any]:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
            shard = trainer.shard

            def noted(model: Any, *arguments: Any) -> None:
                layers = causal_model(model).get_decoder().layers
                frozen = [name for name, weights in layers.named_parameters() if not weights.requires_grad]
                whole = sum(layers.get_parameter(name).numel() for name in frozen)
                shard(model, *arguments)
                held = sum(layers.get_parameter(name).to_local().numel() for name in frozen)
                (folder / f"held-{rank}").write_text(json.dumps([held, whole]))

            trainer.shard = noted
            if rank == 1 and stop_rank_at is not None:
                step = AnswerTrainer.training_step

                def stopping(self: Any, *arguments: Any, **options: Any) -> Any:
                    if self.state.global_step == stop_rank_at:
                        os.kill(os.getpid(), signal.SIGTERM)
                    return step(self, *arguments, **options)

                AnswerTrainer.training_step = stopping
            return processes._train(inputs)

        def all_ranks() -> dict[str, Any]:  # the parent of the second rank is the first one's process
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.write(writing, json.dumps(member(1)).encode())
                os._exit(0)
            os.close(writing)
            first = member(0)
            with os.fdopen(reading) as stream:
                second = json.loads(stream.read())
            os.waitpid(pid, 0)
            return {"ranks": [first, second]}

        return forked(all_ranks)[0]["ranks"]

    same = {"lora_dropout": 0.0, **SHORT}
    one, _ = forked(lambda: {"path": str(finetune(tiny_settings(**same), run).product.path)})
    shares = {"num_processes": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    results = {"one": one["path"]}
    results["two"] = members(home / "two", tiny_settings(**same, **shares))
    results["dropout"] = members(home / "dropout", tiny_settings(**SHORT, **shares))
    results["stopped"] = members(home / "stopped", tiny_settings(**SHORT, **shares), stop_rank_at=2)
    results["again"] = members(home / "stopped", tiny_settings(**SHORT, **shares))
    apart = {**shares, "fsdp": "full_shard"}
    results["apart"] = members(home / "apart", tiny_settings(**same, **apart))
    results["apart-dropout"] = members(home / "apart-dropout", tiny_settings(**SHORT, **apart))
    results["apart-stopped"] = members(home / "apart-stopped", tiny_settings(**SHORT, **apart), stop_rank_at=2)
    results["apart-again"] = members(home / "apart-stopped", tiny_settings(**SHORT, **apart))
    print(json.dumps(results))


if __name__ == "__main__":
    offline_base.BaseRecipe = lambda: TINY
    machine.bitsandbytes_problem()
    torch.set_num_threads(1)
    {"kill": kill_points, "team": team}[sys.argv[1]](Path(sys.argv[2]))
