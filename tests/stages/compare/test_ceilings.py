"""The ceiling of tokens a second against sizes counted by gguf's own reader."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFReader

from lib.report.compare_page import ceilings as shown
from lib.stages.compare.speed import MEMORIES, ceilings, read_bytes
from lib.stages.convert.convert import convert
from tests import tiny_gguf, tiny_run


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_once_but_one_row_of_a_separate_embedding(tied: bool, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_run.make_base(base, tied=tied)
    convert(base, tmp_path / "m.gguf", "f16")
    tiny_gguf.quantize_file(tmp_path / "m.gguf", tmp_path / "q.gguf", "Q8_0")
    for path in (tmp_path / "m.gguf", tmp_path / "q.gguf"):
        tensors = {t.name: t for t in GGUFReader(path).tensors}
        total = sum(int(t.n_bytes) for t in tensors.values())
        table = tensors["token_embd.weight"]
        row = int(table.n_bytes) // int(table.shape[1])
        assert ("output.weight" in tensors) is not tied
        assert read_bytes(path, total) == (total if tied else total - int(table.n_bytes) + row)


def test_bandwidth_divided_by_bytes() -> None:
    assert [round(memory.bandwidth / 1e9, 1) for memory in MEMORIES] == [17.1, 51.2, 76.8]
    small = {"type": "Q2_K", "read_bytes": 1_000_000}
    files = [{"type": "Q4_K_M", "read_bytes": 400_000_000}, {"type": "nf4", "read_bytes": None}, small]
    (limit,) = ceilings(files)
    assert limit["tokens_per_second"][MEMORIES[1].name] == pytest.approx(128)
    assert "caches" in shown([]).data
    table = shown([limit]).data
    assert "read a token, MB" in table and "≤ tokens/s, LPDDR5-6400" in table and ">128<" in table
