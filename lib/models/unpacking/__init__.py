"""A GGUF file as a model folder that `from_pretrained` loads: weights dequantized, configuration and tokenizer rebuilt.

The folder holds `unpacked.json`, which says where it comes from, and of which type the weights were.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lib.errors import InputError

__all__ = ["RECORD", "notes_of", "unpack", "unpack_into"]

RECORD = "unpacked.json"
CHOICES = ("auto", "float16", "bfloat16", "float32")


def unpack(path: Path | str, folder: Path | str, dtype: str = "auto", off_grid: bool = False) -> dict[str, Any]:
    """Write the model of a GGUF file as the new folder `folder`.

    Args:
        dtype: of the weights; auto = float16, or bfloat16 where a weight is too large for it.
        off_grid: scale channels, without changing the function, so that the weights leave the grid of their type.

    Returns:
        What unpacked.json holds: {"source": file name, "sha256", "types": {type: weights}, "main_type", "dtype",
        "off_grid", "seed" (null on the grid), "scales" (smallest and largest, or null), "parameters",
        "cost": {dtype: mean KL divergence in nats a token from float32 on the grid} or null, "cost_note"}.

    Raises:
        InputError: a file that cannot be unpacked, or an output folder that is not new; nothing is left there then.
    """
    from lib.run.files import flush_to_disk, readable_by_group

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} already exists.", "a new or empty folder.", "remove it or choose another name.")
    temporary = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        record = unpack_into(path, temporary, dtype, off_grid)
        for file in temporary.rglob("*"):
            if file.is_file():
                readable_by_group(file)
                flush_to_disk(file)
        if folder.is_dir():
            folder.rmdir()
        temporary.rename(folder)
        flush_to_disk(folder.parent)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}).", "a folder with room that may be written.", "choose one."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return record


def unpack_into(path: Path | str, folder: Path, dtype: str = "auto", off_grid: bool = False) -> dict[str, Any]:
    """As `unpack`, into an empty folder that the caller made and will rename."""
    from lib.models.gguf_tokenizer import write_tokenizer
    from lib.models.unpacking.cost import cost_of
    from lib.models.unpacking.rescaling import RANGE, SEED, Rescaling
    from lib.models.unpacking.source import read_source
    from lib.models.unpacking.writing import DTYPES, TooLarge, write_weights
    from lib.run.files import require_space, sha256_file, write_json

    if dtype not in CHOICES:
        raise InputError(f"dtype {dtype!r}.", f"one of {', '.join(CHOICES)}.", "choose one of them.")
    source = read_source(path)
    scaling = Rescaling(source.config) if off_grid else None
    require_space(folder, source.parameters * (4 if dtype == "float32" else 2), f"the weights of {source.path.name}")
    tries = ["float16", "bfloat16", "float32"] if dtype == "auto" else [dtype]
    for chosen in tries:
        try:
            write_weights(source, folder, chosen, scaling)
            break
        except TooLarge as error:
            if chosen == tries[-1]:
                raise InputError(
                    f"{error} of {source.path}, too large for {chosen}.", "weights it can hold.", "set dtype to auto."
                ) from None
    assert chosen in DTYPES
    write_json(folder / "config.json", {**source.config, "torch_dtype": chosen})
    write_json(folder / "generation_config.json", source.generation)
    write_tokenizer(source.metadata, source.path, folder)
    cost, note = cost_of(source, chosen, scaling)
    record = {
        "source": source.path.name,
        "sha256": sha256_file(source.path),
        "types": source.types,
        "main_type": source.main_type,
        "dtype": chosen,
        "off_grid": off_grid,
        "seed": SEED if off_grid else None,
        "scales": list(RANGE) if off_grid else None,
        "parameters": source.parameters,
        "cost": cost,
        "cost_note": note,
    }
    write_json(folder / RECORD, record)
    return record


def notes_of(record: dict[str, Any]) -> tuple[str, ...]:
    """What every page must say of a base that comes from a GGUF file."""
    kind, source = record["main_type"], record["source"]
    plain = kind in ("F32", "F16", "BF16")
    first = f"weights {'read' if plain else 'dequantized'} from {kind} ({source})"
    return (first, *(["channels rescaled so that they leave the source's grid"] if record["off_grid"] else []))
