"""A tiny Qwen2 as the merged model of a run, and every format made from it, once a session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lib.runs.run import ProductDraft, Run
from lib.stages.export import child
from lib.stages.export.stage import CALIBRATED, FORMATS
from tests import tiny_run


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder (Qwen2, bfloat16, tied, 64 wide)."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_run.make_base(folder, "bfloat16")
    return folder


def token_ids(folder: Path, n: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random reviews."""
    from lib.models.loading import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return [tiny_run.TASK.encode(tokenizer, {"text": text}).prompt_ids for text in tiny_run.texts(n, seed)]


def make(name: str, source: Path, output: Path, seed: int = 1) -> dict:
    """Make a format in this process (its libraries are loaded once for all tests)."""
    if problem := FORMATS[name].problem():
        pytest.skip(problem)
    calibration = token_ids(source, 24, seed) if name in CALIBRATED else []
    argument = {"source": str(source), "output": str(output), "calibration": calibration}
    return child.make({**argument, "format": name, "prompts": token_ids(source, 4, 2)})


@pytest.fixture(scope="session")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict]]:
    """exported(name) → folder and answer of the worker."""
    made: dict[str, tuple[Path, dict]] = {}

    def get(name: str) -> tuple[Path, dict]:
        if name not in made:
            folder = tmp_path_factory.mktemp("exports") / name
            made[name] = folder, make(name, base, folder)
        return made[name]

    return get


def with_merged(run: Run, base: Path) -> Run:
    """The run with `base` as its product `merged`."""

    def merged(work: ProductDraft) -> None:
        shutil.copytree(base, work.folder, dirs_exist_ok=True)
        work.facts = {"base_model": "tiny", "base_revision": "sha256:0", "method": "LoRA", "dtype": "bfloat16"}

    run.produce("merged", merged, {}, inputs=("data", "adapter"))
    return run
