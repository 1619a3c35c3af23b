"""The grid of a base's weights: what each type gives back of weights from Q4_1, NF4 and none."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from lib.errors import InputError
from lib.runs.machine import llama_cpp_problem
from tests import tiny_gguf
from tests.stages.quantize.tiny_base import write_base

pytestmark = pytest.mark.skipif(llama_cpp_problem() is not None, reason="llama-cpp-python does not work here")

RNG = np.random.default_rng(11)


def gaussian(rows: int = 64, columns: int = 512) -> np.ndarray:
    return (0.04 * RNG.standard_normal((rows, columns))).astype(np.float32)


def stored(weights: np.ndarray, dtype: str) -> np.ndarray:
    """Rounded to a 16-bit dtype (bfloat16 by integer arithmetic), as float32."""
    if dtype == "F16":
        return weights.astype(np.float16).astype(np.float32)
    bits = weights.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def shares(weights: np.ndarray, dtype: str, values: np.ndarray | None = None) -> dict[str, float]:
    from lib.stages.quantize.compare_weights import _shares, varied

    return _shares(weights, dtype, values, varied(weights))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_generic_weights_lie_on_no_grid(dtype: str) -> None:
    for weights in (gaussian(), (0.02 * RNG.standard_t(3, (64, 512))).astype(np.float32)):
        found = shares(stored(weights, dtype), dtype)
        assert len(found) == 14 and max(found.values()) == 0.0


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("kind", ["q4_1", "q4_0", "q5_0", "q5_1", "q8_0"])
def test_weights_of_a_type_are_given_back_by_it(kind: str, dtype: str) -> None:
    """The weights come from the library's own quantizer and dequantizer, not from llama.cpp."""
    number = gguf.GGMLQuantizationType[kind.upper()]
    weights = stored(gguf.quants.dequantize(gguf.quants.quantize(gaussian(), number), number), dtype)
    found = shares(weights, dtype)
    assert found[kind] > 0.85
    assert found["q2_K"] == found["q3_K"] == found["iq4_nl"] == 0.0  # of another shape or coarser


def test_with_a_matrix_a_finer_type_finds_the_grid() -> None:
    number = gguf.GGMLQuantizationType.Q4_1
    weights = stored(gguf.quants.dequantize(gguf.quants.quantize(gaussian(), number), number), "BF16")
    found = shares(weights, "BF16", np.ones(512, np.float32))
    assert found["q4_1"] > 0.9 and found["q5_1"] > 0.3


def test_nf4() -> None:
    from lib.stages.quantize.compare_weights import _NF4_CODE, nf4

    code = RNG.integers(0, 16, (64, 512))
    code[:, ::64] = 15  # every block holds its largest weight
    scale = np.repeat(np.exp(RNG.normal(-3, 0.3, (64, 8))), 64, axis=1)
    weights = stored((_NF4_CODE[code] * scale).astype(np.float32), "BF16")
    assert np.allclose(nf4(weights), weights, rtol=2**-7)
    found = shares(weights, "BF16")
    assert found["nf4"] > 0.99 and max(share for kind, share in found.items() if kind != "nf4") < 0.05


def test_the_code_of_nf4_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    from lib.stages.quantize.compare_weights import _NF4_CODE

    assert np.array_equal(_NF4_CODE, functional.get_4bit_type("nf4", device="cpu").numpy())


def test_zeros_of_pruning_are_no_few_values() -> None:
    from lib.stages.quantize.compare_weights import _distinct

    weights = gaussian()
    pruned = np.where(np.arange(512) % 2, weights, 0)
    assert _distinct(weights).mean() > 31 and _distinct(pruned).mean() > 31
    assert _distinct(np.round(weights / 0.02) * 0.02).max() < 22


def test_constant_blocks_do_not_count() -> None:
    from lib.stages.quantize.compare_weights import varied

    weights = np.full((2, 64), 0.5, np.float32)
    weights[0, :32] = 0
    weights[1, 32:] = gaussian(1, 32)
    assert varied(weights).tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_a_model_in_its_file(tmp_path: Path, architecture: str) -> None:
    from lib.stages.quantize.compare_weights import measure_grid as measure

    number = gguf.GGMLQuantizationType.Q4_1
    weights = tiny_gguf.tensors(256, 1, 3, 259, 512, 128)
    rounded = {k: gguf.quants.quantize(v, number) for k, v in weights.items() if v.ndim > 1}
    grid = {k: gguf.quants.dequantize(v, number) for k, v in rounded.items()}
    for name, values in (("grid", {**weights, **grid}), ("plain", weights)):
        source = tiny_gguf.write(tmp_path / f"{name}.gguf", layers=1, weights=values)
        base = write_base(tmp_path / name, values, architecture)
        found = measure({"base": str(base), "source": str(source), "imatrix": None})
        assert found["blocks"] > 1000
        assert found["types"]["q4_1"] > 0.5 if name == "grid" else max(found["types"].values()) < 1e-3
        assert found["distinct"] < 16 if name == "grid" else found["distinct"] > 30
    other = write_base(tmp_path / "other", {"token_embd.weight": np.ones((5, 64), np.float32)}, architecture)
    with pytest.raises(InputError, match="none of the"):
        measure({"base": str(other), "source": str(source), "imatrix": None})
    json.dumps(found)
