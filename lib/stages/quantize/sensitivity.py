"""How much each weight matters, on training text and at its answers; and the product `sensitivity`: what every type
would cost every tensor.

To second order a change d of the weights moves the predicted distribution by a KL divergence of ½ Σ F d². F, the
diagonal of the Fisher information, is the mean square of the gradient of log p(y), with y drawn from the model's own
prediction. Draws of different positions are independent, so one backward pass of a window sums the information of all
its positions.

Answers are a few positions a row, most of them nearly certain: a drawn label would nearly always be the likely one,
and rare others would carry all of the information. So u'∇logits is squared there in place of ∇log p(y), with a random
vector u over the vocabulary whose mean square is the same, E[u u'] = diag(p) - p p' (the covariance of the drawn
labels): u = √p s - p (√p·s) with random signs s, whose squares scatter by about their mean at most, however sure the
model is. Whole rows are run, few at once: signs of different rows are independent, so that the squares add up in the
mean, and the more passes, the less chance is in their sum.

The diagonal takes rounding errors for independent. Some types (IQ3_S and its kin) shrink all weights of a tensor by
about two percent, which no diagonal sees; so the information of a common factor is measured too: F of s in (1 + s) W,
the mean square of Σ W·gradient.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib.errors import refusal
from lib.models.gguf_file import row_order
from lib.models.loading import load_model, weight_bytes
from lib.progress import Progress, track
from lib.runs.child import run_child
from lib.runs.files import require_space, write_jsonl
from lib.runs.machine import available_memory, compute_dtype
from lib.runs.run import ProductDraft, Run
from lib.settings import Settings
from lib.stages.quantize import calibration
from lib.stages.quantize.calibration import AnswerRows, Windows, gguf_layers, matrix_identity

if TYPE_CHECKING:
    import torch


ROWS, ANSWER_ROWS = "rows.jsonl", "answer_rows.jsonl"
TEXT, AT_ANSWERS = "kld", "answer_kld"
"""The two losses that are predicted of a type, as products name them: KL divergence in nats a token of text, and in
nats a position that predicts a token of an answer."""
METHOD = "Fisher information (diagonal, common factor), rounding errors, exact knapsack"
MOST_ANSWERS, MOST_TOKENS = 256, 8192
"""Most rows whose answers are measured, and most tokens of them: as many as those of the windows."""
WINDOWS, WITH_ANSWERS = 16, 4
"""Most windows where text alone decides (four times as many changed predicted losses by 3 % on average, 11 % at most,
docs/LOG.md), and where answers count too (16 others judge the types chosen with 4 to be as good as with 8): the time of
the others goes to the answers, which are measured in both."""


# The product.


def run_texts(data: Path, n_ctx: int, most: int, seed: int) -> tuple[Windows, AnswerRows]:
    """What gradients are of in a run: training rows of a product `data`, at most so many windows, and whole rows with
    their answers."""
    answers = calibration.row_answers(data, "train", MOST_ANSWERS, MOST_TOKENS, seed)
    return calibration.row_windows(data, "train", n_ctx, most, seed), answers


def most_windows(answer_weight: float) -> int:
    """Of text, by what the answers count: where they do not, more of the text is measured. The answers are measured
    either way, because page 06 predicts the loss there whatever decided."""
    return WITH_ANSWERS if answer_weight else WINDOWS


def measure_sensitivity(
    settings: Settings, run: Run, source: Path, matrix: Path | None, force: bool, check: Callable[[], None]
) -> dict[str, Any]:
    """Measure how much each weight matters and what every type would cost, or find it unchanged; the record of it.

    It has "tensors" (see `lib.stages.quantize.type_costs.measure`), "positions", "rows", "left_out",
    "held_out_rows", "shared_with_held_out" (0), "rows_sha256", "method", "dtype", "device", "seconds"; "answers":
    "rows", "positions", "tokens" and "rows_sha256" of the rows whose answers were measured.

    Args:
        source: the GGUF made from the run's merged model.
        matrix: importance matrix with which types are tried.
        force: measure again even if nothing changed.
        check: called before anything is measured.

    Raises:
        InputError: products missing, too few training rows, an architecture that is not known, too little memory.
    """

    def content(work: ProductDraft) -> dict[str, Any]:
        check()
        data, merged = run.require("data").path, run.require("merged").path
        most = min(settings.imatrix_chunks, most_windows(settings.answer_weight))
        chosen, answers = run_texts(data, settings.n_ctx, most, settings.seed)
        measured = measure_types(merged, source, chosen, answers, matrix, settings.seed, run.folder, settings.n_threads)
        write_jsonl(work.folder / ROWS, chosen.used)
        write_jsonl(work.folder / ANSWER_ROWS, answers.used)
        work.device = measured["device"]
        work.facts |= {"dataset": chosen.dataset, "shared_with_held_out": chosen.facts["shared_with_held_out"]}
        work.metrics |= {"positions": measured["positions"], "tensors": len(measured["tensors"])}
        return {**chosen.facts, **measured}

    parameters = {
        **settings.pick("n_ctx", "seed", "imatrix_chunks"),
        "imatrix": matrix_identity(matrix),
        "windows": most_windows(settings.answer_weight),
        "answers": f"{MOST_ANSWERS} rows, {MOST_TOKENS} tokens",
    }
    return run.produce_json("sensitivity", content, parameters, ("data", "merged", "gguf"), force)[1]


def measure_types(
    model: Path,
    source: Path,
    chosen: Windows,
    answers: AnswerRows | None,
    matrix: Path | None,
    seed: int,
    scratch: Path,
    n_threads: int = 0,
) -> dict[str, Any]:
    """How much each weight matters on a text and at its answers, and what every type would cost every tensor.

    Args:
        model: folder of 16- or 32-bit weights that transformers loads; source: the GGUF made from it.
        chosen, answers: what gradients are of; None for a text that has no answers.
        matrix: importance matrix with which types are tried.
        seed: of the labels that are drawn.
        scratch: folder on a disk with room for the sensitivities, twice the size of the weights at 16 bits, with
            answers four times.
        n_threads: for trying types; 0 = physical cores. The result does not depend on it.

    Returns:
        "tensors" (see `lib.stages.quantize.type_costs.measure`), "positions", "answers" (None without), "rows_sha256",
        "method", "dtype", "device", "seconds" (of the gradients).

    Raises:
        InputError: as `measure_sensitivity`.
    """
    size = weight_bytes(model)
    dtype = _dtype(size)
    require_space(scratch, (4 if answers else 2) * size, "sensitivities of all weights")
    with tempfile.TemporaryDirectory(prefix=".sensitivity-", dir=scratch) as folder:
        both = {"source": source, "folder": Path(folder)}
        argument = {"model": model, "windows": chosen.windows, "dtype": dtype, "seed": seed, **both}
        argument["rows"] = answers.rows if answers else []
        made = run_child("lib.stages.quantize.sensitivity:collect", argument, "measuring sensitivities")
        argument = {"scales": made["scales"], "imatrix": matrix, "n_threads": n_threads, **both}
        tried = run_child("lib.stages.quantize.type_costs:measure", argument, "trying types")
    return {
        **{key: made[key] for key in ("positions", "seconds", "device")},
        "answers": answers.facts if answers else None,
        "rows_sha256": chosen.facts["rows_sha256"],
        "dtype": dtype,
        "method": METHOD,
        "tensors": tried["tensors"],
    }


def _dtype(size: int) -> str:
    """Number format of the backward pass, for weights of `size` bytes at 16 bits: sums of squares and the gradients of
    a tensor or two stand beside them. bfloat16 where the machine computes it natively: faster, and the types
    chosen are as good (docs/LOG.md).

    Raises:
        InputError: too little memory for either.
    """
    free = available_memory()
    if 4.0 * size < free:
        return "float32" if compute_dtype()[0] != "bfloat16" and 5.5 * size < free else "bfloat16"
    raise refusal("quantize/no-memory", free=free / 1e9, size=size / 1e9, need=4 * size / 1e9)


# In the child process: the gradients.

_CHECKED = 1 << 21
"""Most weights of a tensor that are compared with the GGUF; of a larger one, rows at even distances."""
_SAME = 1e-2
"""Largest relative difference of a row's sum."""
_TOGETHER, _TOKENS = 4, 512
"""Most rows of a pass over answers, and most tokens of one of several rows."""

Information = tuple[dict[str, np.ndarray], dict[str, float]]
"""GGUF tensor name → F, float32, (rows, columns), a mean over positions, of all matrices of the blocks, of embedding
and output (one where they are tied); and name → the information of a common factor of its weights."""


def collect(argument: dict[str, Any]) -> dict[str, Any]:
    """Write F of every matrix as `folder`/kld/<GGUF name>.npy, and that at answers as `folder`/answer_kld/…; rows stand
    as in GGUF.

    Args:
        argument: "model" (folder), "source" (the GGUF made from it), "windows" (token ids, all of one length),
            "rows" (of `lib.stages.quantize.calibration.AnswerRows`; [] = no answers), "folder", "dtype" and "seed" of
            the draws.

    Returns:
        "positions", "scales" ({loss: {tensor: information of its common factor}}), "seconds" and "device".

    Raises:
        InputError: an architecture that llama.cpp's names are not known for, a GGUF of another model.
    """
    model = load_model(Path(argument["model"]), dtype=argument["dtype"])
    check_same(model, Path(argument["source"]))
    started, seed, scales, config = time.monotonic(), argument["seed"], {}, model.config.to_dict()
    for loss, measured, rows in (
        (TEXT, information, argument["windows"]),
        (AT_ANSWERS, answer_information, argument["rows"]),
    ):
        if rows:
            folder = Path(argument["folder"], loss)
            folder.mkdir()
            found, scales[loss] = measured(model, rows, seed)
            for name, values in found.items():
                np.save(folder / f"{name}.npy", values[row_order(name, config, len(values))])
    return {
        "positions": sum(map(len, argument["windows"])),
        "scales": scales,
        "seconds": round(time.monotonic() - started, 2),
        "device": str(model.device),
    }


def check_same(model: Any, source: Path) -> None:
    """Refuse, before the gradients, a GGUF with other rows than the model, or with rows in another order.

    Raises:
        InputError: with the first such tensor.
    """
    from lib.stages.quantize.llama_library import read_header

    header, config = read_header(source), model.config.to_dict()
    for name, weight in matrices(model).items():
        tensor = header.tensors.get(name)
        if tensor is None:  # an output matrix that only one of the two ties: its rows are those of the embedding
            continue
        sums = weight.detach().double().sum(dim=1).cpu().numpy()[row_order(name, config, len(weight))]
        step = -(-tensor.weights // _CHECKED)
        found = header.rows(name, step=step).sum(axis=1, dtype=np.float64)
        scale = float(np.abs(sums).max())
        if tensor.rows != len(sums) or not np.allclose(found, sums[::step], rtol=_SAME, atol=_SAME * scale):
            raise refusal("quantize/other-model", name=name, source=source)


def information(model: Any, windows: list[list[int]], seed: int) -> Information:
    """Of all positions of the windows, by drawn labels.

    Raises:
        InputError: see `collect`.
    """
    import torch

    draw = torch.Generator().manual_seed(seed)
    with _squared_gradients(model) as mean:
        for window in track(windows, "sensitivity, windows"):
            logits = model(input_ids=torch.tensor([window], device=model.device), use_cache=False).logits[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=draw)[:, 0]
            torch.nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum").backward()
    return mean(sum(map(len, windows)))


def answer_information(model: Any, rows: list[dict[str, Any]], seed: int) -> Information:
    """Of the positions that predict an answer's tokens alone, by random signs.

    Args:
        rows: of `lib.stages.quantize.calibration.AnswerRows`.

    Raises:
        InputError: see `collect`.
    """
    import torch

    from lib.models.head import output_head

    draw = torch.Generator().manual_seed(seed)
    body, head = model.get_decoder(), output_head(model)
    with _squared_gradients(model) as mean, Progress("sensitivity at answers, rows", len(rows)) as progress:
        for group in groups(rows):
            ids = torch.zeros((len(group), max(len(row["ids"]) for row in group)), dtype=torch.long)
            for place, row in enumerate(group):  # padding stands behind: a causal model does not see it
                ids[place, : len(row["ids"])] = torch.tensor(row["ids"])
            hidden = body(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
            read = [hidden[place, row["positions"]] for place, row in enumerate(group)]
            logits = head(torch.cat(read)).float()
            logits.backward(_random_labels(logits.detach(), draw))
            progress.advance(len(group))
    return mean(sum(len(row["positions"]) for row in rows))


def groups(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of like length together, few enough that many passes add up and padding stays small."""
    found: list[list[dict[str, Any]]] = []
    for row in sorted(rows, key=lambda row: len(row["ids"])):
        if found and len(found[-1]) < _TOGETHER and (len(found[-1]) + 1) * len(row["ids"]) <= _TOKENS:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def _random_labels(logits: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Random vectors u with mean 0 and E[u u'] = diag(p) - p p', one a position: (positions, V)."""
    import torch

    p = logits.softmax(-1)
    signs = torch.randint(0, 2, p.shape, generator=draw, dtype=torch.int8).to(p.device) * 2 - 1
    signed = p.sqrt().mul_(signs)
    return signed.sub_(p.mul_(signed.sum(-1, keepdim=True)))  # in place: a long answer's vocabularies are large


@contextlib.contextmanager
def _squared_gradients(model: Any) -> Iterator[Callable[[int], Information]]:
    """Squares of the gradients of every matrix and of its common factor are added up, one square a backward pass, and
    the gradients dropped; yields what divides the sums by a number of positions, once."""
    import torch

    weights = matrices(model)
    sums = {name: torch.zeros(weight.shape, dtype=torch.float32) for name, weight in weights.items()}
    scales, handles = dict.fromkeys(weights, 0.0), []

    def add(name: str, weight: torch.nn.Parameter) -> None:
        if weight.grad is not None:
            gradient = weight.grad.float()
            moved = gradient.to(sums[name].device)
            sums[name].addcmul_(moved, moved)
            scales[name] += float(gradient.flatten().dot(weight.detach().float().flatten())) ** 2
        weight.grad = None

    model.requires_grad_(False)
    for name, weight in weights.items():
        weight.requires_grad_(True)
        handles.append(weight.register_post_accumulate_grad_hook(functools.partial(add, name)))

    def mean(positions: int) -> Information:
        found = {name: total.div_(positions).numpy() for name, total in sums.items()}
        return found, {name: total / positions for name, total in scales.items()}

    try:
        with torch.enable_grad():
            yield mean
    finally:
        for handle in handles:
            handle.remove()


def matrices(model: Any) -> dict[str, torch.nn.Parameter]:
    """GGUF tensor name → weight."""
    found = {name: layer.weight for name, layer in gguf_layers(model).items()}
    found["token_embd.weight"] = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    if head is not found["token_embd.weight"]:
        found["output.weight"] = head
    return found
