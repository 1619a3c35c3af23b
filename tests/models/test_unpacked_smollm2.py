"""The really trained model of `make smollm2`, unpacked: bit for bit, and as transformers reads the same file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lib.models.loading import load_model, load_tokenizer
from lib.models.unpack import unpack
from lib.models.weights import open_weights
from lib.stages.convert import convert
from tests.models.real import SMOLLM2, needs_smollm2

pytestmark = needs_smollm2


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model in float32 and in float16; the costs are measured elsewhere."""
    folder = tmp_path_factory.mktemp("smollm2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.models.unpack.cost_of", lambda *_: (None, "not measured"))
        for dtype in ("float32", "float16"):
            unpack(SMOLLM2, folder / dtype, dtype)
    return folder


def test_logits_equal_transformers_own_loading(both: Path) -> None:
    ours = load_model(both / "float32", "float32", device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(both / "float32")
    ids = tokenizer("The capital of France is Paris, and in 2023 it had 2,102,650 people.", return_tensors="pt")
    with torch.inference_mode():
        assert (ours(**ids).logits - theirs(**ids).logits).abs().max() < 1e-4


def test_round_trip_through_f16_is_bit_equal(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "load_check", lambda *_: "")
    monkeypatch.setattr("lib.models.unpack.cost_of", lambda *_: (None, "not measured"))
    report = convert.convert(both / "float16", both / "smollm2.gguf", "f16")
    assert (report.pre_tokenizer, report.recognised) == ("smollm", "the ids of llama.cpp's check text")
    unpack(both / "smollm2.gguf", both / "again", "float16")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (both / "float16" / name).read_bytes() == (both / "again" / name).read_bytes(), name


def test_every_layer_bit_for_bit(both: Path) -> None:
    stored = open_weights(both / "float16").tensors
    sources = {tensor.name: tensor for tensor in gguf.GGUFReader(SMOLLM2).tensors}
    parts = {"self_attn.q_proj": ("attn_q", 9), "self_attn.k_proj": ("attn_k", 3), "mlp.down_proj": ("ffn_down", 0)}
    for layer in range(30):
        for theirs, (ours, heads) in parts.items():
            source = sources[f"blk.{layer}.{ours}.weight"]
            values = gguf.quants.dequantize(source.data, source.tensor_type).astype(np.float16)
            if heads:
                values = values[[h * 64 + 2 * j + i for h in range(heads) for i in range(2) for j in range(32)]]
            found = stored[f"model.layers.{layer}.{theirs}.weight"].read()
            assert np.array_equal(found.view(np.uint16), values.reshape(-1).view(np.uint16))
