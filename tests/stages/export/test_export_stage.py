"""The stage: formats in processes of their own, one product, nothing absent without a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.errors import InputError
from lib.models.loading import load_as_saved
from lib.runs.run import Run, open_run
from lib.settings import Settings
from lib.stages.export import stage as export_stage
from lib.stages.export.stage import export
from tests import tiny_run
from tests.stages.export.conftest import with_merged

pytestmark = pytest.mark.usefixtures("forked_children")


def settings(*formats: str) -> Settings:
    return Settings(run_name="tiny", export_formats=list(formats))


@pytest.fixture
def run(home: Path, base: Path) -> Run:
    return with_merged(tiny_run.make_run(base), base)


def test_made_skipped_and_made_when_the_library_comes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    if problem := export_stage.FORMATS["gptq"].problem():
        pytest.skip(problem)
    from lib.runs import machine

    hidden = monkeypatch.context()
    with hidden as patched:
        patched.setattr("lib.stages.export.stage.has_module", lambda n: n != "bitsandbytes" and machine.has_module(n))
        result = export(settings("bf16", "nf4", "gptq"), run)
    assert result.product.made and [record["format"] for record in result.made] == ["bf16", "gptq"]
    assert result.skipped == ({"format": "nf4", "reason": "bitsandbytes not installed (extra torch)"},)
    assert "export format nf4 skipped: bitsandbytes not installed (extra torch)" in run.stamps()
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

    tried: list[str] = []

    def refuses(function: str, argument: dict, what: str) -> dict:
        tried.append(argument["format"])
        raise InputError("not made here.", "another place.", "go there.")

    monkeypatch.setattr(export_stage, "run_child", refuses)
    fewer = export(settings("gptq"), run)  # taken over
    assert fewer.made == (gptq,) and fewer.product.entry.facts["reused"] == ["gptq"] and tried == []
    assert [path.name for path in fewer.product.path.iterdir() if path.is_dir()] == ["gptq"]
    assert type(load_as_saved(fewer.product.path / "gptq")).__name__ == "Qwen2ForCausalLM"
    monkeypatch.setattr(export_stage.Format, "version", lambda self: "99")  # another llm-compressor
    later = export(settings("gptq"), run)
    assert later.product.made and "export_libraries" in later.product.message
    assert tried == ["gptq"] and later.made == ()


def test_an_interrupted_export_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def answers(function: str, argument: dict, what: str) -> dict:
        if argument["format"] == "bf16" and made == ["fp16"]:
            Path(argument["output"], "half").mkdir(parents=True)
            raise KeyboardInterrupt
        made.append(argument["format"])
        Path(argument["output"]).mkdir()
        Path(argument["output"], "model.safetensors").write_bytes(b"x")
        check = {"mean_kld": 0.0, "same_top": 1.0, "positions": 1}
        sizes = {"bytes": 1, "tensor_bytes": 2, "weights": 1, "bits_per_weight": 16.0}
        return {**sizes, "peak_memory_mib": 1.0, "seconds": 0.1, "check": check}

    monkeypatch.setattr(export_stage, "run_child", answers)
    with pytest.raises(KeyboardInterrupt):
        export(settings("fp16", "bf16"), run)
    assert "exports" not in run.manifest.entries() and not (run.folder / "exports").exists()
    made.append("interrupted")
    result = export(settings("fp16", "bf16"), run)
    assert made == ["fp16", "interrupted", "bf16"] and result.product.entry.facts["reused"] == ["fp16"]
    assert sorted(path.name for path in (run.folder / "exports" / "bf16").iterdir()) == [
        "README.md",
        "model.safetensors",
    ]
    forced = Settings(run_name="tiny", export_formats=["fp16"], force=True)
    export(forced, run)
    assert made[-1] == "fp16"
    (run.folder / "exports" / "fp16" / "model.safetensors").write_bytes(b"y")  # damaged: made again
    assert export(settings("fp16"), run).product.made and made[-2:] == ["fp16", "fp16"]


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
        assert "exports" in run.manifest.entries()  # the former product stays


def test_without_a_merged_model(home: Path, base: Path) -> None:
    with pytest.raises(InputError, match="04_merge"):
        export(settings("bf16"), tiny_run.make_run(base))
    with pytest.raises(InputError, match="01_data"):
        export(settings("bf16"), open_run("none"))


def test_a_package_has_made_what_its_folders_lack(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what the run has; of several formats that would do the first that works here."""
    from lib.cli.package import export_lacking
    from lib.stages.package.stage import lacking, link_tree

    export(settings("bf16"), run)
    assert lacking(run, ["merged_model", "fp16", "int4", "gguf"]) == {
        "fp16": ("fp16",),
        "int4": ("nf4", "gptq", "autoround"),
    }
    export_lacking(run, ["merged_model", "fp16", "gguf"])
    folder = run.folder / "exports"
    assert {path.name for path in folder.iterdir()} == {"bf16", "fp16", "exports.json"}
    assert lacking(run, ["fp16"]) == {} and type(load_as_saved(folder / "fp16")).__name__ == "Qwen2ForCausalLM"
    tried: list[str] = []

    def refuses(function: str, argument: dict, what: str) -> dict:
        tried.append(argument["format"])
        raise InputError(f"{argument['format']} does not work here.", "another place.", "go there.")

    monkeypatch.setattr(export_stage, "run_child", refuses)
    monkeypatch.setattr(export_stage.Format, "problem", lambda self: None)
    export_lacking(run, ["fp16", "int4"])
    assert (
        list(dict.fromkeys(tried)) == ["nf4", "gptq", "autoround"] and (folder / "fp16" / "model.safetensors").is_file()
    )
    with pytest.raises(InputError, match=r"bf16, fp16 \(nf4: nf4 does not work here.*gptq does not.*leave int4 out"):
        link_tree(run, ["int4"], run.folder)
