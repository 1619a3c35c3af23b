"""Folders that ONNX Runtime GenAI runs: what they hold, and what of a foreign one is refused.

A folder is `genai_config.json`, `model.onnx` (the graph) and `model.onnx.data` (the weights), with the tokenizer and
config.json of the model that it was made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.errors import missing_library, refusal, refusing
from lib.models.configurations import read_configuration
from lib.models.weights import read_object
from lib.runs.machine import has_module

CONFIG, GRAPH = "genai_config.json", "model.onnx"
_PACKAGES = ("onnxruntime_genai", "onnx")
_SESSION = {"log_id", "provider_options"}
"""Session options that the official builder writes; others can name libraries whose code would be run."""
_DOMAINS = {"", "ai.onnx", "com.microsoft"}
"""Where the operators come from that ONNX Runtime itself has."""


def is_onnx(folder: Path) -> bool:
    """Whether a folder is meant for ONNX Runtime GenAI."""
    return (folder / CONFIG).is_file()


def onnx_files(folder: Path) -> list[Path]:
    """Graph and weights."""
    return sorted(folder.glob(f"{GRAPH}*"))


def check_onnx_folder(folder: Path) -> dict[str, Any]:
    """The content of genai_config.json of a folder that can be run as it is.

    Raises:
        InputError: onnxruntime-genai or onnx is not installed; a damaged or missing file; settings, operators or
            weights from outside the folder that could run somebody's code or read other files.
    """
    if absent := [name for name in _PACKAGES if not has_module(name)]:
        raise missing_library(*absent)
    read_configuration(folder)
    content = read_object(folder / CONFIG)
    with refusing((KeyError, TypeError, AttributeError), "models/damaged-genai-config", config=folder / CONFIG):
        model = content["model"]
        decoder = model["decoder"]
        options = decoder["session_options"]
        odd = {*options} - _SESSION | {part for part in ("embedding", "encoder", "vision", "speech") if part in model}
        odd |= {"provider_options"} if options.get("provider_options") else set()
        odd |= {"pipeline"} if decoder.get("pipeline") else set()
        name = decoder["filename"]
        for key in ("vocab_size", "context_length"):
            if type(model[key]) is not int or model[key] < 1:
                raise TypeError(f"{key} {model[key]!r}")
    if odd or name != GRAPH:
        asked = ", ".join(sorted(odd)) or f"the file {name}"
        raise refusal("models/odd-genai-config", config=folder / CONFIG, asked=asked, graph=GRAPH)
    _check_graph(folder)
    return content


def _check_graph(folder: Path) -> None:
    """Refuse operators of others, and weights outside the folder or cut off."""
    import onnx

    path = folder / GRAPH
    if not path.is_file():
        raise refusal("models/no-onnx-graph", folder=folder, graph=GRAPH)
    with refusing((ValueError, RuntimeError, OSError, onnx.checker.ValidationError), "models/damaged-onnx", path=path):
        graph = _read(path)
    if foreign := sorted({node.domain for node in graph.graph.node} - _DOMAINS):
        raise refusal("models/foreign-operators", path=path, domains=", ".join(foreign))
    for name, end in _stored_outside(graph):
        weights = folder / name
        if Path(name).name != name or not weights.is_file():
            raise refusal("models/onnx-weights-elsewhere", path=path, name=name)
        if (size := weights.stat().st_size) < end:
            raise refusal("models/cut-onnx-weights", path=weights, size=size, need=end)


def _read(path: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise ValueError(str(error)) from error


def _stored_outside(graph: Any) -> Iterator[tuple[str, int]]:
    """File name and end, in bytes, of every tensor that lies outside the graph's own file."""
    for tensor in graph.graph.initializer:
        told = {entry.key: entry.value for entry in tensor.external_data}
        if told:
            yield told.get("location", ""), int(told.get("offset", 0)) + int(told.get("length", 0))
