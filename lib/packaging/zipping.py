"""A zip of the package: the same files give the same bytes, whenever it is made."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from lib.progress import Progress
from lib.run.files import CHUNK, atomic_path, require_space

_TIME = (1980, 1, 1, 0, 0, 0)
_MODE = 0o100644 << 16


def write_zip(folder: Path, target: Path, root: str) -> Path:
    """Pack a folder, atomically.

    Names are sorted, times and rights fixed, nothing compressed (weights do not shrink, and compressors differ from
    version to version); files over 4 GB are allowed (ZIP64).

    Args:
        root: name of the folder that the zip unpacks to.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
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
