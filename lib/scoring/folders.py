"""The backend that runs a model folder as it is saved: transformers, or a runtime in a process of its own."""

from __future__ import annotations

from pathlib import Path

from lib.models.base_model import check_model_folder
from lib.models.runtime_folders import runtime_of
from lib.scoring.backend import Backend


def check_folder(folder: Path) -> None:
    """Refuse a folder that `open_folder` could not run, before anything is loaded.

    Raises:
        InputError: as `Runtime.check` or `check_model_folder`.
    """
    runtime = runtime_of(folder)
    (runtime.check if runtime else check_model_folder)(folder)


def open_folder(
    folder: Path, batch_size: int = 32, name: str = "", n_threads: int = 0, n_ctx: int | None = None
) -> Backend:
    """The folder, loaded.

    Args:
        batch_size: sequences a forward pass, where the runtime takes several.
        n_threads: of such a runtime (torch has its own setting). n_ctx: most tokens of a text that it writes.

    Raises:
        InputError: a folder that does not load.
    """
    if runtime := runtime_of(folder):
        from lib.scoring.process_backend import ProcessBackend

        return ProcessBackend(folder, runtime, n_threads, n_ctx, name)
    from lib.models.loading import load_as_saved
    from lib.scoring.torch_backend import TransformersBackend

    return TransformersBackend(load_as_saved(folder), batch_size, name)
