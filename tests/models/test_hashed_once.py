"""The base model of a run is hashed once, whoever asks for it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lib.models.base_model import resolve_base
from lib.runs import files
from tests.models import packed


def test_a_base_model_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.stages.convert.convertible import write_model

    monkeypatch.setenv("WORKBOOK_HOME", str(tmp_path / "home"))
    folder, file = write_model(tmp_path / "model"), packed.make(tmp_path, "qwen2")
    then = time.time() - 60
    for path in (*folder.iterdir(), file):
        os.utime(path, (then, then))
    first = [resolve_base(str(folder)).revision, resolve_base(str(file)).revision]
    with monkeypatch.context() as patch:
        patch.setattr(files, "sha256_file", lambda path: pytest.fail(f"{path} was read again"))
        assert [resolve_base(str(folder)).revision, resolve_base(str(file)).revision] == first
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert resolve_base(str(folder)).revision != first[0]
