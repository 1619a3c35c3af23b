"""Models, adapters and data sets from the hub, a mirror or ModelScope: whole, checked, and resumed when cut off."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from lib.errors import refusal
from lib.hub import transport
from lib.hub.sources import COMMIT, Kind, Remote, RemoteFile, Snapshot, SourceError, choose, is_data, is_offline, parse
from lib.hub.transport import MismatchError, MissingError, UnreachableError
from lib.progress import say
from lib.runs.files import (
    HOME_VARIABLE,
    read_json,
    remembered_sha256,
    runs_folder,
    sha256_json,
    write_json,
    write_text,
)
from lib.runs.locks import lock_file

if TYPE_CHECKING:
    import httpx

Asked = TypeVar("Asked")

HUB = "https://huggingface.co"
"""Where a repository is looked for when HF_ENDPOINT is not set, or its mirror does not have it."""
_HASH = re.compile(r"[0-9a-f]{40,64}")
_PAGE = 500
"""Files of a data set of ModelScope that are listed at a time."""


def fetch(source: str, revision: str, kind: Kind) -> Snapshot:
    """The files of a hub or ModelScope repository: from the cache, else from the network.

    Args:
        source: owner/name, or modelscope:owner/name; with @revision if it is not `revision`.
        revision: branch, tag or commit.
        kind: decides which files are fetched.

    Raises:
        SourceError: it cannot be had; the message names the cure.
        InputError: not an id, or no room on the disk.
    """
    remote = parse(source, revision, kind)
    repository = HubRepository(remote) if remote.place == "hub" else ModelScopeRepository(remote)
    if found := repository.cached():
        return found
    if remote.place == "hub" and (unlisted := repository.unlisted()):
        try:
            exact = HubRepository(replace(remote, revision=unlisted.revision))
            return _asked(exact, exact.download)
        except SourceError as error:
            say(f"{remote.words}: taken from the cache; whether it is whole was not checked ({error.why}).")
            return unlisted
    return _asked(repository, repository.download)


def fetch_text(source: str, revision: str, kind: Kind, path: str) -> str:
    """One small text file of a repository, from the cache or kept nowhere: its configuration, to tell sizes before a
    download.

    Raises:
        SourceError, InputError: as `fetch`.
    """
    remote = parse(source, revision, kind)
    repository = HubRepository(remote) if remote.place == "hub" else ModelScopeRepository(remote)
    if (kept := repository.kept(path)).is_file():
        return kept.read_text(encoding="utf-8")
    return _asked(repository, lambda address: repository.text(address, path))


def _asked(repository: HubRepository | ModelScopeRepository, ask: Callable[[str], Asked]) -> Asked:
    """What the first address gives that can be asked.

    Raises:
        SourceError: none of them; says what the first one answered.
    """
    from huggingface_hub.errors import HfHubHTTPError

    remote = repository.remote
    if is_offline():
        raise _unreachable(remote, "HF_HUB_OFFLINE is set")
    failures = []
    for address in repository.addresses():
        host = transport.host_of(address)
        try:
            return ask(address)
        except SourceError as error:
            failures.append(error)
        except UnreachableError as error:
            failures.append(_unreachable(remote, f"{host}: {error}", error.do))
        except MismatchError as error:
            otherwise = "set HF_ENDPOINT to another mirror" if remote.place == "hub" else "try again later"
            mismatch = refusal("hub/mismatch", SourceError, remote=remote, error=error, host=host, otherwise=otherwise)
            failures.append(mismatch)
        except (HfHubHTTPError, MissingError) as error:  # before OSError, of which the first is one
            failures.append(_refused(remote, error))
        except OSError as error:
            raise refusal("hub/not-stored", remote=remote, why=error.strerror or error) from None
    raise failures[0]


def _unreachable(remote: Remote, reason: str, do: str = "") -> SourceError:
    """The error for a source that is neither in the cache nor reachable."""
    mirror = do or ("set HF_ENDPOINT to a mirror's address" if remote.place == "hub" else "try again later")
    mirror += " (and unset HF_HUB_OFFLINE)" if is_offline() else ""
    last = ", or to offline" if remote.kind == "model" else ""
    return refusal("hub/unreachable", SourceError, remote=remote, reason=reason, mirror=mirror, last=last)


def _refused(remote: Remote, error: Exception) -> SourceError:
    """What a lasting refusal means and what to do about it."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    hub = remote.place == "hub"
    token = "HF_TOKEN" if hub else "MODELSCOPE_API_TOKEN"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 404
    if isinstance(error, GatedRepoError):
        return refusal("hub/gated", SourceError, remote=remote, token=token)
    if isinstance(error, RevisionNotFoundError):
        return refusal("hub/no-revision", SourceError, remote=remote)
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return refusal("hub/absent", SourceError, remote=remote, also="" if hub else " or revision", token=token)
    if status in (401, 403):
        return refusal("hub/no-access", SourceError, remote=remote, status=status, token=token)
    mirror = "set HF_ENDPOINT to a mirror, " if hub else ""
    return refusal("hub/other-answer", SourceError, remote=remote, status=status, mirror=mirror)


@dataclass(frozen=True)
class HubRepository:
    """A repository of the hub or of a mirror (HF_ENDPOINT), listed by its own client and kept in that client's cache.

    Layout of the cache: blobs/<hash>, snapshots/<commit>/<file> → blob, refs/<branch>, and the listing,
    trees/<commit>.json.
    """

    remote: Remote

    @staticmethod
    def addresses() -> list[str]:
        """Addresses in the order in which they are asked: the mirror that HF_ENDPOINT names, then the hub itself."""
        mirror = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
        return [mirror] if mirror == HUB else [mirror, HUB]

    @property
    def folder(self) -> Path:
        """The repository's folder in the cache."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        name = repo_folder_name(repo_id=self.remote.id, repo_type=self.remote.repository_type)
        return Path(constants.HF_HUB_CACHE) / name

    def cached(self) -> Snapshot | None:
        """The snapshot, if the cache holds all of its listing.

        The hub's own client checks only sizes, so what it fetched is hashed here before its first use.
        """
        from huggingface_hub._tree_cache import read_tree_cache

        snapshot, commit = self._place()
        listing = read_tree_cache(str(self.folder), commit) if commit and snapshot.is_dir() else None
        if listing is None:
            return None
        files = [RemoteFile(name, entry.size, entry.lfs_sha256, entry.blob_id) for name, entry in listing.items()]
        try:
            differs = any(transport.difference(snapshot / file.path, file) for file in choose(self.remote, files))
        except SourceError:
            return None
        return None if differs else Snapshot(snapshot, commit)

    def _place(self) -> tuple[Path, str]:
        """The snapshot's folder and the commit; empty where the cache does not know it."""
        place, commit = self.folder, self.remote.revision
        if not COMMIT.fullmatch(commit):
            reference = place / "refs" / commit
            commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else ""
        return place / "snapshots" / commit, commit

    def kept(self, path: str) -> Path:
        """Where the cache holds a file, if it does."""
        return self._place()[0] / path

    def unlisted(self) -> Snapshot | None:
        """The snapshot of a program that keeps no listing, if it has weights and configuration, or data."""
        snapshot, commit = self._place()
        return Snapshot(snapshot, commit) if commit and self._looks_whole(snapshot) else None

    def _looks_whole(self, snapshot: Path) -> bool:
        names = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
        if self.remote.is_data:
            return any(map(is_data, names))
        index = snapshot / "model.safetensors.index.json"
        if index.is_file():
            try:
                return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) <= names
            except (ValueError, KeyError, TypeError, AttributeError):
                return False
        weights = "adapter_model.safetensors" if self.remote.kind == "adapter" else "model.safetensors"
        return weights in names and names & {"config.json", "adapter_config.json"} != set()

    def download(self, address: str) -> Snapshot:
        """Download the snapshot into the cache from one address.

        Raises:
            UnreachableError, MissingError, HfHubHTTPError, MismatchError: see there. SourceError: nothing usable.
            InputError: no room on the disk.
        """
        from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache
        from huggingface_hub.file_download import _create_symlink
        from huggingface_hub.utils import build_hf_headers

        remote, place = self.remote, self.folder
        token = self._token(address)
        lock = place.parent / ".locks" / place.name / "workbook.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock_file(lock), transport.open_client(build_hf_headers(token=token)) as client:
            commit, files = self._list(address, token)
            blobs = {file: place / "blobs" / (file.sha256 or file.git or "") for file in choose(remote, files)}
            base = f"{address}/{'datasets/' if remote.is_data else ''}{remote.id}/resolve/{commit}"
            transport.fetch_files(client, remote, blobs, lambda file: f"{base}/{quote(file.path)}", "HF_HOME")
            snapshot = place / "snapshots" / commit
            for file, blob in blobs.items():
                (snapshot / file.path).parent.mkdir(parents=True, exist_ok=True)
                _create_symlink(str(blob), str(snapshot / file.path))
            entries = {
                file.path: TreeCacheEntry(
                    file.size or 0, file.git or "", file.sha256, file.size if file.sha256 else None
                )
                for file in files
            }
            write_tree_cache(str(place), commit, entries)
            if commit != remote.revision:
                write_text(place / "refs" / remote.revision, commit)
        return Snapshot(snapshot, commit)

    def _token(self, address: str) -> str | bool:
        """The token for an address: that of a mirror is not shown to the hub."""
        from huggingface_hub import get_token

        first = address == self.addresses()[0]
        return (transport.token_of("HF_TOKEN", get_token()) or False) if first else False

    def text(self, address: str, path: str) -> str:
        """A text file from one address; raises as `download`."""
        from huggingface_hub.utils import build_hf_headers

        with transport.open_client(build_hf_headers(token=self._token(address))) as client:
            return _text(client, f"{address}/{self.remote.id}/resolve/{quote(self.remote.revision)}/{quote(path)}")

    def _list(self, address: str, token: str | bool) -> tuple[str, list[RemoteFile]]:
        """The commit of the revision and all its files."""
        from huggingface_hub import HfApi

        remote = self.remote
        options = {"revision": remote.revision, "repo_type": remote.repository_type, "files_metadata": True}
        ask = partial(HfApi(address, token=token).repo_info, remote.id, timeout=transport.TIMEOUT, **options)
        try:
            info = transport.patiently(ask)
            commit, entries = str(info.sha), info.siblings or ()
            files = [RemoteFile(e.rfilename, e.size, e.lfs.sha256 if e.lfs else None, e.blob_id) for e in entries]
        except (KeyError, TypeError, AttributeError):
            raise UnreachableError("its listing is not a hub's") from None
        if not COMMIT.fullmatch(commit):
            raise UnreachableError("it names no commit, so it is not a hub")
        if any(file.leaves_its_folder or not _HASH.fullmatch(file.sha256 or file.git or "") for file in files):
            raise UnreachableError("its listing is not a hub's")
        return commit, files


@dataclass(frozen=True)
class ModelScopeRepository:
    """A repository of ModelScope over its public HTTP interface; kept under runs/_cache/modelscope.

    MODELSCOPE_DOMAIN names another host (as for ModelScope's own client), MODELSCOPE_API_TOKEN a token for private
    repositories. ModelScope names no commit of a whole repository, so the resolved revision is a hash over the files.
    Its own client is not used: it is one more large package, and it neither continues a file in the next process nor
    says which bytes were wrong.
    """

    remote: Remote

    @staticmethod
    def addresses() -> list[str]:
        """The address of ModelScope."""
        domain = os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
        return [(domain if "://" in domain else f"https://{domain}").rstrip("/")]

    @property
    def folder(self) -> Path:
        """The folder of a repository's revision."""
        remote = self.remote
        name = "--".join((f"{remote.repository_type}s", *remote.id.split("/")))
        return runs_folder() / "_cache" / "modelscope" / name / quote(remote.revision, safe="")

    def cached(self) -> Snapshot | None:
        """The copy in the cache, if it is whole: the listing is written last, and every file has its listed size."""
        place = self.folder
        if not (place / "listing.json").is_file():
            return None
        listing = read_json(place / "listing.json")
        files = [RemoteFile(name, entry["bytes"]) for name, entry in listing["files"].items()]
        if any(transport.difference(place / "files" / file.path, file) for file in files):
            return None
        return Snapshot(place / "files", listing["revision"])

    def kept(self, path: str) -> Path:
        """Where the cache holds a file, if it does."""
        return self.folder / "files" / path

    def download(self, address: str) -> Snapshot:
        """Download the files from ModelScope; their folder, and a hash over them.

        Raises:
            UnreachableError, MissingError, HfHubHTTPError, MismatchError: see there. SourceError: nothing usable.
            InputError: no room on the disk.
        """
        remote, place, base = self.remote, self.folder, self._base(address)
        place.mkdir(parents=True, exist_ok=True)
        revision = quote(remote.revision, safe="")
        with lock_file(place.with_name(f".{place.name}.lock")), self._client() as client:
            paths = {file: place / "files" / file.path for file in choose(remote, _listed(client, base, remote))}
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

    def _base(self, address: str) -> str:
        return f"{address}/api/v1/{self.remote.repository_type}s/{self.remote.id}/repo"

    @staticmethod
    def _client() -> httpx.Client:
        token = transport.token_of("MODELSCOPE_API_TOKEN", os.environ.get("MODELSCOPE_API_TOKEN"))
        headers = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}
        return transport.open_client(headers)

    def text(self, address: str, path: str) -> str:
        """A text file from ModelScope; raises as `download`."""
        where = f"Revision={quote(self.remote.revision, safe='')}&FilePath={quote(path, safe='')}"
        with self._client() as client:
            return _text(client, f"{self._base(address)}?{where}")


def _text(client: httpx.Client, url: str) -> str:
    from huggingface_hub.utils import hf_raise_for_status

    def ask() -> str:
        response = client.get(url)
        hf_raise_for_status(response)
        return response.text

    return transport.patiently(ask)


def _listed(client: httpx.Client, base: str, remote: Remote) -> list[RemoteFile]:
    """All files of a revision on ModelScope; those of data sets come in pages."""
    options: dict[str, Any] = {"Revision": remote.revision, "Recursive": "true"}
    if remote.is_data:
        entries: list[Any] = []
        for number in itertools.count(1):
            page = _entries(client, f"{base}/tree", options | {"PageNumber": number, "PageSize": _PAGE})
            entries += page
            if len(page) < _PAGE:
                break
    else:
        entries = _entries(client, f"{base}/files", options)
    files = [e for e in entries if isinstance(e, dict) and e.get("Type") != "tree" and isinstance(e.get("Path"), str)]
    listed = [RemoteFile(e["Path"], e.get("Size"), e.get("Sha256") or None) for e in files]
    return [file for file in listed if not file.leaves_its_folder]


def _entries(client: httpx.Client, url: str, options: dict[str, Any]) -> list[Any]:
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
