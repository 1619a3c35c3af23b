"""Floating-point arrays without torch: equal to torch and NumPy on every bit pattern."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lib.models.weights import NUMPY, largest_magnitude, to_bfloat16, to_float16, widen

EVERY = np.arange(2**16, dtype=np.uint16)


def test_every_bfloat16() -> None:
    wide = torch.from_numpy(EVERY.view(np.int16)).view(torch.bfloat16)
    finite = torch.isfinite(wide).numpy()
    assert np.array_equal(widen(EVERY, "BF16")[finite], wide.float().numpy()[finite])
    assert np.array_equal(to_float16(EVERY, "BF16")[finite], wide.to(torch.float16).numpy()[finite])
    assert to_bfloat16(EVERY, "BF16") is EVERY


def test_float32_to_bfloat16_rounds_as_torch_does() -> None:
    draw = np.random.default_rng(1)
    values = draw.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate(
        [values[np.isfinite(values)], np.array([0x3F808000, 0x3F818000], np.uint32).view(np.float32)]
    )
    wanted = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(to_bfloat16(values, "F32"), wanted)


@pytest.mark.parametrize("dtype", NUMPY)
def test_largest_magnitude(dtype: str) -> None:
    values = np.array([0.5, -3.0, 2.0, -0.0])
    stored = to_bfloat16(values, "F64") if dtype == "BF16" else values.astype(NUMPY[dtype])
    assert largest_magnitude(stored, dtype) == 3.0
    assert largest_magnitude(stored[:0], dtype) == 0.0
    for odd in (math.nan, math.inf, -math.inf):
        wrong = np.array([1.0, odd], np.float32)
        bits = (wrong.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else wrong.astype(NUMPY[dtype])
        assert largest_magnitude(bits, dtype) == math.inf
