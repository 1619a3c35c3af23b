"""llama.cpp's quantizer: dry runs, what is refused, the run itself and the check of its file. For child processes only.

llama.cpp aborts the whole process on some damaged files, so none of this may run in a notebook's kernel.
"""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import llama_cpp

from lib.errors import InputError, refusal
from lib.models.gguf_file import computes_in_float32, padded
from lib.progress import Progress
from lib.runs.child import peak_memory_mib
from lib.runs.files import disk_error
from lib.scoring.llama_backend import open_model
from lib.settings import UNQUANTIZED
from lib.stages.quantize import files, llama_library
from lib.stages.quantize.files import Options, tensor_type
from lib.stages.quantize.llama_library import Header, Imatrix, Log, Tensor, read_header

_BUFFER = 256 << 20
"""Bytes of rows that llama.cpp holds at once; a row is quantized by itself, so this does not change the result."""
_TENSOR_LINE = re.compile(r"^\[ *(\d+)/ *(\d+)\] (\S+) +- \[.*\], type = *(\w+), .*?size = .*?(?:\((\w+)\))?$")
_FALLBACK_LINE = re.compile(
    r"^warning: (\S+) +- ncols +(\d+) not divisible by +(\d+) \(required for type +(\w+)\).*-> falling back to +(\w+)"
)
_OVERRIDE_LINE = re.compile(r"(\S+) +- applying manual override: q8_0 -> q4_0$")
_SUPER_BLOCK = 256
"""Weights in a block of the K-, IQ- (but IQ4_NL) and TQ-types."""
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_OUTPUT = "output.weight"

Tensors = dict[str, Tensor]


# What child processes are asked for.


def quantize(argument: dict[str, Any]) -> dict[str, Any]:
    """Quantize `source` to `output` by the recipe `type`, as `predict` allowed it; then load the result with every
    tensor checked.

    Returns:
        {"seconds", "memory_mib" of quantizing alone, "description": see `describe`, with "fallbacks" ({"tensor",
        "columns", "wanted", "type"}: rows that do not fill blocks of the wanted type)}.
    """
    output, recipe = Path(argument["output"]), argument["type"]
    source = open_source(argument["source"], Options(**argument["options"]))
    started = time.monotonic()
    with Progress(f"quantizing to {recipe}, tensors", every=1.0) as progress:

        def count(line: str) -> None:
            if match := _TENSOR_LINE.match(line):
                progress.total = int(match[2])
                progress.advance()

        log = Log(count)
        threads = argument["n_threads"]
        _llama_quantize(source.header.path, output, recipe, source.options, source.matrix, log, nthread=threads)
    seconds, memory = time.monotonic() - started, peak_memory_mib()
    # every tensor is checked; no copy of the weights in the processor's own layout: nothing is computed here
    llama_cpp.llama_model_free(open_model(output, 0, check_tensors=True, use_extra_bufts=False))
    made = read_header(output)
    description = {**describe(made), "fallbacks": find_fallbacks(recipe, made.tensors, log, source.options)}
    return {"seconds": seconds, "memory_mib": memory, "description": description}


def predict(argument: dict[str, Any]) -> dict[str, Any]:
    """Exact sizes before quantizing.

    Returns:
        {"predictions": one dict a type, see `lib.stages.quantize.files.predict_sizes`; "source": see `describe`}.
    """
    source = open_source(argument["source"], Options(**argument["options"]))
    source.check_options()
    predictions = [source.predict(recipe) for recipe in argument["types"]]
    return {"predictions": predictions, "source": {**describe(source.header), "fallbacks": []}}


def describe(header: Header) -> dict[str, Any]:
    """What a GGUF file really holds, by its own header.

    Returns:
        "file", "bytes", "type" (recipe by the header), "architecture", "name", "imatrix", "weights", "tensor_bytes",
        "bits_per_weight" (effective), "histogram" ({"type", "tensors", "weights", "bytes", "share"}, most weights
        first), "token_embedding_type".
    """
    embedding = header.tensors.get(_EMBEDDINGS[0])
    return {
        "file": header.path.name,
        "bytes": header.path.stat().st_size,
        "type": files.name_of(header.values.get("general.file_type")),
        "architecture": header.values.get("general.architecture") or "unknown",
        "name": header.values.get("general.name") or "",
        "imatrix": header.values.get("quantize.imatrix.file"),
        **_totals(header.tensors),
        "token_embedding_type": embedding.type if embedding else None,
    }


def _totals(tensors: Tensors) -> dict[str, Any]:
    """Weights, bytes, bits per weight; and by tensor type tensors, weights, bytes and share, most weights first."""
    weights, size = sum(t.weights for t in tensors.values()), sum(t.bytes for t in tensors.values())
    parts: dict[str, dict[str, Any]] = {}
    for tensor in tensors.values():
        part = parts.setdefault(tensor.type, {"type": tensor.type, "tensors": 0, "weights": 0, "bytes": 0})
        part["tensors"] += 1
        part["weights"] += tensor.weights
        part["bytes"] += tensor.bytes
    ordered = sorted(parts.values(), key=lambda part: (-part["weights"], part["type"]))
    return {
        "weights": weights,
        "tensor_bytes": size,
        "bits_per_weight": 8 * size / weights if weights else 0.0,
        "histogram": [{**part, "share": part["weights"] / weights} for part in ordered],
    }


# The call of llama_model_quantize, for real or as a dry run.


def _llama_quantize(
    source: Path, output: Path, recipe: str, options: Options, matrix: Imatrix | None, log: Log, **fields: Any
) -> None:
    """Quantize `source` to `output`.

    Raises:
        InputError: llama.cpp refused; with the reason that it logged.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.max_buf_size = files.file_type(recipe), _BUFFER
    for name, value in fields.items():
        setattr(params, name, value)
    for name in ("output_tensor_type", "token_embedding_type"):
        if asked := getattr(options, name):
            setattr(params, name, llama_library.type_number(tensor_type(asked)))
    # each array ends with an empty entry; it lives as long as its name here, until llama.cpp has returned
    if matrix:
        params.imatrix = data = _array(llama_cpp.llama_model_imatrix_data, matrix.values)
        for slot, (name, values) in zip(data, matrix.values.items(), strict=False):
            slot.name, slot.size = name.encode(), values.size
            slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if patterns := options.patterns():
        params.tt_overrides = types = _array(llama_cpp.llama_model_tensor_override, patterns)
        for slot, (pattern, name) in zip(types, patterns, strict=False):
            slot.pattern, slot.type = pattern.encode(), llama_library.type_number(tensor_type(name))
    if keys := _header_keys(options, matrix):
        params.kv_overrides = overrides = _array(llama_cpp.llama_model_kv_override, keys)
        for slot, (key, value) in zip(overrides, keys.items(), strict=False):
            slot.key = key.encode()
            if isinstance(value, str):
                slot.tag, slot.value.val_str = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
            else:
                slot.tag, slot.value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, value
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), ctypes.byref(params))
    if code != 0:
        raise disk_error(log.reason, output.parent) or refusal(
            "quantize/llama-cpp-fails", source=source, recipe=recipe, log=log
        )


def _array(struct: Any, entries: Any) -> Any:
    return (struct * (len(entries) + 1))()


def _header_keys(options: Options, matrix: Imatrix | None) -> dict[str, str | int]:
    """What the header says beside what llama.cpp writes by itself."""
    return {**(matrix.header_keys() if matrix else {}), **dict(options.notes)}


def planned_types(log: Log) -> dict[str, str]:
    """{tensor: new type} of the tensors that a dry run would change."""
    matches = [match for line in log.lines if (match := _TENSOR_LINE.match(line))]
    if not matches or len(matches) != int(matches[0][2]):
        raise RuntimeError(f"the dry run of llama.cpp named {len(matches)} tensors; its log has another form")
    return {match[3]: match[5] for match in matches if match[5]}


def find_fallbacks(recipe: str, tensors: Tensors, log: Log, options: Options) -> list[dict[str, Any]]:
    """Tensors with a substitute type because their rows do not fill a block of the type that is wanted."""
    matches = [match for line in log.lines if (match := _FALLBACK_LINE.match(line))]
    rows = [{"tensor": m[1], "columns": int(m[2]), "wanted": m[4], "type": m[5]} for m in matches]
    logged = [row for row in rows if tensors[row["tensor"]].type == row["type"]]
    head = _head(tensors)
    by_hand = options.output_tensor_type or (head != _OUTPUT and options.token_embedding_type)
    named = any(f"{head} " in line and "applying manual override" in line for line in log.lines)
    if by_hand or named or any(row["tensor"] == head for row in logged):
        return logged
    # llama.cpp moves the output matrix (or the embedding tied to it) to Q8_0 without a warning
    super_blocks = "_K" in recipe or (recipe.startswith(("IQ", "TQ")) and recipe != "IQ4_NL")
    silent = head in tensors and tensors[head].type == "q8_0" and super_blocks
    if not silent or (columns := tensors[head].columns) % _SUPER_BLOCK == 0:
        return logged
    wanted = "q5_K" if recipe in files.TABLES["output_as_q5_K"] else "q6_K"
    return [{"tensor": head, "columns": columns, "wanted": wanted, "type": "q8_0"}, *logged]


def _head(tensors: Tensors) -> str:
    """The output matrix: of a tied model the token embedding."""
    return _OUTPUT if _OUTPUT in tensors else _EMBEDDINGS[0]


@dataclass(frozen=True)
class Source:
    """A model that may be quantized, and by what: `matrix` is the importance matrix of the options."""

    header: Header
    options: Options
    matrix: Imatrix | None

    @property
    def tensors(self) -> Tensors:
        return self.header.tensors

    def importance(self, name: str) -> Any:
        """The matrix's values of a tensor; None without."""
        return self.matrix.values.get(name) if self.matrix else None

    def dry_run(self, recipe: str, options: Options | None = None) -> Log:
        """What llama.cpp would do by these options, or by others, without reading weights or writing; its log tells.

        Raises:
            InputError: llama.cpp refused; with the reason that it logged.
        """
        log, output, options = Log(), self.header.path.with_suffix(".dry"), self.options if options is None else options
        _llama_quantize(self.header.path, output, recipe, options, self.matrix, log, nthread=1, dry_run=True)
        return log

    def predict(self, recipe: str) -> dict[str, Any]:
        """Exact sizes of one recipe; see `lib.stages.quantize.files.predict_sizes`.

        Raises:
            InputError: options that do not fit the model.
        """
        log = self.dry_run(recipe)
        tensors = self._as_planned(log)
        fallbacks = find_fallbacks(recipe, tensors, log, self.options)
        self._check_effect(recipe, tensors, fallbacks)
        self.check_coverage(planned_types(log))
        self._check_importance_of_embeddings(tensors)
        usual = self._as_planned(self.dry_run(recipe, Options())) if self.options.any_types() else tensors
        return {
            "type": recipe,
            "header_bytes": self.header.size_when_quantized,
            "bytes": self.header.size_when_quantized + sum(padded(tensor.bytes) for tensor in tensors.values()),
            **_totals(tensors),
            "fallbacks": fallbacks,
            "set_by_hand": [
                {"tensor": name, "recipe": usual[name].type, "type": tensor.type}
                for name, tensor in tensors.items()
                if tensor.type != usual[name].type
            ],
            "needs_imatrix": any("will require an imatrix" in line for line in log.lines),
        }

    def _as_planned(self, log: Log) -> Tensors:
        """The tensors as they would be after quantizing."""
        changed = {name: self.tensors[name].as_type(kind) for name, kind in planned_types(log).items()}
        return {**self.tensors, **changed}

    def check_options(self) -> None:
        """Refuse options that cannot fit this model, whatever the recipe.

        Raises:
            InputError: a type whose blocks the rows do not fill; an expression that is none, that fits nothing, or
                nothing that an earlier one has left.
        """
        self._check_widths()
        patterns = [pattern for pattern, _ in self.options.patterns()]
        for place, pattern in enumerate(patterns):
            # only this expression asks for another type than the recipe, so the log shows which tensors it chooses
            probe = tuple(f"{p}={'q4_0' if i == place else 'q8_0'}" for i, p in enumerate(patterns))
            try:
                log = self.dry_run("Q8_0", replace(self.options, imatrix=None, tensor_types=probe))
            except InputError as error:
                raise refusal("quantize/bad-expression", pattern=pattern, error=error) from None
            if not any(_OVERRIDE_LINE.search(line) for line in log.lines):
                some = ", ".join(n for n in self.tensors if n.startswith("blk.0.") and n.endswith("weight"))
                raise refusal("quantize/chooses-nothing", pattern=pattern, head=_head(self.tensors), some=some)

    def _check_widths(self) -> None:
        """Refuse types of embedding and output whose blocks the rows do not fill: llama.cpp aborts there."""
        wanted = {**dict.fromkeys(_EMBEDDINGS, self.options.token_embedding_type)}
        for name, asked in {**wanted, _OUTPUT: self.options.output_tensor_type}.items():
            if not asked or name not in self.tensors:
                continue
            kind, columns = tensor_type(asked), self.tensors[name].columns
            if columns % (block := llama_library.block_size(kind)):
                raise refusal("quantize/odd-rows", name=name, columns=columns, kind=kind, block=block)

    def _check_effect(self, recipe: str, tensors: Tensors, fallbacks: list[dict[str, Any]]) -> None:
        """Refuse options that would be without effect: llama.cpp passes over them in silence."""
        if self.options.tensor_types and recipe in UNQUANTIZED:
            raise refusal("quantize/types-of-unquantized", recipe=recipe)
        asked, head = self.options.output_tensor_type, _head(self.tensors)
        if not asked or tensors[head].type == tensor_type(asked) or any(row["tensor"] == head for row in fallbacks):
            return
        raise refusal("quantize/no-effect", asked=asked, head=head, kind=tensors[head].type)

    def _check_importance_of_embeddings(self, tensors: Tensors) -> None:
        """Refuse types that need importance values for a tensor without them: llama.cpp aborts its process there."""
        for name in (*_EMBEDDINGS, _OUTPUT):
            if name not in tensors or tensors[name].type == self.tensors[name].type:
                continue
            if self.importance(name) is None and llama_library.requires_imatrix(tensors[name].type):
                raise refusal("quantize/no-importance", name=name, kind=tensors[name].type)

    def check_coverage(self, names: Iterable[str]) -> None:
        """Refuse a matrix that lacks layers of this model (llama.cpp would quantize without it) or has other widths.

        Args:
            names: the tensors that are to be quantized; embedding and output matrix may do without values.

        Raises:
            InputError: with the first tensor that lacks values.
        """
        for name in names if self.matrix else ():
            values = self.importance(name)
            if values is None and not name.startswith("blk."):
                continue
            shape, have = self.tensors[name].shape, 0 if values is None else values.size
            needed = shape[0] * (shape[2] if len(shape) > 2 else 1)
            if have != needed:
                raise refusal("quantize/other-matrix", matrix=self.matrix, have=have, name=name, needed=needed)


def open_source(path: Path | str, options: Options) -> Source:
    """Read the header of a model that may be quantized.

    Raises:
        InputError: a part of a split model, an importance matrix, or a file that is quantized already.
    """
    path, matrix = Path(path), llama_library.read_imatrix(options.imatrix)
    header = read_header(path, _header_keys(options, matrix))
    if "split.no" in header.values and header.values.get("split.count") != 1:
        raise refusal("quantize/split-model", path=path)
    if header.values.get("general.type") == "imatrix":
        raise InputError(f"{path} is an importance matrix.", "a model.", "give it as --imatrix instead.")
    if quantized := sorted({t.type for t in header.tensors.values()} - files.SOURCE_TENSOR_TYPES):
        name = files.name_of(header.values.get("general.file_type"))
        raise refusal("quantize/quantized-twice", path=path, name=name, types=", ".join(quantized))
    vectors = [name for name, t in header.tensors.items() if computes_in_float32(name, t.shape) and t.type != "f32"]
    if vectors:
        raise refusal("quantize/vectors", path=path, name=vectors[0], kind=header.tensors[vectors[0]].type)
    return Source(header, options, matrix)
