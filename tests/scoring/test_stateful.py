"""A model whose layers keep a state (Qwen3.5) in llama.cpp: converted by the official script, scored as elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lib.models.base_model import resolve_base
from lib.runs.machine import llama_cpp_problem
from lib.scoring.llama_backend import LlamaCppBackend
from lib.stages.convert import official
from lib.stages.convert.convert import open_with_llama_cpp
from tests.models.test_language_model import write_qwen35
from tests.stages.convert.convertible import OFFICIAL

pytestmark = pytest.mark.skipif(llama_cpp_problem() is not None, reason="llama-cpp-python does not work here")
PROMPTS = [[5, 9, 70, 3, *range(20, 20 + 9 * (i % 3)), 40 + i] for i in range(17)]
ANSWERS = [[7, 8], [7, 11, 12], [30]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The language model and its GGUF file."""
    if (sources := official.kept_sources()) is None:
        pytest.skip("the set-up has kept no converter of llama.cpp")
    folder = tmp_path_factory.mktemp("stateful")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBOOK_HOME", str(folder))
        model = resolve_base(str(write_qwen35(folder / "whole"))).path
        script = folder / "convert_hf_to_gguf.py"  # the official one, which is made to accept the small vocabulary
        script.write_text(
            f"import sys\nsys.path[:0] = [{str(sources)!r}]\nimport os\nos.chdir({str(sources)!r})\n{OFFICIAL}"
        )
        (folder / "conversion").mkdir()
        official.convert_officially(model, folder / "model.gguf", "f32", folder)
    return model, folder / "model.gguf"


def test_scores_equal_those_of_transformers(files: tuple[Path, Path]) -> None:
    """More prompts than sequences, a beginning that all share, and answers of several tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    from lib.scoring.torch_backend import TransformersBackend

    model, gguf = files
    open_with_llama_cpp({"path": str(gguf)})
    wanted = TransformersBackend(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    with LlamaCppBackend(gguf, cache_type="f32", flash_attention=False) as found:
        expected = wanted.label_log_probs(PROMPTS, ANSWERS)
        assert np.abs(found.label_log_probs(PROMPTS, ANSWERS) - expected).max() < 1e-3
        assert np.ptp(expected) > 0.1
        ids = list(range(3, 60))
        assert np.abs(found.window_log_probs(ids, 4) - wanted.window_log_probs(ids, 4)).max() < 1e-3
        assert np.abs(found.label_log_probs(PROMPTS[:3], ANSWERS) - expected[:3]).max() < 1e-3  # after other texts
