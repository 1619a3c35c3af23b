"""Without a run, from a model folder and a text: a file under a size budget, and an importance matrix."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.models.base_model import check_model_folder
from lib.models.gguf_file import check_gguf
from lib.models.loading import load_tokenizer, quantization_method, weight_bytes
from lib.runs.child import run_child
from lib.runs.files import sha256_file
from lib.runs.machine import physical_cores
from lib.scoring.texts import Text, Tokens, tokenize_with_transformers
from lib.settings import mix_name
from lib.stages.quantize.bit_allocation import Mix, choose_types, require_possible
from lib.stages.quantize.calibration import choose_rows, choose_windows, dataset_name
from lib.stages.quantize.files import QuantizationReport, quantize_predicted
from lib.stages.quantize.importance_matrix import computing_dtype
from lib.stages.quantize.recipes import check_output
from lib.stages.quantize.sensitivity import MOST_ANSWERS, MOST_TOKENS, WINDOWS, Texts, measure_types, most_windows

SEED = 42
"""Of the labels that are drawn."""


@dataclass(frozen=True)
class Budget:
    """What a file under a size budget is chosen by.

    Attributes:
        bytes: the most that the file may have (see `lib.stages.quantize.bit_allocation.budget_bytes`).
        model: the folder that the GGUF was converted from; gradients are computed there.
        text: what the gradients are of, at most 16 windows of `n_ctx` tokens; `file`: where it was read from. A text
            has no answers, so it decides alone.
        data: in place of a text the folder of a run's product `data`, whose training rows have answers.
        answer_weight: what the loss at answers counts (see `lib.stages.quantize.bit_allocation.choose_types`).
    """

    bytes: int
    model: Path
    text: Text | None = None
    file: Path | None = None
    n_ctx: int = 512
    data: Path | None = None
    answer_weight: float = 0.0

    @property
    def name(self) -> str:
        """What stands in place of a type (MIX_300MB)."""
        return mix_name(self.bytes)


def quantize_to_budget(
    source: Path, output: Path, budget: Budget, matrix: Path | None = None, n_threads: int = 0
) -> QuantizationReport:
    """Quantize one GGUF file to at most a size; `output` is complete or absent.

    Raises:
        InputError: as `mix_of_text`; a place that cannot be written.
    """
    check_output(source, output)
    mixed = mix_of_text(source, budget, matrix, output.parent, n_threads)
    return quantize_predicted(source, output, mixed.prediction, mixed.options, n_threads or physical_cores())


def mix_of_text(source: Path, budget: Budget, matrix: Path | None, scratch: Path, n_threads: int = 0) -> Mix:
    """Choose types for a file of a size, as the stage does for a run.

    Args:
        source: GGUF with F32, F16 or BF16 weights.
        matrix: importance matrix.
        scratch: folder on a disk with room for the sensitivities.
        n_threads: for trying types; 0 = physical cores.

    Raises:
        InputError: an impossible budget (before the work), a folder that is quantized or holds another model, a text
            that does not fill a window, too little memory or room.
    """
    check_gguf(source)
    texts, dataset, digest = _texts(budget)
    weight = budget.answer_weight if texts.answers else 0.0
    require_possible(budget.bytes, source, matrix, dataset, weight)
    found = {**measure_types(budget.model, source, texts, matrix, SEED, scratch, n_threads), "rows_sha256": digest}
    return choose_types(found, budget.bytes, source, matrix, dataset, weight)


def _texts(budget: Budget) -> tuple[Texts, str, str]:
    """What gradients are of, its name for the header, and its hash.

    Raises:
        InputError: no model folder, a folder that is no product `data`, too little text.
    """
    if budget.data is not None:
        _check_whole(budget.model)
        if not (budget.data / "train.jsonl").is_file() or not (budget.data / "task.json").is_file():
            do = "name runs/RUN/data, or give a text by --text."
            raise InputError(f"no train.jsonl and task.json in {budget.data}.", "the data folder of a run.", do)
        chosen = choose_windows(budget.data, budget.n_ctx, most_windows(budget.answer_weight), SEED)
        answers = choose_rows(budget.data, MOST_ANSWERS, MOST_TOKENS, SEED)
        return Texts(chosen.windows, answers), chosen.dataset, chosen.facts["rows_sha256"]
    assert budget.text is not None and budget.file is not None
    windows, digest = _tokens(budget.model, budget.text).windows(budget.n_ctx, WINDOWS), sha256_file(budget.file)
    return (
        Texts(windows),
        dataset_name(budget.file.name, f"{len(windows)} windows of {budget.n_ctx} tokens", digest),
        digest,
    )


def measure_imatrix(
    model: Path, output: Path, text: Text, file: Path, n_ctx: int = 512, chunks: int = 64
) -> dict[str, Any]:
    """Make an importance matrix of a model folder on a text, as 06 does of training rows.

    Args:
        model: folder of 16- or 32-bit weights that transformers loads.
        output: new GGUF file, which `workbook quantize --imatrix` and llama-quantize read; complete or absent.
        text: at most `chunks` windows of `n_ctx` tokens of it are used; `file`: where it was read from.

    Returns:
        "file", "dataset" (its name in the file: the text's, how much of it, its SHA-256), "text_sha256", "rows"
        (documents of which a token is used), "tokens", "windows", "window_tokens", "entries" (layers), "dtype",
        "device", "seconds".

    Raises:
        InputError: a place that cannot be written, a folder that is no model or is quantized, a text that does not fill
            a window, an architecture that is not known.
    """
    check_output(file, output)
    tokens = _tokens(model, text)
    windows, digest = tokens.windows(n_ctx, chunks), sha256_file(file)
    used = n_ctx * len(windows)
    dataset = dataset_name(file.name, f"{len(windows)} windows of {n_ctx} tokens", digest)
    dtype = computing_dtype(weight_bytes(model))
    argument = {"model": str(model.resolve()), "windows": windows, "output": str(output.absolute()), "dataset": dataset}
    made = run_child(
        "lib.stages.quantize.fisher:collect_imatrix", argument | {"dtype": dtype}, "measuring the importance matrix"
    )
    return {
        "file": str(output),
        "dataset": dataset,
        "text_sha256": digest,
        "rows": None if tokens.documents is None else len(set(tokens.documents[:used].tolist())),
        "tokens": used,
        "windows": len(windows),
        "window_tokens": n_ctx,
        "dtype": dtype,
        **{key: made[key] for key in ("entries", "device", "seconds")},
    }


def _tokens(model: Path, text: Text) -> Tokens:
    """A text in the ids of a model that can be computed with.

    Raises:
        InputError: no model folder, or one that is quantized.
    """
    _check_whole(model)
    return tokenize_with_transformers(load_tokenizer(model), text)


def _check_whole(model: Path) -> None:
    """Refuse what gradients cannot be computed with.

    Raises:
        InputError: no model folder, or one that is quantized.
    """
    check_model_folder(model)
    if method := quantization_method(model):
        expected = "the folder of 16- or 32-bit weights (that the GGUF was converted from)."
        raise InputError(f"{model} is quantized ({method}).", expected, "name that folder.")
