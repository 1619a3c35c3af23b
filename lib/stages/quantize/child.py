"""What runs in the child process: llama.cpp's quantizer, its dry run, the header and the load check.

llama.cpp aborts the whole process on some damaged files, so none of this may run in a notebook's kernel.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import llama_cpp

from lib.errors import InputError
from lib.progress import Progress
from lib.runs.child import peak_memory_mib
from lib.stages.quantize import importance_matrix, llama_library, planning, recipes
from lib.stages.quantize.recipes import Options


def quantize(argument: dict[str, Any]) -> dict[str, Any]:
    """Quantize `source` to `output` by the recipe `type`; then load the result with every tensor checked.

    Returns:
        {"seconds", "memory_mib" of quantizing alone, "description": see `lib.stages.quantize.files.describe_gguf`}.
    """
    source, output, recipe = Path(argument["source"]), Path(argument["output"]), argument["type"]
    options = Options.from_json(argument["options"])
    matrix = importance_matrix.read(options.imatrix) if options.imatrix else None
    if matrix is not None:
        names = planning.planned_types(planning.dry_run(source, recipe, options, matrix))
        planning.check_coverage(planning.open_source(source, matrix), names, matrix)
    started = time.monotonic()
    with Progress(f"quantizing to {recipe}, tensors", every=1.0) as progress:

        def count(line: str) -> None:
            if match := planning.TENSOR_LINE.match(line):
                progress.total = int(match[2])
                progress.advance()

        log = llama_library.Log(count)
        planning.call(source, output, recipe, options, matrix, argument["n_threads"], log)
    seconds = time.monotonic() - started
    memory = peak_memory_mib()
    check_loads(output)
    facts, tensors = _read(output)
    fallbacks = planning.find_fallbacks(recipe, tensors, log, options)
    return {"seconds": seconds, "memory_mib": memory, "description": {**facts, "fallbacks": fallbacks}}


def predict(argument: dict[str, Any]) -> dict[str, Any]:
    """Exact sizes before quantizing; options that are "checked" are not probed one by one.

    Returns:
        {"predictions": one dict a type, see `lib.stages.quantize.files.predict_sizes`; "source": see `describe`}.
    """
    options = Options.from_json(argument["options"])
    matrix = importance_matrix.read(options.imatrix) if options.imatrix else None
    source = planning.open_source(Path(argument["source"]), matrix, options.notes)
    if not argument.get("checked"):
        planning.check_options(source, options)
    predictions = [planning.predict_recipe(source, recipe, options, matrix) for recipe in argument["types"]]
    return {"predictions": predictions, "source": describe({"path": argument["source"]})}


def describe(argument: dict[str, Any]) -> dict[str, Any]:
    """What is in a GGUF file: see `lib.stages.quantize.files.describe_gguf`.

    For the fallbacks the recipe is replayed by a dry run over the file itself: llama.cpp decides from names and
    shapes, not from what the tensors are now.
    """
    path = Path(argument["path"])
    facts, tensors = _read(path)
    recipe = facts["type"]
    if recipe == "unknown" or recipe in recipes.UNQUANTIZED:
        return {**facts, "fallbacks": []}
    log = planning.dry_run(path, recipe, Options())
    return {**facts, "fallbacks": planning.find_fallbacks(recipe, tensors, log, Options())}


def check_loads(path: Path) -> None:
    """Load the whole file with every tensor's data validated; an InputError says why it cannot."""
    log = llama_library.Log()
    params = llama_cpp.llama_model_default_params()
    params.check_tensors = True
    params.n_gpu_layers = 0
    params.use_extra_bufts = False  # no copy of the weights in the processor's own layout: nothing is computed here
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise InputError(f"llama.cpp cannot load the new file ({log.reason}).", "a file that loads.", "report this.")
    llama_cpp.llama_model_free(model)


def _read(path: Path) -> tuple[dict[str, Any], planning.Tensors]:
    """The description of a file without its fallbacks, and its tensors."""
    with llama_library.open_header(path) as header:
        tensors = header.tensors
        facts = {
            "file": path.name,
            "bytes": path.stat().st_size,
            "type": recipes.name_of(header.number("general.file_type")),
            "architecture": header.text("general.architecture") or "unknown",
            "name": header.text("general.name") or "",
            "imatrix": header.text("quantize.imatrix.file"),
        }
    weights = sum(t["weights"] for t in tensors.values())
    size = sum(t["bytes"] for t in tensors.values())
    embedding = tensors.get("token_embd.weight")
    more = {
        "weights": weights,
        "tensor_bytes": size,
        "bits_per_weight": 8 * size / weights if weights else 0.0,
        "histogram": planning.histogram(tensors),
        "token_embedding_type": embedding["type"] if embedding else None,
    }
    return {**facts, **more}, tensors
