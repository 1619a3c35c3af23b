"""A Hugging Face model folder to one GGUF file, without loading the model.

The result is equal, byte for byte, to that of the official `convert_hf_to_gguf.py` (llama.cpp, the version inside
llama-cpp-python 0.3.36) for Qwen2 and Qwen3 models whose tokenizer it knows.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.gguf_export.architecture import Architecture, read_architecture, write_parameters
from lib.gguf_export.tensors import PlannedTensor, plan_tensors, write_tensors
from lib.gguf_export.verifying import verify
from lib.gguf_export.vocabulary import Vocabulary, read_vocabulary, write_vocabulary
from lib.models.weights import Weights, open_weights
from lib.progress import Progress
from lib.run.files import atomic_path, read_json, require_space

if TYPE_CHECKING:
    from gguf import GGUFWriter

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

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def convert(model_dir: Path, output: Path, outtype: str = "f16", name: str | None = None) -> ConversionReport:
    """Write `output` from the model folder `model_dir`.

    Args:
        outtype: "f32", "f16", "bf16" or "q8_0"; norms and biases are float32 in all of them.
        name: general.name; None = from the model card or the folder's name, as the official converter does.

    Raises:
        InputError: an unsupported or damaged model, weights the type cannot hold, no room, a path that cannot be
            written. Nothing is left at `output` then.
    """
    started = time.monotonic()
    model_dir, output = Path(model_dir), Path(output)
    if outtype not in OUTTYPES:
        raise InputError(f"outtype {outtype!r}.", f"one of {', '.join(OUTTYPES)}.", "choose one of them.")
    weights = open_weights(model_dir)
    _check_output(output, weights)
    model = read_architecture(model_dir)
    plan = plan_tensors(weights, model, outtype)
    vocabulary = read_vocabulary(model_dir, model.config["vocab_size"])
    require_space(output.parent, sum(tensor.nbytes for tensor in plan) + (32 << 20), output.name)
    try:
        with atomic_path(output) as temporary:
            with _quiet():
                _write(temporary, model_dir, model, plan, vocabulary, outtype, name)
            verify(temporary, {tensor.name: tensor.type.name for tensor in plan})
            loaded = _load_check(temporary)
    except OSError as error:
        raise InputError(
            f"{output} cannot be written ({error.strerror}).", "a folder with room that may be written.", "choose one."
        ) from None
    types = Counter(tensor.type.name for tensor in plan)
    return ConversionReport(
        model=str(model_dir),
        output=str(output),
        architecture=model.name,
        outtype=outtype,
        tensors=len(plan),
        parameters=weights.parameters,
        bytes_before=weights.nbytes,
        bytes_after=output.stat().st_size,
        types=dict(sorted(types.items())),
        float16_fallback=[t.name for t in plan if outtype == "q8_0" and t.type.name == "F16"],
        tokens=len(vocabulary.tokens),
        padding_tokens=vocabulary.types.count(5),
        pre_tokenizer=vocabulary.pre,
        recognised=vocabulary.recognised,
        loaded=loaded,
        seconds=round(time.monotonic() - started, 2),
    )


def _check_output(output: Path, weights: Weights) -> None:
    if output.suffix != ".gguf":
        raise InputError(f"{output} as the output.", "a name that ends in .gguf.", "rename the output.")
    if output.is_dir():
        raise InputError(f"{output} is a folder.", "a file name.", "choose another name.")
    if output.exists() and any(output.samefile(path) for path in weights.files):
        raise InputError(f"{output} is an input file.", "another file.", "choose another name for the output.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The gguf library logs every key; its loggers are silenced while it writes."""
    loggers = [logging.getLogger(name) for name in ("gguf", "metadata")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _write(
    path: Path,
    folder: Path,
    model: Architecture,
    plan: list[PlannedTensor],
    vocabulary: Vocabulary,
    outtype: str,
    name: str | None,
) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path=None, arch=model.name)
    for tensor in plan:
        shape = tensor.source.shape or (1,)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=tensor.type)
    writer.add_type(gguf.GGUFType.MODEL)
    _write_metadata(writer, folder, name)
    write_parameters(writer, model, gguf.LlamaFileType[OUTTYPES[outtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_vocabulary(writer, vocabulary)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    mebibytes = sum(tensor.source.nbytes for tensor in plan) >> 20
    with path.open("ab") as stream, Progress(f"converting to {outtype} (MiB)", mebibytes) as progress:
        write_tensors(stream, plan, progress)


def _write_metadata(writer: GGUFWriter, folder: Path, name: str | None) -> None:
    """general.*: from the folder's name, the model card's front matter and generation_config.json."""
    import gguf

    counts = writer.get_total_parameter_count()
    try:
        metadata = gguf.Metadata.load(None, folder, name, counts[0])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the model card or configuration in {folder} cannot be read ({reason}).",
            "README.md with YAML front matter, JSON files.",
            "correct README.md or remove it.",
        ) from None
    except Exception as error:  # yaml's errors derive from Exception
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"the front matter of {folder / 'README.md'} is not YAML ({reason}).", "YAML.", "correct or remove it."
        ) from None
    generation = folder / "generation_config.json"
    if generation.is_file() and metadata.sampling_penalty_repeat is None:
        # the gguf package of PyPI looks only for llama.cpp's name of this key
        metadata.sampling_penalty_repeat = read_json(generation).get("repetition_penalty")
    if metadata.name is None:
        metadata.name = folder.name
    if metadata.size_label is None and counts[0] > 0:
        metadata.size_label = gguf.size_label(*counts)
    metadata.set_gguf_meta_model(writer)


def _load_check(path: Path) -> str:
    from lib.device import llama_cpp_problem
    from lib.run.child import run_child

    problem = llama_cpp_problem()
    if problem:
        return f"not tried: {problem}"
    run_child(
        "lib.gguf_export.verifying:open_with_llama_cpp", {"path": str(path)}, "opening the GGUF in llama.cpp", 600
    )
    return "llama.cpp opened the file and found every tensor's data valid"
