"""Which weights an adapter was trained on, as its files say: the same GGUF file can be unpacked in several ways."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.models.kinds import adapter_config
from lib.models.unpacking import RECORD, asked_in, identity, is_identity, without_dtype
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
    raise _other_weights(adapter, found, base.revision)


def refuse_other_folder(adapter: Path, folder: Path) -> None:
    """As `refuse_other_weights`, for a folder alone; its unpacked.json says which GGUF file it came out of.

    A folder that came out of none is refused to an adapter of rescaled channels only: an adapter that was trained on
    dequantized weights is often merged into the model that they were quantized from.

    Raises:
        InputError: the adapter was trained on another GGUF file, or on other scales of its channels.
    """
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else None
    own, found = identity(record) if record else "", trained_base(adapter)
    scaled = "gguf_off_grid" in asked_in(own) | asked_in(found)
    if without_dtype(own) != without_dtype(found) and (scaled or (own and is_identity(found))):
        raise _other_weights(adapter, found, own or f"{folder}, which came out of no GGUF file")


def _other_weights(adapter: Path, found: str, base: str) -> InputError:
    asked = {"gguf_dtype": "auto", "gguf_off_grid": False} | asked_in(found)
    needed = f"gguf_dtype: {asked['gguf_dtype']} and gguf_off_grid: {str(asked['gguf_off_grid']).lower()}"
    return InputError(
        f"an adapter ({adapter}) trained on base {found or 'that its files do not name'}, put on {base}.",
        "the weights it was trained on: the same file, unpacked in the same way.",
        f"set {needed} with the file it was trained on, or train again.",
    )
