"""Repositories of ModelScope over its public HTTP interface; kept under runs/_cache/modelscope.

MODELSCOPE_DOMAIN names another host (as for ModelScope's own client), MODELSCOPE_API_TOKEN a token for private
repositories. ModelScope names no commit of a whole repository, so the resolved revision is a hash over the files.
Its own client is not used: it is one more large package, and it neither continues a file in the next process nor says
which bytes were wrong.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from filelock import FileLock

from lib.hub import transport
from lib.hub.sources import Remote, RemoteFile, Snapshot, choose
from lib.hub.transport import MissingError, UnreachableError
from lib.runs.files import HOME_VARIABLE, read_json, remembered_sha256, runs_folder, sha256_json, write_json

if TYPE_CHECKING:
    import httpx


OTHERWISE = "try again later"
_PAGE = 500
"""Files of a data set that are listed at a time."""


def addresses() -> list[str]:
    """The address of ModelScope."""
    domain = os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
    return [(domain if "://" in domain else f"https://{domain}").rstrip("/")]


def folder_of(remote: Remote) -> Path:
    """The folder of a repository's revision."""
    name = "--".join((f"{remote.repository_type}s", *remote.id.split("/")))
    return runs_folder() / "_cache" / "modelscope" / name / quote(remote.revision, safe="")


def cached(remote: Remote) -> Snapshot | None:
    """The copy in the cache, if it is whole: the listing is written last, and every file has its listed size."""
    place = folder_of(remote)
    if not (place / "listing.json").is_file():
        return None
    listing = read_json(place / "listing.json")
    files = [RemoteFile(name, entry["bytes"]) for name, entry in listing["files"].items()]
    if any(transport.difference(place / "files" / file.path, file) for file in files):
        return None
    return Snapshot(place / "files", listing["revision"])


def download(address: str, remote: Remote) -> Snapshot:
    """Download the files from ModelScope; their folder, and a hash over them.

    Raises:
        UnreachableError, MissingError, HfHubHTTPError, MismatchError: see there. SourceError: nothing usable.
        InputError: no room on the disk.
    """
    place = folder_of(remote)
    place.mkdir(parents=True, exist_ok=True)
    token = os.environ.get("MODELSCOPE_API_TOKEN")
    headers = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}
    base = f"{address}/api/v1/{remote.repository_type}s/{remote.id}/repo"
    revision = quote(remote.revision, safe="")
    with FileLock(place.with_name(f".{place.name}.lock")), transport.open_client(headers) as client:
        paths = {file: place / "files" / file.path for file in choose(remote, _list(client, base, remote))}
        transport.fetch_files(
            client,
            remote,
            paths,
            lambda file: f"{base}?Revision={revision}&FilePath={quote(file.path, safe='')}",
            HOME_VARIABLE,
        )
        files = {
            file.path: {"bytes": path.stat().st_size, "sha256": file.sha256 or remembered_sha256(path)}
            for file, path in paths.items()
        }
        digest = sha256_json({name: entry["sha256"] for name, entry in files.items()})
        listing = {"id": remote.id, "revision": f"sha256:{digest[:16]}", "files": files}
        write_json(place / "listing.json", listing)
    return Snapshot(place / "files", listing["revision"])


def _list(client: httpx.Client, base: str, remote: Remote) -> list[RemoteFile]:
    """All files of the revision; those of data sets come in pages."""
    options: dict[str, Any] = {"Revision": remote.revision, "Recursive": "true"}
    if not remote.is_data:
        return _files(_entries(client, f"{base}/files", options))
    listed: list[dict[str, Any]] = []
    for number in itertools.count(1):
        page = _entries(client, f"{base}/tree", options | {"PageNumber": number, "PageSize": _PAGE})
        listed += page
        if len(page) < _PAGE:
            break
    return _files(listed)


def _entries(client: httpx.Client, url: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    from huggingface_hub.utils import hf_raise_for_status

    def ask() -> Any:
        response = client.get(url, params=options)
        hf_raise_for_status(response)
        return response.json()

    answer = transport.patiently(ask)
    if isinstance(answer, dict) and answer.get("Success") is False:
        raise MissingError  # some refusals come with status 200
    try:
        return list(answer["Data"]["Files"])
    except (KeyError, TypeError):
        raise UnreachableError("its listing is not ModelScope's") from None


def _files(entries: list[dict[str, Any]]) -> list[RemoteFile]:
    files = [e for e in entries if isinstance(e, dict) and e.get("Type") != "tree" and isinstance(e.get("Path"), str)]
    listed = [RemoteFile(e["Path"], e.get("Size"), e.get("Sha256") or None) for e in files]
    return [file for file in listed if not file.leaves_its_folder]
