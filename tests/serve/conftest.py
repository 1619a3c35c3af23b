"""A server of a tiny model, as a process."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from tests import tiny_gguf, tiny_run
from tests.conftest import PROJECT

MESSAGES = [{"role": "system", "content": "你是助手。"}, {"role": "user", "content": "房间很干净"}]

TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
TOOLS += "{% for message in messages if message.tool_calls %}{{ message.tool_calls | tojson }}{% endfor %}"
"""What the template of the served model writes of tools, and of calls of them."""


def start(*arguments: str) -> tuple[subprocess.Popen, list[str], str]:
    """The process, the lines of its stderr so far (and later), its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lib.cli", "serve", *arguments], cwd=PROJECT, stderr=subprocess.PIPE, text=True
    )
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")), daemon=True)
    reader.start()
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        found = [match for line in list(lines) if (match := re.search(r"served at (http://\S+)/v1", line))]
        if found:
            return process, lines, found[0][1]
        time.sleep(0.05)
    process.kill()
    raise AssertionError("".join(lines))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    tiny_run.make_tokenizer(folder / "tokenizer")
    template = folder / "tokenizer" / "chat_template.jinja"
    template.write_text(TOOLS + template.read_text(encoding="utf-8"), encoding="utf-8")
    return tiny_gguf.write(folder / "tiny.gguf", layers=1, tokenizer=folder / "tokenizer")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[SimpleNamespace]:
    process, lines, address = start(
        str(model), "--port", "0", "--n-ctx", "256", "--max-tokens", "12", "--n-threads", "1"
    )
    with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
        yield SimpleNamespace(client=client, lines=lines, process=process, address=address)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert not any("Traceback" in line for line in lines), "".join(lines)
