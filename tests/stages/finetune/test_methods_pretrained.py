"""Every way of training on a really trained model, cut to four layers: a short training, merged as peft merges it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lib.models.base_model import base_of
from lib.models.unpack import unpack
from lib.runs.files import HOME_VARIABLE, write_jsonl
from lib.runs.machine import bitsandbytes_problem
from lib.runs.run import Run, open_run
from lib.settings import FULL, Settings
from lib.stages.data.stage import prepare
from lib.stages.finetune.stage import finetune
from lib.stages.merge.nf4 import dequantize_base
from lib.stages.merge.stage import merge
from tests.models.real import SMOLLM2, needs_smollm2
from tests.stages.finetune.test_methods import LOFTQ, METHODS, WHOLE, merged_by_peft

pytestmark = [needs_smollm2, pytest.mark.slow]
LAYERS, EVERY = 4, 20
WAYS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    **METHODS,
    "LoftQ": LOFTQ,
    "LoftQ with DoRA": {**LOFTQ, "use_dora": True},
    "full": WHOLE | {"learning_rate": 3e-4},
    "cosine, warmed up, cut": {"lr_scheduler_type": "cosine", "warmup_steps": 0.3, "max_grad_norm": 0.1},
    "inverse root": {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 1.0, "weight_decay": 0.1},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Settings]]:
    """A home with a run "data" on movie reviews, and the settings it was made with."""
    home = tmp_path_factory.mktemp("pretrained")
    unpack(SMOLLM2, home / "whole", "float32", off_grid=True)
    shutil.copytree(home / "whole", home / "base", ignore=shutil.ignore_patterns("*.safetensors*"))
    model = AutoModelForCausalLM.from_pretrained(home / "whole", dtype=torch.float32)
    del model.model.layers[LAYERS:]
    model.config.num_hidden_layers = LAYERS
    model.to(torch.bfloat16).save_pretrained(home / "base")
    shutil.rmtree(home / "whole")
    with SMOLLM2.with_name("movies.jsonl").open(encoding="utf-8") as lines:
        write_jsonl(home / "movies.jsonl", [json.loads(line) for line in islice(lines, 0, None, EVERY)])
    settings = Settings(
        run_name="data",
        dataset=str(home / "movies.jsonl"),
        label_names=["negative", "positive"],
        split="cluster",
        system_prompt="You judge reviews.",
        user_prompt="Is this review positive or negative? Answer with one word.\nReview: {text}",
        base_model=str(home / "base"),
        max_seq_length=128,
        max_train_rows=32,
        max_eval_rows=16,
        lora_r=8,
        lora_alpha=16,
        learning_rate=1e-3,
        num_train_epochs=1.0,
        per_device_train_batch_size=8,
        save_steps=4,
        dtype="float32",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOME_VARIABLE, str(home))
        prepare(settings, open_run("data"))
        yield home, settings
    shutil.rmtree(home)


def fresh(home: Path) -> Run:
    """A run of its own on the same data."""
    shutil.rmtree(home / "runs" / "trained", ignore_errors=True)
    shutil.copytree(home / "runs" / "data", home / "runs" / "trained")
    return open_run("trained")


@pytest.mark.parametrize("way", WAYS)
def test_a_short_training_of_a_pretrained_model_is_merged_as_peft_merges_it(
    way: str, prepared: tuple[Path, Settings], tmp_path: Path
) -> None:
    home, settings = prepared
    settings = settings.model_copy(update={**WAYS[way], "dtype": "float32"})
    if settings.load_in_4bit and (problem := bitsandbytes_problem()):
        pytest.skip(problem)
    run = fresh(home)
    result, base = finetune(settings, run), base_of(run).path
    losses = [row["loss"] for row in result.history if "loss" in row]
    assert result.steps == 4 and len(losses) == 4 and all(map(math.isfinite, losses))
    merged = merge(settings, run)
    found = load_file(merged.product.path / "model.safetensors")
    if way == FULL:
        expected = {name: t.bfloat16() for name, t in load_file(result.product.path / "model.safetensors").items()}
    else:
        below = dequantize_base(base, tmp_path / "rounded") if settings.load_in_4bit else base
        expected = merged_by_peft(below, result.product.path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    before = load_file(base / "model.safetensors")
    moved = [name for name, tensor in found.items() if not torch.equal(tensor, before[name])]
    assert merged.report.tensors_changed == (len(before) if way == FULL else 7 * LAYERS) and moved
