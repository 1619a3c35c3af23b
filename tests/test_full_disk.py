"""Every stage on a disk that fills up while it works, then with room: what it makes is what it makes undisturbed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.full_disk import STAGES
from tests.support.small_disk import on_a_small_disk

pytestmark = pytest.mark.slow
EXACT = ("data/train.jsonl", "data/test.jsonl", "adapter/adapter_model.safetensors", "merged/model.safetensors")


def test_every_stage_says_so_and_makes_the_same_afterwards(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    for folder in (small, large):
        folder.mkdir()
    command = [sys.executable, "-m", "tests.support.full_disk", str(small), str(large)]
    ended = on_a_small_disk(small, 250, command, timeout=1500)
    assert ended.returncode == 0, ended.stderr[-3000:]
    result = json.loads(ended.stdout.splitlines()[-1])
    assert len(result["said"]) >= len(STAGES) - 1 and not result["left"]  # on a fast machine one may end before
    for product, found in result["said"].items():
        words = ("is full or takes no writing", "cannot be written (No space", "MB free on the disk")
        assert any(word in found["said"] for word in words), (product, found["said"])
        assert found["finished"] == list(STAGES)[: list(STAGES).index(product)]
    undisturbed, afterwards = result["digests"]["large"], result["digests"]["small"]
    assert {name: list(files) for name, files in undisturbed.items()} == {k: list(v) for k, v in afterwards.items()}
    for product, names in undisturbed.items():
        for name, digest in names.items():
            if f"{product}/{name}" in EXACT or name.endswith(".gguf"):
                assert afterwards[product][name] == digest, (product, name)
