"""Rows in llama.cpp's types and back."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from lib.runs.machine import llama_cpp_problem

pytestmark = pytest.mark.skipif(llama_cpp_problem() is not None, reason="llama-cpp-python does not work here")


@pytest.mark.parametrize(
    "name", ["f16", "bf16", "q8_0", "q6_K", "q5_1", "q4_K", "q3_K", "q2_K", "iq4_xs", "iq3_s", "iq2_xs", "tq2_0"]
)
def test_weights_are_turned_back_as_the_package_gguf_does(name: str) -> None:
    """Two independent implementations: llama.cpp's C and numpy in the package `gguf`."""
    from lib.stages.quantize import llama_library

    rows = np.random.default_rng(1).normal(size=(3, 512)).astype(np.float32)
    stored = llama_library.quantize_rows(name, rows, np.ones(512, dtype=np.float32))
    back = llama_library.dequantize_rows(name, stored)
    assert back.shape == rows.shape and not np.array_equal(back, rows)
    np.testing.assert_allclose(back, dequantize(stored, gguf.GGMLQuantizationType[name.upper()]), rtol=1e-6, atol=1e-7)
