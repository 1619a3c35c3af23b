"""HTTP for downloads: patient retries, resumed files, and bytes that match the listing.

huggingface_hub's own download starts a file again from nothing in the next process, retries no server error, obeys any
`Retry-After`, and compares sizes alone; so the bytes are fetched here, for the hub and for ModelScope alike.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lib.hub.sources import Remote, RemoteFile
from lib.progress import Progress
from lib.runs.files import flush_to_disk, readable_by_group, remembered_sha256, require_space

if TYPE_CHECKING:
    import httpx


ATTEMPTS = 5
"""Tries of a request that brings nothing; a try that brought bytes starts the count again."""
ATTEMPTS_CONNECT = 2
"""Tries to reach a server that does not answer at all (the next source may)."""
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before the second try (doubled each time), and the longest wait that a server may ask for."""
TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as broken."""
TOGETHER = 4
"""Files that are fetched at a time: one connection seldom fills a line."""
_RETRIED = frozenset((408, 425, 429, 500, 502, 503, 504))

T = TypeVar("T")


class UnreachableError(Exception):
    """No usable answer after all tries; the message is the reason in a few words.

    Args:
        do: what to do, where that is known: the cause is a setting of this machine.
    """

    def __init__(self, reason: str, do: str = "") -> None:
        super().__init__(reason)
        self.do = do


class MissingError(Exception):
    """No such repository, or a private one, where the answer's status does not say so."""


class MismatchError(Exception):
    """Bytes that differ from the listing, twice."""


def host_of(address: str) -> str:
    """Host and port of an address: names, passwords and tokens in it are never told."""
    return re.split("[/?#]", (address.partition("://")[2] or address).rpartition("@")[2])[0]


def open_client(headers: Mapping[str, str]) -> httpx.Client:
    """A client that follows redirects (without the token, when they lead to another host).

    Raises:
        UnreachableError: the environment names a proxy that cannot be one, or certificates that are none.
    """
    import httpx

    plain = {"Accept-Encoding": "identity", "User-Agent": "quantization-workbook"}
    timeout = httpx.Timeout(TIMEOUT, connect=10.0)
    try:
        return httpx.Client(headers={**plain, **headers}, follow_redirects=True, timeout=timeout)
    except OSError:
        raise UnreachableError("SSL_CERT_FILE or SSL_CERT_DIR names no certificates", _CERTIFICATES) from None
    except (ValueError, ImportError, httpx.InvalidURL):  # their words may hold the proxy's password
        raise UnreachableError(
            "HTTP_PROXY, HTTPS_PROXY or ALL_PROXY holds no address of a proxy, or one of a kind that needs another "
            "package",
            "correct or unset those variables",
        ) from None


_CERTIFICATES = "set SSL_CERT_FILE to a file of the certificates (PEM) that servers or the proxy here bear, or unset it"


def token_of(name: str, value: str | None) -> str | None:
    """A token without spaces and line ends around it; None where there is none.

    Raises:
        UnreachableError: characters that no token has, and no header may hold.
    """
    token = (value or "").strip()
    if not re.fullmatch("[!-~]*", token):
        raise UnreachableError(f"{name} holds characters that no token has", f"set {name} to the token alone")
    return token or None


class _EndedError(Exception):
    """Another file of the same download failed, or the user ended it."""


class _CutOffError(Exception):
    """An answer that ended before the file did; another request brings the rest."""


def _failure(error: Exception) -> tuple[str, float | None, int]:
    """Why a request failed, the seconds that the server asks to wait, and how many tries that is worth.

    Raises:
        HfHubHTTPError: a lasting refusal. UnreachableError: no web address, a circle of redirects, no trusted server.
    """
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, _CutOffError):
        return str(error), None, ATTEMPTS
    if isinstance(error, HfHubHTTPError):
        status, asked = error.response.status_code, error.response.headers.get("Retry-After", "")
        if status not in _RETRIED:
            raise error
        return f"it answered {status}", float(asked) if asked.isdigit() else None, ATTEMPTS
    if isinstance(error, (httpx.UnsupportedProtocol, httpx.InvalidURL)):
        raise UnreachableError("an address must start with http:// or https://")
    if isinstance(error, httpx.TooManyRedirects):
        raise UnreachableError("it redirects in a circle")
    if isinstance(error, httpx.ConnectError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        raise UnreachableError("its certificate is not trusted here", _CERTIFICATES)
    connect = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
    return type(error).__name__, None, ATTEMPTS_CONNECT if connect else ATTEMPTS


def patiently(
    request: Callable[[], T], got_bytes: Callable[[], bool] = lambda: False, ended: threading.Event | None = None
) -> T:
    """What a request gives, after as many tries as it takes.

    Args:
        got_bytes: whether the last try brought bytes, so that the tries are counted from the first again.
        ended: set when the answer is no longer wanted; ends the waiting between two tries.

    Raises:
        UnreachableError: no answer, or no JSON (a proxy's page), or the server asks to wait longer than `LONGEST_WAIT`.
        HfHubHTTPError: a lasting refusal.
    """
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    failures, ended = 0, ended or threading.Event()
    while not ended.is_set():
        try:
            return request()
        except (httpx.RequestError, httpx.InvalidURL, HfHubHTTPError, _CutOffError) as error:
            failures = 1 if got_bytes() else failures + 1
            reason, asked, most = _failure(error)
            if failures >= most:
                raise UnreachableError(reason) from None
            if asked is not None and asked > LONGEST_WAIT:
                raise UnreachableError(f"{reason}; the server asks to wait {asked:.0f} s") from None
            ended.wait(asked if asked is not None else FIRST_WAIT * 2 ** (failures - 1))
        except ValueError:
            raise UnreachableError("it answered with a page, not with JSON") from None
    raise _EndedError


def fetch_files(
    client: httpx.Client,
    remote: Remote,
    targets: Mapping[RemoteFile, Path],
    address: Callable[[RemoteFile], str],
    variable: str,
) -> None:
    """Make every target match the listing; files that already do are not fetched again. `TOGETHER` at a time: the first
    that fails ends the others, whose bytes are kept for the next time.

    Args:
        address: where a file is found.
        variable: names the folder in which there must be room, for messages.

    Raises:
        UnreachableError, HfHubHTTPError, MismatchError: see there. InputError: no room on the disk.
    """
    missing = {path: file for file, path in targets.items() if difference(path, file)}  # equal files have one path
    for path in missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # damaged
    left = sum(max(0, (file.size or 0) - _size(_part(path))) for path, file in missing.items())
    if left:
        require_space(next(iter(targets.values())).parent, left, remote.words, variable)
    ended, counting = threading.Event(), threading.Lock()
    with Progress(f"downloading {remote.id}, bytes", left) as progress, ThreadPoolExecutor(TOGETHER) as pool:

        def came(count: int) -> None:
            if ended.is_set():
                raise _EndedError
            with counting:
                progress.advance(count)

        def bring(path: Path, file: RemoteFile) -> None:
            part = _part(path)
            _download(client, address(file), file, part, came, ended)
            flush_to_disk(part)
            readable_by_group(part)
            part.replace(path)

        try:
            for future in as_completed([pool.submit(bring, *pair) for pair in missing.items()]):
                future.result()
        finally:
            ended.set()
            pool.shutdown(cancel_futures=True)


def difference(path: Path, file: RemoteFile) -> str | None:
    """How a file on the disk differs from its listing, in words; None when size and hash are as listed."""
    if not path.is_file():
        return "no such file"
    if file.size is not None and _size(path) != file.size:
        return f"{_size(path)} bytes instead of {file.size}"
    if file.sha256 is not None:
        kind, wanted, found = "SHA-256", file.sha256, remembered_sha256(path)
    elif file.git is not None:
        from huggingface_hub.utils.sha import git_hash

        kind, wanted, found = "git hash", file.git, git_hash(path.read_bytes())
    else:
        return None
    return None if found == wanted else f"{kind} {found[:12]}… instead of {wanted[:12]}…"


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.incomplete")


def _size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def _download(
    client: httpx.Client,
    url: str,
    file: RemoteFile,
    part: Path,
    came: Callable[[int], None],
    ended: threading.Event,
) -> None:
    """Fill `part` with the file at `url`, continuing what is there; once more from nothing if the bytes are wrong.

    Args:
        came: told the number of bytes that were written; raises when no more are wanted.
    """
    had = 0

    def append() -> None:
        """Ask for all bytes that are missing."""
        from huggingface_hub.utils import hf_raise_for_status

        nonlocal had
        had = _size(part)
        if part.is_file() and had >= (file.size or 0):
            return
        with client.stream("GET", url, headers={"Range": f"bytes={had}-"} if had else {}) as response:
            if response.status_code == 416:  # the rest that we asked for does not exist: begin again
                part.unlink()
                raise _CutOffError("it answered 416")
            hf_raise_for_status(response)
            continued = response.headers.get("Content-Range", "").startswith(f"bytes {had}-")
            with part.open("ab" if response.status_code == 206 and continued else "wb") as stream:
                for chunk in response.iter_bytes():
                    stream.write(chunk)
                    came(len(chunk))
        if _size(part) < (file.size or 0):
            raise _CutOffError("the connection ended early")

    for _ in range(2):
        patiently(append, lambda: _size(part) > had, ended)
        problem = difference(part, file)
        if problem is None:
            return
        part.unlink()
    raise MismatchError(f"{file.path} has {problem}")
