"""Models of GGUF files that several modules unpack."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import packed


@pytest.fixture(scope="session")
def packed_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A quantized file of every architecture."""
    folder = tmp_path_factory.mktemp("packed")
    return {name: packed.make(folder, name) for name in packed.MODELS}
