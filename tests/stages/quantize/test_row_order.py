"""The base's rows in the order of a file of a family whose order is not known: told by the rows themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from lib.stages.quantize.compare_weights import base_matrices
from lib.stages.quantize.quantizer import read_header
from tests.models.test_head import SIZES, small
from tests.stages.quantize.test_surviving import paired


def write_gguf(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    writer = gguf.GGUFWriter(path, "granite")
    writer.add_block_count(SIZES["num_hidden_layers"])
    for name, values in tensors.items():
        writer.add_tensor(name, values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def base(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A small Granite, whose query rows llama.cpp pairs as Llama's."""
    model: Any = small("granite")
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base", {name: value.numpy() for name, value in model.state_dict().items()}


def test_rows_as_they_are_paired_or_unknown(base: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    folder, weights = base
    query, up = (weights[f"model.layers.0.{name}.weight"] for name in ("self_attn.q_proj", "mlp.up_proj"))
    down = weights["model.layers.0.mlp.down_proj.weight"]
    noise = np.random.default_rng(0).normal(0, 1e-3, query.shape).astype(np.float32)
    tensors = {
        "blk.0.attn_q.weight": paired(query + noise, SIZES["num_attention_heads"]),
        "blk.0.ffn_up.weight": up,
        "blk.0.ffn_down.weight": down[::-1],
    }
    found, left_out = base_matrices(folder, read_header(write_gguf(tmp_path / "model.gguf", tensors)))
    assert left_out == ["blk.0.ffn_down.weight"]
    for name, want in (("blk.0.attn_q.weight", paired(query, 2)), ("blk.0.ffn_up.weight", up)):
        assert np.array_equal(found[name].rows(), want)
