"""HTTP for downloads: retries with patience, resumed files, and bytes that are what the listing says.

huggingface_hub's own download starts a file again from nothing in the next process, retries no server error, obeys any
`Retry-After`, and compares sizes alone; so the bytes are fetched here, for the hub and for ModelScope alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
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
_RETRIED = frozenset((408, 425, 429, 500, 502, 503, 504))

T = TypeVar("T")


class UnreachableError(Exception):
    """No usable answer after all tries; the message is the reason in a few words."""


class MissingError(Exception):
    """No such repository, or a private one, where the answer's status does not say so."""


class MismatchError(Exception):
    """Bytes that differ from the listing, twice."""


def open_client(headers: Mapping[str, str]) -> httpx.Client:
    """A client that follows redirects (without the token, when they lead to another host)."""
    import httpx

    plain = {"Accept-Encoding": "identity", "User-Agent": "quantization-workbook"}
    return httpx.Client(
        headers={**plain, **headers}, follow_redirects=True, timeout=httpx.Timeout(TIMEOUT, connect=10.0)
    )


class _Patience:
    """Counts the tries that brought nothing, and waits between them."""

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

    def after(self, error: Exception) -> None:
        """Wait after a failed request; what more tries will not change is raised.

        Raises:
            HfHubHTTPError: a lasting refusal. UnreachableError: as `wait`; no web address, or a circle of redirects.
        """
        import httpx
        from huggingface_hub.errors import HfHubHTTPError

        if isinstance(error, HfHubHTTPError):
            status, asked = error.response.status_code, error.response.headers.get("Retry-After", "")
            if status not in _RETRIED:
                raise error
            self.wait(f"it answered {status}", float(asked) if asked.isdigit() else None)
        elif isinstance(error, (httpx.UnsupportedProtocol, httpx.InvalidURL)):
            raise UnreachableError("an address must start with http:// or https://")
        elif isinstance(error, httpx.TooManyRedirects):
            raise UnreachableError("it redirects in a circle")
        else:
            connect = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
            self.wait(type(error).__name__, most=ATTEMPTS_CONNECT if connect else ATTEMPTS)


def patiently(request: Callable[[], T]) -> T:
    """What a request for JSON gives, after as many tries as it takes.

    Raises:
        UnreachableError: no answer, or no JSON (a proxy's page). HfHubHTTPError: a lasting refusal.
    """
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    patience = _Patience()
    while True:
        try:
            return request()
        except (httpx.RequestError, httpx.InvalidURL, HfHubHTTPError) as error:
            patience.after(error)
        except ValueError:
            raise UnreachableError("it answered with a page, not with JSON") from None


def fetch_files(
    client: httpx.Client,
    remote: Remote,
    targets: Mapping[RemoteFile, Path],
    address: Callable[[RemoteFile], str],
    variable: str,
) -> None:
    """Bring every target to what the listing says; what is right already is not fetched again.

    Args:
        address: where a file is found.
        variable: names the folder in which there must be room, for messages.

    Raises:
        UnreachableError, HfHubHTTPError, MismatchError: see there. InputError: no room on the disk.
    """
    missing = {file: path for file, path in targets.items() if difference(path, file)}
    for path in missing.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # damaged
    left = sum(max(0, (file.size or 0) - _size(_part(path))) for file, path in missing.items())
    if left:
        require_space(next(iter(targets.values())).parent, left, remote.words, variable)
    with Progress(f"downloading {remote.id}, bytes", left) as progress:
        for file, path in missing.items():
            part = _part(path)
            _download(client, address(file), file, part, progress)
            flush_to_disk(part)
            readable_by_group(part)
            part.replace(path)


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


def _download(client: httpx.Client, url: str, file: RemoteFile, part: Path, progress: Progress) -> None:
    """Fill `part` with the file at `url`, continuing what is there; once more from nothing if the bytes are wrong."""
    for _ in range(2):
        _fill(client, url, file, part, progress)
        problem = difference(part, file)
        if problem is None:
            return
        part.unlink()
    raise MismatchError(f"{file.path} has {problem}")


def _fill(client: httpx.Client, url: str, file: RemoteFile, part: Path, progress: Progress) -> None:
    """Bring `part` to its full size by as many requests as it takes."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    patience = _Patience()
    while not part.is_file() or _size(part) < (file.size or 0):
        have = _size(part)
        try:
            ended = _append(client, url, part, have, progress)
        except (httpx.RequestError, httpx.InvalidURL, HfHubHTTPError) as error:
            ended = error
        if _size(part) > have:
            patience.failures = 0
        if isinstance(ended, Exception):
            patience.after(ended)
        elif file.size is None:
            return
        elif _size(part) < file.size:
            patience.wait(ended)


def _append(client: httpx.Client, url: str, part: Path, have: int, progress: Progress) -> str:
    """One request for all bytes from `have` on; how it ended, in words.

    Raises:
        httpx.RequestError, HfHubHTTPError: the connection broke, or the server refused.
    """
    from huggingface_hub.utils import hf_raise_for_status

    with client.stream("GET", url, headers={"Range": f"bytes={have}-"} if have else {}) as response:
        if response.status_code == 416:  # the rest that we asked for does not exist: begin again
            part.unlink()
            return "it answered 416"
        hf_raise_for_status(response)
        continued = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        with part.open("ab" if response.status_code == 206 and continued else "wb") as stream:
            for chunk in response.iter_bytes():
                stream.write(chunk)
                progress.advance(len(chunk))
    return "the connection ended early"
