"""Pickled weights (`pytorch_model.bin`, `adapter_model.bin`) as safetensors: the only place that reads a pickle.

A pickle is a program. torch's `weights_only` reader runs none of it but the building of tensors, and does so in a child
process that can neither reach the network nor start a program nor write anywhere but into the new folder.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError, refusal, refusing
from lib.hub.sources import MODEL_PATTERNS
from lib.models.weights import INDEX, SAFETENSORS, impostor, pack_header, read_file, read_object
from lib.runs import files
from lib.runs.child import own_folder, run_child
from lib.runs.confinement import confine

if TYPE_CHECKING:
    import torch

MODEL, ADAPTER = "pytorch_model", "adapter_model"
_INDEX = f"{MODEL}.bin.index.json"
_SHORT = SAFETENSORS | {"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}
_SHORT |= {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
"""dtype in torch → in safetensors."""
_MOST = 8
"""Times the bytes of its file that tensors may take: names that share one tensor are written each for itself."""
_SLOWEST = 10_000_000
"""Bytes a second."""


def unpickle(folder: Path, output: Path) -> dict[str, Any]:
    """Write the model or adapter of `folder` as the new folder `output`: weights as safetensors, other files copied.

    Returns:
        {"files": source → new, "tensors", "bytes", "left_out": tied name → the tensor that it is, "copies": names that
        were written as copies of a shared tensor, "copied": other files, "confined": whether the kernel held the
        reader}.

    Raises:
        InputError: no pickled weights, or more than weights in them, damaged ones, or an output that is not new.
    """
    found, listed = _pickles(folder)
    files.require_new(output)
    size = sum((folder / name).stat().st_size for name in found)
    files.require_space(output, size, f"the weights of {folder}")
    with files.new_folder(output) as temporary:
        argument = {"folder": folder, "output": temporary, "files": found}
        patience = 120 + size / _SLOWEST
        report = run_child("lib.models.unpickle:convert_all", argument, "reading the pickle", patience)
        places: dict[str, str] = report.pop("places")
        if lost := sorted(listed - places.keys() - report["left_out"].keys()):
            raise refusal("models/index-and-shards", folder=folder, count=len(lost), wrong=lost)
        if listed:
            content = {"metadata": {"total_size": report["bytes"]}, "weight_map": dict(sorted(places.items()))}
            files.write_json(temporary / INDEX, content)
        copied = {path for pattern in MODEL_PATTERNS for path in folder.glob(pattern) if path.is_file()}
        names = sorted(str(path.relative_to(folder)) for path in copied if path.name != _INDEX)
        for name in names:
            (temporary / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, temporary / name)
        for new in found.values():
            read_file(temporary / new)
    return {**report, "tensors": len(places), "files": found, "copied": names}


def _pickles(folder: Path) -> tuple[dict[str, str], set[str]]:
    """Pickled file → name of the safetensors file that it becomes; and the tensors that an index of shards lists."""
    if not folder.is_dir():
        raise refusal("models/no-folder", what="no folder", folder=folder)
    if ready := sorted(path.name for path in folder.glob("*.safetensors")):
        raise refusal("models/nothing-pickled", folder=folder, what=f"{ready[0]}, which is no pickle")
    index, listed = folder / _INDEX, {}
    names = [name for name in (f"{MODEL}.bin", f"{ADAPTER}.bin") if (folder / name).is_file()][:1]
    if index.is_file() and names != [f"{MODEL}.bin"]:  # the order of transformers
        with refusing((KeyError, AttributeError, TypeError), "models/damaged-index", index=index):
            listed = {str(name): str(file) for name, file in read_object(index)["weight_map"].items()}
        names = sorted(set(listed.values()))
    if not names:
        raise refusal("models/nothing-pickled", folder=folder, what=f"neither {MODEL}.bin nor {ADAPTER}.bin")
    for name in names:
        if not re.fullmatch(rf"({MODEL}|{ADAPTER})(-\d{{5}}-of-\d{{5}})?\.bin", name):
            raise refusal("models/odd-index", index=index, names=name)
        files.refuse_device(folder / name)
        if not (folder / name).is_file():
            raise refusal("models/missing-shards", count=1, shown=name, folder=folder)
        with (folder / name).open("rb") as stream:
            what, do = impostor(stream.read(64)) or ("a pickle", "")
        if what != "a pickle":
            raise InputError(f"{folder / name} is {what}, not the file itself.", "a pickle of torch.", f"{do}.")
    new = {name: name.replace(MODEL, "model").replace(".bin", ".safetensors") for name in names}
    return new, set(listed)


# In the child.


def convert_all(argument: dict[str, Any]) -> dict[str, Any]:
    """Every file, one after the other; runs in the child process, which is confined before it opens the first."""
    import torch  # noqa: F401 - before the limits, and what torch.load imports

    folder, output, names = Path(argument["folder"]), Path(argument["output"]), argument["files"]
    tied, sizes = _tied_names(folder), [(folder / name).stat().st_size for name in names]
    confined = confine([output, own_folder()], 3 * max(sizes) + (1 << 30), 60 + sum(sizes) // _SLOWEST)
    places: dict[str, str] = {}
    report: dict[str, Any] = {"bytes": 0, "left_out": {}, "copies": [], "confined": confined}
    for name, new in names.items():
        tensors = _read(folder / name)
        shared, copies = _shared(tensors, tied)
        kept = {key: tensor for key, tensor in tensors.items() if key not in shared}
        if twice := sorted(places.keys() & kept.keys()):
            raise InputError(f"{twice[0]} is in two shards of {folder}.", "each tensor once.", "download it again.")
        report["bytes"] += _write(output / new, kept, (folder / name).stat().st_size)
        places |= dict.fromkeys(kept, new)
        report["left_out"] |= shared
        report["copies"] += copies
    return report | {"places": places}


def _tied_names(folder: Path) -> list[str]:
    """Patterns of the names that transformers gets from another tensor when it loads this model; [] where of none."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if not (folder / "config.json").is_file():
        return []
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # refused by what loads it; copies are right
        return []
    return list(kind._tied_weights_keys or []) if config.tie_word_embeddings else []


def _read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, memory-mapped where it is a ZIP archive (torch since 1.6)."""
    import torch

    def refused(what: object) -> InputError:
        return refusal("models/foreign-pickle", path=path, what=" ".join(str(what).split())[:300])

    with path.open("rb") as stream:
        archive = stream.read(4) == b"PK\x03\x04"
    try:
        if archive:  # torch compares no checksums, and maps what is compressed as if it were not
            with zipfile.ZipFile(path) as parts:
                squeezed = [part.filename for part in parts.infolist() if part.compress_type]
                if bad := squeezed[:1] or parts.testzip():
                    raise refused(f"its part {bad} is compressed or damaged")
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except InputError:
        raise
    except Exception as error:  # whatever a reader says of bytes that somebody made up
        asked = re.search(r"GLOBAL (\S+)", str(error))
        said = f"it asks for {asked[1]}, which is no tensor" if asked else str(error).rpartition("error: ")[2]
        said = said.partition("Check the documentation")[0].strip(" \n.")
        raise refused(said or type(error).__name__) from None
    if not isinstance(found, dict) or not found:
        raise refused(f"it holds a {type(found).__name__}" + (" of nothing" if isinstance(found, dict) else ""))
    for name, tensor in found.items():
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
        if not isinstance(name, str) or not plain or tensor.device.type != "cpu" or _name_of(tensor) not in _SHORT:
            kind = f"{type(tensor).__name__} {getattr(tensor, 'dtype', '')}".strip()
            raise refused(f"{str(name)[:80]!r} is a {kind}")
    return {name: tensor.detach() for name, tensor in found.items()}


def _name_of(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shared(tensors: dict[str, torch.Tensor], tied: list[str]) -> tuple[dict[str, str], list[str]]:
    """Tied names → the same tensor under the name that is kept, as transformers saves a model; further names of it."""
    groups = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.numel():
            groups[(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())].append(name)
    left_out, copies = {}, []
    for names in groups.values():
        owners = [name for name in names if not any(re.search(pattern, name) for pattern in tied)] or names[:1]
        left_out |= {name: owners[0] for name in names if name not in owners and names[1:]}
        copies += owners[1:]
    return left_out, copies


def _write(path: Path, tensors: dict[str, torch.Tensor], size: int) -> int:
    """One safetensors file, tensor by tensor, the widest numbers first (so that each begins at a multiple of its size).

    Returns:
        Bytes of its tensors.
    """
    import torch

    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    need = sum(sizes.values())
    if need > _MOST * size:
        raise refusal("models/swollen-pickle", path=path, need=need, size=size)
    files.require_space(path.parent, need, "its tensors")
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    heads = {name: (_SHORT[_name_of(tensors[name])], tensors[name].shape, sizes[name]) for name in order}
    with path.open("wb") as stream:
        stream.write(pack_header(heads, {}))
        for name in order:
            plain = tensors[name].resolve_neg().contiguous().reshape(-1)
            stream.write(memoryview(plain.view(torch.uint8).numpy()))
    return need
