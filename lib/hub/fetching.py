"""Models, adapters and data sets from the hub, a mirror or ModelScope: whole, checked, and resumed when cut off."""

from __future__ import annotations

from types import ModuleType

from lib.errors import InputError
from lib.hub import huggingface, modelscope, transport
from lib.hub.sources import Kind, Remote, Snapshot, SourceError, is_offline, parse
from lib.hub.transport import MismatchError, MissingError, UnreachableError


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
    place = huggingface if remote.place == "hub" else modelscope
    if found := place.cached(remote):
        return found
    if is_offline():
        raise _unreachable(remote, "HF_HUB_OFFLINE is set")
    failures = []
    for address in place.addresses():
        try:
            return _download(place, address, remote)
        except SourceError as error:
            failures.append(error)
    raise failures[0]


def _download(place: ModuleType, address: str, remote: Remote) -> Snapshot:
    """Download from one address; every failure becomes a sentence for the user."""
    from huggingface_hub.errors import HfHubHTTPError

    host = transport.host_of(address)
    try:
        return place.download(address, remote)
    except UnreachableError as error:
        raise _unreachable(remote, f"{host}: {error}") from None
    except MismatchError as error:
        raise SourceError(
            f"{remote.words}: {error}, twice, from {host}.",
            "the bytes whose hash the listing names.",
            f"{place.OTHERWISE}, or set {remote.setting} to a local folder.",
            "its bytes differ from their hash",
        ) from None
    except (HfHubHTTPError, MissingError) as error:  # before OSError, of which the first is one
        raise _refused(remote, error) from None
    except OSError as error:
        raise InputError(
            f"{remote.words} could not be stored ({error.strerror or error}).",
            "room and write access.",
            "set HF_HOME (hub) or WORKBOOK_HOME (ModelScope) to another folder.",
        ) from None


def _unreachable(remote: Remote, reason: str) -> SourceError:
    """The error for a source that is neither in the cache nor reachable."""
    mirror = "set HF_ENDPOINT to a mirror's address" if remote.place == "hub" else "try again later"
    offline = " (and unset HF_HUB_OFFLINE)" if is_offline() else ""
    last = ", or to offline" if remote.kind == "model" else ""
    return SourceError(
        f"{remote.words} is not in the cache and cannot be reached ({reason}).",
        "a network, or a filled cache.",
        f"{mirror}{offline}, or set {remote.setting} to a local folder{last}; `fallbacks` can list other sources.",
        f"cannot be reached: {reason}",
    )


def _refused(remote: Remote, error: Exception) -> SourceError:
    """What a lasting refusal means and what to do about it."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    what, key, hub = remote.words, remote.setting, remote.place == "hub"
    token = "HF_TOKEN" if hub else "MODELSCOPE_API_TOKEN"
    local = f"or download it elsewhere and set {key} to the folder"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 404
    if isinstance(error, GatedRepoError):
        do = f"accept its terms on its page and set {token} to your token, {local}."
        return SourceError(f"{what} is gated.", "access granted to your account.", do, "is gated")
    if isinstance(error, RevisionNotFoundError):
        return SourceError(f"{what}: no such revision.", "a branch, tag or commit.", "correct revision.", "no revision")
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        do = f"correct {key}{'' if hub else ' or revision'}; for a private one set {token}."
        return SourceError(f"{what} is not there, or private.", "one that exists.", do, "is not there, or private")
    if status in (401, 403):
        do = f"set {token} to a valid token, {local}."
        return SourceError(f"{what}: access refused ({status}).", "access.", do, f"answered {status}")
    do = f"try again later, {'set HF_ENDPOINT to a mirror, ' if hub else ''}{local}."
    return SourceError(f"{what}: it answered {status}.", "a download.", do, f"answered {status}")
