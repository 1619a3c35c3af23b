"""The trial of llama.cpp answers where it works, and says how it ended where it does not."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import quantize

from lib.scoring import measure

WIDTH, HIDDEN, TOKENS, PROMPT = 64, 128, 32, 24


def write_model(path: Path) -> None:
    """One layer of Llama with every weight 1/64 or 0, no vocabulary."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(PROMPT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(TOKENS)
    writer.add_tokenizer_model("none")
    matrices = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (WIDTH, WIDTH))
    matrices |= {"ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH), "ffn_down": (WIDTH, HIDDEN)}
    shapes = {f"blk.0.{name}.weight": shape for name, shape in matrices.items()}
    for name, shape in {"token_embd.weight": (TOKENS, WIDTH), **shapes}.items():
        values = quantize(np.eye(*shape, dtype=np.float32) + 1 / WIDTH, GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, values, raw_dtype=GGMLQuantizationType.Q8_0)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_works_here() -> None:
    assert measure.llama_cpp_crash() is None


def test_the_weights_have_8_bits(tmp_path: Path) -> None:
    write_model(tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_bytes() == gzip.decompress(measure.TRIAL.read_bytes())
    types = {tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "x.gguf").tensors if len(tensor.shape) == 2}
    assert types == {"Q8_0"}


@pytest.mark.parametrize(("end", "said"), [("os.kill(os.getpid(), 11)", "SIGSEGV"), ("sys.exit(3)", "exit code 3")])
def test_says_how_it_ended(end: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dying.py").write_text(f"import os, sys\ndef try_prompt(argument):\n    {end}\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = measure.run_child
    monkeypatch.setattr(measure, "run_child", lambda _, *rest, **more: run("dying:try_prompt", *rest, **more))
    assert said in measure.llama_cpp_crash()
