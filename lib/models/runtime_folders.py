"""Model folders that another program than transformers runs: which program, their files, what is refused of a foreign
one. Each holds the tokenizer of the model that it was made of, too."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import refusal, refusing
from lib.models import onnx_folder
from lib.models.configurations import check_configuration
from lib.models.weights import read_object
from lib.runs.files import refuse_device
from lib.runs.packages import environment_problem


@dataclass(frozen=True)
class Runtime:
    """A program that runs model folders.

    Attributes:
        title: in words.
        module: of `lib.scoring.runtimes`; also the kind of such a folder for `inspect` and in packages.
        marker: the file that tells such a folder.
        weights: patterns of the files that hold graph and weights.
        configuration: file of the configuration for transformers.
        check: "vocab_size", "context_length" and "layers" of a folder that can be run as it is, or InputError.
        environment: that its packages are in; None = this one.
    """

    title: str
    module: str
    marker: str
    weights: tuple[str, ...]
    configuration: str
    check: Callable[[Path], dict[str, Any]]
    environment: str | None = None

    def files(self, folder: Path) -> list[Path]:
        """Graph and weights of a folder."""
        return sorted({path for pattern in self.weights for path in folder.glob(pattern)})


MNN_CONFIGURATION = "transformers_config.json"
"""Of the model that a folder for MNN was made of; config.json is MNN's own there."""
_MNN_FILES = {
    "llm_model": "llm.mnn",
    "llm_weight": "llm.mnn.weight",
    "tokenizer_file": "tokenizer.mtok",
    "embedding_file": "embeddings_bf16.bin",
}
_MNN_KEYS = {"backend_type", "thread_num", "precision", "memory", "sampler_type", "temperature", "top_k", "top_p"}
_MNN_KEYS |= {"min_p", "tfs_z", "typical", "repetition_penalty", "presence_penalty", "frequency_penalty"}
_MNN_KEYS |= {"penalty_window", "n_gram", "ngram_factor", *_MNN_FILES}
"""Keys that llmexport writes for a language model; others name further models and files, or cut what is computed."""


def _check_mnn(folder: Path) -> dict[str, Any]:
    """What `Runtime.check` says, of a folder for MNN."""
    if problem := environment_problem("mnn"):
        raise refusal("models/no-environment", folder=folder, problem=problem)
    for name in ("config.json", "llm_config.json", *_MNN_FILES.values()):
        refuse_device(folder / name)
    settings, config = read_object(folder / "config.json"), read_object(folder / "llm_config.json")
    odd = settings.keys() - _MNN_KEYS
    odd |= {key for key, name in _MNN_FILES.items() if settings.get(key, name) != name}
    for key in settings.keys() - _MNN_FILES.keys():
        if not isinstance(settings[key], int | float) and not re.fullmatch(r"[\w.-]{1,20}", str(settings[key])):
            odd.add(key)
    if odd:
        raise refusal("models/odd-mnn-config", config=folder / "config.json", odd=", ".join(sorted(map(repr, odd))))
    own = check_configuration(folder / MNN_CONFIGURATION, read_object(folder / MNN_CONFIGURATION))
    names = [name for key, name in _MNN_FILES.items() if key in settings]
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise refusal("models/cut-mnn-folder", folder=folder, absent=", ".join(absent))
    refused = refusing(
        (KeyError, TypeError, ValueError), "models/damaged-mnn-config", config=folder / "llm_config.json"
    )
    with refused:
        told = {"vocab_size": own["vocab_size"], "context_length": own["max_position_embeddings"]}
        told["layers"] = config["layer_nums"]
        if any(type(value) is not int or not 1 <= value <= 1 << 24 for value in told.values()):
            raise ValueError(str(told))
    return told


def _check_onnx(folder: Path) -> dict[str, Any]:
    model = onnx_folder.check_onnx_folder(folder)["model"]
    keys = ("vocab_size", "context_length")
    return {**{key: model[key] for key in keys}, "layers": model["decoder"]["num_hidden_layers"]}


RUNTIMES = (
    Runtime("ONNX Runtime", "onnx", onnx_folder.CONFIG, (f"{onnx_folder.GRAPH}*",), "config.json", _check_onnx),
    Runtime("MNN", "mnn", "llm_config.json", ("llm.mnn*", "embeddings_*"), MNN_CONFIGURATION, _check_mnn, "mnn"),
)


LLAMA_CPP, TRANSFORMERS = "llama.cpp", "transformers"
"""The programs that need no such table: of GGUF files, and of folders that `runtime_of` does not know."""


def program_of(path: Path) -> str:
    """The program that runs a GGUF file or a folder, in words."""
    runtime = runtime_of(path)
    return LLAMA_CPP if path.is_file() else runtime.title if runtime else TRANSFORMERS


def runtime_of(folder: Path) -> Runtime | None:
    """The program that a folder is meant for; None for transformers."""
    return next((runtime for runtime in RUNTIMES if (folder / runtime.marker).is_file()), None)
