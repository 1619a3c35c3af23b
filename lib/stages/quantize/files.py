"""One file at a time: predict its size, quantize it, describe it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.models.gguf_file import check_gguf
from lib.runs.child import run_child
from lib.runs.files import atomic_path, require_space
from lib.runs.machine import llama_cpp_problem, physical_cores
from lib.stages.quantize import recipes
from lib.stages.quantize.recipes import Options, check_output


@dataclass(frozen=True)
class QuantizationReport:
    """One quantized file.

    Attributes:
        type: the recipe, e.g. "Q4_K_M".
        file: its name.
        bytes, predicted_bytes: size of the file, measured, and by the dry run before.
        weights: number of weights; tensor_bytes: what they take without header and padding.
        bits_per_weight: 8 * tensor_bytes / weights.
        histogram: tensors, weights, bytes and share of weights by tensor type, most weights first.
        fallbacks: tensors whose rows do not fill blocks of the type that the recipe wants:
            {"tensor", "columns", "wanted", "type"}.
        token_embedding_type: tensor type of the token embedding.
        imatrix: name of the importance matrix used; None without.
        seconds, peak_memory_mib: cost of quantizing.
        set_by_hand: tensors to which the options give another type than the recipe: {"tensor", "recipe", "type"}.
        mix: of a file made for a size budget how its types were chosen (see
        `lib.stages.quantize.bit_allocation.Mix.record`).
    """

    type: str
    file: str
    bytes: int
    predicted_bytes: int
    weights: int
    tensor_bytes: int
    bits_per_weight: float
    histogram: list[dict[str, Any]]
    fallbacks: list[dict[str, Any]]
    token_embedding_type: str | None
    imatrix: str | None
    seconds: float
    peak_memory_mib: float
    set_by_hand: list[dict[str, Any]] = field(default_factory=list)
    mix: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def _require_llama_cpp() -> None:
    if problem := llama_cpp_problem():
        do = "install llama-cpp-python as the README says; `workbook doctor` tells what it lacks."
        raise InputError(f"llama.cpp cannot be used here ({problem}).", "llama-cpp-python.", do)


def predict_sizes(source: Path, types: Sequence[str], options: Options | None = None) -> list[dict[str, Any]]:
    """Exact sizes before quantizing, by llama.cpp's dry run (milliseconds; reads only the header).

    Args:
        source: GGUF with F32, F16 or BF16 weights.
        types: recipes, e.g. ["Q8_0", "Q4_K_M"].
        options: importance matrix and types of single tensors; all change sizes.

    Returns:
        One dict a type: "type", "bytes" (of the file), "header_bytes" (of it), "tensor_bytes", "weights",
        "bits_per_weight" (effective: 8 * tensor bytes / weights), "fallbacks" and "set_by_hand" (see
        `QuantizationReport`), "needs_imatrix", "histogram" (see `QuantizationReport`).

    Raises:
        InputError: unknown type, no usable source, source already quantized, options that do not fit the model.
    """
    return survey(source, types, options)[0]


def survey(
    source: Path, types: Sequence[str], options: Options | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """`predict_sizes` of a source, and the source as `describe_gguf` describes it; both by one child process."""
    options = options or Options()
    for name in types:
        recipes.file_type(name)
    check_gguf(source)
    _require_llama_cpp()
    argument = {"source": str(source.resolve()), "types": list(types), "options": options.to_json()}
    answer = run_child("lib.stages.quantize.child:predict", argument, "predicting sizes")
    return answer["predictions"], answer["source"]


def require_matrix(predictions: Sequence[dict[str, Any]], options: Options) -> None:
    """Refuse types that need an importance matrix when there is none.

    Raises:
        InputError: with the first such type.
    """
    for prediction in predictions:
        if prediction["needs_imatrix"] and options.imatrix is None:
            do = (
                "give one (--imatrix FILE, made by `workbook imatrix` or llama-imatrix), or choose a K-type, e.g. Q2_K."
            )
            name = prediction["type"]
            raise InputError(f"{name} without an importance matrix.", "an importance matrix for this type.", do)


def describe_gguf(path: Path) -> dict[str, Any]:
    """What a GGUF file really holds, by its own header.

    Returns:
        "file", "bytes", "type" (recipe by the header), "architecture", "name", "imatrix", "weights", "tensor_bytes",
        "bits_per_weight" (effective), "histogram" ({"type", "tensors", "weights", "bytes", "share"}, most weights
        first), "fallbacks" ({"tensor", "columns", "wanted", "type"}: rows that do not fill blocks of the wanted type),
        "token_embedding_type".

    Raises:
        InputError: not a GGUF file, damaged or truncated.
    """
    check_gguf(path)
    _require_llama_cpp()
    answer = run_child("lib.stages.quantize.child:describe", {"path": str(path.resolve())}, f"reading {path.name}")
    return {key: value for key, value in answer.items() if key != "peak_memory_mib"}


def quantize_file(
    source: Path, output: Path, type_name: str, options: Options | None = None, n_threads: int = 0
) -> QuantizationReport:
    """Quantize one GGUF file with llama.cpp, byte for byte as llama-quantize does it.

    The work is done in a child process into a temporary sibling of `output`; the new file is loaded with every tensor
    checked before it is flushed and renamed, so that `output` is either complete or absent.

    Args:
        source: GGUF with F32, F16 or BF16 weights.
        output: the new file.
        type_name: recipe, e.g. "Q4_K_M".
        options: importance matrix and types of single tensors.
        n_threads: 0 = physical cores; the result does not depend on it.

    Raises:
        InputError: unknown type; source missing, no GGUF, damaged, or already quantized; output is the source; a type
            that needs an importance matrix without one; one that does not fit the model; too little room.
    """
    recipes.file_type(type_name)
    check_gguf(source)
    check_output(source, output)
    options = options or Options()
    predictions = predict_sizes(source, [type_name], options)
    require_matrix(predictions, options)
    return quantize_predicted(source, output, predictions[0], options, n_threads or physical_cores())


def quantize_predicted(
    source: Path,
    output: Path,
    prediction: dict[str, Any],
    options: Options,
    n_threads: int,
    stop: threading.Event | None = None,
    heard: Callable[[str], None] | None = None,
) -> QuantizationReport:
    """As `quantize_file`, for a checked source whose size was predicted already; `stop`, `heard`: see `run_child`."""
    name = prediction["type"]
    recipe = prediction.get("recipe", name)
    require_space(output.parent, prediction["bytes"], f"{output.name}")
    with atomic_path(output) as temporary:
        argument = {
            "source": str(source.resolve()),
            "output": str(temporary.absolute()),
            "type": recipe,
            "options": options.to_json(),
            "n_threads": n_threads,
        }
        answer = run_child("lib.stages.quantize.child:quantize", argument, f"quantizing to {name}", None, stop, heard)
        description = answer["description"]
        if description["bytes"] != prediction["bytes"]:
            raise RuntimeError(f"{output.name} has {description['bytes']} bytes; predicted {prediction['bytes']}")
    kept = ("weights", "tensor_bytes", "bits_per_weight", "histogram", "token_embedding_type", "imatrix")
    return QuantizationReport(
        type=name,
        file=output.name,
        bytes=description["bytes"],
        predicted_bytes=prediction["bytes"],
        fallbacks=[] if "mix" in prediction else description["fallbacks"],
        set_by_hand=prediction["set_by_hand"],
        mix=prediction.get("mix"),
        **{key: description[key] for key in kept},
        seconds=round(answer["seconds"], 3),
        peak_memory_mib=answer["memory_mib"],
    )
