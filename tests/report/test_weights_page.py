"""Page 06: the block of Q4_K that it takes apart is put together as gguf does it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import gguf
import nbformat
import numpy as np
import pytest

from lib.report import weights_page
from lib.runs.machine import llama_cpp_problem

PROJECT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(llama_cpp_problem() is not None, reason="llama-cpp-python does not work here")


def test_the_cell_takes_a_block_apart() -> None:
    from lib.stages.quantize.llama_library import quantize_rows

    weights = np.random.default_rng(0).normal(size=(1, 256)).astype(np.float32)
    stored = quantize_rows("q4_K", weights, None)
    block = weights_page.Block("blk.0.attn_v.weight", "Q4_K_M", weights[0], stored[0])
    shown: list = []
    page = SimpleNamespace(q4_k_block=lambda *_: block, block=weights_page.block)
    names = {"weights_page": page, "run": None, "result": None, "gguf": gguf, "np": np}
    names["display"] = SimpleNamespace(show=lambda *parts: shown.extend(parts))
    cells = nbformat.read(PROJECT / "notebooks" / "06_quantize.ipynb", as_version=4).cells
    exec(next(cell.source for cell in cells if cell.get("id") == "block-apart"), names)
    rebuilt = (names["d"] * names["scales"])[:, None] * names["codes"] - (names["d_min"] * names["minimums"])[:, None]
    exact = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.Q4_K)
    assert rebuilt.reshape(-1) == pytest.approx(exact[0], abs=1e-6)
    error = np.linalg.norm(exact - weights) / np.linalg.norm(weights)
    table, reading = shown
    assert "blk.0.attn_v.weight in Q4_K_M, as it is stored: 256 weights in 144 bytes" in table.data
    assert "144 bytes for 256 weights are 4.5 bits a weight" in reading.data and f"{100 * error:.1f} %" in reading.data
    assert "224–255" in table.data and table.data.count("<tr>") == 9
