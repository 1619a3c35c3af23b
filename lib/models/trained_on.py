"""Which weights an adapter was trained on, as its files say: the same GGUF file can be unpacked in several ways."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.models.kinds import adapter_config
from lib.models.unpacking import asked_in, is_identity
from lib.run.files import read_json

if TYPE_CHECKING:
    from lib.models.resolving import Base


def unpacking_of(adapter: Path) -> dict[str, Any]:
    """How the base of an adapter that this workbook trained was unpacked, as keywords of `resolve_base`.

    An adapter fits the weights it was trained on: channels rescaled or not. Empty where its files say nothing.
    """
    return asked_in(trained_base(adapter))


def trained_base(adapter: Path) -> str:
    """The revision of the base that an adapter was trained on, as its files say; empty where they do not.

    training.json is this workbook's; adapter_config.json, which the weights are never without, bears the revision too.
    """
    record = adapter / "training.json"
    content = read_json(record) if record.is_file() else {}
    base = content.get("base") if isinstance(content, dict) else None
    if isinstance(base, dict) and base.get("revision"):
        return str(base["revision"])
    return str(adapter_config(adapter).get("revision") or "")


def refuse_other_weights(adapter: Path, base: Base) -> None:
    """Refuse an adapter on other weights of a GGUF file than those it was trained on: shapes do not tell them apart.

    Raises:
        InputError: it was trained on a GGUF base of another identity; or the base's channels are rescaled, and the
            adapter's files do not say that it was trained on exactly these.
    """
    found = trained_base(adapter)
    private = base.unpacked is not None and base.unpacked["off_grid"]
    if found == base.revision or not (is_identity(found) or private):
        return
    asked = {"gguf_dtype": "auto", "gguf_off_grid": False} | asked_in(found)
    needed = f"gguf_dtype: {asked['gguf_dtype']} and gguf_off_grid: {str(asked['gguf_off_grid']).lower()}"
    raise InputError(
        f"an adapter ({adapter}) trained on base {found or 'that its files do not name'}, put on {base.revision}.",
        "the weights it was trained on: the same file, unpacked in the same way.",
        f"set {needed} with the file it was trained on, or train again.",
    )
