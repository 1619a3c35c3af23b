"""The stage: formats in processes of their own, one product, nothing absent without a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.errors import InputError
from lib.exporting import export
from lib.exporting import stage as export_stage
from lib.models.saved import load_as_saved
from lib.run import Run, open_run
from lib.settings import Settings
from tests import tiny_run
from tests.exporting.conftest import with_merged


def settings(*formats: str) -> Settings:
    return Settings(run_name="tiny", export_formats=list(formats))


@pytest.fixture
def run(home: Path, base: Path) -> Run:
    return with_merged(tiny_run.make_run(base), base)


def test_made_skipped_and_made_when_the_library_comes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    if problem := export_stage.FORMATS["gptq"].problem():
        pytest.skip(problem)
    from lib import device

    hidden = monkeypatch.context()
    with hidden as patched:
        patched.setattr("lib.exporting.formats.has_module", lambda n: n != "bitsandbytes" and device.has_module(n))
        result = export(settings("bf16", "nf4", "gptq"), run)
    assert result.product.made and [record["format"] for record in result.made] == ["bf16", "gptq"]
    assert result.skipped == ({"format": "nf4", "reason": "bitsandbytes not installed"},)
    assert "export format nf4 skipped: bitsandbytes not installed" in run.stamps()
    folder = result.product.path
    assert sorted(path.name for path in folder.iterdir()) == ["bf16", "exports.json", "gptq"]
    bf16, gptq = result.made
    assert bf16["bits_per_weight"] == 16 and bf16["made_by"] == "transformers" and bf16["check"]["mean_kld"] == 0
    assert gptq["calibration_rows"] == 24 and gptq["group_size"] == 64  # all training rows of the tiny run
    assert gptq["bytes"] == (folder / "gptq" / "model.safetensors").stat().st_size < bf16["bytes"]
    assert gptq["peak_memory_mib"] > 100 and gptq["seconds"] > 0
    card = (folder / "gptq" / "README.md").read_text(encoding="utf-8")
    assert "not a result" in card and "24 training rows" in card and "`tiny`" in card
    assert type(load_as_saved(folder / "gptq")).__name__ == "Qwen2ForCausalLM"
    again = export(settings("bf16", "nf4", "gptq"), run)
    assert not again.product.made and again.made == result.made and again.skipped == result.skipped

    monkeypatch.setattr(export_stage.Format, "version", lambda self: "99")  # as if it had been installed since
    monkeypatch.setattr(export_stage, "_make", lambda wanted, *_: ({}, "not made in this test"))
    later = export(settings("bf16", "nf4", "gptq"), run)
    assert later.product.made and "export_libraries" in later.product.message
    assert [skip["format"] for skip in later.skipped] == ["bf16", "nf4", "gptq"]


def test_no_format_is_asked_for(run: Run) -> None:
    result = export(settings(), run)
    assert result.made == () and result.skipped == ()
    assert [path.name for path in result.product.path.iterdir()] == ["exports.json"]


@pytest.mark.parametrize(
    "error", [InputError("no group fits.", "x", "y"), RuntimeError("…\nValueError: no group fits.")]
)
def test_a_library_that_fails_is_skipped_and_leaves_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    if problem := export_stage.FORMATS["torchao-int8"].problem():
        pytest.skip(problem)

    def fails(function: str, argument: dict, what: str) -> dict:
        Path(argument["output"]).mkdir()
        raise error

    monkeypatch.setattr(export_stage, "run_child", fails)
    result = export(settings("torchao-int8"), run)
    assert result.made == () and "no group fits" in result.skipped[0]["reason"]
    assert [path.name for path in result.product.path.iterdir()] == ["exports.json"]
    if isinstance(error, RuntimeError):  # what needs no further package must not fail
        with pytest.raises(RuntimeError, match="no group fits"):
            export(settings("bf16"), run)
        assert not (run.folder / ".exports.part").exists()


def test_without_a_merged_model(home: Path, base: Path) -> None:
    with pytest.raises(InputError, match="04_merge"):
        export(settings("bf16"), tiny_run.make_run(base))
    with pytest.raises(InputError, match="01_data"):
        export(settings("bf16"), open_run("none"))
