"""A tiny random model as F16, a copy of it, Q8_0 and Q2_K, with tokenizer, task and rows."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lib.prompts.tasks import ClassificationTask
from tests import tiny_gguf

WORDS = "房间 很 不 干净 服务 好 差 早餐 位置 方便 但是 虽然 ， 。 一般 贵".split()  # noqa: SIM905
LABELS = ("负面", "正面")


class Ladder(NamedTuple):
    """Files made from one model, and what to score them on."""

    reference: Path
    copy: Path
    q8: Path
    q2: Path
    tokenizer_folder: Path
    tokenizer: Any
    task: ClassificationTask
    rows: list[dict]


def make_rows(n: int) -> list[dict]:
    draw = random.Random(3)
    texts = ["".join(draw.choices(WORDS, k=draw.randint(3, 20))) for _ in range(n)]
    return [
        {"id": f"test-{i:05d}", "text": text, "label": i % 2, "group": i, "leaked": i % 4 == 0}
        for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="session")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Ladder:
    """The files, once a session."""
    from lib.models.gguf_tokenizer import tokenizer_from_gguf
    from lib.models.offline_base import TokenizerRecipe, train_tokenizer

    folder = tmp_path_factory.mktemp("ladder")
    rows = make_rows(40)
    train_tokenizer([row["text"] for row in rows], list(LABELS), folder / "tokenizer", TokenizerRecipe(vocabulary=512))
    reference = tiny_gguf.write(folder / "m-F16.gguf", layers=1, tokenizer=folder / "tokenizer")
    files = [folder / f"m-{kind}.gguf" for kind in ("Q8_0", "Q2_K")]
    for path in files:
        kind = path.stem.removeprefix("m-")
        tiny_gguf.quantize_file(reference, path, kind, n_threads=1)
    copy = Path(shutil.copyfile(reference, folder / "copy.gguf"))
    task = ClassificationTask(LABELS, "你是助手。", "评价：{text}", 192)
    return Ladder(reference, copy, *files, folder / "tokenizer", tokenizer_from_gguf(reference), task, rows)
