"""The stage: the ladder as a product, files taken over when only the ladder changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lib.errors import InputError
from lib.report import weights_page
from lib.report.display import rows_of
from lib.runs.files import sha256_file
from lib.runs.run import ProductDraft, Run, open_run
from lib.settings import Settings
from lib.stages.quantize import files
from lib.stages.quantize.stage import mix_effect, plan, predictions, quantize, tensor_errors
from tests import tiny_gguf


def settings(*ladder: str, force: bool = False) -> Settings:
    return Settings(run_name="t", ladder=list(ladder), force=force, n_threads=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("source") / "tiny-F16.gguf", width=896, layers=1)


def make_gguf(run: Run, source: Path, force: bool = False) -> None:
    def build(work: ProductDraft) -> None:
        shutil.copyfile(source, work.folder / source.name)

    run.produce("gguf", build, parameters={}, force=force)


@pytest.fixture
def run(home: Path, source: Path) -> Run:
    run = open_run("t")
    make_gguf(run, source)
    return run


def test_ladder_then_longer_ladder(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = quantize(settings("Q8_0", "Q4_K_M"), run)
    folder = first.product.path
    assert sorted(p.name for p in folder.iterdir()) == ["quantized.json", "tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf"]
    assert [f.type for f in first.files] == ["Q8_0", "Q4_K_M"]
    assert all(f.bytes == f.predicted_bytes == (folder / f.file).stat().st_size for f in first.files)
    assert first.source["type"] == "F16" and first.source["weights"] == first.files[0].weights
    assert first.files[0].bits_per_weight > first.files[1].bits_per_weight > 4.5
    note = " ".join(run.stamps())
    assert "896" in note and "Q4_K_M" in note and "Q8_0" not in note

    again = quantize(settings("Q8_0", "Q4_K_M"), run)
    assert not again.product.made and again.files == first.files
    assert mix_effect(settings("Q8_0", "Q4_K_M"), run, first) is None and predictions(run) == {}
    planned = plan(settings("Q8_0", "Q4_K_M"), run)
    assert [p["bytes"] for p in planned] == [f.bytes for f in first.files]
    rows = rows_of("quantize.planned_files", planned)
    assert [row["fallbacks"] for row in rows] == [len(f.fallbacks) for f in first.files] == [0, 7]
    assert rows[0]["tensor_types"] == "q8_0, f32" and rows[0]["set_by_hand"] == 0

    made: list[str] = []
    real = files.quantize_planned

    def counted(*arguments, **keywords):
        made.append(arguments[2].type)
        return real(*arguments, **keywords)

    monkeypatch.setattr(files, "quantize_planned", counted)
    digest = sha256_file(folder / "tiny-Q8_0.gguf")
    longer = quantize(settings("Q8_0", "Q5_K_M"), run)
    assert made == ["Q5_K_M"] and "ladder" in longer.product.message
    assert [f.type for f in longer.files] == ["Q8_0", "Q5_K_M"]
    assert sha256_file(folder / "tiny-Q8_0.gguf") == digest
    assert not (folder / "tiny-Q4_K_M.gguf").exists()
    assert longer.product.entry.facts["reused"] == ["Q8_0"]
    assert quantize(settings("Q8_0", "Q5_K_M"), run).product.made is False

    quantize(settings("Q8_0", force=True), run)
    assert made == ["Q5_K_M", "Q8_0"]


def test_number_formats_in_the_ladder(run: Run) -> None:
    """F32 and BF16 are files like others; F16 is the converted file, which is not made twice, and that is said."""
    asked = settings("F32", "F16", "BF16")
    assert [entry["type"] for entry in plan(asked, run)] == ["F32", "BF16"]
    result = quantize(asked, run)
    assert [file.type for file in result.files] == ["F32", "BF16"]
    assert result.files[0].bits_per_weight == 32.0 and result.files[1].bytes < 1.01 * result.source["bytes"]
    assert any(stamp.startswith("F16 of the ladder is the converted file itself") for stamp in run.stamps())
    errors = tensor_errors(asked, run, result)
    assert {row["relative_rmse"] for row in errors.files["F32"]} == {0.0} != errors.files["BF16"][0]["relative_rmse"]
    assert "<img" in weights_page.error_map(errors).data and weights_page.error_kinds(errors)
    assert quantize(asked, run).product.made is False
    exact = settings("F32")
    only = tensor_errors(exact, run, quantize(exact, run))
    assert "no error to draw" in weights_page.error_map(only).data and weights_page.error_kinds(only)
    with pytest.raises(InputError, match=r"nothing but F16.*add one to ladder"):
        quantize(settings("F16"), run)


def test_damaged_file_is_made_again(run: Run) -> None:
    path = quantize(settings("Q8_0", "Q4_0"), run).product.path / "tiny-Q8_0.gguf"
    digest = sha256_file(path)
    with path.open("r+b") as stream:
        stream.seek(-10, 2)
        stream.write(b"x")
    result = quantize(settings("Q8_0", "Q4_0"), run)
    assert result.product.made and "tiny-Q8_0.gguf" in result.product.message
    assert result.product.entry.facts["reused"] == ["Q4_0"]
    assert sha256_file(path) == digest


def test_another_source_reuses_nothing(run: Run, tmp_path: Path) -> None:
    quantize(settings("Q8_0"), run)
    make_gguf(run, tiny_gguf.write(tmp_path / "tiny-F16.gguf", seed=9), force=True)
    result = quantize(settings("Q8_0"), run)
    assert result.product.made and result.product.entry.facts["reused"] == []


def test_interrupted_ladder_continues(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = files.quantize_planned

    def interrupted(*arguments, **keywords):
        if arguments[2].type == "Q4_0":
            raise KeyboardInterrupt
        return real(*arguments, **keywords)

    monkeypatch.setattr(files, "quantize_planned", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(settings("Q8_0", "Q4_0"), run)
    assert "quantized" not in run.manifest.entries() and not (run.folder / "quantized").exists()
    left = run.folder / ".quantized.part" / ".tiny-Q4_0.gguf.x1.part"
    left.mkdir()
    (left / "tiny-Q4_0.gguf").write_bytes(bytes(100))
    monkeypatch.setattr(files, "quantize_planned", real)
    result = quantize(settings("Q8_0", "Q4_0"), run)
    assert result.product.entry.facts["reused"] == ["Q8_0"]
    assert sorted(result.product.entry.outputs) == ["quantized.json", "tiny-Q4_0.gguf", "tiny-Q8_0.gguf"]


def test_without_gguf_product(home: Path) -> None:
    with pytest.raises(InputError, match="05_convert_gguf"):
        quantize(settings("Q8_0"), open_run("none"))


def test_options_are_parameters_of_the_product(run: Run) -> None:
    quantize(settings("Q8_0", "Q4_0"), run)
    changed = Settings(run_name="t", ladder=["Q8_0", "Q4_0"], tensor_types=["attn_v=f16"], n_threads=1)
    result = quantize(changed, run)
    assert result.product.made and "tensor_types" in result.product.message
    assert result.product.entry.facts["reused"] == []
    assert all(row["tensor"] == "blk.0.attn_v.weight" for f in result.files for row in f.set_by_hand)
    assert [len(f.set_by_hand) for f in result.files] == [1, 1]
    assert quantize(changed, run).product.made is False


def test_importance_matrix_by_its_content(home: Path, tmp_path: Path) -> None:
    run, matrix = open_run("m"), tmp_path / "imatrix.gguf"
    make_gguf(run, tiny_gguf.write(tmp_path / "tiny-F16.gguf"))
    tiny_gguf.write_imatrix(matrix)
    wanted = Settings(run_name="m", ladder=["IQ4_XS", "Q2_K_S"], imatrix=str(matrix), n_threads=1)
    first = quantize(wanted, run)
    assert first.product.made and [f.imatrix for f in first.files] == ["imatrix.gguf"] * 2
    assert quantize(wanted, run).product.made is False
    tiny_gguf.write_imatrix(matrix, calls=5)
    again = quantize(wanted, run)
    assert again.product.made and again.product.entry.facts["reused"] == []
    matrix.unlink()
    with pytest.raises(InputError, match=r"no file .*imatrix"):
        quantize(wanted, run)
