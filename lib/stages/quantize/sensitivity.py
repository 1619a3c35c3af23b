"""The product `sensitivity`: what every type would cost every tensor, on the training rows of the importance matrix and
at the answers of whole training rows.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import InputError
from lib.models.loading import weight_bytes
from lib.runs.child import run_child
from lib.runs.files import read_json, require_space, sha256_file, write_json, write_jsonl
from lib.runs.machine import available_memory, compute_dtype
from lib.runs.run import Product, Run, Work
from lib.stages.quantize.calibration import AnswerRows, choose_rows, choose_windows

if TYPE_CHECKING:
    from lib.settings import Settings


RECORD, ROWS, ANSWER_ROWS = "sensitivity.json", "rows.jsonl", "answer_rows.jsonl"
MOST_ANSWERS, MOST_TOKENS = 256, 8192
"""Most rows whose answers are measured, and most tokens of them: as many as those of the windows."""
METHOD = "Fisher information (diagonal, common factor), rounding errors, exact knapsack"
WINDOWS, WITH_ANSWERS = 16, 4
"""Most windows where text alone decides (four times as many changed predicted losses by 3 % on average, 11 % at most,
docs/LOG.md), and where answers count too (16 others judge the types chosen with 4 to be as good as with 8): the time of
the others goes to the answers, which are measured in both."""


@dataclass(frozen=True)
class Sensitivity:
    """Predicted losses of a run's tensors.

    Attributes:
        record: "tensors" (see `lib.stages.quantize.type_costs.measure`), "positions", "rows", "left_out",
            "held_out_rows",
            "shared_with_held_out" (0), "rows_sha256", "dtype", "device", "seconds"; "answers": "rows", "positions",
            "tokens" and "rows_sha256" of the rows whose answers were measured (None without answers).
    """

    product: Product
    record: dict[str, Any]


def measure_sensitivity(settings: Settings, run: Run, source: Path, matrix: Path | None, force: bool) -> Sensitivity:
    """Measure how much each weight matters and what every type would cost, or find it unchanged.

    Args:
        source: the GGUF made from the run's merged model.
        matrix: importance matrix with which types are tried.
        force: measure again even if nothing changed.

    Raises:
        InputError: products missing, too few training rows, an architecture that is not known, too little memory.
    """
    identity = None if matrix is None else f"{matrix.name} {sha256_file(matrix)}"
    product = run.produce(
        "sensitivity",
        lambda work: _build(settings, run, source, matrix, work),
        parameters={
            **settings.pick("n_ctx", "seed", "imatrix_chunks"),
            "imatrix": identity,
            "windows": most_windows(settings.answer_weight),
            "answers": f"{MOST_ANSWERS} rows, {MOST_TOKENS} tokens",
        },
        inputs=("data", "merged", "gguf"),
        force=force,
    )
    return Sensitivity(product, read_json(product.path / RECORD))


def _build(settings: Settings, run: Run, source: Path, matrix: Path | None, work: Work) -> None:
    data, merged = run.require("data"), run.require("merged")
    most = min(settings.imatrix_chunks, most_windows(settings.answer_weight))
    chosen = choose_windows(data.path, settings.n_ctx, most, settings.seed)
    answers = choose_rows(data.path, MOST_ANSWERS, MOST_TOKENS, settings.seed)
    texts = Texts(chosen.windows, answers)
    measured = measure_types(merged.path, source, texts, matrix, settings.seed, run.folder, settings.n_threads)
    write_json(work.folder / RECORD, {**chosen.facts, **measured})
    write_jsonl(work.folder / ROWS, chosen.used)
    write_jsonl(work.folder / ANSWER_ROWS, answers.used)
    work.device = measured["device"]
    work.facts |= {"dataset": chosen.dataset, "shared_with_held_out": chosen.facts["shared_with_held_out"]}
    work.metrics |= {"positions": measured["positions"], "tensors": len(measured["tensors"])}


@dataclass(frozen=True)
class Texts:
    """What gradients are of.

    Attributes:
        windows: token ids, all of one length.
        answers: rows whose answers are measured; None for a text that has none.
    """

    windows: list[list[int]]
    answers: AnswerRows | None = None


def most_windows(answer_weight: float) -> int:
    """Of text, by what the answers count: where they do not, more of the text is measured. The answers are measured
    either way, because page 06 predicts the loss there whatever decided."""
    return WITH_ANSWERS if answer_weight else WINDOWS


def measure_types(
    model: Path,
    source: Path,
    texts: Texts,
    matrix: Path | None,
    seed: int,
    scratch: Path,
    n_threads: int = 0,
) -> dict[str, Any]:
    """How much each weight matters on a text and at its answers, and what every type would cost every tensor.

    Args:
        model: folder of 16- or 32-bit weights that transformers loads; source: the GGUF made from it.
        texts: see `Texts`.
        matrix: importance matrix with which types are tried.
        seed: of the labels that are drawn.
        scratch: folder on a disk with room for the sensitivities, twice the size of the weights at 16 bits, with
            answers four times.
        n_threads: for trying types; 0 = physical cores. The result does not depend on it.

    Returns:
        "tensors" (see `lib.stages.quantize.type_costs.measure`), "positions", "answers" (see `Sensitivity`),
        "method", "dtype",
        "device", "seconds" (of the gradients).

    Raises:
        InputError: as `measure_sensitivity`.
    """
    size = weight_bytes(model)
    dtype = _dtype(size)
    require_space(scratch, (4 if texts.answers else 2) * size, "sensitivities of all weights")
    with tempfile.TemporaryDirectory(prefix=".sensitivity-", dir=scratch) as name:
        argument = {"model": str(model.resolve()), "windows": texts.windows, "folder": str(Path(name).resolve())}
        argument |= {"source": str(source.resolve()), "dtype": dtype, "seed": seed}
        argument |= {"rows": texts.answers.rows if texts.answers else []}
        made = run_child("lib.stages.quantize.fisher:collect", argument, "measuring sensitivities")
        argument = {key: argument[key] for key in ("source", "folder")}
        argument |= {key: made[key] for key in ("scales", "answer_scales")}
        argument |= {"n_threads": n_threads, "imatrix": None if matrix is None else str(matrix.resolve())}
        tried = run_child("lib.stages.quantize.type_costs:measure", argument, "trying types")
    facts = {key: made[key] for key in ("positions", "seconds", "device")}
    facts |= {"answers": texts.answers.facts if texts.answers else None}
    return {**facts, "dtype": dtype, "method": METHOD, "tensors": tried["tensors"]}


def _dtype(size: int) -> str:
    """Number format of the backward pass, for weights of `size` bytes at 16 bits: sums of squares and the gradients of
    a tensor or two stand beside them. bfloat16 where the machine computes it natively: faster, and the types
    chosen are as good (docs/LOG.md).

    Raises:
        InputError: too little memory for either.
    """
    free = available_memory()
    if 4.0 * size < free:
        return "float32" if compute_dtype()[0] == "float32" and 5.5 * size < free else "bfloat16"
    raise InputError(
        f"{free / 1e9:.1f} GB of free memory for a backward pass of a model of {size / 1e9:.1f} GB.",
        f"{4 * size / 1e9:.1f} GB.",
        "close other programs, or do without a size budget.",
    )
