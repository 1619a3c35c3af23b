"""The tiny model, once a session, in both forms."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from lib.prompts.tasks import ClassificationTask
from tests.scoring import tiny


class Tiny(NamedTuple):
    """A model, its tokenizer, its task and its GGUF file."""

    model: object
    tokenizer: object
    task: ClassificationTask
    gguf: Path
    folder: Path


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Tiny:
    """The tiny random Qwen2."""
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    tiny.make_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = tiny.make_model()
    model.save_pretrained(folder)
    path = folder / "tiny-F32.gguf"
    tiny.write_gguf(model, tokenizer, path)
    task = ClassificationTask(tiny.LABELS, "你是助手。", "评价：{text}", 192)
    return Tiny(model, tokenizer, task, path, folder)
