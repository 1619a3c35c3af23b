"""Listening at an address until a signal: who can reach it, the socket, and uvicorn on it."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lib.errors import refusal

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp


@dataclass(frozen=True)
class ServeOptions:
    """How a file, or a package's page, is served.

    Attributes:
        host, port: where; port 0 = a free one.
        n_ctx: of a file: tokens of prompt and answer; 0 = the file's, at most 4096.
        max_tokens: of a file: most tokens of an answer.
        thinking: of a file: whether a template that knows both ways asks for reasoning.
        n_gpu_layers: -1 = all. n_threads: 0 = physical cores.
        cert, key: of a page: PEM files; with them the address is https, which browsers want for several threads and for
            use without a network. None = http.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    n_ctx: int = 0
    max_tokens: int = 1024
    thinking: bool = False
    n_gpu_layers: int = 0
    n_threads: int = 0
    cert: Path | None = None
    key: Path | None = None


_BACKLOG = 2048
_GRACE_SECONDS = 5
HEADER_SECONDS, BODY_SECONDS = 10, 30
"""How long a client may take to say what it wants; also, to take the rest of an answer when it has been made."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def names_loopback(header: str) -> bool:
    """Whether a request's Host is this machine by a loopback name.

    A page of the web whose name was pointed to 127.0.0.1 (DNS rebinding) is of the same origin for a browser, and
    would read every answer; but its requests bear its own name.
    """
    try:
        return is_loopback(urlsplit(f"//{header}").hostname or "")
    except ValueError:
        return False


def in_address(host: str) -> str:
    """A host as it stands in an address."""
    return f"[{host}]" if ":" in host else host


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 = any free one.

    It listens before a model is loaded: two servers that only bind an address could share it.

    Raises:
        InputError: an address that cannot be used.
    """
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        if not host:
            raise ValueError("an empty host would be every interface")
        listening.bind((host, port))
        listening.listen(_BACKLOG)
    except (OSError, OverflowError, ValueError) as error:
        listening.close()
        raise refusal("serve/no-address", host=host, port=port, why=getattr(error, "strerror", None) or error) from None
    return listening


def _protocol(buffer: int) -> type:
    """uvicorn's protocol, with an end to connections that do not ask or do not read.

    Args:
        buffer: bytes of an answer that are kept for a client that is slow to read before the answer waits for it.
    """
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    seconds = {h11.IDLE: HEADER_SECONDS, h11.SEND_BODY: BODY_SECONDS}

    class Protocol(H11Protocol):
        phase, deadline = None, None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=buffer)
            self._watch()

        def handle_events(self) -> None:
            super().handle_events()
            self._watch()

        def _watch(self) -> None:
            """Begin the time of another part of a request."""
            if self.conn.their_state is self.phase:
                return
            self.phase = self.conn.their_state
            if self.deadline:
                self.deadline.cancel()
            end = seconds.get(self.phase)
            self.deadline = end and self.loop.call_later(end, self.transport.abort)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self.deadline:
                self.deadline.cancel()

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self.loop.call_later(BODY_SECONDS, self.transport.abort)

    return Protocol


def make_server(
    application: ASGIApp, ready: Callable[[], None], buffer: int = 1 << 16, **options: Any
) -> uvicorn.Server:
    """A server whose `run(sockets=[…])` answers until a signal; requests that run get a few seconds to end.

    Args:
        ready: called when it answers.
        buffer: see `_protocol`.
        options: more settings of `uvicorn.Config`.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            ready()

    config = uvicorn.Config(
        application,
        http=_protocol(buffer),
        access_log=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        lifespan="off",
        server_header=False,
        **options,
    )
    return Server(config)
