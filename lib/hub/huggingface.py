"""Repositories of the hub or of a mirror (HF_ENDPOINT), listed by its own client and kept in that client's cache.

Layout of the cache: blobs/<hash>, snapshots/<commit>/<file> → blob, refs/<branch>, and the listing,
trees/<commit>.json.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock

from lib.hub import transport
from lib.hub.sources import COMMIT, Remote, RemoteFile, Snapshot, SourceError, choose, is_data
from lib.hub.transport import MissingError, UnreachableError
from lib.runs.files import write_text

HUB = "https://huggingface.co"
"""Where a repository is looked for when HF_ENDPOINT is not set, or its mirror does not have it."""
OTHERWISE = "set HF_ENDPOINT to another mirror"
_HASH = re.compile(r"[0-9a-f]{40,64}")


def addresses() -> list[str]:
    """Addresses in the order in which they are asked: the mirror that HF_ENDPOINT names, then the hub itself."""
    mirror = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    return [mirror] if mirror == HUB else [mirror, HUB]


def folder_of(remote: Remote) -> Path:
    """The repository's folder in the cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=remote.id, repo_type=remote.repository_type)


def cached(remote: Remote) -> Snapshot | None:
    """The snapshot, if the cache holds all of it.

    The hub's own client checks only sizes, so what it fetched is hashed here before its first use.
    """
    from huggingface_hub._tree_cache import read_tree_cache

    place, commit = folder_of(remote), remote.revision
    if not COMMIT.fullmatch(commit):
        reference = place / "refs" / commit
        commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else ""
    snapshot = place / "snapshots" / commit
    if not commit or not snapshot.is_dir():
        return None
    listing = read_tree_cache(str(place), commit)
    if listing is None:
        return Snapshot(snapshot, commit) if _looks_whole(remote, snapshot) else None
    files = [RemoteFile(name, entry.size, entry.lfs_sha256, entry.blob_id) for name, entry in listing.items()]
    try:
        differs = any(transport.difference(snapshot / file.path, file) for file in choose(remote, files))
    except SourceError:
        return None
    return None if differs else Snapshot(snapshot, commit)


def _looks_whole(remote: Remote, snapshot: Path) -> bool:
    """Whether a snapshot without a listing (an older hub client's) has weights and configuration, or data."""
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


def download(address: str, remote: Remote) -> Snapshot:
    """Download the snapshot into the cache from one address.

    Raises:
        UnreachableError, MissingError, HfHubHTTPError, MismatchError: see there. SourceError: nothing usable.
        InputError: no room on the disk.
    """
    from huggingface_hub import get_token
    from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache
    from huggingface_hub.file_download import _create_symlink
    from huggingface_hub.utils import build_hf_headers

    token = (get_token() or False) if address == addresses()[0] else False  # a mirror's token is not shown to the hub
    place = folder_of(remote)
    lock = place.parent / ".locks" / place.name / "workbook.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock), transport.open_client(build_hf_headers(token=token)) as client:
        commit, files = _list(address, token, remote)
        blobs = {file: place / "blobs" / (file.sha256 or file.git or "") for file in choose(remote, files)}
        base = f"{address}/{'datasets/' if remote.is_data else ''}{remote.id}/resolve/{commit}"
        transport.fetch_files(client, remote, blobs, lambda file: f"{base}/{quote(file.path)}", "HF_HOME")
        snapshot = place / "snapshots" / commit
        for file, blob in blobs.items():
            (snapshot / file.path).parent.mkdir(parents=True, exist_ok=True)
            _create_symlink(str(blob), str(snapshot / file.path))
        entries = {
            file.path: TreeCacheEntry(file.size or 0, file.git or "", file.sha256, file.size if file.sha256 else None)
            for file in files
        }
        write_tree_cache(str(place), commit, entries)
        if commit != remote.revision:
            write_text(place / "refs" / remote.revision, commit)
    return Snapshot(snapshot, commit)


def _list(address: str, token: str | bool, remote: Remote) -> tuple[str, list[RemoteFile]]:
    """The commit of the revision and all its files."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    def ask() -> tuple[str, list[RemoteFile]]:
        info = HfApi(address, token=token).repo_info(
            remote.id,
            revision=remote.revision,
            repo_type=remote.repository_type,
            files_metadata=True,
            timeout=transport.TIMEOUT,
        )
        return str(info.sha), [
            RemoteFile(entry.rfilename, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
            for entry in info.siblings or ()
        ]

    try:
        commit, files = transport.patiently(ask)
    except HFValidationError:
        raise MissingError from None
    except (KeyError, TypeError, AttributeError):
        raise UnreachableError("its listing is not a hub's") from None
    if not COMMIT.fullmatch(commit):
        raise UnreachableError("it names no commit, so it is not a hub")
    if any(file.leaves_its_folder or not _HASH.fullmatch(file.sha256 or file.git or "") for file in files):
        raise UnreachableError("its listing is not a hub's")
    return commit, files
