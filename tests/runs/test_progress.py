"""Lines of progress where stderr is no terminal: seldom, and what is said at once is said."""

from __future__ import annotations

import pytest

from lib import progress
from lib.progress import PLAIN_SECONDS, PROGRESS_FILE_VARIABLE, Progress, say
from lib.report.runner import DETAIL, to_stderr


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time; nothing was written so far."""
    now = [1000.0]
    monkeypatch.delenv(PROGRESS_FILE_VARIABLE, raising=False)
    monkeypatch.setattr(progress, "_told", [])
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_ten_seconds_whatever_works(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for work in range(30):
        with Progress(f"work {work}", 4) as progress:
            for _ in range(4):
                clock[0] += 0.5
                progress.advance()
            to_stderr(f"{DETAIL}inside {work}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("work 0: …") or lines[0].startswith("work 0: 0/4")
    assert len(lines) == 1 + 60 / PLAIN_SECONDS, lines
    say("fold 2 of 5")
    to_stderr("03 evaluate")
    assert capsys.readouterr().err.splitlines() == ["fold 2 of 5", "03 evaluate"]
