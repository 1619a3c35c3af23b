"""Commands that write a file: an earlier result of theirs is replaced, which is said; anything else needs --force."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lib.cli.models import convert
from lib.cli.quantize import imatrix, quantize
from lib.errors import InputError
from tests import tiny_run

pytestmark = pytest.mark.usefixtures("forked_children")
SAID = "is there already: it is replaced."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, and beside it a text."""
    folder = tmp_path_factory.mktemp("replacing") / "base"
    tiny_run.make_base(folder)
    (folder.parent / "reviews.txt").write_text("\n\n".join(tiny_run.texts(60)), encoding="utf-8")
    return folder


Command = Callable[..., None]


@pytest.fixture(scope="module")
def commands(base: Path) -> dict[str, Command]:
    """Each writes the file that it is given."""
    source = base.parent / "m-F32.gguf"
    convert(base, source, "f32")
    return {
        "convert": lambda path, **more: convert(base, path, **more),
        "quantize": lambda path, **more: quantize(source, path, ["Q4_0"], **more),
        "imatrix": lambda path, **more: imatrix(base, path, base.parent / "reviews.txt", n_ctx=64, chunks=2, **more),
    }


@pytest.mark.parametrize("name", ["convert", "quantize", "imatrix"])
def test_only_an_earlier_result_is_replaced(
    name: str, commands: dict[str, Command], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = commands[name]
    path = tmp_path / "out.gguf"
    command(path)
    assert SAID not in capsys.readouterr().err
    first = path.read_bytes()
    command(path)
    assert f"{path} {SAID}" in capsys.readouterr().err and path.read_bytes() == first
    path.write_bytes(b"years of work")
    with pytest.raises(InputError, match=r"no earlier result of this command(?s:.)*--force"):
        command(path)
    assert path.read_bytes() == b"years of work"
    command(path, force=True)
    assert SAID in capsys.readouterr().err and path.read_bytes() == first


@pytest.mark.parametrize(
    ("name", "there"),
    [("convert", "quantize"), ("convert", "imatrix"), ("quantize", "convert"), ("imatrix", "convert")],
)
def test_the_file_of_another_command_is_none(
    name: str, there: str, commands: dict[str, Command], tmp_path: Path
) -> None:
    path = tmp_path / "out.gguf"
    commands[there](path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="no earlier result"):
        commands[name](path)
    assert path.read_bytes() == before
