"""Repositories of ModelScope over its public HTTP interface; kept under runs/_cache/modelscope.

MODELSCOPE_DOMAIN names another host (as for ModelScope's own client), MODELSCOPE_API_TOKEN a token for private
repositories. ModelScope names no commit of a whole repository, so the resolved revision is a hash over the files.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from filelock import FileLock

from lib.errors import InputError
from lib.hub import transport
from lib.hub.sources import Remote, SourceError, choose, is_offline, require_room, unreachable
from lib.hub.transport import MismatchError, RefusedError, RemoteFile, UnreachableError
from lib.progress import Progress
from lib.runs.files import (
    HOME_VARIABLE,
    flush_to_disk,
    read_json,
    readable_by_group,
    runs_folder,
    sha256_file,
    sha256_json,
    write_json,
)

if TYPE_CHECKING:
    import httpx


_DOMAIN = "www.modelscope.cn"
_PAGE = 500


def endpoint() -> str:
    """The address of ModelScope."""
    domain = os.environ.get("MODELSCOPE_DOMAIN") or _DOMAIN
    return (domain if "://" in domain else f"https://{domain}").rstrip("/")


def folder_of(remote: Remote) -> Path:
    """The folder of a repository's revision."""
    kind = "datasets" if remote.is_data else "models"
    name = "--".join((kind, *remote.id.split("/")))
    return runs_folder() / "_cache" / "modelscope" / name / quote(remote.revision, safe="")


def fetch(remote: Remote) -> tuple[Path, str]:
    """The folder with the files and a hash over them ("sha256:…").

    Raises:
        SourceError: cannot be had; the message names the cure. InputError: no room on the disk.
    """
    place = folder_of(remote)
    if found := _cached(place):
        return found
    if is_offline():
        raise unreachable(remote, "HF_HUB_OFFLINE is set")
    token = os.environ.get("MODELSCOPE_API_TOKEN")
    headers = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_name(f".{place.name}.lock")), transport.open_client(headers) as client:
            return _cached(place) or _download(client, remote, place)
    except UnreachableError as error:
        raise unreachable(remote, f"{endpoint().partition('://')[2]}: {error}") from None
    except RefusedError as error:
        raise _explain(remote, error) from None
    except MismatchError as error:
        raise SourceError(
            f"{remote.words}: {error}, twice.",
            "the bytes whose SHA-256 ModelScope names.",
            f"try again later, or set {remote.setting} to a local folder.",
            "its bytes differ from their hash",
        ) from None


def _cached(place: Path) -> tuple[Path, str] | None:
    """A whole copy: the listing is written last, and every file has its listed size."""
    if not (place / "listing.json").is_file():
        return None
    listing = read_json(place / "listing.json")
    files = place / "files"
    sizes = {files / name: entry["bytes"] for name, entry in listing["files"].items()}
    whole = all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())
    return (files, listing["revision"]) if whole else None


def _download(client: httpx.Client, remote: Remote, place: Path) -> tuple[Path, str]:
    chosen = choose(remote, _list(client, remote))
    targets = {file: place / "files" / file.path for file in chosen}
    missing = [f for f, path in targets.items() if not path.is_file() or transport.wrong(path, f)]
    need = sum(file.size or 0 for file in missing)
    require_room(remote, need, place, HOME_VARIABLE)
    kind = "datasets" if remote.is_data else "models"
    url = f"{endpoint()}/api/v1/{kind}/{remote.id}/repo?Revision={quote(remote.revision, safe='')}&FilePath="
    with Progress(f"downloading {remote.id}, bytes", need) as progress:
        for file in missing:
            part = place / "parts" / quote(file.path, safe="")
            try:
                transport.download(client, url + quote(file.path, safe=""), file, part, progress)
            except MismatchError as error:
                raise MismatchError(f"{file.path} has {error}") from None
            flush_to_disk(part)
            readable_by_group(part)
            targets[file].parent.mkdir(parents=True, exist_ok=True)
            part.replace(targets[file])
    hashes = {file.path: file.sha256 or sha256_file(path) for file, path in targets.items()}
    revision = f"sha256:{sha256_json(hashes)[:16]}"
    sizes = {file.path: {"bytes": path.stat().st_size, "sha256": hashes[file.path]} for file, path in targets.items()}
    write_json(place / "listing.json", {"id": remote.id, "revision": revision, "files": sizes})
    return place / "files", revision


def _list(client: httpx.Client, remote: Remote) -> list[RemoteFile]:
    """All files of the revision; data sets come in pages."""
    options: dict[str, Any] = {"Revision": remote.revision, "Recursive": "true"}
    base = f"{endpoint()}/api/v1"
    if not remote.is_data:
        return _files(transport.get_json(client, f"{base}/models/{remote.id}/repo/files", options)[0])
    files: list[RemoteFile] = []
    number = 1
    while True:
        page = {**options, "PageNumber": number, "PageSize": _PAGE}
        entries = _entries(transport.get_json(client, f"{base}/datasets/{remote.id}/repo/tree", page)[0])
        files += _files_of(entries)
        if len(entries) < _PAGE:
            return files
        number += 1


def _entries(answer: Any) -> list[dict[str, Any]]:
    if isinstance(answer, dict) and answer.get("Success") is False:
        raise RefusedError(404, "", str(answer.get("Message", "")))  # some refusals come with status 200
    try:
        return list(answer["Data"]["Files"])
    except (KeyError, TypeError):
        raise UnreachableError("its listing is not ModelScope's") from None


def _files(answer: Any) -> list[RemoteFile]:
    return _files_of(_entries(answer))


def _files_of(entries: list[dict[str, Any]]) -> list[RemoteFile]:
    files = [e for e in entries if isinstance(e, dict) and e.get("Type") != "tree" and isinstance(e.get("Path"), str)]
    safe = [e for e in files if not e["Path"].startswith("/") and ".." not in e["Path"].split("/")]
    return [RemoteFile(e["Path"], e.get("Size"), e.get("Sha256") or None) for e in safe]


def _explain(remote: Remote, error: RefusedError) -> InputError:
    what, key = remote.words, remote.setting
    if error.status in (401, 403):
        do = f"set MODELSCOPE_API_TOKEN to your token, or set {key} to a local folder."
        return SourceError(f"{what}: access refused ({error.status}).", "access.", do, f"answered {error.status}")
    if error.status == 404:
        do = f"correct {key} or revision; for a private one set MODELSCOPE_API_TOKEN."
        return SourceError(f"{what} is not there, or private.", "one that exists.", do, "is not there, or private")
    do = f"try again later, or set {key} to a local folder."
    return SourceError(f"{what}: ModelScope answered {error.status}.", "a download.", do, f"answered {error.status}")
