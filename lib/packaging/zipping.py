"""A zip of the package: the same files give the same bytes, whenever it is made."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path

from lib.errors import InputError
from lib.progress import Progress
from lib.run.files import CHUNK, atomic_path, require_space

_TIME = (1980, 1, 1, 0, 0, 0)
_MODE = 0o100644 << 16


def check_target(target: Path, root: str, report: str, run_name: str) -> None:
    """Refuse to replace what is not an earlier zip of the same run.

    Args:
        report: name of the file in the zip that names the run.

    Raises:
        InputError: another run's package, or another file, has the name.
    """
    if not target.exists():
        return
    try:
        with zipfile.ZipFile(target) as archive:
            found = json.loads(archive.read(f"{root}/{report}"))["run"]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        found = None
    if found != run_name:
        what = f"the package of run {found!r}" if found else "no package of the workbook"
        raise InputError(
            f"{target} is there already and is {what}.",
            f"a folder where no other file has the name {target.name}.",
            "name another folder with --output, or move that file away.",
        )


def write_zip(folder: Path, names: Iterable[str], target: Path, root: str) -> Path:
    """Pack files of a folder, atomically.

    Names are sorted, times and rights fixed, nothing compressed (weights do not shrink, and compressors differ from
    version to version); files over 4 GB are allowed (ZIP64).

    Args:
        names: relative paths of the product's files: what else came into the folder is nobody's to hand on.
        root: name of the folder that the zip unpacks to.
    """
    paths = sorted(folder / name for name in names)
    total = sum(path.stat().st_size for path in paths)
    require_space(target.parent, total, f"{target.name}")
    with (
        atomic_path(target) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
        Progress(f"packing {target.name}, MB", max(1, round(total / 1e6))) as progress,
    ):
        for path in paths:
            info = zipfile.ZipInfo(f"{root}/{path.relative_to(folder).as_posix()}", _TIME)
            info.create_system, info.external_attr, info.file_size = 3, _MODE, path.stat().st_size
            with path.open("rb") as source, archive.open(info, "w") as packed:
                shutil.copyfileobj(source, packed, CHUNK)
            progress.advance(round(info.file_size / 1e6))
    return target
