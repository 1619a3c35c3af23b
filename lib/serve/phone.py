"""`workbook serve --phone`: a package's page for a phone in the same network, with a place to send its result to."""

from __future__ import annotations

import html
import json
import re
import secrets
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lib.errors import InputError, missing_library, refusing
from lib.language import CHINESE, ENGLISH, TAGS
from lib.runs.files import data_file, object_or_empty
from lib.runs.machine import has_module
from lib.serve.listening import ServeOptions, in_address, is_loopback, listen, make_server
from lib.stages.compare.speed import MOST_BYTES, check_result, save_result

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Send

NEEDS = ("segno", "starlette", "uvicorn")
PAGE = "web/index.html"
RESULT = "result"
WORDS = "words.json"
"""Beside the page: {language: {English: translation}}."""
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_ACCEPTED = re.compile(r"\s*([A-Za-z]+)[\w-]*\s*(?:;\s*q=(\d(?:\.\d{1,3})?))?\s*")
_SAID = re.compile(r"(?P<mark><[^>]* data-t>)(?P<text>[^<]+)")


def serve_phone(package: Path, devices: Path, options: ServeOptions, tell: Callable[[str], None]) -> None:
    """Serve a package's folder until SIGTERM or Ctrl-C.

    Args:
        package: folder with web/.
        devices: folder for the results that phones send.
        tell: gets the address, a QR code of it, and what came in.

    Raises:
        InputError: a folder without a page, an address or a certificate that cannot be used, missing libraries.
    """
    if not (package / PAGE).is_file():
        raise InputError(f"{package} holds no {PAGE}.", "a package with a phone page.", "workbook package RUN --web.")
    if missing := [name for name in NEEDS if not has_module(name)]:
        raise missing_library(*missing)
    encryption = encryption_of(options)
    token = secrets.token_urlsafe(16)
    with listen(options.host, options.port) as listening:
        host = f"{_reachable(options.host)}:{listening.getsockname()[1]}"
        address = f"{'https' if encryption else 'http'}://{host}/{token}/{PAGE.rpartition('/')[0]}/"
        application = make_application(package, devices, token, tell)
        server = make_server(application, lambda: announce(address, options, tell), log_level="critical", **encryption)
        server.run(sockets=[listening])


def encryption_of(options: ServeOptions) -> dict[str, Any]:
    """Settings of uvicorn for https; none for http.

    Raises:
        InputError: a certificate that cannot be used.
    """
    if options.cert is None:
        return {}
    with refusing((OSError, ssl.SSLError), "serve/no-certificate", options=options):
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(options.cert, options.key)
    return {"ssl_certfile": options.cert, "ssl_keyfile": options.key}


def make_application(package: Path, devices: Path, token: str, tell: Callable[[str], None]) -> ASGIApp:
    """GET and HEAD of files of the package, POST of a result; everything under /<token>/."""
    root = package.resolve()

    async def application(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        from starlette.requests import ClientDisconnect, Request

        request = Request(scope, receive)
        try:
            response = await _answer(request, root, devices, token, tell)
            response.headers.update(data_file("serve/http.yaml")["headers"])
            await response(scope, receive, send)
        except (ClientDisconnect, OSError):
            pass  # a phone that goes away is no news
        except Exception as error:
            tell(f"The server failed: {type(error).__name__}: {error}")
            raise

    return application


async def _answer(request: Request, root: Path, devices: Path, token: str, tell: Callable[[str], None]) -> Response:
    from starlette.responses import FileResponse, PlainTextResponse

    start, _, inner = request.scope["path"].removeprefix("/").partition("/")
    if not secrets.compare_digest(start.encode("utf-8", "replace"), token.encode()):
        return PlainTextResponse("not found\n", 404)
    if request.method == "POST" and inner == RESULT:
        response = await _save(request, devices, tell)
        response.headers["Connection"] = "close"
        return response
    path = _file(root, inner) if request.method in ("GET", "HEAD") else None
    if path is None:
        return PlainTextResponse("not found\n", 404)
    if path == root / PAGE:
        return _page(path, _wanted_language(request.headers.get("Accept-Language", "")))
    _simplify_range(request)
    return FileResponse(
        path, media_type=data_file("serve/http.yaml")["types"].get(path.suffix, "application/octet-stream")
    )


def _wanted_language(accepted: str) -> str:
    """Of English and Chinese the one that a browser wants more, by its Accept-Language."""
    found = {ENGLISH: 0.0, CHINESE: 0.0}
    for part in accepted.split(",")[:50]:
        if (told := _ACCEPTED.fullmatch(part)) and (name := told[1].lower()) in found:
            found[name] = max(found[name], float(told[2] or 1))
    return max(found, key=lambda name: found[name])  # of two that are wanted alike English


def _page(path: Path, wanted: str) -> Response:
    """The page with its first words in a language; its scripts say the others in that of the same browser."""
    from starlette.responses import HTMLResponse

    text, words = path.read_text(encoding="utf-8", errors="replace"), object_or_empty(path.with_name(WORDS)).get(wanted)
    if isinstance(words, dict):
        text = _SAID.sub(lambda said: said["mark"] + html.escape(str(words.get(said["text"], said["text"]))), text)
        text = text.replace('<html lang="en">', f'<html lang="{TAGS[wanted]}">', 1)
    return HTMLResponse(text, headers={"Vary": "Accept-Language", "Content-Language": TAGS[wanted]})


async def _save(request: Request, devices: Path, tell: Callable[[str], None]) -> Response:
    """A phone's result: checked, then saved."""
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse, PlainTextResponse

    length = request.headers.get("Content-Length", "")
    if not length.isdecimal() or len(length) > 9:
        return PlainTextResponse("Content-Length is missing\n", 411)
    if int(length) > MOST_BYTES:
        return PlainTextResponse(f"more than {MOST_BYTES} bytes\n", 413)
    try:
        result = check_result(json.loads(await request.body()))
        path = await run_in_threadpool(save_result, devices, result)
    except (ValueError, RecursionError) as error:
        return PlainTextResponse(f"{error}\n", 400)
    except OSError as error:
        tell(f"A result came in and could not be saved in {devices}: {error.strerror or error}")
        return PlainTextResponse("the result could not be saved\n", 500)
    tell(f"A result came in: {path}")
    return JSONResponse({"saved": path.name}, 201)


def _file(root: Path, inner: str) -> Path | None:
    """A file of the package; None for anything else, hidden files and what links lead out of it."""
    if "\0" in inner or any(part.startswith(".") for part in inner.split("/")):
        return None
    path = root / (inner + "index.html" if inner.endswith("/") else inner)
    try:
        return path if path.is_file() and path.resolve().is_relative_to(root) else None
    except (OSError, ValueError):  # a name that no file system takes
        return None


def _simplify_range(request: Request) -> None:
    """Leave a Range that is one span of numbers that Python reads; another one is ignored, as allowed."""
    from starlette.datastructures import MutableHeaders

    headers = MutableHeaders(scope=request.scope)
    found = _RANGE.fullmatch(headers.get("Range", ""))
    first, last = (digits and (digits.lstrip("0")[:19] or "0") for digits in found.groups()) if found else ("", "")
    del headers["Range"]
    if (first or last) and not (first and last and int(first) > int(last)):
        headers["Range"] = f"bytes={first}-{last}"


def _reachable(host: str) -> str:
    """The address that a phone can reach: of the network's interface where every interface listens."""
    if host in ("0.0.0.0", "::"):
        family, probe = (socket.AF_INET, "192.0.2.1") if host == "0.0.0.0" else (socket.AF_INET6, "2001:db8::1")
        with socket.socket(family, socket.SOCK_DGRAM) as asked:  # a datagram socket sends nothing to connect
            try:
                asked.connect((probe, 9))
                host = asked.getsockname()[0]
            except OSError:
                host = socket.gethostname()
    return in_address(host)


def announce(address: str, options: ServeOptions, tell: Callable[[str], None]) -> None:
    """Tell the address and how a phone reaches it: by a QR code, or by which option it could."""
    import io

    import segno

    said = data_file("serve/sentences.yaml")
    if is_loopback(options.host):
        tell(said["alone"].format(port=urlsplit(address).port))
    else:
        tell(
            f"Warning: {options.host} is not this machine alone: everybody in the network who knows the address below "
            + ("can read the package." if options.cert else "can read the package, and it is not encrypted.")
        )
        if not options.cert:
            tell(said["http"])
        drawn = io.StringIO()
        segno.make(address, micro=False).terminal(drawn, border=2, compact=True)
        tell(drawn.getvalue())
        tell(said["network"])
    tell(f"The phone page is served at {address} (end with Ctrl-C).")
