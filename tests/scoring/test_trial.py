"""The trial of llama.cpp answers where it works, and says how it ended where it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFReader

from lib.scoring import measure


def test_works_here() -> None:
    assert measure.llama_cpp_crash() is None


def test_the_weights_have_8_bits(tmp_path: Path) -> None:
    measure._write_model(tmp_path / "x.gguf")
    types = {tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "x.gguf").tensors if len(tensor.shape) == 2}
    assert types == {"Q8_0"}


@pytest.mark.parametrize(("end", "said"), [("os.kill(os.getpid(), 11)", "SIGSEGV"), ("sys.exit(3)", "exit code 3")])
def test_says_how_it_ended(end: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dying.py").write_text(f"import os, sys\ndef try_prompt(argument):\n    {end}\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = measure.run_child
    monkeypatch.setattr(measure, "run_child", lambda _, *rest, **more: run("dying:try_prompt", *rest, **more))
    assert said in measure.llama_cpp_crash()
