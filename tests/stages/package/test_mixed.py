"""A file under a size budget through every later stage: compared, explained, packaged, tested where it was packed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lib.runs.files import write_json
from lib.runs.machine import llama_cpp_problem
from lib.runs.run import Run
from lib.settings import Settings
from lib.stages.compare.stage import compare
from lib.stages.convert.convert import convert
from lib.stages.package.stage import package
from lib.stages.quantize.stage import mix_effect, predictions, quantize, tensor_errors
from tests import tiny_run
from tests.stages.package.test_package import CONVENTION

pytestmark = [
    pytest.mark.skipif(llama_cpp_problem() is not None, reason="llama-cpp-python does not work here"),
    pytest.mark.usefixtures("unmeasured_children", "forked_children"),
]
MIX = "MIX_120KB"
SETTINGS = Settings(
    run_name="tiny", imatrix="auto", size_budget_mb=0.12, ladder=["Q8_0", "Q4_0"], n_ctx=64, perplexity_tokens=512
)


@pytest.fixture
def run(home: Path) -> Run:
    tiny_run.make_base(home / "base")
    run = tiny_run.make_run(home / "base")
    run.produce("merged", lambda work: shutil.copytree(home / "base", work.folder, dirs_exist_ok=True) and None, {})
    run.produce("gguf", lambda work: convert(home / "base", work.folder / "tiny-F16.gguf") and None, {})
    run.produce("exports", lambda work: write_json(work.folder / "exports.json", {"made": [], "skipped": []}), {})
    return run


def test_from_the_budget_to_the_package(run: Run) -> None:
    result = quantize(SETTINGS, run)
    mixed = result.files[-1]
    assert mixed.type == MIX and mixed.bytes <= 120_000 and not mixed.fallbacks and not mixed.set_by_hand
    measured = mix_effect(SETTINGS, run, result)
    content = measured.content
    assert content["mixed"]["file"] == mixed.file and [e["type"] for e in content["types"]] == ["Q8_0", "Q4_0"]
    assert content["tokens"] == 8 * 31 and content["types"][0]["difference"] > 0, "Q8_0 is far larger"
    for entry in content["types"]:
        assert entry["difference"] == pytest.approx(content["mixed"]["kld"] - entry["kld"], rel=1e-9)
    assert not mix_effect(SETTINGS, run, result).product.made
    tensor_errors(SETTINGS, run, result)
    compared = compare(SETTINGS, run)
    entry = compared.entry(MIX)
    assert entry["file"] == mixed.file and entry["bytes"] == mixed.bytes and entry["kld_mean"] > 0
    assert predictions(run).keys() == {file.file for file in result.files}
    made = package(run, MIX, n_threads=1)  # whose own test_model.py has passed
    assert CONVENTION.fullmatch(made.report["file"]["name"]) and made.report["file"]["name"].endswith(
        f"-tiny-v1.0-{MIX}.gguf"
    )
    card = (made.product.path / "README.md").read_text(encoding="utf-8")
    assert f"{MIX} is no recipe of llama.cpp: under a budget of 120,000 bytes" in card
    assert made.report["mix"] == mixed.mix and made.report["file"]["type"] == MIX
    assert f"FROM ./{made.report['file']['name']}" in (made.product.path / "Modelfile").read_text(encoding="utf-8")
