"""Repositories of the hub or of a mirror (HF_ENDPOINT), in the cache that the hub's own client uses.

The workbook fetches the files itself, because the hub's client starts an interrupted file again from nothing and
checks only sizes. Layout of the cache: blobs/<hash>, snapshots/<commit>/<file> → blob, refs/<branch>, and
trees/<commit>.json, the listing.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from filelock import FileLock

from lib.errors import InputError
from lib.hub import transport
from lib.hub.sources import COMMIT, Remote, SourceError, choose, is_data, is_offline, require_room, unreachable
from lib.hub.transport import MismatchError, RefusedError, RemoteFile, UnreachableError
from lib.progress import Progress
from lib.runs.files import flush_to_disk, readable_by_group, runs_folder, write_json, write_text

if TYPE_CHECKING:
    import httpx


HUB = "https://huggingface.co"
"""Where a repository is looked for when HF_ENDPOINT is not set, or its mirror does not have it."""
_LISTING_FORMAT = 1
_HASH = re.compile(r"[0-9a-f]{40,64}")


def endpoints() -> list[str]:
    """Addresses in the order in which they are asked: the mirror that HF_ENDPOINT names, then the hub itself."""
    mirror = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    return [mirror] if mirror == HUB else [mirror, HUB]


def cache() -> Path:
    """The hub client's cache: HF_HUB_CACHE, HF_HOME/hub, or the user's."""
    if place := os.environ.get("HF_HUB_CACHE"):
        return Path(place).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def folder_of(remote: Remote) -> Path:
    """The repository's folder in the cache."""
    kind = "datasets" if remote.is_data else "models"
    return cache() / "--".join((kind, *remote.id.split("/")))


def fetch(remote: Remote) -> tuple[Path, str]:
    """The snapshot's folder and its commit: from the cache when it is whole there, else from the network.

    Raises:
        SourceError: cannot be had; the message names the cure. InputError: no room on the disk.
    """
    place = folder_of(remote)
    if found := _cached(remote, place):
        return found
    if is_offline():
        raise unreachable(remote, "HF_HUB_OFFLINE is set")
    from huggingface_hub import get_token

    failures = []
    for address in endpoints():
        token = None if failures else get_token()  # a mirror's token is not shown to the hub
        try:
            return _fetch_from(address, token, remote, place)
        except SourceError as error:
            failures.append(error)
    raise failures[0]


def _fetch_from(address: str, token: str | None, remote: Remote, place: Path) -> tuple[Path, str]:
    """From one address; its refusals as sentences."""
    host = address.partition("://")[2] or address
    try:
        with transport.open_client({"Authorization": f"Bearer {token}"} if token else {}) as client:
            return _download(client, address, remote, place)
    except UnreachableError as error:
        raise unreachable(remote, f"{host}: {error}") from None
    except RefusedError as error:
        raise _explain(remote, error) from None
    except MismatchError as error:
        raise SourceError(
            f"{remote.words}: {error}, twice, from {host}.",
            "the bytes whose hash the hub names.",
            f"set HF_ENDPOINT to another mirror, or set {remote.setting} to a local folder.",
            "its bytes differ from their hash",
        ) from None


def _cached(remote: Remote, place: Path) -> tuple[Path, str] | None:
    """A whole snapshot in the cache."""
    commit = remote.revision
    if not COMMIT.fullmatch(commit):
        reference = place / "refs" / commit
        commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else ""
    snapshot = place / "snapshots" / commit
    if not commit or not snapshot.is_dir():
        return None
    listing = _read_listing(place / "trees" / f"{commit}.json")
    if listing is None:
        return (snapshot, commit) if _looks_whole(remote, snapshot) else None
    try:
        chosen = choose(remote, listing)
    except SourceError:
        return None
    return (snapshot, commit) if all(_verified(snapshot / file.path, file) for file in chosen) else None


def _verified(path: Path, file: RemoteFile) -> bool:
    """Whether a file of the cache is there and has its hash; the hash is computed once for each state of the file.

    The hub's own client checks only sizes, so what it fetched is checked here before its first use.
    """
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    state = f"{path.stat().st_size} {path.stat().st_mtime_ns}"
    record = runs_folder() / "_cache" / "hub-verified" / str(file.sha256 or file.git)
    if record.is_file() and record.read_text(encoding="utf-8") == state:
        return True
    if transport.wrong(path, file):
        return False
    write_text(record, state)
    return True


def _looks_whole(remote: Remote, snapshot: Path) -> bool:
    """For a snapshot without listing (an older hub client's): weights and configuration, or data, are there."""
    names = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
    if remote.is_data:
        return any(map(is_data, names))
    index = snapshot / "model.safetensors.index.json"
    if index.is_file():
        try:
            return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) <= names
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
    weights = "adapter_model.safetensors" if remote.kind == "adapter" else "model.safetensors"
    return weights in names and names & {"config.json", "adapter_config.json"} != set()


def _read_listing(path: Path) -> list[RemoteFile] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format_version"] != _LISTING_FORMAT:
            return None
        return [
            RemoteFile(name, entry["size"], entry.get("lfs_sha256"), entry["blob_id"])
            for name, entry in content["files"].items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _download(client: httpx.Client, address: str, remote: Remote, place: Path) -> tuple[Path, str]:
    kind = "datasets" if remote.is_data else "models"
    api = f"{address}/api/{kind}/{remote.id}"
    commit = remote.revision
    if not COMMIT.fullmatch(commit):
        info, _ = transport.get_json(client, f"{api}/revision/{quote(commit, safe='')}")
        commit = info.get("sha") if isinstance(info, dict) else None
        if not commit or not COMMIT.fullmatch(commit):
            raise UnreachableError("it names no commit, so it is not a hub")
    files = _list(client, f"{api}/tree/{commit}")
    chosen = choose(remote, files)
    blobs = {file: place / "blobs" / (file.sha256 or file.git or "") for file in chosen}
    missing = [file for file, blob in blobs.items() if not _verified(blob, file)]
    for file in missing:
        blobs[file].unlink(missing_ok=True)  # damaged: the hash is its name
    require_room(remote, sum(_left(file, blobs[file]) for file in missing), place, "HF_HOME")
    base = f"{address}/{'datasets/' if remote.is_data else ''}{remote.id}/resolve/{commit}"
    with Progress(f"downloading {remote.id}, bytes", sum(_left(file, blobs[file]) for file in missing)) as progress:
        for file in missing:
            _blob(client, f"{base}/{quote(file.path)}", file, blobs[file], progress)
    snapshot = place / "snapshots" / commit
    for file, blob in blobs.items():
        _link(snapshot / file.path, blob)
    write_json(place / "trees" / f"{commit}.json", _listing(files))
    if commit != remote.revision:
        write_text(place / "refs" / remote.revision, commit)
    return snapshot, commit


def _list(client: httpx.Client, url: str) -> list[RemoteFile]:
    """All files of a commit; the listing comes in pages."""
    files, page = [], f"{url}?recursive=true"
    while page:
        entries, response = transport.get_json(client, page)
        try:
            files += [_file(entry) for entry in entries if entry["type"] == "file"]
        except (KeyError, TypeError, ValueError):
            raise UnreachableError("its listing is not a hub's") from None
        following = response.links.get("next", {}).get("url", "")
        query = urlsplit(following).query  # a mirror's link may lead to the hub itself: only the cursor is taken
        page = f"{url}?{query}" if query else ""
    return files


def _file(entry: dict[str, Any]) -> RemoteFile:
    """An entry of the listing; a path or hash that would leave the cache is a ValueError."""
    large = entry.get("lfs") or {}
    path, git, sha256 = entry["path"], entry["oid"], large.get("oid")
    if path.startswith("/") or ".." in path.split("/") or not _HASH.fullmatch(sha256 or git):
        raise ValueError(path)
    return RemoteFile(path, large.get("size", entry["size"]), sha256, git)


def _listing(files: list[RemoteFile]) -> dict[str, Any]:
    """As the hub's client writes it, so that it can use the snapshot too."""
    found = {}
    for file in files:
        found[file.path] = {"size": file.size, "blob_id": file.git}
        if file.sha256:
            found[file.path] |= {"lfs_sha256": file.sha256, "lfs_size": file.size}
    return {"format_version": _LISTING_FORMAT, "files": found}


def _part(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _left(file: RemoteFile, blob: Path) -> int:
    """Bytes of a file that are still to come."""
    part = _part(blob)
    return max(0, (file.size or 0) - (part.stat().st_size if part.is_file() else 0))


def _blob(client: httpx.Client, url: str, file: RemoteFile, blob: Path, progress: Progress) -> None:
    """One file into the cache; the lock is the one that the hub's client takes."""
    lock = blob.parents[2] / ".locks" / blob.parents[1].name / f"{blob.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        if blob.is_file():
            return
        try:
            transport.download(client, url, file, _part(blob), progress)
        except MismatchError as error:
            raise MismatchError(f"{file.path} has {error}") from None
        flush_to_disk(_part(blob))
        readable_by_group(_part(blob))
        _part(blob).replace(blob)


def _link(path: Path, blob: Path) -> None:
    """The snapshot's file: a relative link to the blob; where links do not work, another name of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and path.samefile(blob):
        return
    path.unlink(missing_ok=True)
    try:
        path.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:
        os.link(blob, path)


def _explain(remote: Remote, error: RefusedError) -> InputError:
    """What the hub's refusal means and what to do about it."""
    what, key = remote.words, remote.setting
    local = f"or download it elsewhere and set {key} to the folder"
    if error.code == "GatedRepo":
        do = f"accept its terms on its page and set HF_TOKEN to your token, {local}."
        return SourceError(f"{what} is gated.", "access granted to your account.", do, "is gated")
    if error.code == "RevisionNotFound":
        return SourceError(f"{what}: no such revision.", "a branch, tag or commit.", "correct revision.", "no revision")
    if error.code == "RepoNotFound" or error.status == 404:
        do = f"correct {key}; for a private one set HF_TOKEN."
        return SourceError(f"{what} is not there, or private.", "one that exists.", do, "is not there, or private")
    if error.status in (401, 403):
        do = f"set HF_TOKEN to a valid token, {local}."
        return SourceError(f"{what}: access refused ({error.status}).", "access.", do, f"answered {error.status}")
    do = f"try again later, set HF_ENDPOINT to a mirror, {local}."
    return SourceError(f"{what}: the hub answered {error.status}.", "a download.", do, f"answered {error.status}")
