"""HTTP for downloads: retries with patience, resumed files, and bytes that are what the server said they would be."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.runs.files import CHUNK, sha256_file

if TYPE_CHECKING:
    import httpx

    from lib.progress import Progress


ATTEMPTS = 5
"""Tries of a request that brings nothing; a try that brought bytes starts the count again."""
ATTEMPTS_CONNECT = 2
"""Tries to reach a server that does not answer at all (the next source may)."""
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before the second try (doubled each time), and the longest wait that a server may ask for."""
_RETRIED = frozenset((408, 425, 429, 500, 502, 503, 504))


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository's listing; the hashes are those that the server names, None when it names none.

    Attributes:
        path: relative, with forward slashes. size: bytes; None when unknown.
        sha256: of its bytes. git: its git blob id (SHA-1).
    """

    path: str
    size: int | None
    sha256: str | None = None
    git: str | None = None

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


class UnreachableError(Exception):
    """No usable answer after all tries; the message is the reason in a few words."""


class RefusedError(Exception):
    """An answer that more tries will not change."""

    def __init__(self, status: int, code: str, text: str) -> None:
        super().__init__(f"{status} {code}".strip())
        self.status, self.code, self.text = status, code, text


class MismatchError(Exception):
    """Bytes that differ from the listing's hash, twice."""


def open_client(headers: dict[str, str]) -> httpx.Client:
    """A client that follows redirects (without the token, when they lead to another host)."""
    import httpx

    plain = {"Accept-Encoding": "identity", "User-Agent": "quantization-workbook"}
    return httpx.Client(headers={**plain, **headers}, follow_redirects=True, timeout=httpx.Timeout(30.0, connect=10.0))


class _Patience:
    """Counts tries that brought nothing and waits between them."""

    def __init__(self) -> None:
        self.failures = 0

    def wait(self, reason: str, asked: float | None = None, most: int = ATTEMPTS) -> None:
        """Wait before the next try.

        Raises:
            UnreachableError: it was the last one, or the server asks for more time than `LONGEST_WAIT`.
        """
        self.failures += 1
        if self.failures >= most:
            raise UnreachableError(reason)
        if asked is not None and asked > LONGEST_WAIT:
            raise UnreachableError(f"{reason}; the server asks to wait {asked:.0f} s")
        time.sleep(asked if asked is not None else FIRST_WAIT * 2 ** (self.failures - 1))

    def progress(self) -> None:
        self.failures = 0


def _check(response: httpx.Response, patience: _Patience) -> bool:
    """True for a usable answer, False after a wait for the next try.

    Raises:
        RefusedError, UnreachableError: see there.
    """
    status = response.status_code
    if status in _RETRIED:
        after = response.headers.get("Retry-After", "")
        patience.wait(f"it answered {status}", float(after) if after.isdigit() else None)
        return False
    if status >= 400:
        response.read()
        raise RefusedError(status, response.headers.get("X-Error-Code", ""), response.text[:300])
    return True


def _retry(error: Exception, patience: _Patience) -> None:
    """Wait after a failed connection; what cannot get better (an address that is none, a redirect loop) ends it."""
    import httpx

    if isinstance(error, (httpx.UnsupportedProtocol, httpx.InvalidURL)):
        raise UnreachableError("an address must start with http:// or https://")
    if isinstance(error, httpx.TooManyRedirects):
        raise UnreachableError("it redirects in a circle")
    connect = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
    patience.wait(type(error).__name__, most=ATTEMPTS_CONNECT if connect else ATTEMPTS)


def get_json(client: httpx.Client, url: str, params: dict[str, Any] | None = None) -> tuple[Any, httpx.Response]:
    """The JSON at `url` and the answer it came with.

    Raises:
        UnreachableError: no answer, or no JSON (a proxy's page). RefusedError: a lasting refusal.
    """
    import httpx

    patience = _Patience()
    while True:
        try:
            response = client.get(url, params=params)
        except (httpx.RequestError, httpx.InvalidURL) as error:
            _retry(error, patience)
            continue
        if _check(response, patience):
            try:
                return response.json(), response
            except ValueError:
                raise UnreachableError(f"{response.url.host} answered with a page, not with JSON") from None


def download(client: httpx.Client, url: str, file: RemoteFile, part: Path, progress: Progress) -> None:
    """Fill `part` with the file at `url`, continuing what is there; its size and hash are checked.

    Raises:
        UnreachableError, RefusedError: see there. MismatchError: wrong bytes, also after starting again from nothing.
    """
    part.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        _fill(client, url, file, part, progress)
        if problem := wrong(part, file):
            part.unlink()
            continue
        return
    raise MismatchError(problem)


def wrong(path: Path, file: RemoteFile) -> str | None:
    """How a file differs from its listing, in words; None when size and hash are as listed."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"{size} bytes instead of {file.size}"
    if file.sha256 is not None and (found := sha256_file(path)) != file.sha256:
        return f"SHA-256 {found[:12]}… instead of {file.sha256[:12]}…"
    if file.sha256 is None and file.git is not None and (found := _git_blob(path, size)) != file.git:
        return f"git hash {found[:12]}… instead of {file.git[:12]}…"
    return None


def _git_blob(path: Path, size: int) -> str:
    digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _fill(client: httpx.Client, url: str, file: RemoteFile, part: Path, progress: Progress) -> None:
    """Bring `part` to its full size by as many requests as it takes."""
    import httpx

    patience = _Patience()
    while True:
        have = part.stat().st_size if part.is_file() else 0
        if file.size is not None and have >= file.size and (have or part.is_file()):
            return
        try:
            with client.stream("GET", url, headers={"Range": f"bytes={have}-"} if have else {}) as response:
                if response.status_code == 416:  # the rest that we asked for does not exist: begin again
                    part.unlink()
                    patience.wait("it answered 416")
                    continue
                if not _check(response, patience):
                    continue
                continued = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
                _append(response, part, progress, restart=not (response.status_code == 206 and continued))
        except (httpx.RequestError, httpx.InvalidURL) as error:
            if part.is_file() and part.stat().st_size > have:
                patience.progress()
            _retry(error, patience)
            continue
        if file.size is None or part.stat().st_size >= file.size:
            return
        if part.stat().st_size > have:
            patience.progress()
        patience.wait("the connection ended early")


def _append(response: httpx.Response, part: Path, progress: Progress, restart: bool) -> None:
    with part.open("wb" if restart else "ab") as stream:
        for chunk in response.iter_bytes():
            stream.write(chunk)
            progress.advance(len(chunk))
