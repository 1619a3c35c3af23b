"""Quantized files: their sizes predicted, one or several made at once, described.

Several files with few threads each use the cores better than one file with all of them: llama.cpp's threads wait for
one another at every tensor, and reading, checking and writing a file are work of one thread (docs/LOG.md).
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.errors import InputError, refusal
from lib.models.gguf_file import check_model_gguf, read_metadata
from lib.models.unpack_source import Keys
from lib.progress import Progress
from lib.runs.child import StoppedError, run_child
from lib.runs.files import atomic_path, data_file, require_space, writable
from lib.runs.machine import available_memory, llama_cpp_problem, physical_cores
from lib.runs.run import Product
from lib.settings import IMATRIX_TYPES, TENSOR_TYPES

# The names of llama.cpp's recipes ("Q4_K_M"), and what may be changed about one.
#
# A recipe is a mix: it decides a type for every tensor, so a file's real bits per weight differ from its name. K- and
# IQ-types store super-blocks of 256 weights; rows of another length fall back to a type with blocks of 32.

TABLES = data_file("stages/quantize/recipes.yaml")

FILE_TYPES: dict[str, int] = TABLES["file_types"]
"""Every recipe that llama.cpp (as pinned) can write, with its `general.file_type`."""

SOURCE_TENSOR_TYPES = frozenset({"f32", "f16", "bf16"})
"""Tensor types that may be quantized; anything else would be quantized a second time."""

_NANOSECONDS_ANY = 4.0
"""Time to read, widen and write one weight, whatever its type."""


def quantizing_seconds(histogram: Sequence[dict[str, Any]]) -> float:
    """Roughly what one thread needs for a file with that histogram: good enough to begin with the longest."""
    times = TABLES["nanoseconds"]
    return sum(row["weights"] * (times[row["type"]] + _NANOSECONDS_ANY) for row in histogram) * 1e-9


def file_type(name: str) -> int:
    """The header number of a recipe.

    Raises:
        InputError: no such recipe; the message offers the nearest names.
    """
    if name in FILE_TYPES:
        return FILE_TYPES[name]
    near = difflib.get_close_matches(name.upper(), FILE_TYPES, 3, 0.5)
    do = f"write {' or '.join(near)}." if near else f"choose one of: {', '.join(FILE_TYPES)}."
    raise InputError(f"unknown quantization type {name!r}.", "a type that llama.cpp writes, e.g. Q4_K_M.", do)


def name_of(number: int | None) -> str:
    """The recipe with that header number; "unknown" when the header has none or another."""
    return next((name for name, value in FILE_TYPES.items() if value == number), "unknown")


def tensor_type(name: str) -> str:
    """The tensor type of that name, whatever its case, as llama.cpp writes it.

    Raises:
        InputError: no such type.
    """
    by_lower_case = {kind.lower(): kind for kind in TENSOR_TYPES}
    if kind := by_lower_case.get(name.lower()):
        return kind
    near = [by_lower_case[found] for found in difflib.get_close_matches(name.lower(), by_lower_case, 2, 0.5)]
    do = f"write {' or '.join(near)}." if near else f"choose one of: {', '.join(TENSOR_TYPES)}."
    raise InputError(f"unknown tensor type {name!r}.", "the type of one tensor, e.g. q6_K (a recipe is a mix).", do)


@dataclass(frozen=True)
class Options:
    """Options of quantizing, checked for their form; what they do to a model is checked by the dry run.

    Attributes:
        imatrix: importance matrix of llama-imatrix (GGUF or .dat; in a child process its path as text); its file name
            goes into the new header.
        tensor_types: "regular expression=type" for tensors whose name it is found in; the first that fits counts.
        output_tensor_type: type of the output matrix (of a tied model: of the token embedding); "" = as the recipe.
        token_embedding_type: type of the token embedding; "" = as the recipe.
        notes: (key, text of at most 127 bytes) that go into the new header.
    """

    imatrix: Path | None = None
    tensor_types: Sequence[str] = ()
    output_tensor_type: str = ""
    token_embedding_type: str = ""
    notes: Sequence[Sequence[str]] = ()

    def __post_init__(self) -> None:
        named = [name for _, name in self.patterns()]
        for name in filter(None, (*named, self.output_tensor_type, self.token_embedding_type)):
            tensor_type(name)

    def patterns(self) -> list[tuple[str, str]]:
        """(regular expression, type) of each entry of `tensor_types`.

        Raises:
            InputError: an entry of another form.
        """
        pairs = []
        for entry in self.tensor_types:
            pattern, _, name = entry.partition("=")
            if not pattern or not name:
                raise refusal("quantize/no-pair", entry=entry)
            if pattern != pattern.lower():
                raise refusal("quantize/capital-letters", pattern=pattern)
            pairs.append((pattern, name))
        return pairs

    def any_types(self) -> bool:
        """Whether any tensor's type is set by hand."""
        return bool(self.tensor_types or self.output_tensor_type or self.token_embedding_type)


# Sizes predicted, files made.

_MEMORY_PER_CHILD = 512 << 20
"""Bytes: llama.cpp's buffers of at most 256 MiB (they do not grow with the model), the interpreter and the tokenizer
of the load check. The mapped source is not counted: its pages can be dropped at any time."""

_REFRESH = 0.2


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
        mix: of a file made for a size budget how its types were chosen (see `PlannedFile`).
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


@dataclass(frozen=True)
class QuantizeResult:
    """The ladder of a run.

    Attributes:
        product: the folder with one `<name>-<TYPE>.gguf` a type.
        source: description of the file that was quantized (see `lib.stages.quantize.quantizer.describe`).
        files: one report a type, in the order of the ladder; behind them the one made for a size budget.
    """

    product: Product
    source: dict[str, Any]
    files: tuple[QuantizationReport, ...]


@dataclass(frozen=True)
class PlannedFile:
    """One file to make.

    Attributes:
        prediction: see `predict_sizes`. Of a file under a size budget "type" is its name ("MIX_300MB"), "recipe" what
            the header says, "mix" the record of the choice.
        options: importance matrix, types of single tensors, further keys of the header.
    """

    prediction: dict[str, Any]
    options: Options

    @property
    def type(self) -> str:
        return self.prediction["type"]

    @property
    def record(self) -> dict[str, Any] | None:
        """How the types of a file under a size budget were chosen: "method", "budget_bytes", "answer_weight" (0 = text
        alone), "predicted_kld" (nats a token), "predicted_answer_kld" (nats a position that predicts a token of an
        answer; None without answers), "positions", "answers", "rows_sha256", "types" ({tensor: type}), "tensors"
        ([{"tensor", "type", "weights", "bytes", "kld", "answer_kld"}]). None of others."""
        return self.prediction.get("mix")


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
    """`predict_sizes`, and the source as `lib.stages.quantize.quantizer.describe` tells of it; by one child process."""
    for name in types:
        file_type(name)
    check_model_gguf(source)
    if problem := llama_cpp_problem():
        raise refusal("runs/no-llama-cpp", problem=problem)
    argument = {"source": source, "types": list(types), "options": options or Options()}
    answer = run_child("lib.stages.quantize.quantizer:predict", argument, "predicting sizes")
    Keys(read_metadata(source), source).require_numbers()
    return answer["predictions"], answer["source"]


def require_matrix(predictions: Sequence[dict[str, Any]], options: Options) -> None:
    """Refuse types that need an importance matrix when there is none.

    Raises:
        InputError: with the first such type.
    """
    needing = [prediction for prediction in predictions if prediction["needs_imatrix"]]
    if needing and options.imatrix is None:
        found, other = needing[0]["type"], "choose a K-type, e.g. Q2_K."
        if found not in IMATRIX_TYPES:  # an option asks for it
            low = min(needing[0]["set_by_hand"], key=lambda row: (not row["type"].startswith("iq"), row["type"]))
            other = f"choose another type for that tensor, e.g. {low['recipe']} as in {found}."
            found = f"{low['tensor']} as {low['type']}"
        raise refusal("quantize/no-matrix", found=found, other=other)


def check_output(source: Path, output: Path) -> None:
    """Refuse an output that is the source itself (llama.cpp would destroy it) or cannot be written.

    Raises:
        InputError: same file by path, symbolic or hard link; a folder; an unwritable place.
    """
    if output.is_dir():
        raise InputError(f"{output} is a folder.", "the path of the new file.", f"write {output}/NAME-TYPE.gguf.")
    if output.is_symlink():
        raise InputError(f"{output} is a symbolic link.", "a plain path.", "remove the link, or choose another name.")
    if output.resolve() == source.resolve() or (output.exists() and output.samefile(source)):
        raise refusal("quantize/is-source", output=output)
    if not output.name.endswith(".gguf"):
        raise InputError(f"the output name {output.name!r}.", "a name that ends with .gguf.", "add .gguf to it.")
    writable(output.parent)


def plan_files(
    source: Path, output: Path, types: Sequence[str], options: Options | None = None, beside: Sequence[str] = ()
) -> list[PlannedFile]:
    """What quantizing one GGUF file to several types will make; every refusal comes here, before the first file.

    Args:
        output: a folder, which gets <name of the source>-<TYPE>.gguf each; or the path of a single file.
        beside: names in place of a type of files that are planned elsewhere and go to the same folder.

    Raises:
        InputError: as `predict_sizes`; a type that needs an importance matrix without one; a type named twice; an
            output that is the source or cannot be written.
    """
    names, options = [*types, *beside], options or Options()
    if len(set(names)) != len(names):
        raise InputError(f"a type named twice: {' '.join(names)}.", "each type once.", "remove one of the two.")
    check_model_gguf(source)
    for name in names:
        check_output(source, output_path(source, output, name))
    predictions = predict_sizes(source, types, options) if types else []
    require_matrix(predictions, options)
    return [PlannedFile(found, options) for found in predictions]


def output_path(source: Path, output: Path, name: str) -> Path:
    """Where the file of a type goes: `output` itself if it is no folder and ends with .gguf, else a file in it, named
    like the source without the type at its end."""
    if output.suffix == ".gguf" and not output.is_dir():
        return output
    stem = source.stem
    for suffix in ("F16", "BF16", "F32"):
        stem = stem.removesuffix(f"-{suffix}").removesuffix(f"-{suffix.lower()}")
    return output / f"{stem}-{name}.gguf"


def quantize_files(
    source: Path, output: Path, types: Sequence[str], options: Options | None = None, n_threads: int = 0
) -> list[QuantizationReport]:
    """Quantize one GGUF file to several types, byte for byte as llama-quantize does it.

    Each is made in a child process as a temporary sibling, and loaded with every tensor checked before it is flushed
    and renamed: a file is complete or absent.

    Args:
        output: see `plan_files`.
        n_threads: of all files together; 0 = physical cores. No byte depends on it.

    Raises:
        InputError: as `plan_files`; too little room.
    """
    return make_files(source, output, plan_files(source, output, types, options), n_threads)


def at_once(count: int, n_threads: int = 0) -> tuple[int, int]:
    """How many of `count` files at once, and threads each: as threads (0 = physical cores) and free memory allow."""
    threads = n_threads or physical_cores()
    files = max(1, min(count, threads, available_memory() // _MEMORY_PER_CHILD))
    spare = 0 if n_threads else 1  # keeps a core busy while another file is read, checked or written
    return files, min(threads, max(1, threads // files) + spare)


def make_files(
    source: Path,
    output: Path,
    planned: Sequence[PlannedFile],
    n_threads: int = 0,
    done: Callable[[QuantizationReport], None] = lambda report: None,
) -> list[QuantizationReport]:
    """Make all files, the longest first; reports in the order of `planned`.

    Args:
        source: checked, of the predictions; output: see `plan_files`.
        done: called as each file is finished, one at a time.

    Raises:
        BaseException: the first that a file raised, or that interrupted the caller (Ctrl-C, SIGTERM); every child is
            ended and no half file is left by then.
    """
    if not planned:
        return []
    paths = {file.type: output_path(source, output, file.type) for file in planned}
    what = f"{len(planned)} quantized files" if len(planned) > 1 else paths[planned[0].type].name
    require_space(paths[planned[0].type].parent, sum(file.prediction["bytes"] for file in planned), what)
    (together, threads), stop, one = at_once(len(planned), n_threads), threading.Event(), threading.Lock()
    reports: dict[str, QuantizationReport] = {}
    tensors: dict[str, str] = {}  # how far each running file is

    def make(file: PlannedFile) -> None:
        def heard(line: str) -> None:
            tensors[file.type] = line.partition(", tensors: ")[2].partition(" ")[0]

        try:
            if stop.is_set():
                raise StoppedError(file.type)
            report = quantize_planned(source, paths[file.type], file, threads, stop, heard)
        except BaseException:
            stop.set()  # the others are given up with it
            raise
        finally:
            tensors.pop(file.type, None)
        with one:  # also when it was complete just before the others were stopped
            reports[file.type] = report
            done(report)

    several = f" ({together} at once)" if together > 1 else ""
    longest = sorted(planned, key=lambda file: -quantizing_seconds(file.prediction["histogram"]))
    pool = ThreadPoolExecutor(together, thread_name_prefix="quantizing")
    try:
        with Progress(f"quantizing, types{several}", len(planned)) as progress:
            running = {pool.submit(make, file) for file in longest}
            while running:
                finished, running = wait(running, _REFRESH, FIRST_COMPLETED)
                for future in sorted(finished, key=lambda f: isinstance(f.exception(), StoppedError)):
                    future.result()  # the error that stopped the others comes before theirs
                where = ", ".join(f"{name} {place}" for name, place in tensors.copy().items() if place)
                progress.advance(len(finished), where)
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
    return [reports[file.type] for file in planned]


def quantize_planned(
    source: Path,
    output: Path,
    file: PlannedFile,
    n_threads: int,
    stop: threading.Event | None = None,
    heard: Callable[[str], None] | None = None,
) -> QuantizationReport:
    """One file of a checked source, whose size was predicted; `stop`, `heard`: see `run_child`."""
    prediction = file.prediction
    with atomic_path(output, alone=True) as temporary:
        argument = {
            "source": source,
            "output": temporary,
            "type": prediction.get("recipe", file.type),
            "options": file.options,
            "n_threads": n_threads,
        }
        function = "lib.stages.quantize.quantizer:quantize"
        answer = run_child(function, argument, f"quantizing to {file.type}", None, stop, heard)
        description = answer["description"]
        if description["bytes"] != prediction["bytes"]:
            raise RuntimeError(f"{output.name} has {description['bytes']} bytes; predicted {prediction['bytes']}")
    kept = ("bytes", "weights", "tensor_bytes", "bits_per_weight", "histogram", "token_embedding_type", "imatrix")
    return QuantizationReport(
        type=file.type,
        file=output.name,
        predicted_bytes=prediction["bytes"],
        fallbacks=[] if file.record else description["fallbacks"],
        set_by_hand=prediction["set_by_hand"],
        mix=file.record,
        **{key: description[key] for key in kept},
        seconds=round(answer["seconds"], 3),
        peak_memory_mib=answer["memory_mib"],
    )
