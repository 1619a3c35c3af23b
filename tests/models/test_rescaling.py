"""Channels rescaled: the same function, and no block of a matrix is reproduced by the type it came from."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lib.errors import InputError
from lib.models.loading import load_model
from lib.models.unpack import RANGE, Rescaling, rounded_slabs, unpack
from tests.models import packed
from tests.models.real import SMOLLM2, needs_smollm2

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def reproduced(weights: torch.Tensor, kind: gguf.GGMLQuantizationType) -> float:
    """Share of blocks of 32 that a type gives back, to the last bit of float16."""
    values = weights.float().numpy()
    back = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
    return float((back.astype(np.float16) == values.astype(np.float16)).reshape(-1, 32).all(1).mean())


def biased(arrays: dict[str, np.ndarray]) -> None:
    """Biases that matter; those of the small models are noise around zero already."""
    for name, array in arrays.items():
        if name.endswith(".bias"):
            array += 0.5


@pytest.mark.parametrize("name", packed.MODELS)
def test_the_function_stays_and_the_grid_is_left(name: str, packed_files: dict[str, Path], tmp_path: Path) -> None:
    path = packed_files[name]
    if name == "qwen2":
        path = packed.repack(path.parent / "qwen2-f32.gguf", tmp_path / path.name, tensors=biased)
    unpack(path, tmp_path / "on", "float32")
    record = unpack(path, tmp_path / "off", "float32", off_grid=True)
    assert record["off_grid"] and record["scales"] == list(RANGE) and record["cost"]["float32"] < 1e-6
    ids = torch.arange(3, 120)[None]
    with torch.inference_mode():
        on, off = (load_model(tmp_path / f, "float32", device="cpu")(ids).logits for f in ("on", "off"))
    assert on.std() > 0.1 and (on - off).abs().max() < 1e-3
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("on", "off"))
    for key in before:
        if any(f"{part}.weight" in key for part in MATRICES):
            assert reproduced(before[key], packed.Q.Q4_1) > 0.99 and reproduced(after[key], packed.Q.Q4_1) == 0, key
        elif (
            key.startswith("model.layers.") and "_norm" not in key and not key.endswith(("q_proj.bias", "k_proj.bias"))
        ):
            ratio = after[key] / before[key]
            assert RANGE[0] <= ratio.min() < 0.9 and 1.1 < ratio.max() <= RANGE[1], key
        else:  # residual stream, embedding and output, norms of queries and keys
            assert torch.equal(before[key], after[key]), key


def test_scales_are_drawn_by_seed_and_layer() -> None:
    config = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    ones = np.ones(64, np.float32)

    def norm(layer: int, seed: int = 1) -> np.ndarray:
        return Rescaling(config, seed).apply(f"model.layers.{layer}.input_layernorm.weight", 0, ones)

    assert np.array_equal(norm(0), norm(0)) and not np.array_equal(norm(0), norm(1))
    assert not np.array_equal(norm(0), norm(0, 2))
    assert np.array_equal(Rescaling(config).apply("model.norm.weight", 0, ones), ones)


def test_rows_of_a_later_slab_get_their_own_scales() -> None:
    config = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    values = np.random.default_rng(0).normal(size=(96, 64)).astype(np.float32)
    whole = Rescaling(config).apply("model.layers.1.mlp.up_proj.weight", 0, values)
    parts = [Rescaling(config).apply("model.layers.1.mlp.up_proj.weight", i, values[i : i + 32]) for i in (0, 32, 64)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_weights_without_a_grid_are_refused(packed_files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lie on no grid to leave"):
        unpack(packed_files["llama"].parent / "llama-f32.gguf", tmp_path / "model", off_grid=True)


@needs_smollm2
def test_a_trained_models_layer_leaves_the_grid() -> None:
    from lib.models.unpack_source import read_source

    source = read_source(SMOLLM2)
    tensors = {tensor.name: tensor for tensor in source.tensors}
    for part in ("self_attn.o_proj", "mlp.up_proj"):
        tensor = tensors[f"model.layers.17.{part}.weight"]
        for scaling, share in ((None, 1.0), (Rescaling(source.config), 0.0)):
            ((_, values),) = rounded_slabs(source, tensor, "float16", scaling)
            assert reproduced(torch.from_numpy(values), packed.Q.Q4_1) == share
