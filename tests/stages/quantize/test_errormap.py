"""The error map: every tensor of every file against the source, by arithmetic that is done again here."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from lib.report import weights_page
from lib.runs.machine import llama_cpp_problem
from lib.runs.run import Run, open_run
from lib.settings import Settings
from lib.stages.quantize import compare_weights
from lib.stages.quantize.stage import TensorErrors, quantize, tensor_errors
from tests import tiny_gguf
from tests.stages.quantize.test_quantize_stage import make_gguf

pytestmark = pytest.mark.skipif(llama_cpp_problem() is not None, reason="llama-cpp-python does not work here")


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Run:
    run = open_run("t")
    make_gguf(run, tiny_gguf.write(tmp_path / "tiny-F16.gguf", width=256, layers=2))
    return run


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def by_hand(tensor: gguf.ReaderTensor) -> np.ndarray:
    """Q8_0: blocks of a half-precision scale and 32 signed bytes."""
    blocks = np.asarray(tensor.data).reshape(-1, 34)
    return (blocks[:, :2].copy().view("<f2").astype(np.float32) * blocks[:, 2:].view(np.int8)).ravel()


def test_every_tensor_of_every_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(run_name="t", ladder=["Q8_0", "Q4_K_M", "IQ4_XS"], n_threads=1)
    result = quantize(settings, run)
    found = tensor_errors(settings, run, result)
    source = tensors(run.folder / "gguf" / "tiny-F16.gguf")
    for file in result.files:
        made = tensors(result.product.path / file.file)
        changed = [name for name in made if made[name].tensor_type != source[name].tensor_type]
        rows = {row["tensor"]: row for row in found.files[file.type]}
        assert sorted(rows) == sorted(changed) and len(changed) >= 15
        for name, row in rows.items():
            wanted = np.asarray(source[name].data, dtype=np.float32).ravel()
            kind = made[name].tensor_type
            got = by_hand(made[name]) if kind.name == "Q8_0" else gguf.quants.dequantize(made[name].data, kind).ravel()
            error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
            assert row["relative_rmse"] == pytest.approx(error, rel=1e-4), (file.type, name)
            assert row["bits_per_weight"] == 8 * made[name].n_bytes / wanted.size
    worst = {name: max(row["relative_rmse"] for row in rows) for name, rows in found.files.items()}
    assert worst["Q8_0"] < 0.01 < worst["Q4_K_M"] < 0.2
    assert tensor_errors(settings, run, result).product.made is False
    # In pieces of a few rows the sums are the same.
    monkeypatch.setattr(compare_weights, "_AT_ONCE", 1000)
    paths = {file.type: str(result.product.path / file.file) for file in result.files}
    again = compare_weights.compare_with_source({"source": str(run.folder / "gguf" / "tiny-F16.gguf"), "files": paths})
    for name, rows in again["files"].items():
        for row, other in zip(rows, found.files[name], strict=True):
            assert row["relative_rmse"] == pytest.approx(other["relative_rmse"], rel=1e-9)


def test_the_page(run: Run) -> None:
    settings = Settings(run_name="t", ladder=["Q8_0", "Q2_K"], n_threads=1)
    found = tensor_errors(settings, run, quantize(settings, run))
    kinds = found.by_kind("Q2_K")
    mine = [row for row in found.files["Q2_K"] if row["kind"] == "ffn_down"]
    wanted = np.sqrt(np.mean([row["relative_rmse"] ** 2 for row in mine]))
    assert len(mine) == 2 and kinds["ffn_down"]["relative_rmse"] == pytest.approx(wanted)
    assert weights_page.kinds_of(found)[-1] == "token_embd" and {row["layer"] for row in mine} == {0, 1}
    shown, reading = weights_page.error_kinds(found)
    assert f"{wanted:.2g} at" in shown.data and 'scope="col">Q8_0</th>' in shown.data
    worst = max(kinds, key=lambda kind: kinds[kind]["relative_rmse"])
    assert f"Q2_K: {worst} (" in reading.data
    shown = weights_page.error_map(found).data
    assert "Heat maps" in shown and "token_embd.weight" in shown
    many = [{**row, "layer": layer} for layer in range(24) for row in found.files["Q2_K"] if row["layer"] == 0]
    assert "data:image/png" in weights_page.error_map(TensorErrors(found.product, {"Q2_K": many, "Q8_0": many})).data
