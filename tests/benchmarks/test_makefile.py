"""`make bench` runs every program that sets ours beside a peer, and no other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_settings import PROJECT


def test_every_program_with_a_peer_is_run() -> None:
    text = (PROJECT / "Makefile").read_text(encoding="utf-8")
    listed = re.findall(r"^BENCHMARKS := (.*)$", text, re.M)[0].split()
    programs = {path.stem: path.read_text(encoding="utf-8") for path in (PROJECT / "benchmarks").glob("*.py")}
    own = {
        name
        for name, source in programs.items()
        if "\nif __name__" in source and "harness" in source and "peer" in source
    }
    assert set(listed) == own
    for name in listed:
        assert "--json OUT.json" in programs[name]


@pytest.mark.slow
def test_memory_against_size_is_measured_at_once(tmp_path: Path) -> None:
    """`benchmarks/large_model.py` on two small models, without a limit: every step ends, and its memory is noted."""
    program = PROJECT / "benchmarks" / "large_model.py"
    command = [sys.executable, program, "--json", tmp_path / "out.json", "--sizes", "0.1,0.2", "--folder", tmp_path]
    subprocess.run(command, check=True, timeout=600, capture_output=True)
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [one["layers"] for one in found["results"]] == [1, 2]
    assert all(one["merge"]["peak_anonymous_mib"] > 0 for one in found["results"])
    assert set(found["ratios"]) == {"size", "merge", "proof", "check", "convert", "gate"}
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
