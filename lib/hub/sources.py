"""What a user may write for a model, an adapter or a data set, and which files of a repository that means.

Three forms: a local path; a hub id (`owner/name`); a ModelScope id (`modelscope:owner/name`). An id may end in
`@revision`, which stands before the parameter `revision`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from lib.errors import InputError, refusal
from lib.runs.files import data_file

MODELSCOPE = "modelscope:"
COMMIT = re.compile(r"[0-9a-f]{40}")
_ID = re.compile(r"(?!.*(\.\.|--|\.git$|[.-](/|$)))([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]{0,95}")
"""As the hub has them (its client raises on others)."""

Kind = Literal["model", "adapter", "dataset"]


class SourceError(InputError):
    """A source that is not available: unreachable, missing, closed, or not what it claims to be.

    Only such an error makes the workbook try the next source that the parameter file lists.

    Attributes:
        why: the reason in a few words, for the stamp on the pages.
    """

    def __init__(self, found: str, expected: str, do: str, why: str) -> None:
        super().__init__(found, expected, do)
        self.why = why

    def __reduce__(self) -> tuple:
        return (SourceError, (self.found, self.expected, self.do, self.why))


@dataclass(frozen=True)
class Snapshot:
    """A repository's files on the disk.

    Attributes:
        path: their folder.
        revision: the commit (hub), or a hash over the files ("sha256:…", ModelScope).
    """

    path: Path
    revision: str


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
    def leaves_its_folder(self) -> bool:
        """Whether the path would lead out of the folder it is put into."""
        return self.path.startswith("/") or ".." in self.path.split("/")


@dataclass(frozen=True)
class Remote:
    """A repository on the hub or on ModelScope.

    Attributes:
        place: "hub" or "modelscope".
        id: owner/name (old hub repositories have no owner).
        revision: branch, tag or commit; ModelScope's default branch is called master.
        kind: "model", "adapter" or "dataset".
    """

    place: Literal["hub", "modelscope"]
    id: str
    revision: str
    kind: Kind

    @property
    def is_data(self) -> bool:
        return self.kind == "dataset"

    @property
    def repository_type(self) -> Literal["dataset", "model"]:
        """What the hub calls its kind; addresses and folders use the plural."""
        return "dataset" if self.is_data else "model"

    @property
    def name(self) -> str:
        """What finds it again, with its commit; ModelScope has no commits, so the branch is part of the name."""
        if self.place == "hub":
            return self.id
        return f"{MODELSCOPE}{self.id}" + ("" if self.revision == "master" else f"@{self.revision}")

    @property
    def words(self) -> str:
        """For messages, e.g. "hub model 'owner/name' (revision 'main')"."""
        where = "hub" if self.place == "hub" else "ModelScope"
        what = "data set" if self.is_data else self.kind
        return f"{where} {what} {self.id!r} (revision {self.revision!r})"

    @property
    def setting(self) -> str:
        """The key that names it in a parameter file."""
        return {"model": "base_model", "adapter": "adapter", "dataset": "dataset"}[self.kind]


def looks_like_path(text: str) -> bool:
    """Whether a source that does not exist here can only have been meant as a path."""
    if text.startswith(MODELSCOPE):
        return False
    name = text.partition("@")[0]
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1


def parse(text: str, revision: str, kind: Kind) -> Remote:
    """The repository that `text` names.

    Raises:
        InputError: not an id.
    """
    rest = text.removeprefix(MODELSCOPE)
    name, _, own = rest.partition("@")
    place: Literal["hub", "modelscope"] = "modelscope" if rest != text else "hub"
    wanted = own or revision
    remote = Remote(place, name, "master" if place == "modelscope" and wanted == "main" else wanted, kind)
    if not _ID.fullmatch(name) or (place == "modelscope" and "/" not in name):
        raise refusal("hub/no-id", remote=remote, text=text)
    return remote


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network (read now: the hub client reads it only once, at import)."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in ("1", "ON", "YES", "TRUE")


MODEL_PATTERNS: list[str] = data_file("hub/patterns.yaml")["model"]
"""Files of a model that are fetched, from these folders of the repository: never pickles, never code."""
DATA_SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet")
_NO_DATA = ("dataset_infos.json", "requirements.txt", "readme.txt", "license.txt", "labels.txt")
_TELLS = re.compile(
    r"readme[^/]*|dataset_infos?\.json|(labels|classes|label_names|data|dataset|meta)\.(txt|ya?ml)", re.I
)
"""Files of a data set that may say what its classes are called."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def is_data(path: str) -> bool:
    """Whether a file of a data set repository holds rows (or could)."""
    name = path.rpartition("/")[2].lower()
    return name.endswith(DATA_SUFFIXES) and name not in _NO_DATA and not name.startswith(".")


def choose(remote: Remote, files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """The files to fetch.

    Raises:
        SourceError: the repository holds nothing usable: no safetensors, only a script, no data files.
    """
    if remote.is_data:
        return _choose_data(remote, files)
    chosen = [
        file
        for file in files
        if any(fnmatchcase(file.path, p) and file.path.count("/") == p.count("/") for p in MODEL_PATTERNS)
        and not file.path.startswith("consolidated")
    ]
    if not any(file.path.endswith(".safetensors") for file in chosen):
        pickles = [file.path for file in files if file.path.endswith(_PICKLES)]
        gguf = [file.path for file in files if file.path.endswith(".gguf")]
        only = f"only pickled weights ({pickles[0]})" if pickles else f"only GGUF ({gguf[0]})" if gguf else "no weights"
        also = ", or download this one, run workbook unpickle FOLDER OUT and give OUT" if pickles else ""
        raise refusal("hub/no-weights", SourceError, remote=remote, only=only, unpickle=also)
    return chosen


def _choose_data(remote: Remote, files: Sequence[RemoteFile]) -> list[RemoteFile]:
    data = [file for file in files if is_data(file.path)]
    if data:
        return [*data, *(file for file in files if _TELLS.fullmatch(file.path) and file not in data)]
    scripts = [file.path for file in files if file.path.endswith(".py")]
    if scripts:
        raise refusal("hub/script-data", SourceError, remote=remote, scripts=scripts)
    names = ", ".join(file.path for file in files[:5]) or "nothing"
    raise refusal("hub/no-data", SourceError, remote=remote, names=names)
