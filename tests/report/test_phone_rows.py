"""Real phones beside this machine: matched by SHA-256, or left out with a sentence."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lib.cli.evaluate import RowOptions, compare
from lib.errors import InputError
from lib.prompts.tasks import ClassificationTask
from lib.report import steps_page
from lib.runs.files import write_json
from lib.stages.compare.speed import match_files, measured
from tests.serve.test_phone import RESULT

ENTRY = {
    "type": "Q8_0",
    "file": "m-Q8_0.gguf",
    "load_seconds": 0.5,
    "prompt_tokens_per_second": 90.0,
    "prompt_tokens_per_second_range": [80.0, 95.0],
    "generation_tokens_per_second": 40.0,
    "generation_tokens_per_second_range": [39.0, 41.0],
}


def make_run(folder: Path, digest: str) -> Any:
    products = {
        "gguf": {"m-F16.gguf": {"sha256": "f" * 64}},
        "quantized": {"m-Q8_0.gguf": {"sha256": digest}, "quantized.json": {"sha256": "e" * 64}},
    }
    return SimpleNamespace(
        folder=folder, require=lambda name: SimpleNamespace(entry=SimpleNamespace(outputs=products[name]))
    )


def test_results_of_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, RESULT["sha256"])
    assert measured(run, [ENTRY]) == ([], [])
    write_json(tmp_path / "devices" / "1-good.json", RESULT)
    write_json(tmp_path / "devices" / "2-other.json", {**RESULT, "sha256": "b" * 64})
    (tmp_path / "devices" / "3-damaged.json").write_text("{", encoding="utf-8")
    (result,), left_out = measured(run, [ENTRY])
    assert result["type"] == "Q8_0" and [text.split()[0] for text in left_out] == ["2-other.json", "3-damaged.json"]
    assert "which is not compared here" in left_out[0]
    phone, machine = steps_page.phones([result], [{**ENTRY, "type": "F16"}, ENTRY], "EPYC")
    assert phone["generation, tokens/s"] == "7.9 (7.5 – 8.2)" and phone["stored tokens"] == "9/9"
    assert machine["device"] == "this machine (EPYC)" and machine["prompt, tokens/s"] == "90.0 (80.0 – 95.0)"
    compared = SimpleNamespace(files=[ENTRY], conditions={"processor": "EPYC"})
    text = steps_page.shown_phones([result], left_out, compared, "quick")[1].data
    assert text.startswith("1 result of the phone page") and "9 of 9 stored tokens" in text and left_out[1] in text


def test_without_results_the_page_says_how() -> None:
    assert "workbook package quick --web" in steps_page.shown_phones([], [], None, "quick")[0].data


def test_files_named_by_hand(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"model")
    content = {**RESULT, "sha256": hashlib.sha256(b"model").hexdigest()}
    write_json(tmp_path / "phone.json", content)
    assert match_files([tmp_path / "phone.json"], [tmp_path / "a.gguf"]) == [{**content, "compared": "a.gguf"}]
    (tmp_path / "a.gguf").write_bytes(b"another model")
    with pytest.raises(InputError, match="not compared here"):
        match_files([tmp_path / "phone.json"], [tmp_path / "a.gguf"])
    with pytest.raises(InputError, match="no result"):
        match_files([tmp_path / "absent.json"], [])


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_compare_shows_them(
    as_json: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the measuring itself replaced: what is under test is the joining of a phone's result with its file."""
    (tmp_path / "m-Q8_0.gguf").write_bytes(b"model")
    write_json(tmp_path / "phone.json", {**RESULT, "sha256": hashlib.sha256(b"model").hexdigest()})
    entry = {**ENTRY, "bytes": 5, "bits_per_weight": 8.5, "kld_mean": 0.1, "verdict": "reference"}
    content = {"files": [entry], "conditions": {"processor": "EPYC"}}
    monkeypatch.setattr("lib.stages.compare.files.compare_files", lambda *args, **keys: content)
    task = ClassificationTask(("a", "b"), "s", "{text}", 64)
    monkeypatch.setattr(RowOptions, "task", lambda self: task)
    monkeypatch.setattr(RowOptions, "rows", lambda self, task: ([], {}))
    compare(tmp_path / "m-Q8_0.gguf", [], tmp_path, device=[tmp_path / "phone.json"], as_json=as_json)
    shown = capsys.readouterr().out
    if as_json:
        assert json.loads(shown)["devices"][0]["type"] == "Q8_0"
    else:
        assert "Pixel 8" in shown and "this machine (EPYC)" in shown and "7.9 (7.5 – 8.2)" in shown
