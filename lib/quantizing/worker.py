"""What runs in the child process: llama.cpp's quantizer, its dry run, the header and the load check.

llama.cpp aborts the whole process on some damaged files, so none of this may run in a notebook's kernel.
"""

from __future__ import annotations

import ctypes
import re
import time
from pathlib import Path
from typing import Any

import llama_cpp

from lib.errors import InputError
from lib.progress import Progress
from lib.quantizing import imatrix as importance
from lib.quantizing import native, recipes
from lib.run.child import peak_memory_mib

_BUFFER = 256 << 20
"""Bytes of rows that llama.cpp holds at once; a row is quantized by itself, so this does not change the result."""

_TENSOR_LINE = re.compile(r"^\[ *(\d+)/ *(\d+)\] (\S+) +- \[.*\], type = *(\w+), .*?size = .*?(?:\((\w+)\))?$")
_FALLBACK_LINE = re.compile(
    r"^warning: (\S+) +- ncols +(\d+) not divisible by +(\d+) \(required for type +(\w+)\).*-> falling back to +(\w+)"
)


def quantize(argument: dict[str, Any]) -> dict[str, Any]:
    """Quantize `source` to `output` by the recipe `type`; then load the result with every tensor checked.

    Returns:
        {"seconds", "peak_memory_mib" of quantizing alone, "description": see `describe`}.
    """
    source, output, recipe = Path(argument["source"]), Path(argument["output"]), argument["type"]
    matrix = importance.read(Path(argument["imatrix"])) if argument["imatrix"] else None
    if matrix is not None:
        _check_coverage(source, recipe, matrix)
    started = time.monotonic()
    with Progress(f"quantizing to {recipe}, tensors") as progress:

        def count(line: str) -> None:
            if match := _TENSOR_LINE.match(line):
                progress.total = int(match[2])
                progress.advance()

        _run(source, output, recipe, matrix, argument["n_threads"], dry=False, log=native.Log(count))
    seconds = time.monotonic() - started
    memory = peak_memory_mib()
    check_loads(output)
    return {"seconds": seconds, "memory_mib": memory, "description": describe({"path": str(output)})}


def predict(argument: dict[str, Any]) -> dict[str, Any]:
    """Exact sizes before quantizing.

    Returns:
        {"predictions": one dict a type: type, bytes (file), tensor_bytes, weights, bits_per_weight, fallbacks,
        needs_imatrix; "source": see `describe`}.
    """
    source = Path(argument["source"])
    matrix = importance.read(Path(argument["imatrix"])) if argument.get("imatrix") else None
    _check_source(source)
    predictions = [_predict(source, recipe, matrix) for recipe in argument["types"]]
    return {"predictions": predictions, "source": describe({"path": str(source)})}


def describe(argument: dict[str, Any]) -> dict[str, Any]:
    """What is in a GGUF file: see `lib.quantizing.describe_gguf`."""
    path = Path(argument["path"])
    with native.open_header(path) as header:
        recipe = recipes.name_of(header.number("general.file_type"))
        tensors = header.tensors
        facts = {
            "file": path.name,
            "bytes": path.stat().st_size,
            "type": recipe,
            "architecture": header.text("general.architecture") or "unknown",
            "name": header.text("general.name") or "",
            "imatrix": header.text("quantize.imatrix.file"),
        }
    weights = sum(t["weights"] for t in tensors.values())
    size = sum(t["bytes"] for t in tensors.values())
    embedding = tensors.get("token_embd.weight")
    return {
        **facts,
        "weights": weights,
        "tensor_bytes": size,
        "bits_per_weight": 8 * size / weights if weights else 0.0,
        "histogram": _histogram(tensors, weights),
        "fallbacks": _fallbacks(path, recipe, tensors),
        "token_embedding_type": embedding["type"] if embedding else None,
    }


def check_loads(path: Path) -> None:
    """Load the whole file with every tensor's data validated; an InputError says why it cannot."""
    log = native.Log()
    params = llama_cpp.llama_model_default_params()
    params.check_tensors = True
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise InputError(f"llama.cpp cannot load the new file ({log.reason}).", "a file that loads.", "report this.")
    llama_cpp.llama_model_free(model)


def _check_source(source: Path) -> None:
    """Refuse parts of a split model and files that are quantized already."""
    with native.open_header(source) as header:
        if (header.number("split.count") or 0) > 1 or header.has("split.no"):
            do = "join the parts first: llama-gguf-split --merge."
            raise InputError(f"{source} is one part of a split model.", "a model in one file.", do)
        if header.text("general.type") == "imatrix":
            raise InputError(f"{source} is an importance matrix.", "a model.", "give it as --imatrix instead.")
        quantized = sorted({t["type"] for t in header.tensors.values()} - recipes.SOURCE_TENSOR_TYPES)
        name = recipes.name_of(header.number("general.file_type"))
    if quantized:
        raise InputError(
            f"{source} is already quantized ({name}: {', '.join(quantized)}).",
            "F16, BF16 or F32 weights: quantizing twice adds the errors.",
            "start from the F16 file (outtype: f16 in the parameters).",
        )


def _predict(source: Path, recipe: str, matrix: importance.Imatrix | None) -> dict[str, Any]:
    log = native.Log()
    _run(source, source.with_suffix(".dry"), recipe, matrix, 1, dry=True, log=log)
    with native.open_header(source) as header:
        tensors = {name: dict(tensor) for name, tensor in header.tensors.items()}
        extra = (matrix.header_numbers(), matrix.header_texts()) if matrix else ({}, {})
        size = header.size_when_quantized(recipes.file_type(recipe), *extra)
    for name, new_type in _planned(log).items():
        rows = tensors[name]["weights"] // tensors[name]["shape"][0]
        tensors[name]["bytes"] = rows * native.row_bytes(new_type, tensors[name]["shape"][0])
        tensors[name]["type"] = new_type
    tensor_bytes = sum(t["bytes"] for t in tensors.values())
    weights = sum(t["weights"] for t in tensors.values())
    return {
        "type": recipe,
        "bytes": size + sum(-(-t["bytes"] // 32) * 32 for t in tensors.values()),
        "tensor_bytes": tensor_bytes,
        "weights": weights,
        "bits_per_weight": 8 * tensor_bytes / weights,
        "fallbacks": [*_silent_fallback(recipe, tensors), *_logged_fallbacks(log, tensors)],
        "needs_imatrix": any("will require an imatrix" in line for line in log.lines),
    }


def _planned(log: native.Log) -> dict[str, str]:
    """{tensor: new type} of the tensors that a dry run would change."""
    matches = [match for line in log.lines if (match := _TENSOR_LINE.match(line))]
    if not matches or len(matches) != int(matches[0][2]):
        raise RuntimeError(f"the dry run of llama.cpp named {len(matches)} tensors; its log has another form")
    return {match[3]: match[5] for match in matches if match[5]}


def _run(
    source: Path,
    output: Path,
    recipe: str,
    matrix: importance.Imatrix | None,
    n_threads: int,
    dry: bool,
    log: native.Log,
) -> None:
    """Call llama_model_quantize; its reason for refusing becomes an InputError."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = n_threads
    params.ftype = recipes.file_type(recipe)
    params.dry_run = dry
    params.max_buf_size = _BUFFER
    keep_alive = _attach(params, matrix) if matrix is not None else None
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), ctypes.byref(params))
    del keep_alive
    if code != 0:
        do = "check the source file and the disk; for IQ types give an importance matrix."
        raise InputError(f"llama.cpp cannot quantize {source} to {recipe}: {log.reason}.", "a usable source.", do)


def _attach(params: Any, matrix: importance.Imatrix) -> list[Any]:
    """Put the importance matrix and the keys that tell of it into the parameters; returns what must stay alive."""
    data = (llama_cpp.llama_model_imatrix_data * (len(matrix.values) + 1))()
    for slot, (name, values) in zip(data, matrix.values.items(), strict=False):
        slot.name = name.encode()
        slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        slot.size = values.size
    texts, numbers = matrix.header_texts(), matrix.header_numbers()
    order = ("file", "dataset", "entries_count", "chunks_count")
    keys = [key for key in (f"quantize.imatrix.{name}" for name in order) if key in texts or key in numbers]
    overrides = (llama_cpp.llama_model_kv_override * (len(keys) + 1))()
    for slot, key in zip(overrides, keys, strict=False):
        slot.key = key.encode()
        if key in texts:
            slot.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR
            slot.value.val_str = texts[key].encode()
        else:
            slot.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
            slot.value.val_i64 = numbers[key]
    params.imatrix, params.kv_overrides = data, overrides
    return [data, overrides]


def _check_coverage(source: Path, recipe: str, matrix: importance.Imatrix) -> None:
    """Refuse a matrix that lacks layers of this model or has other widths: llama.cpp would quantize without it."""
    log = native.Log()
    _run(source, source.with_suffix(".dry"), recipe, matrix, 1, dry=True, log=log)
    with native.open_header(source) as header:
        shapes = {name: tensor["shape"] for name, tensor in header.tensors.items()}
    for name in _planned(log):
        if not name.startswith("blk."):
            continue
        experts = shapes[name][2] if len(shapes[name]) > 2 else 1
        wanted = shapes[name][0] * experts
        have = matrix.values[name].size if name in matrix.values else 0
        if have != wanted:
            found = f"the importance matrix {matrix.file} has {have} values for {name}."
            raise InputError(found, f"{wanted}.", "make the importance matrix with this very model.")


def _histogram(tensors: dict[str, dict[str, Any]], weights: int) -> list[dict[str, Any]]:
    """Tensors, weights and bytes by tensor type, most weights first."""
    rows: dict[str, dict[str, Any]] = {}
    for tensor in tensors.values():
        row = rows.setdefault(tensor["type"], {"type": tensor["type"], "tensors": 0, "weights": 0, "bytes": 0})
        row["tensors"] += 1
        row["weights"] += tensor["weights"]
        row["bytes"] += tensor["bytes"]
    ordered = sorted(rows.values(), key=lambda row: -row["weights"])
    return [{**row, "share": row["weights"] / weights} for row in ordered]


def _fallbacks(path: Path, recipe: str, tensors: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Tensors with a substitute type because their rows do not fill a block of the type that the recipe wants.

    The recipe is replayed by a dry run over the file itself: llama.cpp decides from names and shapes, not from what
    the tensors are now.
    """
    if recipe in ("unknown", "F32", "F16", "BF16"):
        return []
    log = native.Log()
    _run(path, path.with_suffix(".dry"), recipe, None, 1, dry=True, log=log)
    return [*_silent_fallback(recipe, tensors), *_logged_fallbacks(log, tensors)]


def _logged_fallbacks(log: native.Log, tensors: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What llama.cpp warned of, where the tensor really has that type."""
    matches = [match for line in log.lines if (match := _FALLBACK_LINE.match(line))]
    rows = [{"tensor": m[1], "columns": int(m[2]), "wanted": m[4], "type": m[5]} for m in matches]
    return [row for row in rows if tensors[row["tensor"]]["type"] == row["type"]]


def _silent_fallback(recipe: str, tensors: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The output matrix (or the embedding tied to it), which llama.cpp moves to Q8_0 without a warning."""
    head = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    if head not in tensors or tensors[head]["type"] != "q8_0" or not recipes.uses_super_blocks(recipe):
        return []
    columns = tensors[head]["shape"][0]
    if columns % recipes.SUPER_BLOCK == 0:
        return []
    wanted = "q5_K" if recipe in recipes.Q5_K_OUTPUT else "q6_K"
    return [{"tensor": head, "columns": columns, "wanted": wanted, "type": "q8_0"}]
