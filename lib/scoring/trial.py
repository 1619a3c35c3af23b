"""Does llama.cpp, as it was compiled here, survive a prompt on 8-bit weights? Tried in a process of its own.

Compiled by GCC for a processor with AMX it does not: the inline assembly behind `_tile_loadconfig` names 8 of the 64
bytes that it reads, GCC 12 leaves out the stores to the others, and `ldtilecfg` faults (ggml-cpu/amx/mmq.cpp).
`scripts/setup.sh` compiles without that code; a llama-cpp-python from elsewhere may have it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.run.child import run_child

_WIDTH, _HIDDEN, _TOKENS, _PROMPT = 64, 128, 32, 24


def llama_cpp_crash() -> str | None:
    """How llama.cpp ends on a tiny model in Q8_0, in words; None when it answers."""
    with tempfile.TemporaryDirectory(prefix="workbook-trial-") as name:
        path = Path(name) / "trial.gguf"
        _write_model(path)
        try:
            run_child("lib.scoring.trial:try_prompt", {"path": str(path)}, "a prompt on 8-bit weights", timeout=120)
        except InputError as error:
            return error.found.rstrip(".")
    return None


def try_prompt(argument: dict[str, Any]) -> dict[str, Any]:
    """Read a prompt with the model at "path"."""
    from lib.scoring.llama import LlamaCppBackend

    backend = LlamaCppBackend(Path(argument["path"]), _PROMPT, n_threads=1)
    try:
        values = backend.window_log_probs([place % _TOKENS for place in range(_PROMPT)])
        return {"positions": len(values)}
    finally:
        backend.close()


def _write_model(path: Path) -> None:
    """One layer of Llama with every weight 1/64 or 0, no vocabulary."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(_PROMPT)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_HIDDEN)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(_TOKENS)
    writer.add_tokenizer_model("none")
    matrices = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (_WIDTH, _WIDTH))
    matrices |= {"ffn_gate": (_HIDDEN, _WIDTH), "ffn_up": (_HIDDEN, _WIDTH), "ffn_down": (_WIDTH, _HIDDEN)}
    shapes = {f"blk.0.{name}.weight": shape for name, shape in matrices.items()}
    for name, shape in {"token_embd.weight": (_TOKENS, _WIDTH), **shapes}.items():
        values = quantize(np.eye(*shape, dtype=np.float32) + 1 / _WIDTH, GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, values, raw_dtype=GGMLQuantizationType.Q8_0)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(_WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
