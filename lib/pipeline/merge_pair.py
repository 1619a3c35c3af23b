"""An adapter and its base model, each a folder or a hub id, merged outside a run: what `workbook merge` does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.models import base_model as bases
from lib.models.adapters import refuse_adapter, require_adapter
from lib.models.tokenizer_files import differences, reader
from lib.runs.files import user_path
from lib.stages.convert.convert import Conversion
from lib.stages.merge.stage import write_lineage
from lib.stages.merge.weights import merge_folders

if TYPE_CHECKING:
    from lib.models.weights import Weights
    from lib.stages.convert.tensors import GgufFile

_SETTINGS = "generation_config.json"


@dataclass(frozen=True)
class Pair:
    """An adapter and its base on the disk.

    Attributes:
        base_model, adapter: as the user named them.
        base, folder: the folders of the base and of the adapter.
        name, commit: of the base as the card of the merged model tells it; no commit of a local folder.
        exact: revision of the base where the adapter's files can be compared with it; else empty.
    """

    base_model: str
    adapter: str
    base: Path
    folder: Path
    name: str
    commit: str | None
    exact: str

    @property
    def key(self) -> dict[str, str]:
        """Hashes of both: another adapter or base has others."""
        return {"adapter": bases.resolve_adapter(str(self.folder)).revision, "base": bases.fingerprint(self.base)}


def find_pair(base_model: str, adapter: str, revision: str = "main") -> Pair:
    """Both on the disk, fetched if need be, and fit for one another as far as names and hashes tell.

    Raises:
        InputError: one that cannot be had or is of the other kind; an adapter of other weights.
    """
    folder = user_path(adapter) if user_path(adapter).is_dir() else bases.resolve_adapter(adapter).path
    base_model = base_model.rstrip("/") or base_model
    local = user_path(base_model)
    if local.is_dir():
        base, name, commit, exact = local, local.name, None, ""
        if bases.trained_base(folder).startswith("sha256:"):
            exact = bases.fingerprint(base)
    else:
        found = bases.resolve_base(base_model, revision, **bases.unpacking_of(folder))
        base, exact = found.path, found.revision
        name, commit = (found.unpacked["source"], None) if found.unpacked else (base_model, base.name)
    refuse_adapter(base)
    require_adapter(folder)
    bases.refuse_other_folder(folder, base)
    return Pair(base_model, adapter, base, folder, name, commit, exact)


@dataclass
class Merged:
    """A merge that was made.

    Attributes:
        report: `MergeReport` as JSON; "tokenizer" (what was taken from the adapter), "trained_on", "names_base" and
            "left_out" where there is something to say; "gguf" (`ConversionReport`) with a conversion.
        notes: the same in sentences.
    """

    report: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def merge_pair(
    pair: Pair,
    output: Path,
    dtype: str | None = None,
    tokenizer: str = "adapter",
    gguf: Path | None = None,
    outtype: str = "f16",
) -> Merged:
    """Merge into the new folder `output`; with `gguf` convert the result in the same pass.

    Args:
        dtype: float32, bfloat16 or float16; None = of the base.
        tokenizer: "adapter" (where it has its own) or "base".

    Raises:
        InputError: what `merge_folders` and `convert` refuse.
    """
    base, given = pair.base, pair.folder
    conversions: list[Conversion] = []

    @contextlib.contextmanager
    def also(folder: Path, weights: Weights) -> Iterator[GgufFile | None]:
        write_lineage(folder, pair.name, pair.commit, Path(pair.adapter).name)
        if gguf is not None:
            conversions.append(Conversion(folder, weights, gguf, outtype))
        with conversions[0].open() if conversions else contextlib.nullcontext() as file:
            yield file

    made = Merged(asdict(merge_folders(base, given, output, dtype, tokenizer, also)))
    made.notes += [f"note: {words}" for words in made.report["remarks"]]
    if tokenizer == "adapter" and (own := differences(given, base)):
        made.report["tokenizer"] = list(own)
        made.notes.append("taken from the adapter: " + "; ".join(own.values()))
    if trained := bases.other_revision(given, pair.exact):
        made.report["trained_on"] = trained
        made.notes.append(
            f"THE ADAPTER WAS TRAINED ON ANOTHER BASE ({trained}), not on {pair.exact}: evaluate before you use it"
        )
    elif unlike := bases.unchecked_base(given, pair.base_model, base, pair.exact):
        made.report["names_base"] = unlike
        made.notes.append(
            f"the adapter names {unlike} as its base; whether {pair.base_model} is the same was not checked"
        )
    if (given / _SETTINGS).is_file() and reader(given)(_SETTINGS) != reader(base)(_SETTINGS):
        made.report["left_out"] = [_SETTINGS]
        made.notes.append(
            f"left out: {_SETTINGS} of the adapter; the merged model has the base's, also where answers end"
        )
    for conversion in conversions:
        made.report["gguf"] = {**asdict(conversion.report()), "model": str(output)}
    return made
