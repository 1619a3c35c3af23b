"""A Hugging Face model folder to one GGUF file, without loading the model; and the finished file read back.

The result is equal, byte for byte, to that of the official `convert_hf_to_gguf.py` (llama.cpp, the version inside
llama-cpp-python 0.3.36) for Qwen2 and Qwen3 models whose tokenizer it knows. It is read back with a reader that shares
no code with the writer, and by llama.cpp.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import yaml
from gguf.gguf_writer import WriterState

from lib.errors import InputError, refusal, refusing
from lib.models.configurations import read_sampling
from lib.models.gguf_file import data_end, padded, read_metadata, read_tensors
from lib.models.weights import Weights, open_weights, read_object
from lib.progress import Progress
from lib.runs.child import run_child, run_jobs
from lib.runs.files import atomic_path, require_space
from lib.runs.machine import llama_cpp_problem
from lib.scoring.llama_backend import forget_errors, last_error, llama
from lib.stages.convert.tensors import GgufFile, plan_tensors, read_convertible, write_parameters
from lib.stages.convert.tokenizer import add_tokenizer

_LOAD_MODE_NONE = 0  # llama.h, enum llama_load_mode


def verify(path: Path, types: dict[str, str]) -> None:
    """Check that the file holds exactly the planned tensors with their types and ends where the last one ends.

    Raises:
        RuntimeError: it does not; the writer is wrong or the disk is.
    """
    tensors = read_tensors(path)
    found = {tensor.name: gguf.GGMLQuantizationType(tensor.type).name for tensor in tensors}
    if found != types or len(found) != len(tensors):
        wrong = sorted(set(found.items()) ^ set(types.items()))
        raise RuntimeError(f"{path}: {len(wrong)} tensors differ from the plan, first {wrong[:1]}")
    end = data_end(tensors)
    if end is None or path.stat().st_size != padded(end):
        raise RuntimeError(f"{path}: {path.stat().st_size} bytes, its last tensor ends at {end}")


def metadata_table(path: Path, width: int = 60) -> list[tuple[str, str]]:
    """Key and value of everything a GGUF says about itself, long values shortened, arrays as their length."""
    rows = []
    for key, value in read_metadata(path).items():
        if isinstance(value, list):
            text = f"{len(value)} values" if len(value) > 8 else ", ".join(map(str, value))
        else:
            text = f"{value:.7g}" if isinstance(value, float) else " ".join(str(value).split())
        rows.append((key, text if len(text) <= width else text[: width - 1] + "…"))
    return rows


def open_with_llama_cpp(argument: dict[str, Any]) -> dict[str, Any]:
    """Load {"path"} with llama.cpp, without the data of the tensors (runs in a child process).

    It parses all keys, builds the vocabulary and the graph, and looks up every tensor by name and shape. The values are
    checked where they are written; the gate of stage 05 loads them.

    Raises:
        InputError: llama.cpp refuses the file; with the last errors it logged.
    """
    llama_cpp = llama()
    forget_errors()
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    parameters.no_alloc, parameters.load_mode = True, _LOAD_MODE_NONE  # mapping is not allowed with no_alloc
    model = llama_cpp.llama_model_load_from_file(argument["path"].encode(), parameters)
    small = llama_cpp.llama_context_default_params()
    small.n_ctx = small.n_batch = small.n_ubatch = 64
    if not model or not llama_cpp.llama_init_from_model(model, small):  # a context builds the graph, and may abort
        raise refusal(
            "convert/llama-cpp-refuses", path=Path(argument["path"]).name, why=last_error() or "no reason given"
        )
    return {}


OUTTYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
"""outtype → name of the file type in GGUF."""


@dataclass(frozen=True)
class ConversionReport:
    """What was converted.

    Attributes:
        bytes_before, bytes_after: of the weights read and of the GGUF file.
        types: number of tensors of each GGUF type.
        float16_fallback: tensors whose rows Q8_0 cannot divide.
        pre_tokenizer, recognised: name in GGUF and how it was found.
        loaded: what llama.cpp said when it opened the file, in words.
        unsaid: added tokens that llama.cpp cuts otherwise, and why.
        converter: another one than `convert`, in words; empty for that.
    """

    model: str
    output: str
    architecture: str
    outtype: str
    tensors: int
    parameters: int
    bytes_before: int
    bytes_after: int
    types: dict[str, int]
    float16_fallback: list[str]
    tokens: int
    padding_tokens: int
    pre_tokenizer: str
    recognised: str
    loaded: str
    seconds: float
    unsaid: list[str] = field(default_factory=list)
    converter: str = ""


def convert(model_dir: Path, output: Path, outtype: str = "f16", name: str | None = None) -> ConversionReport:
    """Write `output` from the model folder `model_dir`.

    Args:
        outtype: "f32", "f16", "bf16" or "q8_0"; norms and biases are float32 in all of them.
        name: general.name; None = from the model card or the folder's name, as the official converter does.

    Raises:
        InputError: an unsupported or damaged model, weights the type cannot hold, no room, a path that cannot be
            written. Nothing is left at `output` then.
    """
    conversion = Conversion(model_dir, open_weights(Path(model_dir)), output, outtype, name)
    with conversion.open() as file:
        mebibytes = conversion.weights.nbytes >> 20
        with Progress(f"converting to {outtype} (MiB)", mebibytes, pieces=1 << 20) as progress:
            run_jobs(file.jobs(), progress.advance)
    return conversion.report()


class Conversion:
    """A planned conversion: everything that can be refused without reading the weights has been checked.

    The weights may be written from a model folder (`convert`) or by whoever makes them (`workbook merge --gguf`).
    """

    def __init__(self, model_dir: Path, weights: Weights, output: Path, outtype: str, name: str | None = None) -> None:
        self.started = time.monotonic()
        self.folder, self.output, self.weights, self.outtype = Path(model_dir), Path(output), weights, outtype
        check_output(self.output, weights, outtype)
        self.config = read_convertible(self.folder)
        self.plan = plan_tensors(weights, self.config, outtype)
        self.header, self.tokenizer = self._header(name)

    @contextlib.contextmanager
    def open(self) -> Iterator[GgufFile]:
        """The file to put the weights into; verified, and renamed to `output`, when the block succeeds.

        Raises:
            InputError: the disk or llama.cpp refuses; nothing is left at `output` then.
        """
        require_space(self.output.parent, sum(t.nbytes for t in self.plan) + len(self.header), self.output.name)
        refused, placed = refusing(OSError, "runs/no-output", output=self.output), atomic_path(self.output, alone=True)
        with refused, placed as temporary, ThreadPoolExecutor(1) as pool:
            file = GgufFile(temporary, self.header, self.plan)
            read = pool.submit(self._read_back, temporary)  # while the data is still being written
            with contextlib.closing(file):
                file.put_own()
                yield file
            self.loaded = read.result()

    def ask_llama_cpp(self) -> str:
        """What llama.cpp says of the file before there is any: of its header, in front of a hole.

        Raises:
            InputError: it refuses such a model.
        """
        with tempfile.TemporaryDirectory(prefix="workbook-header-") as name:
            self.write_header(Path(name) / self.output.name)
            return load_check(Path(name) / self.output.name)

    def write_header(self, path: Path) -> None:
        """A file of the planned size with the header alone, in front of a hole: sizes are told from it."""
        GgufFile(path, self.header, self.plan).close()

    def _read_back(self, path: Path) -> str:
        """Check the header, and ask llama.cpp for its opinion of it."""
        verify(path, {tensor.name: tensor.type.name for tensor in self.plan})
        return load_check(path)

    def report(self) -> ConversionReport:
        """What was done, once `open` has ended."""
        types = Counter(tensor.type.name for tensor in self.plan)
        fallback = [t.name for t in self.plan if self.outtype == "q8_0" and t.type.name == "F16"]
        return ConversionReport(
            model=str(self.folder),
            output=str(self.output),
            architecture=self.config["model_type"],
            outtype=self.outtype,
            tensors=len(self.plan),
            parameters=self.weights.parameters,
            bytes_before=self.weights.nbytes,
            bytes_after=self.output.stat().st_size,
            types=dict(sorted(types.items())),
            float16_fallback=fallback,
            **self.tokenizer,
            loaded=self.loaded,
            seconds=round(time.monotonic() - self.started, 2),
        )

    def _header(self, name: str | None) -> tuple[bytes, dict[str, Any]]:
        """Everything before the data of the tensors, and what is reported of the tokenizer."""
        writer = gguf.GGUFWriter(path=None, arch=self.config["model_type"])
        for tensor in self.plan:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type)
        writer.add_type(gguf.GGUFType.MODEL)
        write_metadata(writer, self.folder, name)
        write_parameters(writer, self.config, gguf.LlamaFileType[OUTTYPES[self.outtype]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        tokenizer = add_tokenizer(writer, self.folder, self.config["vocab_size"])
        return header_of(writer), tokenizer


def plan_conversion(folder: Path) -> Conversion:
    """What converting a model folder would be, asked of llama.cpp too; nothing is written, and no weight is read.

    Raises:
        InputError: what `convert` refuses before it reads weights.
    """
    conversion = Conversion(folder, open_weights(folder), Path("model.gguf"), "f16")
    conversion.ask_llama_cpp()
    return conversion


def check_name(output: Path, outtype: str) -> None:
    """Refuse an unknown type, and an output that is no .gguf file or a folder."""
    if outtype not in OUTTYPES:
        raise InputError(f"outtype {outtype!r}.", f"one of {', '.join(OUTTYPES)}.", "choose one of them.")
    if output.suffix != ".gguf":
        raise InputError(f"{output} as the output.", "a name that ends in .gguf.", "rename the output.")
    if output.is_dir():
        raise InputError(f"{output} is a folder.", "a file name.", "choose another name.")


def check_output(output: Path, weights: Weights, outtype: str) -> None:
    """As `check_name`; and an output that is one of the inputs."""
    check_name(output, outtype)
    if output.exists() and any(path.exists() and output.samefile(path) for path in weights.files):
        raise InputError(f"{output} is an input file.", "another file.", "choose another name for the output.")


def header_of(writer: gguf.GGUFWriter) -> bytes:
    """Everything that `writer` was told, as the beginning of a file."""
    stream = io.BytesIO()
    writer.fout, writer.state = [stream], WriterState.EMPTY  # in memory, where it would open a file
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return stream.getvalue()


def write_metadata(writer: gguf.GGUFWriter, folder: Path, name: str | None) -> None:
    """general.*: from the folder's name, the model card's front matter and, of a model, its JSON files."""
    for logger in ("gguf", "metadata", "gguf.gguf_writer"):  # they would log every key
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    counts, sampling = writer.get_total_parameter_count(), read_sampling(folder)
    with refusing(Exception, "convert/bad-card", folder=folder):  # yaml's errors derive from Exception
        path = folder / "config.json"
        card, config = _read_card(folder / "README.md"), read_object(path) if path.is_file() else {}
        metadata = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), card, config, folder, counts[0])
    if (penalty := sampling.pop("repetition_penalty", None)) is not None:
        sampling.setdefault("penalty_repeat", penalty)  # llama.cpp's name of it
    for key, value in sampling.items():
        setattr(metadata, f"sampling_{'temp' if key == 'temperature' else key}", value)
    metadata.name = name or metadata.name or folder.name
    if metadata.size_label is None and counts[0] > 0:
        metadata.size_label = gguf.size_label(*counts)
    metadata.set_gguf_meta_model(writer)


class _Texts(yaml.SafeLoader):
    """Every scalar as it is written: 2.10 is no number, no (Norwegian) is not false, and only null is nothing."""


_Texts.yaml_implicit_resolvers = {
    letter: [found for found in resolvers if found[0].rpartition(":")[2] in ("null", "merge")]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_MOST_ALIASES = 8
_OF_MODELS = ("base_model", "dataset")
"""Beginnings of the keys whose values may have keys of their own."""
_SEVERAL = (*_OF_MODELS, "tags", "pipeline_tag", "language", "license")
"""Beginnings of the keys that may have several values; those of others are joined."""


def _read_card(path: Path) -> dict[str, Any]:
    """The front matter of a model card in texts alone, as GGUF has them; what is no text is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    front = itertools.takewhile(lambda line: line != "---", lines[1:]) if lines[:1] == ["---"] else ()
    text = "\n".join(front).replace("\t", "  ")
    if sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, _Texts)) > _MOST_ALIASES:
        raise ValueError(f"more than {_MOST_ALIASES} aliases, which may stand for more than any memory holds")
    written = yaml.load(text, _Texts)
    card: dict[str, Any] = {}
    for key, value in written.items() if isinstance(written, dict) else ():
        parts = [
            {name: text for name, text in part.items() if isinstance(text, str)} if isinstance(part, dict) else part
            for part in (value if isinstance(value, list) else [value])
            if isinstance(part, str) or (isinstance(part, dict) and str(key).startswith(_OF_MODELS))
        ]
        if value is None:
            card[str(key)] = None
        elif parts:
            several = isinstance(value, list) and str(key).startswith(_SEVERAL)
            card[str(key)] = parts if several or isinstance(parts[0], dict) else ", ".join(parts)
    return card


def load_check(path: Path) -> str:
    """What llama.cpp says about the file, in words.

    Raises:
        InputError: it refuses the file.
    """
    if problem := llama_cpp_problem():
        return f"not tried: {problem}"
    what, function = "opening the GGUF in llama.cpp", "lib.stages.convert.convert:open_with_llama_cpp"
    run_child(function, {"path": str(path)}, what, 600, heard=lambda line: None)
    return "llama.cpp opened the file: its keys, its vocabulary, and the name, type and shape of every tensor are valid"
