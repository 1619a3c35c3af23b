"""Folders that ONNX Runtime GenAI runs: what they hold, and what of a foreign one is refused.

A folder is `genai_config.json`, `model.onnx` (the graph) and `model.onnx.data` (the weights), with the tokenizer and
config.json of the model that it was made of.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.errors import missing_library, refusal, refusing
from lib.models.configurations import read_configuration
from lib.models.weights import read_object
from lib.runs.files import refuse_device
from lib.runs.machine import has_module

CONFIG, GRAPH = "genai_config.json", "model.onnx"
_PACKAGES = ("onnxruntime_genai", "onnx")
_MOST_BYTES = {CONFIG: 1 << 20, GRAPH: 2 << 30}
"""Largest sizes that are read: the settings, and what a graph can have (protobuf)."""
_MODEL = {"bos_token_id", "eos_token_id", "pad_token_id", "context_length", "decoder", "type", "vocab_size"}
_DECODER = {"session_options", "filename", "head_size", "hidden_size", "inputs", "outputs"}
_DECODER |= {"num_attention_heads", "num_hidden_layers", "num_key_value_heads"}
_SEARCH = {"diversity_penalty", "do_sample", "early_stopping", "length_penalty", "max_length", "min_length", "top_k"}
_SEARCH |= {"no_repeat_ngram_size", "num_beams", "num_return_sequences", "past_present_share_buffer", "top_p"}
_SEARCH |= {"repetition_penalty", "temperature"}
"""Keys that the official builder writes for a language model; others name programs, files, or other ways to compute."""
_NAMES = {
    "inputs": {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "position_ids": "position_ids",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    },
    "outputs": {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    },
}
_LARGEST = {"vocab_size": 1 << 22, "context_length": 1 << 24, "num_hidden_layers": 1 << 12}
_LARGEST |= dict.fromkeys(("head_size", "num_attention_heads", "num_key_value_heads"), 1 << 12)
_LARGEST["hidden_size"] = 1 << 20
_DOMAINS = {"", "ai.onnx", "com.microsoft"}
"""Where the operators come from that ONNX Runtime itself has."""


def check_onnx_folder(folder: Path) -> dict[str, Any]:
    """The content of genai_config.json of a folder that can be run as it is.

    Raises:
        InputError: onnxruntime-genai or onnx is not installed; a damaged, missing or oversized file; settings,
            operators or weights from outside the folder that could run code, write files, or compute otherwise.
    """
    if absent := [name for name in _PACKAGES if not has_module(name)]:
        raise missing_library(*absent)
    for name, most in _MOST_BYTES.items():
        path = folder / name
        refuse_device(path)
        if path.is_file() and path.stat().st_size > most:
            raise refusal("models/too-large-onnx", path=path, size=path.stat().st_size, most=most)
    own = read_configuration(folder)
    content = read_object(folder / CONFIG)
    with refusing(
        (KeyError, TypeError, AttributeError, ValueError), "models/damaged-genai-config", config=folder / CONFIG
    ):
        model, search = content["model"], content["search"]
        decoder = model["decoder"]
        options, odd = decoder["session_options"], {*content} - {"model", "search"}
        odd |= {*model} - _MODEL | {*decoder} - _DECODER | {*search} - _SEARCH
        odd |= {*options} - {"log_id", "provider_options"} | {"provider_options" for _ in options["provider_options"]}
        odd |= {key for key in ("num_beams", "num_return_sequences") if search.get(key, 1) != 1}
        odd |= {part for part, names in _NAMES.items() if not decoder[part].items() <= names.items()}
        name = decoder["filename"]
        for key, most in _LARGEST.items():
            value = model[key] if key in model else decoder[key]
            if type(value) is not int or not 1 <= value <= most:
                raise TypeError(f"{key} {value!r:.40}")
        for text in (model["type"], options.get("log_id", "x"), name):
            if not isinstance(text, str) or not re.fullmatch(r"[\w.-]{1,60}", text):
                raise ValueError(f"{text!r:.60}")
    if odd or name != GRAPH:
        asked = ", ".join(sorted(f"{key!r:.40}" for key in odd)) or f"the file {name}"
        raise refusal("models/odd-genai-config", config=folder / CONFIG, asked=asked, graph=GRAPH)
    if (rows := own.get("vocab_size", model["vocab_size"])) != model["vocab_size"]:
        raise refusal("models/other-genai-config", config=folder / CONFIG, found=model["vocab_size"], rows=rows)
    _check_graph(folder, model["vocab_size"])
    return content


def _check_graph(folder: Path, vocab_size: int) -> None:
    """Refuse operators of others, logits of another vocabulary, and weights outside the folder or cut off."""
    import onnx

    path = folder / GRAPH
    if not path.is_file():
        raise refusal("models/no-onnx-graph", folder=folder, graph=GRAPH)
    with refusing((ValueError, RuntimeError, OSError, onnx.checker.ValidationError), "models/damaged-onnx", path=path):
        graph = _read(path)
        outside = list(_stored_outside(graph))
        (logits,) = (output for output in graph.graph.output if output.name == "logits")
        found = logits.type.tensor_type.shape.dim[2].dim_value
        if found != vocab_size:
            raise ValueError(f"logits of {found} tokens, and {CONFIG} says {vocab_size}")
    domains = {node.domain for node in graph.graph.node} | {function.domain for function in graph.functions}
    if foreign := sorted(domains - _DOMAINS):
        raise refusal("models/foreign-operators", path=path, domains=", ".join(foreign))
    for name, end in outside:
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
            first, length = int(told.get("offset", 0)), int(told.get("length", 0))
            if min(first, length) < 0:
                raise ValueError(f"{tensor.name}: bytes from {first} on, {length} of them")
            yield told.get("location", ""), first + length
