"""What is left of a fine-tuning, tensor by tensor: against a direct computation; the stage; the page."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from lib.models.base_model import resolve_base
from lib.report import display, weights_page
from lib.report.display import mark_names
from lib.runs.machine import llama_cpp_problem
from lib.runs.run import ProductDraft, Run, open_run
from lib.settings import Settings
from lib.stages.quantize.stage import Retention, SourceGrid, plan, quantize, retention, source_grid, stamp
from tests import tiny_gguf
from tests.stages.quantize.tiny_base import write_base

pytestmark = [
    pytest.mark.skipif(llama_cpp_problem() is not None, reason="llama-cpp-python does not work here"),
    pytest.mark.usefixtures("forked_children"),
]

MOVED = ("attn_q", "attn_k", "ffn_down")
SETTINGS = Settings(run_name="t", ladder=["Q8_0", "Q5_K_M", "Q4_1"], n_threads=1)


def on_grid(values: np.ndarray) -> np.ndarray:
    kind = gguf.GGMLQuantizationType.Q4_1
    return gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)


def half(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k: v.astype(np.float16).astype(np.float32) if v.ndim > 1 else v for k, v in weights.items()}


def tuned(base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The base with a change of rank 4 in some matrices, about a hundredth of their size."""
    made = dict(base)
    for i, (name, values) in enumerate(base.items()):
        if name.endswith(".weight") and name.split(".")[-2] in MOVED:
            a, b = (tiny_gguf.noise(shape, 50 + 2 * i + k, 1.0) for k, shape in enumerate([(len(values), 4), (4, 256)]))
            if values.shape[1] == 256:
                made[name] = values + 0.0005 * a @ b
            else:
                made[name] = values + 0.0005 * a @ tiny_gguf.noise((4, values.shape[1]), 99, 1.0)
    return half(made)


def paired(values: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of Llama's rotary rows, by a loop: first and second half of every head in turn."""
    size = len(values) // heads
    rows = [h * size + part * (size // 2) + i for h in range(heads) for i in range(size // 2) for part in range(2)]
    return values[rows]


def read(path: Path) -> dict[str, np.ndarray]:
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = data.reshape(tensor.shape[::-1].tolist()).astype(np.float64)
    return found


@pytest.fixture(scope="module")
def base_weights() -> dict[str, np.ndarray]:
    weights = tiny_gguf.tensors(256, 2, 3, 259, 512, 128)
    return half({k: on_grid(v) if v.ndim > 1 else v for k, v in weights.items()})


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_shares_are_those_of_a_direct_computation(base_weights: dict, tmp_path: Path, model_type: str) -> None:
    from lib.stages.quantize import compare_weights

    after = tuned(base_weights)
    heads = {"attn_q": 4, "attn_k": 2} if model_type == "llama" else {}
    stored = {k: paired(v, n) if (n := heads.get(k.split(".")[-2])) else v for k, v in after.items() if v.ndim > 1}
    before = {k: v for k, v in base_weights.items() if v.ndim > 1}
    start = {k: paired(v, n) if (n := heads.get(k.split(".")[-2])) else v for k, v in before.items()}
    source = tiny_gguf.write(tmp_path / "m.gguf", weights={**after, **stored})
    folder = write_base(tmp_path / "base", base_weights, model_type)
    files = {kind: tmp_path / f"{kind}.gguf" for kind in ("Q8_0", "Q4_K_M", "Q4_1")}
    for kind, path in files.items():
        tiny_gguf.quantize_file(source, path, kind, n_threads=1)
    argument = {"base": str(folder), "source": str(source), "files": {k: str(v) for k, v in files.items()}}
    found = compare_weights.compare_with_base(argument)
    assert found["left_out"] == []
    total = [sum(np.sum((stored[k] - start[k]) ** 2) for k in stored), sum(np.sum(start[k] ** 2) for k in start)]
    assert found["moved"] == pytest.approx(np.sqrt(total[0] / total[1]), rel=1e-5)
    for kind, path in files.items():
        made, rows = read(path), {row["tensor"]: row for row in found["files"][kind]}
        assert sorted(rows) == sorted(f"blk.{i}.{name}.weight" for i in range(2) for name in MOVED)
        for name, row in rows.items():
            delta, left = (np.float64(values) - start[name] for values in (stored[name], made[name]))
            assert row["kept"] == pytest.approx(np.sum(left * delta) / np.sum(delta**2), abs=1e-4)
            if row["type"] == "q4_1":
                size = np.abs(start[name].reshape(-1, 32)).max(axis=1, keepdims=True)
                near = 2 * 2.0 ** (np.floor(np.log2(size)) - 7)  # two last places of bfloat16
                changed = (np.abs(delta.reshape(-1, 32)) > near).any(axis=1)
                back = (np.abs(left.reshape(-1, 32)) <= near).all(axis=1)
                assert (row["changed"], row["returned"]) == (changed.sum(), (changed & back).sum())
    whole = Retention(None, found["files"])
    assert whole.kept("Q8_0") == pytest.approx(1, abs=0.05) and whole.kept("Q4_1") < min(0.2, whole.kept("Q4_K_M"))
    rows = [row for row in found["files"]["Q4_1"] if row["kind"] == "attn_q"]
    mean = np.average([row["kept"] for row in rows], weights=[row["square"] for row in rows])
    assert whole.kept("Q4_1", "attn_q") == pytest.approx(mean) and whole.returned("Q4_1") > 0.3
    assert whole.kept("Q4_1", "ffn_up") is None and whole.returned("Q4_1", "ffn_up") is None
    # In pieces of a few rows the sums are the same.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_weights, "_AT_ONCE", 12000)
        again = compare_weights.compare_with_base(argument)
    assert [r["kept"] for r in again["files"]["Q4_1"]] == pytest.approx([r["kept"] for r in found["files"]["Q4_1"]])


def make_run(folder: Path, before: dict[str, np.ndarray]) -> Run:
    run, base = open_run("t"), write_base(folder / "base", before)
    source = tiny_gguf.write(folder / "tiny-F16.gguf", weights=tuned(before))

    def data(work: ProductDraft) -> None:
        (work.folder / "x").write_text("1")
        work.facts |= {"base_model": str(base), "base_revision": resolve_base(str(base)).revision}

    run.produce("data", data, {})
    run.produce("gguf", lambda work: shutil.copyfile(source, work.folder / source.name), {}, ("data",))
    return run


@pytest.fixture
def unmarked():
    yield
    mark_names([], "")


def text(shown) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", shown.data))


def test_stage_and_page_of_a_base_on_a_grid(home: Path, tmp_path: Path, base_weights: dict, unmarked: None) -> None:
    run = make_run(tmp_path, base_weights)
    found = source_grid(SETTINGS, run)
    assert found.types["q4_1"] > 0.9 and "q5_0" not in found.types and found.matrices == 6 and found.distinct < 16
    assert run.stamps() == [stamp(found)] and "the base's weights lie on the grid of q4_1" in run.stamps()[0]
    assert source_grid(SETTINGS, run).product.made is False
    planned = plan(SETTINGS, run)
    weights_page.mark(found, planned)
    shown = text(display.table([{"type": name} for name in ("Q8_0", "Q5_K_M", "Q4_1", "q4_1, f32")], "Files."))
    assert "Q4_1‡" in shown and "q4_1‡, f32" in shown and "Q8_0‡" not in shown and "‡ on the grid of the base" in shown
    shown, reading = weights_page.grid(found)
    assert "q4_1‡ 1" in text(shown) and "**The base's weights lie" in reading.data

    result = quantize(SETTINGS, run)
    kept = retention(SETTINGS, run, result)
    assert retention(SETTINGS, run, result).product.made is False
    assert kept.source_grid["tiny-Q4_1.gguf"] > 0.5 and kept.source_grid["tiny-Q8_0.gguf"] == 0
    assert kept.product.entry.metrics["Q4_1"] == kept.kept("Q4_1") < 0.5
    shown, reading = weights_page.kept(kept)
    table = text(shown)
    assert f"all matrices {kept.kept('Q8_0'):.2f} (" in table and "attn_q" in table and "ffn_up" not in table
    words = reading.data
    assert f"Q4_1 {kept.kept('Q4_1'):.2f} ({100 * kept.returned('Q4_1'):.0f} %)" in words and "Q8_0" not in words
    shutil.rmtree(tmp_path / "base")
    still = retention(SETTINGS, run, result)
    assert still == replace(kept, product=still.product) and not still.product.made
    anew = SETTINGS.model_copy(update={"force": True})
    gone = retention(anew, run, result)
    (reason,) = weights_page.kept(gone)
    assert gone.product is None and "cannot be had now" in reason.data
    (reason,) = weights_page.grid(source_grid(anew, run))
    assert "Not measured." in reason.data


def test_an_adapter_in_rounded_weights_is_not_measured_from_others(home: Path, tmp_path: Path, base_weights) -> None:
    run = make_run(tmp_path, base_weights)

    def merged(work: ProductDraft) -> None:
        (work.folder / "x").write_text("1")
        work.facts["merge_base"] = "dequantized"

    run.produce("merged", merged, {})
    found = source_grid(SETTINGS, run)
    assert found.product is None and "merge_base: dequantized" in weights_page.grid(found)[0].data
    assert retention(SETTINGS, run, quantize(SETTINGS, run)).reason == found.reason


def test_a_base_that_was_never_quantized(home: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, half(tiny_gguf.tensors(256, 2, 3, 259, 512, 128)))
    settings = SETTINGS.model_copy(update={"ladder": ["Q8_0"]})
    found = source_grid(settings, run)
    assert found.types == {} and run.stamps() == [] and "on the grid of none of the" in weights_page.grid(found)[1].data
    kept = retention(settings, run, quantize(settings, run))
    assert set(kept.source_grid.values()) == {0}
    assert "Every file keeps at least 0.9 of the change; least Q8_0" in weights_page.kept(kept)[1].data


def test_few_values_without_a_type_that_fits() -> None:
    """Weights of a 4-bit format whose groups none of the types has (AWQ, GPTQ) are told by their few values."""
    said = stamp(SourceGrid(None, {"q4_1": 0.0}, 14.0, 100))
    assert "seem to come from a quantized file (14.0 different values" in said
    assert stamp(SourceGrid(None, {"q4_1": 0.1}, 31.0, 100)) == stamp(SourceGrid(None)) == ""
