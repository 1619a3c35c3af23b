"""`workbook serve --phone`: a package's page for a phone in the same network, with a place to send its result to."""

from __future__ import annotations

import json
import re
import secrets
import socket
import ssl
import sys
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lib.errors import InputError
from lib.runs.phone_results import MOST_BYTES, check_result, save_result
from lib.serve.limits import is_loopback

PAGE = "web/index.html"
RESULT = "result"
_BLOCK = 1 << 20
_IDLE_SECONDS = 60
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".wasm": "application/wasm",
}
_HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",  # both: several threads need an isolated page
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",  # the token is in the address
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
    "X-Workbook-Phone": "1",  # tells the page that a result can be sent here
}


@dataclass(frozen=True)
class PhoneOptions:
    """How a package is served.

    Attributes:
        host, port: where; port 0 = a free one.
        certificate, key: PEM files; with them the address is https, which browsers want for several threads and for
            use without a network. None = http.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    certificate: Path | None = None
    key: Path | None = None


def serve_phone(package: Path, devices: Path, options: PhoneOptions, tell: Callable[[str], None]) -> None:
    """Serve a package's folder until SIGTERM or Ctrl-C.

    Args:
        package: folder with web/.
        devices: folder for the results that phones send.
        tell: gets the address, a QR code of it, and what came in.

    Raises:
        InputError: a folder without a page, an address or a certificate that cannot be used.
    """
    if not (package / PAGE).is_file():
        raise InputError(f"{package} holds no {PAGE}.", "a package with a phone page.", "workbook package RUN --web.")
    token = secrets.token_urlsafe(16)
    with make_server(package, devices, options, token, tell) as server:
        scheme = "https" if options.certificate else "http"
        address = f"{scheme}://{_shown(options.host)}:{server.server_address[1]}/{token}/{PAGE.rpartition('/')[0]}/"
        _announce(address, options, tell)
        server.serve_forever(poll_interval=0.2)


def make_server(
    package: Path, devices: Path, options: PhoneOptions, token: str, tell: Callable[[str], None]
) -> ThreadingHTTPServer:
    """The server, bound and listening; `serve_forever` answers.

    Raises:
        InputError: an address or a certificate that cannot be used.
    """
    root = package.resolve()

    class Handler(_Handler):
        pass

    Handler.root, Handler.devices, Handler.token, Handler.tell = root, devices, token, staticmethod(tell)

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """A phone that goes away, or refuses the certificate, is no news; anything else is said in a line."""
            error = sys.exc_info()[1]
            if not isinstance(error, OSError):
                tell(f"The server failed: {type(error).__name__}: {error}")

    try:
        server = Server((options.host, options.port), Handler)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"{options.host}:{options.port} cannot be used ({getattr(error, 'strerror', None) or error}).",
            "an address of this machine and a free port.",
            "choose another --port (0 = any free one) or --host.",
        ) from None
    if options.certificate:
        _secure(server, options)
    return server


def _secure(server: ThreadingHTTPServer, options: PhoneOptions) -> None:
    """Let a bound server speak https; it is closed where the certificate cannot be used."""
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(options.certificate, options.key)
    except (OSError, ssl.SSLError) as error:
        server.server_close()
        raise InputError(
            f"{options.certificate} cannot be used ({error}).", "a certificate and its key, PEM.", "check --cert."
        ) from None
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)


class _Handler(BaseHTTPRequestHandler):
    """GET and HEAD of files below `root`, POST of one result; everything under /<token>/."""

    root: Path
    devices: Path
    token: str
    tell: Callable[[str], None]
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_SECONDS

    def do_GET(self) -> None:
        """A file, or the part that Range names."""
        path = self._file()
        if path is None:
            self._answer(HTTPStatus.NOT_FOUND, b"not found\n")
            return
        size = path.stat().st_size
        first, last, status = self._span(size)
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            self._answer(status, b"", {"Content-Range": f"bytes */{size}"})
            return
        headers = {"Content-Length": str(last - first + 1), "Accept-Ranges": "bytes"}
        headers["Content-Type"] = _TYPES.get(path.suffix, "application/octet-stream")
        if status == HTTPStatus.PARTIAL_CONTENT:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self._head(status, headers)
        if self.command != "HEAD":
            self._copy(path, first, last - first + 1)

    do_HEAD = do_GET  # noqa: N815 - the name that the standard library asks for

    def do_POST(self) -> None:
        """A phone's result: checked, then saved."""
        self.close_connection = True
        if self._inner() != RESULT:
            self._answer(HTTPStatus.NOT_FOUND, b"not found\n")
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 9:
            self._answer(HTTPStatus.LENGTH_REQUIRED, b"Content-Length is missing\n")
            return
        if int(length) > MOST_BYTES:
            self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {MOST_BYTES} bytes\n".encode())
            return
        body = self.rfile.read(int(length))
        try:
            path = save_result(self.devices, check_result(json.loads(body)))
        except (ValueError, RecursionError) as error:
            self._answer(HTTPStatus.BAD_REQUEST, f"{error}\n".encode())
            return
        except OSError as error:
            self.tell(f"A result came in and could not be saved in {self.devices}: {error.strerror or error}")
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, b"the result could not be saved\n")
            return
        self.tell(f"A result came in: {path}")
        self._answer(HTTPStatus.CREATED, json.dumps({"saved": path.name}).encode(), {"Content-Type": _TYPES[".json"]})

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the address holds the token."""

    def _inner(self) -> str | None:
        """The path behind the token; None without it."""
        try:
            path = unquote(urlsplit(self.path).path)
        except ValueError:  # "http://[x" is the begin of an address that has no end
            return None
        start, _, rest = path.removeprefix("/").partition("/")
        return rest if secrets.compare_digest(start.encode("utf-8", "replace"), self.token.encode()) else None

    def _file(self) -> Path | None:
        inner = self._inner()
        if inner is None or "\0" in inner or any(part.startswith(".") for part in inner.split("/")):
            return None
        path = self.root / (inner + "index.html" if inner.endswith("/") else inner)
        try:
            return path if path.is_file() and path.resolve().is_relative_to(self.root) else None
        except (OSError, ValueError):  # a name that no file system takes
            return None

    def _span(self, size: int) -> tuple[int, int, HTTPStatus]:
        """First and last byte, and the status; what Range says in another way than one span is ignored, as allowed."""
        found = _RANGE.fullmatch(self.headers.get("Range", ""))
        if not found or found[1] == found[2] == "":
            return 0, size - 1, HTTPStatus.OK
        if not found[1]:
            first, last = max(0, size - _offset(found[2])), size - 1
        else:
            first, last = _offset(found[1]), min(_offset(found[2] or str(size)), size - 1)
        if first > last:
            return 0, 0, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
        return first, last, HTTPStatus.PARTIAL_CONTENT

    def _copy(self, path: Path, first: int, count: int) -> None:
        with path.open("rb") as stream:
            stream.seek(first)
            while count and (block := stream.read(min(_BLOCK, count))):
                try:
                    self.wfile.write(block)
                except OSError:  # the phone went away
                    self.close_connection = True
                    return
                count -= len(block)

    def _head(self, status: HTTPStatus, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in {**_HEADERS, **headers}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _answer(self, status: HTTPStatus, body: bytes, headers: dict[str, str] | None = None) -> None:
        given = {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(body)), **(headers or {})}
        self._head(status, given)
        if self.command != "HEAD":
            self.wfile.write(body)


def _offset(digits: str) -> int:
    """The number; of more digits than Python reads the first, which are beyond any file too."""
    return int(digits.lstrip("0")[:19] or "0")


def _shown(host: str) -> str:
    """The address that a phone can reach: of the network's interface where every interface listens."""
    if host in ("0.0.0.0", "::"):
        family, probe = (socket.AF_INET, "192.0.2.1") if host == "0.0.0.0" else (socket.AF_INET6, "2001:db8::1")
        with socket.socket(family, socket.SOCK_DGRAM) as asked:  # a datagram socket sends nothing to connect
            try:
                asked.connect((probe, 9))
                host = asked.getsockname()[0]
            except OSError:
                host = socket.gethostname()
    return f"[{host}]" if ":" in host else host


def _announce(address: str, options: PhoneOptions, tell: Callable[[str], None]) -> None:
    import io

    import segno

    if not is_loopback(options.host):
        tell(
            f"Warning: {options.host} is not this machine alone: everybody in the network who knows the address below "
            + ("can read the package." if options.certificate else "can read the package, and it is not encrypted.")
        )
        if not options.certificate:
            tell(
                "Over http browsers give a page one thread and no storage. For several threads and use offline: "
                "--cert and --key, or over USB `adb reverse tcp:PORT tcp:PORT` and http://localhost."
            )
    drawn = io.StringIO()
    segno.make(address, micro=False).terminal(drawn, border=2, compact=True)
    tell(drawn.getvalue())
    tell(f"The phone page is served at {address} (end with Ctrl-C).")
