"""`make bench` runs every program that sets ours beside a peer, and no other."""

from __future__ import annotations

import re

from tests.test_settings import PROJECT


def test_every_program_with_a_peer_is_run() -> None:
    text = (PROJECT / "Makefile").read_text(encoding="utf-8")
    listed = re.findall(r"^BENCHMARKS := (.*)$", text, re.M)[0].split()
    programs = {path.stem: path.read_text(encoding="utf-8") for path in (PROJECT / "benchmarks").glob("*.py")}
    own = {name for name, source in programs.items() if "\nif __name__" in source and "harness" in source}
    assert set(listed) == own
    for name in listed:
        assert "--json OUT.json" in programs[name]
