"""Calibration: what a model is measured on to quantize it well, and the importance matrix that is measured there.

The text is the run's own: training rows as token windows and whole rows with their answers, held-out rows provably left
out; test rows for judging what was made.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import InputError, refusal
from lib.models.base_model import check_model_folder
from lib.models.gguf_file import name_map
from lib.models.loading import load_model, load_tokenizer, quantization_method, weight_bytes
from lib.progress import Progress, say
from lib.prompts.tasks import read_task, texts_of
from lib.runs import files
from lib.runs.child import run_child
from lib.runs.files import read_jsonl, sha256_json, write_jsonl
from lib.runs.machine import available_memory
from lib.runs.run import Product, ProductDraft, Run
from lib.scoring.measure import Text, beyond_context, tokenize_with_transformers
from lib.settings import Settings
from lib.stages.quantize.files import Options, check_output

Row = Mapping[str, Any]


# Rows of a data product.


def text_hash(row: Row) -> str:
    """Hash of a row's texts, whatever its label, id and system turn."""
    return sha256_json(texts_of(row))


@dataclass(frozen=True)
class Windows:
    """Windows of rows or of a text.

    Attributes:
        windows: token ids, each of the same length.
        dataset: name for the header of files, see `dataset_name`.
        facts: counts for the record: rows, tokens, window_tokens, rows_sha256; of training rows also left_out (by
            reason), held_out_rows and shared_with_held_out (0).
        owners: for every token of the windows the number of its row in its split; of rows alone.
        used: {"id", "sha256"} of every row of which a token is in a window, in the order of the tokens; likewise.
    """

    windows: list[list[int]]
    dataset: str
    facts: dict[str, Any]
    owners: list[int] = field(default_factory=list)
    used: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class AnswerRows:
    """Whole rows with their answers.

    Attributes:
        rows: {"ids": token ids up to the last one that is read from, "positions": where the model predicts a learned
            token (the position before it), "targets": these tokens, "row": number of the row in its split}.
        used: {"id", "sha256"} of every row.
        facts: counts for the record: rows, positions, tokens, rows_sha256.
    """

    rows: list[dict[str, Any]]
    used: list[dict[str, str]]

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "rows": len(self.rows),
            "positions": sum(len(row["positions"]) for row in self.rows),
            "tokens": sum(len(row["ids"]) for row in self.rows),
            "rows_sha256": sha256_json([row["sha256"] for row in self.used]),
        }


def dataset_name(file: str, part: str, digest: str) -> str:
    """What a header says of a text, in the 127 bytes that llama.cpp keeps: its name (cut where it is long), how much
    of it was used, and its hash."""
    rest = f", {part}, sha256 {digest}"
    return file.encode()[: 127 - len(rest)].decode("utf-8", "ignore") + rest


def row_windows(data: Path, split: str, size: int, most: int, seed: int) -> Windows:
    """At most `most` windows of `size` tokens from rows of a data product, in the order that `seed` draws.

    Rows stand one behind the other as training sees them (prompt, answer, end of turn); what does not fill a window is
    dropped, as llama-imatrix does. A training row with the text of a validation or test row, or in the near-duplicate
    group of one, is left out; of test rows those without a leak come first.

    Args:
        split: "train" or "test".

    Raises:
        InputError: the rows do not fill one window.
    """
    rows, held_out, facts = _rows(data, split, seed)
    task, tokenizer = read_task(data), load_tokenizer(data / "tokenizer")
    ids: list[int] = []
    owners: list[int] = []
    for number, row in rows:
        if len(ids) >= size * most:
            break
        ids += (own := task.encode(tokenizer, row).ids)
        owners += [number] * len(own)
    count = min(most, len(ids) // size)
    if not count and split == "test":
        raise refusal("quantize/too-few-tokens", count=len(ids), size=size)
    if not count:
        raise refusal("quantize/too-little-text", count=len(rows), left_out=sum(facts["left_out"].values()), size=size)
    owners, by_number = owners[: count * size], dict(rows)
    used = _fingerprints([by_number[number] for number in dict.fromkeys(owners)], held_out)
    digest = sha256_json([row["sha256"] for row in used])
    facts = {"rows": len(used), **facts, "tokens": count * size, "window_tokens": size, "rows_sha256": digest}
    windows = [ids[i * size : (i + 1) * size] for i in range(count)]
    return Windows(windows, dataset_name(f"{split}.jsonl", f"{len(used)} rows", digest), facts, owners, used)


def row_answers(data: Path, split: str, most_rows: int, most_tokens: int, seed: int) -> AnswerRows:
    """Whole rows for what is measured at their answers, in the order and under the rules of `row_windows`; one row is
    taken whatever its length."""
    rows, held_out, _ = _rows(data, split, seed)
    task, tokenizer = read_task(data), load_tokenizer(data / "tokenizer")
    chosen: list[dict[str, Any]] = []
    used, tokens = [], 0
    for number, row in rows:
        encoded = task.encode(tokenizer, row)
        ids, read = encoded.ids, [position - 1 for position in encoded.loss if position]
        tokens += read[-1] + 1
        if len(chosen) == most_rows or (chosen and tokens > most_tokens):
            break
        targets = [ids[position + 1] for position in read]
        chosen.append({"ids": ids[: read[-1] + 1], "positions": read, "targets": targets, "row": number})
        used.append(row)
    return AnswerRows(chosen, _fingerprints(used, held_out))


def _rows(data: Path, split: str, seed: int) -> tuple[list[tuple[int, Row]], set[str], dict[str, Any]]:
    """Rows of a split with their numbers in it, shuffled; the hashes that none of them may have; facts of training
    rows: how many were left out because they equal or nearly equal a held-out row."""
    rows, draw = read_jsonl(data / f"{split}.jsonl"), np.random.default_rng(seed)
    if split == "test":
        order = draw.permutation(len(rows)).tolist()
        order.sort(key=lambda number: bool(rows[number].get("leaked", False)))
        return [(number, rows[number]) for number in order], set(), {}
    held_out = [row for name in ("validation", "test") for row in read_jsonl(data / f"{name}.jsonl")]
    texts, groups = {text_hash(row) for row in held_out}, {row["group"] for row in held_out if "group" in row}
    same = [text_hash(row) in texts for row in rows]
    near = [row.get("group") in groups and not equal for row, equal in zip(rows, same, strict=True)]
    kept = [(number, row) for number, row in enumerate(rows) if not same[number] and not near[number]]
    left_out = {"text of a held-out row": sum(same), "nearly the text of a held-out row": sum(near)}
    facts = {"left_out": left_out, "held_out_rows": len(held_out), "shared_with_held_out": 0}
    return [kept[place] for place in draw.permutation(len(kept)).tolist()], texts, facts


def _fingerprints(rows: Sequence[Row], held_out: set[str]) -> list[dict[str, str]]:
    """ "id" and "sha256" of rows, of which none may be held out."""
    if shared := held_out & {text_hash(row) for row in rows}:
        raise RuntimeError(f"{len(shared)} held-out rows came among those that quantizing is measured on")
    return [{"id": str(row["id"]), "sha256": text_hash(row)} for row in rows]


def text_windows(model: Path, text: Text, file: Path, size: int, most: int) -> Windows:
    """Windows of a text, in the ids of a model that can be computed with.

    Args:
        file: where the text was read from; "rows" of the facts are its documents, None where it has none.

    Raises:
        InputError: no model folder, one that is quantized, a text that does not fill a window.
    """
    require_whole_weights(model)
    tokens = tokenize_with_transformers(load_tokenizer(model, chat=False), text)
    windows, digest = tokens.windows(size, most), files.sha256_file(file)
    used = size * len(windows)
    rows = None if tokens.documents is None else len(set(tokens.documents[:used].tolist()))
    facts = {"rows": rows, "tokens": used, "window_tokens": size, "rows_sha256": digest}
    return Windows(windows, dataset_name(file.name, f"{len(windows)} windows of {size} tokens", digest), facts)


def require_whole_weights(model: Path) -> None:
    """Refuse what gradients cannot be computed with: no model folder, or one that is quantized."""
    check_model_folder(model)
    if method := quantization_method(model):
        raise refusal("quantize/no-whole-weights", model=model, method=method)


# The product `imatrix`: an importance matrix of the run's own training rows; or one of any text.

AUTO, NONE = "auto", "none"
FILE, ROWS = "imatrix.gguf", "rows.jsonl"


@dataclass(frozen=True)
class ImportanceMatrix:
    """The importance matrix of a run.

    Attributes:
        record: "dataset", "rows", "left_out" (training rows by reason), "held_out_rows", "shared_with_held_out" (0),
            "tokens", "windows", "window_tokens", "rows_sha256", "entries", "dtype", "device", "seconds".
    """

    product: Product
    record: dict[str, Any]

    @property
    def path(self) -> Path:
        """The file, which llama-quantize and llama-imatrix read."""
        return self.product.path / FILE


def importance_matrix(settings: Settings, run: Run, force: bool | None = None) -> ImportanceMatrix | None:
    """Make the importance matrix, or find it unchanged; None unless the setting `imatrix` is auto.

    Args:
        force: make it again even if nothing changed; None = as the settings say.

    Raises:
        InputError: products missing, too few training rows, an architecture that is not known.
    """
    if settings.imatrix != AUTO:
        return None
    parameters = settings.pick("n_ctx", "seed", "imatrix_chunks")
    force = settings.force if force is None else force
    made = run.produce_json("imatrix", lambda work: _build(settings, run, work), parameters, ("data", "merged"), force)
    return ImportanceMatrix(*made)


def matrix_file(settings: Settings) -> Path | None:
    """The file that the setting `imatrix` names; None where it names none.

    Raises:
        InputError: no such file.
    """
    matrix = None if settings.imatrix in ("", NONE, AUTO) else files.user_path(settings.imatrix)
    if matrix is not None and not matrix.is_file():
        raise InputError(f"no file {matrix}.", "an importance matrix.", "correct imatrix, or set it to auto or none.")
    return matrix


def run_options(settings: Settings, run: Run) -> Options:
    """The options of the run's ladder. Its own importance matrix is not made again if it is unchanged, whatever `force`
    says: the page has measured it before.

    Raises:
        InputError: as `importance_matrix`; no such file.
    """
    own = importance_matrix(settings, run, force=False)
    matrix = own.path if own else matrix_file(settings)
    return Options(matrix, settings.tensor_types, settings.output_tensor_type, settings.token_embedding_type)


def matrix_identity(matrix: Path | None) -> str | None:
    """An importance matrix by its name and its content; None where there is none."""
    return None if matrix is None else f"{matrix.name} {files.sha256_file(matrix)}"


def _build(settings: Settings, run: Run, work: ProductDraft) -> dict[str, Any]:
    data, merged = run.require("data"), run.require("merged")
    chosen = row_windows(data.path, "train", settings.n_ctx, settings.imatrix_chunks, settings.seed)
    made = collect(merged.path, chosen, work.folder / FILE)
    record = {"dataset": chosen.dataset, **chosen.facts, "windows": len(chosen.windows), **made}
    write_jsonl(work.folder / ROWS, chosen.used)
    work.device = made["device"]
    work.facts |= {"dataset": chosen.dataset, "shared_with_held_out": chosen.facts["shared_with_held_out"]}
    work.metrics |= {key: record[key] for key in ("rows", "tokens", "windows")}
    return record


def measure_imatrix(
    model: Path, output: Path, text: Text, file: Path, n_ctx: int = 512, chunks: int = 64
) -> dict[str, Any]:
    """Make an importance matrix of a model folder on a text, as 06 does of training rows.

    Args:
        model: folder of 16- or 32-bit weights that transformers loads.
        output: new GGUF file, which `workbook quantize --imatrix` and llama-quantize read; complete or absent.
        text: at most `chunks` windows of `n_ctx` tokens of it are used; `file`: where it was read from.

    Returns:
        "file", "dataset" (its name in the file), "text_sha256", "rows" (documents of which a token is used), "tokens",
        "windows", "window_tokens", "entries" (layers), "dtype", "device", "seconds".

    Raises:
        InputError: a place that cannot be written, no whole model, too short a text, an unknown architecture.
    """
    check_output(file, output)
    chosen = text_windows(model, text, file, n_ctx, chunks)
    made = collect(model, chosen, output)
    return {
        "file": str(output),
        "dataset": chosen.dataset,
        "text_sha256": chosen.facts["rows_sha256"],
        **{key: chosen.facts[key] for key in ("rows", "tokens")},
        "windows": len(chosen.windows),
        "window_tokens": n_ctx,
        **{key: made[key] for key in ("dtype", "entries", "device", "seconds")},
    }


def collect(model: Path, chosen: Windows, output: Path) -> dict[str, Any]:
    """Write the matrix; "entries", "seconds", "device", "dtype" and "peak_memory_mib".

    Weights are stored in 16 bits each: where there is room, they are computed with in float32, as llama.cpp does.
    """
    for words in beyond_context([model], len(chosen.windows[0])):
        say(f"{words}: inputs behind that are none that it was trained on")
    dtype = "float32" if 4 * weight_bytes(model) < available_memory() else "bfloat16"
    argument = {"model": model, "windows": chosen.windows, "output": output, "dataset": chosen.dataset, "dtype": dtype}
    function = "lib.stages.quantize.calibration:collect_in_child"
    return {**run_child(function, argument, "measuring the importance matrix"), "dtype": dtype}


# Mean squares of the inputs of every linear layer, by forward hooks; written as llama-imatrix writes them.

_TOKENS_AT_ONCE = 2048
"""Most tokens of a forward pass."""


def collect_in_child(argument: dict[str, Any]) -> dict[str, Any]:
    """Run windows of tokens through a model folder and write the importance matrix.

    Args:
        argument: "model" (folder), "windows" (token ids, all of one length), "output" (new GGUF file), "dataset" (its
            name for the header), "dtype" ("float32" or "bfloat16").

    Returns:
        "entries" (layers), "seconds" and "device".

    Raises:
        InputError: an architecture that llama.cpp's names are not known for, inputs that are not finite.
    """
    model, windows = load_model(Path(argument["model"]), dtype=argument["dtype"]), argument["windows"]
    started = time.monotonic()
    sums = sums_of_squares(model, windows)
    write_imatrix(Path(argument["output"]), sums, sum(map(len, windows)), argument["dataset"], len(windows[0]))
    return {"entries": len(sums), "seconds": round(time.monotonic() - started, 2), "device": str(model.device)}


def sums_of_squares(model: Any, windows: list[list[int]]) -> dict[str, np.ndarray]:
    """GGUF tensor name → Σ x² over all tokens for every input of that layer, float64, (inputs,).

    The layers are those that llama-imatrix sees: the matrices of the blocks, not embedding and output.

    Raises:
        InputError: see `collect_in_child`.
    """
    import torch

    layers = gguf_layers(model)
    sums = {name: torch.zeros(layer.in_features, dtype=torch.float64) for name, layer in layers.items()}

    def add(total: torch.Tensor, _: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        """Sums over one pass in float32, over all in float64."""
        rows = inputs[0].detach().float().flatten(0, -2)
        total.add_(rows.square().sum(dim=0).to("cpu", total.dtype))

    handles = [layer.register_forward_pre_hook(functools.partial(add, sums[name])) for name, layer in layers.items()]
    body, step = model.get_decoder(), max(1, _TOKENS_AT_ONCE // len(windows[0]))
    try:
        with torch.inference_mode(), Progress("importance matrix, windows", len(windows)) as progress:
            for start in range(0, len(windows), step):
                batch = torch.tensor(windows[start : start + step], device=model.device)
                body(input_ids=batch, use_cache=False)
                progress.advance(len(batch))
    finally:
        for handle in handles:
            handle.remove()
    if broken := [name for name, values in sums.items() if not torch.isfinite(values).all()]:
        raise refusal("quantize/no-activations", broken=broken, count=len(broken))
    return {name: values.numpy() for name, values in sums.items()}


def gguf_layers(model: Any) -> dict[str, Any]:
    """GGUF tensor name → linear layer, of all blocks.

    Raises:
        InputError: a linear layer in a block for which the package `gguf` knows no name.
    """
    import torch

    kind, body = model.config.model_type, model.get_decoder()
    prefix = next(f"{name}." for name, module in model.named_modules() if module is body)
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(prefix)
    }
    names = name_map(kind, model.config.num_hidden_layers)
    found = {name: names.get_name(f"{name}.weight", (".weight",)) if names else None for name in linear}
    heads = {getattr(model.config, f"linear_num_{kind}_heads", 0) for kind in ("key", "value")}
    if len(heads) > 1:  # then GGUF has the columns of these in another order (conversion/qwen.py, _reorder_v_heads)
        found |= {name: None for name in found if name.endswith(".linear_attn.out_proj")}
    if unknown := [name for name, new in found.items() if new is None]:
        raise refusal("quantize/unknown-layer", unknown=unknown, kind=kind)
    return {str(found[name]): layer for name, layer in linear.items()}


def write_imatrix(path: Path, sums: dict[str, np.ndarray], count: int, dataset: str, window: int) -> None:
    """Write an importance matrix in llama.cpp's GGUF form: sums of squares and counts a layer, names in order."""
    import gguf

    class Writer(gguf.GGUFWriter):
        def add_architecture(self) -> None:
            """An importance matrix has none."""

    with files.atomic_path(path, alone=True) as temporary:
        writer = Writer(temporary, "")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [dataset])
        writer.add_uint32("imatrix.chunk_count", count // window)
        writer.add_uint32("imatrix.chunk_size", window)
        for name in sorted(sums):
            writer.add_tensor(f"{name}.in_sum2", sums[name].astype(np.float32).reshape(1, -1))
            writer.add_tensor(f"{name}.counts", np.full((1, 1), count, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
