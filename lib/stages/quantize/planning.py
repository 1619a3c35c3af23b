"""The call of llama_model_quantize, for real or as a dry run. For child processes only.
What a recipe and its options would do to a model, by llama.cpp's dry run: types, sizes, fallbacks, refusals.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import llama_cpp

from lib.errors import InputError
from lib.stages.quantize import importance_matrix, llama_library, recipes
from lib.stages.quantize.recipes import Options, tensor_type

# The call of llama_model_quantize, for real or as a dry run. For child processes only.

_BUFFER = 256 << 20
"""Bytes of rows that llama.cpp holds at once; a row is quantized by itself, so this does not change the result."""


def call(
    source: Path,
    output: Path,
    recipe: str,
    options: Options,
    matrix: importance_matrix.Imatrix | None,
    n_threads: int,
    log: llama_library.Log,
) -> None:
    """Quantize `source` to `output`.

    Raises:
        InputError: llama.cpp refused; with the reason that it logged.
    """
    _call(source, output, recipe, options, matrix, log, nthread=n_threads)


def dry_run(
    source: Path, recipe: str, options: Options, matrix: importance_matrix.Imatrix | None = None
) -> llama_library.Log:
    """What llama.cpp would do, without reading weights or writing; its log tells.

    Raises:
        InputError: llama.cpp refused; with the reason that it logged.
    """
    log = llama_library.Log()
    _call(source, source.with_suffix(".dry"), recipe, options, matrix, log, nthread=1, dry_run=True)
    return log


def _call(
    source: Path,
    output: Path,
    recipe: str,
    options: Options,
    matrix: importance_matrix.Imatrix | None,
    log: llama_library.Log,
    **fields: Any,
) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = recipes.file_type(recipe)
    params.max_buf_size = _BUFFER
    for name, value in fields.items():
        setattr(params, name, value)
    keep_alive = [_attach_matrix(params, matrix) if matrix is not None else None, _attach_types(params, options)]
    keep_alive.append(_attach_keys(params, matrix, options))
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), ctypes.byref(params))
    del keep_alive
    if code != 0:
        do = "check the source file and the disk; for IQ types give an importance matrix."
        raise InputError(f"llama.cpp cannot quantize {source} to {recipe}: {log.reason}.", "a usable source.", do)


def _attach_types(params: Any, options: Options) -> Any:
    """Put types of single tensors into the parameters; returns what must stay alive."""
    if options.output_tensor_type:
        params.output_tensor_type = llama_library.type_number(tensor_type(options.output_tensor_type))
    if options.token_embedding_type:
        params.token_embedding_type = llama_library.type_number(tensor_type(options.token_embedding_type))
    patterns = options.patterns()
    if not patterns:
        return None
    overrides = (llama_cpp.llama_model_tensor_override * (len(patterns) + 1))()
    for slot, (pattern, name) in zip(overrides, patterns, strict=False):
        slot.pattern = pattern.encode()
        slot.type = llama_library.type_number(tensor_type(name))
    params.tt_overrides = overrides
    return overrides


def _attach_matrix(params: Any, matrix: importance_matrix.Imatrix) -> list[Any]:
    """Put the importance matrix into the parameters; returns what must stay alive."""
    data = (llama_cpp.llama_model_imatrix_data * (len(matrix.values) + 1))()
    for slot, (name, values) in zip(data, matrix.values.items(), strict=False):
        slot.name = name.encode()
        slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        slot.size = values.size
    params.imatrix = data
    return [data]


def _attach_keys(params: Any, matrix: importance_matrix.Imatrix | None, options: Options) -> Any:
    """Put the keys that tell of the importance matrix, and the notes, into the parameters; returns what must stay."""
    texts = {} if matrix is None else matrix.header_texts()
    numbers = {} if matrix is None else matrix.header_numbers()
    order = ("file", "dataset", "entries_count", "chunks_count")
    keys = [key for key in (f"quantize.imatrix.{name}" for name in order) if key in texts or key in numbers]
    texts |= dict(options.notes)
    if not (keys := [*keys, *dict(options.notes)]):
        return None
    overrides = (llama_cpp.llama_model_kv_override * (len(keys) + 1))()
    for slot, key in zip(overrides, keys, strict=False):
        slot.key = key.encode()
        if key in texts:
            slot.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR
            slot.value.val_str = texts[key].encode()
        else:
            slot.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
            slot.value.val_i64 = numbers[key]
    params.kv_overrides = overrides
    return overrides


# What a recipe and its options would do to a model, by llama.cpp's dry run: types, sizes, fallbacks, refusals.
#
# For child processes only.

TENSOR_LINE = re.compile(r"^\[ *(\d+)/ *(\d+)\] (\S+) +- \[.*\], type = *(\w+), .*?size = .*?(?:\((\w+)\))?$")
_FALLBACK_LINE = re.compile(
    r"^warning: (\S+) +- ncols +(\d+) not divisible by +(\d+) \(required for type +(\w+)\).*-> falling back to +(\w+)"
)
_OVERRIDE_LINE = re.compile(r"(\S+) +- applying manual override: q8_0 -> q4_0$")
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"

Tensors = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Source:
    """A checked source: its tensors and the bytes that its header will have after quantizing."""

    path: Path
    tensors: Tensors
    header_bytes: int

    @property
    def head(self) -> str:
        """The output matrix: of a tied model the token embedding."""
        return _OUTPUT if _OUTPUT in self.tensors else _EMBEDDING


def open_source(
    path: Path, matrix: importance_matrix.Imatrix | None, notes: tuple[tuple[str, str], ...] = ()
) -> Source:
    """Read the header of a model that may be quantized; `notes`: see `Options`.

    Raises:
        InputError: a part of a split model, an importance matrix, or a file that is quantized already.
    """
    with llama_library.open_header(path) as header:
        if (header.number("split.count") or 0) > 1 or header.has("split.no"):
            do = "join the parts first: llama-gguf-split --merge."
            raise InputError(f"{path} is one part of a split model.", "a model in one file.", do)
        if header.text("general.type") == "imatrix":
            raise InputError(f"{path} is an importance matrix.", "a model.", "give it as --imatrix instead.")
        quantized = sorted({t["type"] for t in header.tensors.values()} - recipes.SOURCE_TENSOR_TYPES)
        name = recipes.name_of(header.number("general.file_type"))
        if quantized:
            raise InputError(
                f"{path} is already quantized ({name}: {', '.join(quantized)}).",
                "F16, BF16 or F32 weights: quantizing twice adds the errors.",
                "start from the F16 file (outtype: f16 in the parameters).",
            )
        numbers, texts = (matrix.header_numbers(), matrix.header_texts()) if matrix else ({}, {})
        return Source(path, header.tensors, header.size_when_quantized(0, numbers, {**texts, **dict(notes)}))


def predict_recipe(
    source: Source, recipe: str, options: Options, matrix: importance_matrix.Imatrix | None
) -> dict[str, Any]:
    """Exact sizes of one recipe; see `lib.stages.quantize.files.predict_sizes`.

    Raises:
        InputError: options that do not fit the model.
    """
    log = dry_run(source.path, recipe, options, matrix)
    tensors = _as_planned(source.tensors, log)
    fallbacks = find_fallbacks(recipe, tensors, log, options)
    if options.any_types():
        _check_effect(source, recipe, options, tensors, fallbacks)
    if matrix is not None:
        check_coverage(source, planned_types(log), matrix)
    _check_matrix_of_embeddings(tensors, source.tensors, matrix)
    tensor_bytes = sum(t["bytes"] for t in tensors.values())
    weights = sum(t["weights"] for t in tensors.values())
    return {
        "type": recipe,
        "header_bytes": source.header_bytes,
        "bytes": source.header_bytes + sum(-(-t["bytes"] // 32) * 32 for t in tensors.values()),
        "tensor_bytes": tensor_bytes,
        "weights": weights,
        "bits_per_weight": 8 * tensor_bytes / weights,
        "fallbacks": fallbacks,
        "set_by_hand": _set_by_hand(source, recipe, options, matrix, tensors),
        "needs_imatrix": any("will require an imatrix" in line for line in log.lines),
        "histogram": histogram(tensors),
    }


def _as_planned(tensors: Tensors, log: llama_library.Log) -> Tensors:
    """The tensors as they would be after quantizing."""
    planned = {name: dict(tensor) for name, tensor in tensors.items()}
    for name, new_type in planned_types(log).items():
        tensor = planned[name]
        rows = tensor["weights"] // tensor["shape"][0]
        tensor["bytes"] = rows * llama_library.row_bytes(new_type, tensor["shape"][0])
        tensor["type"] = new_type
    return planned


def histogram(tensors: Tensors) -> list[dict[str, Any]]:
    """Tensors, weights, bytes and share of the weights by tensor type, most weights first."""
    rows: dict[str, dict[str, Any]] = {}
    for tensor in tensors.values():
        row = rows.setdefault(tensor["type"], {"type": tensor["type"], "tensors": 0, "weights": 0, "bytes": 0})
        row["tensors"] += 1
        row["weights"] += tensor["weights"]
        row["bytes"] += tensor["bytes"]
    weights = sum(row["weights"] for row in rows.values())
    return [
        {**row, "share": row["weights"] / weights}
        for row in sorted(rows.values(), key=lambda r: (-r["weights"], r["type"]))
    ]


def planned_types(log: llama_library.Log) -> dict[str, str]:
    """{tensor: new type} of the tensors that a dry run would change."""
    matches = [match for line in log.lines if (match := TENSOR_LINE.match(line))]
    if not matches or len(matches) != int(matches[0][2]):
        raise RuntimeError(f"the dry run of llama.cpp named {len(matches)} tensors; its log has another form")
    return {match[3]: match[5] for match in matches if match[5]}


def find_fallbacks(recipe: str, tensors: Tensors, log: llama_library.Log, options: Options) -> list[dict[str, Any]]:
    """Tensors with a substitute type because their rows do not fill a block of the type that is wanted."""
    matches = [match for line in log.lines if (match := _FALLBACK_LINE.match(line))]
    rows = [{"tensor": m[1], "columns": int(m[2]), "wanted": m[4], "type": m[5]} for m in matches]
    logged = [row for row in rows if tensors[row["tensor"]]["type"] == row["type"]]
    head = _OUTPUT if _OUTPUT in tensors else _EMBEDDING
    by_hand = options.output_tensor_type or (head == _EMBEDDING and options.token_embedding_type)
    named = any(f"{head} " in line and "applying manual override" in line for line in log.lines)
    if by_hand or named or any(row["tensor"] == head for row in logged):
        return logged
    return [*_silent_fallback(recipe, head, tensors), *logged]


def _silent_fallback(recipe: str, head: str, tensors: Tensors) -> list[dict[str, Any]]:
    """The output matrix (or the embedding tied to it), which llama.cpp moves to Q8_0 without a warning."""
    if head not in tensors or tensors[head]["type"] != "q8_0" or not recipes.uses_super_blocks(recipe):
        return []
    columns = tensors[head]["shape"][0]
    if columns % recipes.SUPER_BLOCK == 0:
        return []
    wanted = "q5_K" if recipe in recipes.Q5_K_OUTPUT else "q6_K"
    return [{"tensor": head, "columns": columns, "wanted": wanted, "type": "q8_0"}]


def _set_by_hand(
    source: Source, recipe: str, options: Options, matrix: importance_matrix.Imatrix | None, tensors: Tensors
) -> list[dict[str, Any]]:
    """Tensors to which the options give another type than the recipe would."""
    if not options.any_types():
        return []
    usual = _as_planned(source.tensors, dry_run(source.path, recipe, Options(), matrix))
    return [
        {"tensor": name, "recipe": usual[name]["type"], "type": tensor["type"]}
        for name, tensor in tensors.items()
        if tensor["type"] != usual[name]["type"]
    ]


def check_options(source: Source, options: Options) -> None:
    """Refuse options that cannot fit this model, whatever the recipe.

    Raises:
        InputError: a type whose blocks the rows do not fill; an expression that is none, that fits nothing, or
            nothing that an earlier one has left.
    """
    _check_widths(source, options)
    patterns = [pattern for pattern, _ in options.patterns()]
    for place, pattern in enumerate(patterns):
        probe = tuple(f"{p}={'q4_0' if i == place else 'q8_0'}" for i, p in enumerate(patterns))
        log = _probe(source, pattern, replace(options, imatrix=None, tensor_types=probe))
        if not any(_OVERRIDE_LINE.search(line) for line in log.lines):
            some = ", ".join(n for n in source.tensors if n.startswith("blk.0.") and n.endswith("weight"))
            raise InputError(
                f"the expression {pattern!r} of tensor_types chooses no tensor.",
                "one that fits a matrix which no earlier entry and neither of the two other types takes.",
                f"correct or remove it; tensors are called {source.head}, {some} (norms are never quantized).",
            )


def _probe(source: Source, pattern: str, options: Options) -> llama_library.Log:
    """A dry run that shows which tensors an expression chooses: only it asks for another type than the recipe."""
    try:
        return dry_run(source.path, "Q8_0", options)
    except InputError as error:
        do = "correct it; it is a regular expression of C++ (ECMAScript)."
        raise InputError(f"llama.cpp refuses {pattern!r} in tensor_types. {error.found}", "REGEX=TYPE.", do) from None


def _check_widths(source: Source, options: Options) -> None:
    """Refuse types of embedding and output whose blocks the rows do not fill: llama.cpp aborts its process there."""
    chosen = [(name, options.token_embedding_type) for name in _EMBEDDINGS]
    chosen.append((_OUTPUT, options.output_tensor_type))
    for name, wanted in chosen:
        if not wanted or name not in source.tensors:
            continue
        kind, columns = tensor_type(wanted), source.tensors[name]["shape"][0]
        if columns % llama_library.block_size(kind):
            raise InputError(
                f"{name} has rows of {columns} weights, which do not fill blocks of {kind}.",
                f"a type whose blocks divide {columns} (those of {kind} hold {llama_library.block_size(kind)}).",
                "choose q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl, which have blocks of 32.",
            )


def _check_effect(
    source: Source, recipe: str, options: Options, tensors: Tensors, fallbacks: list[dict[str, Any]]
) -> None:
    """Refuse options that would be without effect: llama.cpp passes over them in silence."""
    if options.tensor_types and recipe in recipes.UNQUANTIZED:
        do = f"leave out {recipe}, or tensor_types."
        raise InputError(f"tensor_types with {recipe}.", "a quantized type: llama.cpp ignores them for others.", do)
    if not options.output_tensor_type:
        return
    head = source.head
    fell = any(row["tensor"] == head for row in fallbacks)
    if tensors[head]["type"] != tensor_type(options.output_tensor_type) and not fell:
        raise InputError(
            f"output_tensor_type {options.output_tensor_type} has no effect: {head} becomes {tensors[head]['type']}.",
            "an output matrix of its own, or a tied one that no other option sets.",
            "remove output_tensor_type, or set token_embedding_type alone.",
        )


def _check_matrix_of_embeddings(tensors: Tensors, before: Tensors, matrix: importance_matrix.Imatrix | None) -> None:
    """Refuse types that need importance values for a tensor without them: llama.cpp aborts its process there."""
    for name in (*_EMBEDDINGS, _OUTPUT):
        tensor = tensors.get(name)
        if (
            tensor is None
            or tensor["type"] == before[name]["type"]
            or not llama_library.requires_imatrix(tensor["type"])
        ):
            continue
        if matrix is None or name not in matrix.values:
            raise InputError(
                f"{name} as {tensor['type']} without importance values for it.",
                "an importance matrix that covers it (llama-imatrix --process-output for the output matrix).",
                "choose another type for it, e.g. q4_0 or q8_0.",
            )


def check_coverage(source: Source, names: Iterable[str], matrix: importance_matrix.Imatrix) -> None:
    """Refuse a matrix that lacks layers of this model (llama.cpp would quantize without it) or has other widths.

    Args:
        names: the tensors that are to be quantized; embedding and output matrix may do without values.

    Raises:
        InputError: with the first tensor that lacks values.
    """
    for name in names:
        if not name.startswith("blk.") and name not in matrix.values:
            continue
        shape = source.tensors[name]["shape"]
        wanted = shape[0] * (shape[2] if len(shape) > 2 else 1)
        have = matrix.values[name].size if name in matrix.values else 0
        if have != wanted:
            found = f"the importance matrix {matrix.file} has {have} values for {name}."
            raise InputError(
                found, f"{wanted}.", "make it with this very model (`workbook imatrix MODEL_DIR OUT.gguf --text FILE`)."
            )
