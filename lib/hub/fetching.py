"""Models, adapters and data sets from the hub, a mirror or ModelScope: whole, checked, and resumed when cut off."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lib.hub import huggingface, modelscope
from lib.hub.sources import Kind, parse


@dataclass(frozen=True)
class Snapshot:
    """A repository's files on the disk.

    Attributes:
        path: their folder.
        revision: the commit (hub), or a hash over the files ("sha256:…", ModelScope).
    """

    path: Path
    revision: str


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
    try:
        path, found = (huggingface if remote.place == "hub" else modelscope).fetch(remote)
    except OSError as error:
        from lib.errors import InputError

        raise InputError(
            f"{remote.words} could not be stored ({error.strerror or error}).",
            "room and write access.",
            "set HF_HOME (hub) or WORKBOOK_HOME (ModelScope) to another folder.",
        ) from None
    return Snapshot(path, found)
