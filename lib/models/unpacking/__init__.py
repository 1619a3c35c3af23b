"""A GGUF file as a model folder that `from_pretrained` loads: weights dequantized, configuration and tokenizer rebuilt.

The folder holds `unpacked.json`, which says where it comes from, and of which type the weights were.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError

if TYPE_CHECKING:
    from lib.models.unpacking.source import Source

__all__ = [
    "RECORD",
    "asked_in",
    "identity",
    "is_identity",
    "notes_of",
    "plain_name",
    "unpack",
    "unpack_into",
    "unpacked",
    "without_dtype",
]

RECORD = "unpacked.json"
OFF_GRID = "off-grid"
CHOICES = ("auto", "float16", "bfloat16", "float32")
PLAIN = ("F64", "F32", "F16", "BF16")
"""Types that are no quantized ones."""

VERSION = 2
"""Raised when other weights, configuration or tokenizer come out of the same file."""


def unpack(path: Path | str, folder: Path | str, dtype: str = "auto", off_grid: bool = False) -> dict[str, Any]:
    """Write the model of a GGUF file as the new folder `folder`.

    Args:
        dtype: of the weights; auto = float16, or bfloat16 where a weight is too large for it.
        off_grid: scale channels, without changing the function, so that the weights leave the grid of their type.

    Returns:
        What unpacked.json holds: {"source": file name, "sha256", "version" (of this unpacking), "types": {type:
        weights}, "main_type", "dtype", "dtype_asked", "off_grid", "seed" and "scales" (smallest, largest; both null on
        the grid), "parameters", "license" (as the file says, or null), "cost" (mean KL divergence by dtype, see
        `cost.cost_of`, or null), "cost_note"}.

    Raises:
        InputError: a file that cannot be unpacked, or an output folder that is not new; nothing is left there then.
    """
    from lib.models.unpacking.source import read_source
    from lib.run.files import new_folder

    source = read_source(path)  # outside of what is blamed on the output
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} already exists.", "a new or empty folder.", "remove it or choose another name.")
    with new_folder(folder) as temporary:
        return unpack_into(source, temporary, dtype, off_grid)


def unpack_into(source: Source, folder: Path, dtype: str = "auto", off_grid: bool = False) -> dict[str, Any]:
    """As `unpack`, from a file that was looked at, into an empty folder that the caller made and will rename."""
    from lib.models.gguf_tokenizer import write_tokenizer
    from lib.models.unpacking.cost import cost_of
    from lib.models.unpacking.rescaling import RANGE, SEED, Rescaling
    from lib.models.unpacking.writing import DTYPES, TooLargeError, write_weights
    from lib.run.files import require_space, sha256_file, write_json

    if dtype not in CHOICES:
        raise InputError(f"dtype {dtype!r}.", f"one of {', '.join(CHOICES)}.", "choose one of them.")
    if off_grid and source.main_type in PLAIN:
        raise InputError(
            f"{source.path} of {source.main_type} weights, which lie on no grid to leave.",
            "a file of a quantized type.",
            "leave out --off-grid (gguf_off_grid: false).",
        )
    scaling = Rescaling(source.config) if off_grid else None
    require_space(folder, source.parameters * (4 if dtype == "float32" else 2), f"the weights of {source.path.name}")
    tries = ["float16", "bfloat16", "float32"] if dtype == "auto" else [dtype]
    for chosen in tries:
        try:
            write_weights(source, folder, chosen, scaling)
            break
        except TooLargeError as error:
            if chosen == tries[-1]:
                raise InputError(
                    f"{error} of {source.path}, too large for {chosen}.",
                    "weights it can hold.",
                    "--dtype auto (gguf_dtype: auto).",
                ) from None
    assert chosen in DTYPES
    write_json(folder / "config.json", {**source.config, "torch_dtype": chosen})
    write_json(folder / "generation_config.json", source.generation)
    write_tokenizer(source.metadata, source.path, folder)
    cost, note = cost_of(source, chosen, scaling)
    record = {
        "source": source.path.name,
        "sha256": sha256_file(source.path),
        "version": VERSION,
        "types": source.types,
        "main_type": source.main_type,
        "dtype": chosen,
        "dtype_asked": dtype,
        "off_grid": off_grid,
        "seed": SEED if off_grid else None,
        "scales": list(RANGE) if off_grid else None,
        "parameters": source.parameters,
        "license": name if isinstance(name := source.metadata.get("general.license"), str) else None,
        "cost": cost,
        "cost_note": note,
    }
    write_json(folder / RECORD, record)
    return record


def unpacked(path: Path, dtype: str = "auto", off_grid: bool = False) -> tuple[Path, dict[str, Any]]:
    """The model folder of a GGUF file, kept under .cache/unpacked and made only once, and its `unpacked.json`.

    Raises:
        InputError: a file that cannot be unpacked.
    """
    from lib.models import store
    from lib.models.unpacking.rescaling import RANGE, SEED
    from lib.models.unpacking.source import read_source
    from lib.progress import say
    from lib.run import folders
    from lib.run.files import read_json, sha256_file

    key: dict[str, Any] = {"sha256": sha256_file(path), "dtype": dtype, "off_grid": off_grid}
    key |= {"version": VERSION} | ({"seed": SEED, "scales": list(RANGE)} if off_grid else {})
    made = []

    def build(folder: Path) -> dict[str, Any]:
        made.append(folder)
        record = unpack_into(read_source(path), folder, dtype, off_grid)
        if record["sha256"] != key["sha256"]:
            raise InputError(f"{path} changed while it was read.", "a file that stays as it is.", "run it again.")
        return record

    folder = store.ensure("gguf", key, build, folders.home() / ".cache" / "unpacked")
    say(f"{path.name}: {'unpacked into' if made else 'unpacked before, found in'} {folder}")
    return folder, {**read_json(folder / RECORD), "source": path.name}  # a copy under another name finds it too


def identity(record: Mapping[str, Any]) -> str:
    """What tells a base from a GGUF file from all others: hash, version of the unpacking, dtype if asked, scales.

    For example sha256:0123456789abcdef+v2+bfloat16+off-grid-20261128-0.8-1.25 (seed, smallest and largest scale).
    """
    asked = record["dtype_asked"]
    more = [f"v{record['version']}", *([asked] if asked != "auto" else [])]
    if record["off_grid"]:
        more.append("-".join(map(str, [OFF_GRID, record["seed"], *record["scales"]])))
    return "+".join([f"sha256:{record['sha256'][:16]}", *more])


def is_identity(revision: str) -> bool:
    """Whether a revision is the `identity` of a base from a GGUF file, not a hub's commit or the hash of a folder."""
    return revision.startswith("sha256:") and "+" in revision


def asked_in(revision: str) -> dict[str, Any]:
    """How the base of this identity was unpacked, as keywords of `resolve_base`; empty where it says nothing."""
    _, *more = revision.split("+") if revision.startswith("sha256:") else [revision]
    dtype = next((part for part in more if part in CHOICES), None)
    off_grid = any(part.startswith(OFF_GRID) for part in more)
    return ({"gguf_dtype": dtype} if dtype else {}) | ({"gguf_off_grid": True} if off_grid else {})


def without_dtype(revision: str) -> str:
    """An `identity` but for the number format that was asked for: which weights, not how finely they are stored."""
    return "+".join(part for part in revision.split("+") if part not in CHOICES)


def plain_name(name: str) -> str:
    """A GGUF file's name without its type: SmolLM2-135M-Instruct.Q4_1.gguf → SmolLM2-135M-Instruct.

    Other names stay as they are.
    """
    if not name.lower().endswith(".gguf"):
        return name
    return re.sub(r"[.-](I?Q\d\w*|TQ\d\w*|MXFP4\w*|B?F16|F32)$", "", name[:-5], flags=re.IGNORECASE) or name


def notes_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """What every page must say of a base that comes from a GGUF file."""
    kind, source = record["main_type"], record["source"]
    first = f"weights {'read' if kind in PLAIN else 'dequantized'} from {kind} ({source})"
    return (first, *(["channels rescaled so that they leave the source's grid"] if record["off_grid"] else []))
