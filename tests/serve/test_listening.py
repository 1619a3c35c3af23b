"""Connections that do not ask, ask for ever, or do not read: closed in time, and nobody is denied meanwhile."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("uvicorn")

from lib.serve import listening

ANSWER = b"x" * (12 << 20)


async def application(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """The whole body is read; then /large is answered with ANSWER in pieces, everything else with "ok"."""
    if scope["path"] == "/busy":
        await asyncio.sleep(2.5)
    while scope["method"] == "POST" and (message := await receive()).get("more_body"):
        pass
    if scope["method"] == "POST" and message["type"] == "http.disconnect":
        application.ended.append("left")
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/large":
        for start in range(0, len(ANSWER), 1 << 16):
            await send({"type": "http.response.body", "body": ANSWER[start : start + (1 << 16)], "more_body": True})
        application.ended.append("made")
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    monkeypatch.setattr(listening, "HEADER_SECONDS", 1.0)
    monkeypatch.setattr(listening, "BODY_SECONDS", 1.5)
    application.ended = []
    ready = threading.Event()
    with listening.listen("127.0.0.1", 0) as sock:
        server = listening.make_server(application, ready.set, 16 << 20, log_level="critical")
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        assert ready.wait(10)
        host, port = sock.getsockname()
        yield SimpleNamespace(address=(host, port), url=f"http://{host}:{port}", ended=application.ended)
        server.should_exit = True
        thread.join(20)


def seconds_open(connection: socket.socket, dribble: bytes = b"", most: float = 6.0) -> float:
    """Seconds until the server closes a connection that gets a byte now and then."""
    begin, rest = time.monotonic(), list(dribble)
    connection.settimeout(0.2)
    while time.monotonic() - begin < most:
        try:
            if rest:
                connection.sendall(bytes([rest.pop(0)]))
            if not connection.recv(1 << 12):
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - begin


def test_silent_connections_deny_nobody(served: SimpleNamespace) -> None:
    with ExitStack() as held:
        silent = [held.enter_context(socket.create_connection(served.address)) for _ in range(150)]
        silent[0].sendall(b"GET / HT")
        began = time.monotonic()
        assert httpx.get(served.url, trust_env=False, timeout=5).text == "ok"
        assert time.monotonic() - began < 1
        assert all(seconds_open(connection) < 2.5 for connection in silent)


@pytest.mark.parametrize(
    ("begin", "dribble"),
    [
        (b"", b"GET / HTTP/1.1\r\nx: " + b"a" * 90),
        (b"GET / HTTP/1.1\r\nhost: a\r\n", b""),
        (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 99\r\n\r\n", b"a" * 90),
        (b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1\r\n", b""),
        (b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", b" " * 90),
        (b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", b"GET / HTTP/1.1\r\nx: " + b"a" * 90),
    ],
    ids=["slow headers", "half headers", "slow body", "half chunk", "answered, then blanks", "answered, then slow"],
)
def test_unfinished_requests_are_closed(served: SimpleNamespace, begin: bytes, dribble: bytes) -> None:
    with socket.create_connection(served.address) as connection:
        connection.sendall(begin)
        assert seconds_open(connection, dribble) < 3


def test_whole_requests_have_all_the_time_they_need(served: SimpleNamespace) -> None:
    """An answer that takes longer than headers and body may, and one connection for several requests."""
    with httpx.Client(base_url=served.url, trust_env=False, timeout=10) as client:
        for _ in range(3):
            assert client.post("/", content=b"a" * 1000).text == "ok"
            time.sleep(0.7)
        assert client.post("/busy", content=b"a").text == "ok"
        assert client.get("/busy").text == "ok"


def test_an_answer_is_made_for_a_client_that_does_not_read(served: SimpleNamespace) -> None:
    with socket.create_connection(served.address) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nhost: a\r\n\r\n")
        end = time.monotonic() + 5
        while not served.ended and time.monotonic() < end:
            time.sleep(0.05)
        assert served.ended == ["made"]
