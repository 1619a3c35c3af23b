"""Losses go to a tracker that is installed, into the run's folder, and nothing else changes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lib.errors import InputError
from lib.report.runner import ready
from lib.runs import machine
from lib.runs.files import data_file
from lib.settings import Settings
from lib.stages.finetune import tracking
from lib.stages.finetune.stage import finetune
from tests.conftest import PROJECT
from tests.stages.finetune.conftest import tiny_settings
from tests.stages.finetune.test_stage import same, weights

TRACKERS = data_file("stages/finetune/trackers.yaml")


def test_every_tracker_of_the_settings_is_known_to_transformers() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    (entry,) = (
        entry
        for key, entry in yaml.safe_load((PROJECT / "lib" / "settings.yaml").read_text(encoding="utf-8")).items()
        if key == "report_to"
    )
    assert entry["one_of"] == ["none", *TRACKERS] and set(TRACKERS) <= set(INTEGRATION_TO_CALLBACK)


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_done(runs, monkeypatch) -> None:
    monkeypatch.setattr(tracking, "has_module", lambda name: name == "tensorboardX")
    tracking.refuse_absent("tensorboard")
    for check in (
        lambda: finetune(tiny_settings(report_to="wandb"), runs("fresh")),
        lambda: ready(Settings(report_to="wandb")),  # of a report, and of `workbook doctor`
    ):
        with pytest.raises(InputError, match="report_to: wandb, and the package wandb is not installed"):
            check()


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_stays_offline_and_in_the_run_unless_the_user_says_otherwise(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = TRACKERS[name]["variables"]
    monkeypatch.setitem(sys.modules, "swanlab", SimpleNamespace(init=lambda: None))
    for key in variables:
        monkeypatch.delenv(key, raising=False)
    with tracking.reporting(name, tmp_path / "tracking"):
        assert any(str(tmp_path / "tracking" / name) in os.environ[key] for key in variables)
        assert all(os.environ[key] == "offline" for key in variables if key.endswith("_MODE"))
    assert not set(variables) & set(os.environ)
    first = next(iter(variables))
    monkeypatch.setenv(first, "of the user")
    with tracking.reporting(name, tmp_path / "tracking"):
        assert os.environ[first] == "of the user"
    assert os.environ[first] == "of the user"


def test_tensorboard_gets_the_curves_and_the_product_is_the_same(runs) -> None:
    if not machine.has_module("tensorboard"):
        pytest.skip("tensorboard is not installed (the extra track)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = runs("fresh")
    result = finetune(tiny_settings(report_to="tensorboard"), run)
    assert same(weights(result.product.path), weights(runs("straight").folder / "adapter"))
    assert "report_to" not in result.product.entry.parameters
    events = EventAccumulator(str(run.folder / "tracking" / "tensorboard"))
    events.Reload()
    losses = {row["step"]: row["eval_loss"] for row in result.history if "eval_loss" in row}
    assert {e.step: e.value for e in events.Scalars("eval/loss")} == pytest.approx(losses, rel=1e-6)
    assert not list(result.product.path.rglob("events.out*"))


@pytest.mark.parametrize("name", [name for name in TRACKERS if name != "tensorboard"])
def test_another_tracker_writes_into_its_folder_and_the_product_is_the_same(name: str, runs, monkeypatch) -> None:
    if not any(map(machine.has_module, TRACKERS[name]["packages"])):
        pytest.skip(f"{name} is not installed")
    for key in TRACKERS[name]["variables"]:
        monkeypatch.delenv(key, raising=False)
    run = runs("fresh")
    result = finetune(tiny_settings(report_to=name), run)
    assert same(weights(result.product.path), weights(runs("straight").folder / "adapter"))
    written = [path for path in (run.folder / "tracking" / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in written) > 1000
