"""What a run takes: disk by product, time, and what stands against a model; told by `doctor` without a download."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lib import settings as lib_settings
from lib.cli.__main__ import app
from lib.models.base_model import SHIPPED
from lib.models.configurations import shapes_of
from lib.pipeline import resources
from lib.pipeline.resources import Speed
from lib.runs.files import PROJECT

THINKING = "Qwen/Qwen3-4B-Thinking-2507"


def settings_of(name: str, **changes: object) -> lib_settings.Settings:
    return lib_settings.load(PROJECT / "params" / f"{name}.yaml", changes)


def test_the_4b_profile_takes_what_was_reckoned_by_hand() -> None:
    """Base, merged and GGUF of 8 GB each, and a ladder of 19 GB (4.02 · 10⁹ weights); it makes no exports."""
    settings = settings_of("crypto-qwen3-4b-thinking")
    disk = resources.disk_of(settings, shapes_of(SHIPPED[THINKING]), download=True)
    assert disk["base"] == disk["merged"] == pytest.approx(8.04e9, rel=0.01)
    assert disk["gguf"] == pytest.approx(8.05e9, rel=0.01) and sum(disk.values()) == pytest.approx(43e9, rel=0.05)
    assert resources.disk_of(settings, shapes_of(SHIPPED[THINKING]), download=False)["base"] == 0


def test_time_grows_with_weights_rows_and_models() -> None:
    settings = settings_of("chnsenticorp-qwen3-0.6b")
    rows = {"train": 1000, "test": 100}
    one = resources.seconds_of(settings, 10**9, rows, Speed(1e12, "", 1e9), 10**9)
    tokens = settings.max_seq_length
    passes = 6 if settings.gradient_checkpointing else 4
    by_hand = passes * 1e9 * tokens * 1000 * settings.num_train_epochs / (resources.REACHED * 1e12)
    assert one["training"] == pytest.approx(by_hand) and one["files"] == pytest.approx(3.0)
    twice = resources.seconds_of(settings, 2 * 10**9, rows, Speed(1e12, "", 1e9), 10**9)
    assert twice["training"] == pytest.approx(2 * one["training"])
    short = resources.seconds_of(settings, 10**9, rows, Speed(1e12, "", 1e9), 10**9, tokens=tokens / 4)
    assert short["training"] == pytest.approx(one["training"] / 4) and short["files"] == one["files"]


def test_folds_are_as_many_models() -> None:
    shapes, speed = shapes_of(SHIPPED[THINKING]), Speed(1e12, "", 1e9)
    once, thrice = (settings_of("chnsenticorp-offline", folds=folds) for folds in (1, 3))
    disks = [resources.disk_of(settings, shapes, download=False) for settings in (once, thrice)]
    assert {**disks[1], "base": 0} == {name: 3 * disk for name, disk in disks[0].items()}
    rows = {"train": 1000, "test": 100}
    seconds = [resources.seconds_of(settings, 10**9, rows, speed, 0) for settings in (once, thrice)]
    assert seconds[1] == pytest.approx({step: 3 * each for step, each in seconds[0].items()})


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (30, "minutes"),
        (2000, "less than an hour"),
        (20000, "some hours"),
        (80000, "a day"),
        (9 * 86400, "about 9 days"),
    ],
)
def test_time_classes(seconds: float, words: str) -> None:
    assert resources.time_class(seconds) == words


def test_a_family_that_05_does_not_know_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # without the official converter, which knows more
    assert resources.conversion_problem(SHIPPED[THINKING]) is None
    other = {**SHIPPED[THINKING], "architectures": ["GemmaForCausalLM"], "model_type": "gemma"}
    assert "GemmaForCausalLM" in str(resources.conversion_problem(other))


@pytest.fixture
def slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "measure_speed", lambda *_: Speed(60e9, "float32 on the CPU", 4e8))


def doctor(*words: str) -> tuple[int, str]:
    answer = CliRunner().invoke(app, ["doctor", *words])
    return answer.exit_code, answer.output


def test_qlora_of_4b_on_two_cores_is_no_plan(slow_machine: None, home: Path) -> None:
    words = ("-p", f"base_model={THINKING}", "-p", "load_in_4bit=true", "-p", "max_seq_length=1024")
    code, text = doctor(str(PROJECT / "params" / "quick.yaml"), *words)
    assert code == 0, text
    assert "Nothing needs to be changed" not in text
    assert "too long to be a plan" in text or "none of these fits" in text
    assert "reasons always" in text and "the configuration that comes with the workbook" in text


def test_rows_that_have_yet_to_be_brought_do_not_hide_the_rest(slow_machine: None, home: Path) -> None:
    code, text = doctor(str(PROJECT / "params" / "crypto-qwen3-4b-thinking.yaml"), "-p", "dataset=data/none.json")
    assert code == 2 and "no file or folder" in text and "Disk: about 43" in text and "for every 1,000" in text


def test_a_run_without_training_is_told_no_way_to_train(slow_machine: None, home: Path) -> None:
    code, text = doctor(str(PROJECT / "params" / "quick.yaml"), "-p", "finetuning_type=none")
    assert code == 0 and "Nothing is trained" in text and "training 0 h" in text and "Recommended" not in text


def test_json_has_the_numbers(slow_machine: None, home: Path) -> None:
    code, text = doctor(str(PROJECT / "params" / "quick.yaml"), "--json")
    takes = json.loads(text[text.index("{\n") :])["takes"]
    assert code == 0 and takes["where"] == "offline" and takes["disk"]["base"] == 0
    assert takes["rows"]["test"] > 0 and takes["speed"]["flops"] == 60e9 and takes["conversion"] is None


def test_a_disk_that_is_too_small_is_said(slow_machine: None, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib.cli import doctor as module

    monkeypatch.setattr(module, "free_space", lambda folder: 10**6)
    code, text = doctor(str(PROJECT / "params" / "quick.yaml"))
    assert code == 0 and "NOT ENOUGH" in text and "but not the disk" in text


def test_the_machine_is_measured(tmp_path: Path) -> None:
    found = resources.measure_speed(tmp_path)
    assert found.flops > 1e8 and found.disk > 1e5 and "float32" in found.how
    assert not list(tmp_path.iterdir())
