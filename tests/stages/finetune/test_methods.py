"""Ways of training that peft and transformers have: each trains, resumes exactly and merges as peft merges."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from lib.models.base_model import base_of
from lib.stages.finetune.session import _new_model
from lib.stages.finetune.stage import finetune, made_with
from lib.stages.finetune.trainer import training_arguments
from tests.stages.finetune.conftest import make_data, tiny_settings

ONE = {"per_device_train_batch_size": 4, "num_train_epochs": 1.0, "warmup_steps": 0.0}
"""A single update of four rows."""


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter_model.safetensors")


def test_weights_decay_and_long_gradients_are_cut(runs, tmp_path: Path) -> None:
    """One update: AdamW takes lr · decay · A off A beside its step; a gradient of no length moves nothing."""
    found = {}
    for name, changes in {"plain": {}, "decayed": {"weight_decay": 0.5}, "cut": {"max_grad_norm": 1e-14}}.items():
        run = runs(name)
        make_data(run, train=4, validation=4)
        settings = tiny_settings(**ONE, **changes)
        found[name] = weights(finetune(settings, run).product.path)
    begun = {name: p.detach().numpy() for name, p in _new_model(base_of(run), settings, "float32").named_parameters()}
    rate = settings.learning_rate
    for name, plain in found["plain"].items():
        first = begun[name.replace(".weight", ".default.weight")]
        np.testing.assert_allclose(plain - found["decayed"][name], 0.5 * rate * first, atol=1e-8)
        moved = "lora_B" in name  # the gradient of A is 0 while B is
        assert np.abs(found["cut"][name] - first).max() < 1e-4 * rate
        assert (np.abs(plain - first).max() > 1e-4 * rate) == moved
    assert training_arguments(tmp_path, 8, tiny_settings(max_grad_norm=0.0)).max_grad_norm == math.inf


def test_older_trainings_stay_what_they_are(runs) -> None:
    """Keys that came later are named where they are not the default: nothing is trained anew for their sake."""
    entry = finetune(tiny_settings(), runs("straight")).product.entry
    assert "weight_decay" not in entry.parameters and made_with(entry.parameters)["weight_decay"] == 0.0
    assert not runs("straight").is_current("adapter", entry.parameters | {"weight_decay": 0.1}, ("data",))
